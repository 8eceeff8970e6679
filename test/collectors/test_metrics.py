# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

import pytest
from torch import nn

from torchrl_dvla.collectors.metrics import CollectionCounters, WeightTelemetry
from torchrl_dvla.swimlane import Timeline
from torchrl_dvla.weight_update import AsyncWeightUpdater, WeightRelay


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


def test_nodes_are_on_the_timeline_and_in_the_scalars() -> None:
    updater = AsyncWeightUpdater(num_slots=4)
    updater.init_on_sender(model=nn.Linear(2, 1), num_workers=0)
    timeline = Timeline()
    telemetry = WeightTelemetry(updater, timeline)
    assert not any(key.startswith("broadcast/") for key in telemetry.scalars(data_bytes=0.0))
    broadcast = updater.open_broadcast(shapes=["chain"])
    with pytest.raises(RuntimeError, match=r"has a broadcast at 127.0.0.1:\d+ already"):
        updater.open_broadcast()
    relay = WeightRelay(broadcast.address, nn.Linear(2, 1), name="a")
    broadcast.wait(0, 30.0, num_nodes=1)
    updater.publish()
    updater.wait(1, 30.0)
    assert relay.wait(1) == 1
    broadcast.wait(1, 30.0)
    telemetry.record()
    telemetry.record()  # nothing is told twice
    spans = [span for span in timeline.spans() if span.track == "node a"]
    assert [span.name for span in spans] == ["receive 0", "receive 1"]
    assert {span.lane for span in spans} == {"distribution"}
    assert spans[0].end_s <= spans[1].start_s
    assert spans[1].blocked_on == "no_version"
    relay.close()
    updater.shutdown()  # ends the broadcast, too
    scalars = telemetry.scalars(data_bytes=8.0)
    assert scalars["broadcast/version"] == scalars["weights/version"] == 1
    assert scalars["broadcast/nodes_joined"] == 1
    assert scalars["planes/data_bytes"] == 8.0
