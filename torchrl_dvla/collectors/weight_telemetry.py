# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The weight-control plane in a run's metrics and on its timeline."""

from __future__ import annotations

from torchrl_dvla.swimlane import Timeline
from torchrl_dvla.weight_update import AsyncWeightUpdater

__all__ = ["WeightTelemetry"]


class WeightTelemetry:
    """Turns what updater, readers and nodes noted into scalars and spans.

    Args:
        updater (AsyncWeightUpdater): the learner's end.
        timeline (Timeline): takes the readers' adoptions and, if the updater has a broadcast, the
            nodes' transfers: a track of the distribution lane each.
    """

    def __init__(self, updater: AsyncWeightUpdater, timeline: Timeline) -> None:
        self._updater = updater
        self._timeline = timeline

    def record(self) -> None:
        """Put what readers adopted, and nodes received, since the last call on the timeline."""
        for name, adoptions in self._updater.store.take_adoptions().items():
            track = self._timeline.track("distribution", f"reader {name}")
            for adoption in adoptions:
                track.add(adoption.start_s, adoption.end_s, f"adopt {adoption.version}")
                track.waiting("no_version", adoption.end_s)

        if self._updater.broadcast is not None:
            for transfer in self._updater.broadcast.take_transfers():
                track = self._timeline.track("distribution", f"node {transfer.node}")
                name = f"{transfer.what} {transfer.version}"
                track.add(transfer.start_s, transfer.end_s, name)
                track.waiting("no_version", transfer.end_s)

    def scalars(self, data_bytes: float) -> dict[str, float]:
        """``weights/...``, ``broadcast/...`` if there is one, and the bytes of both planes.

        Args:
            data_bytes (float): bytes of the training-data plane until now.
        """
        weights = self._updater.stats()
        planes = {
            "planes/weight_bytes": weights.pop("published_bytes"),
            "planes/data_bytes": data_bytes,
        }
        broadcast = self._updater.broadcast
        nodes = {} if broadcast is None else broadcast.stats()
        return planes | nodes | {f"weights/{key}": value for key, value in weights.items()}
