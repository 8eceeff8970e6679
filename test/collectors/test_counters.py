# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

from torchrl_dvla.collectors.counters import CollectionCounters


def test_episodes_may_end_while_the_learner_reads():
    counters = CollectionCounters(window=2)

    class Read(int):
        """A number that is added up while another episode ends."""

        def __radd__(self, other):
            counters.add_episode(success=True, num_env_steps=8)
            return other + int(self)

    counters.add_episode(success=False, num_env_steps=Read(4))
    counters.add_episode(success=True, num_env_steps=Read(8))
    stats = counters.stats()
    assert (stats["collector/success_rate"], stats["collector/episode_env_steps"]) == (0.5, 6.0)
    assert counters.stats()["collector/success_rate"] == 1.0
    assert counters.totals["collector/episodes"] == 4
