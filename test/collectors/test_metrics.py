# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

from torch import nn

from torchrl_dvla.collectors.metrics import CollectionCounters, WeightTelemetry
from torchrl_dvla.swimlane import Timeline
from torchrl_dvla.weight_update import AsyncWeightUpdater


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


def test_adoptions_are_on_the_timeline_once_and_publishes_in_the_scalars() -> None:
    updater = AsyncWeightUpdater()
    updater.init_on_sender(model=nn.Linear(2, 1), num_workers=0)
    timeline = Timeline()
    telemetry = WeightTelemetry(updater, timeline)
    reader, served = updater.reader("a"), nn.Linear(2, 1)
    reader.adopt_into(served)
    updater.publish()
    reader.adopt_into(served)
    telemetry.record()
    telemetry.record()  # nothing is told twice
    spans = [span for span in timeline.spans() if span.track == "reader a"]
    assert [span.name for span in spans] == ["adopt 0", "adopt 1"]
    assert {span.lane for span in spans} == {"distribution"}
    assert spans[0].end_s <= spans[1].start_s
    assert spans[1].blocked_on == "no_version"
    reader.close(), updater.shutdown()
    scalars = telemetry.scalars(data_bytes=8.0)  # after the end, too
    assert (scalars["weights/version"], scalars["planes/data_bytes"]) == (1, 8.0)
