# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The learner's calls: one at a time, from the host or from a device, versions in order."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import torch

from torchrl_dvla.weight_update import device_copy
from torchrl_dvla.weight_update.device_writer import DeviceWriter
from torchrl_dvla.weight_update.segment import WeightSegment
from torchrl_dvla.weight_update.writer import SlotWriter

__all__ = ["Publisher"]


class Publisher:
    """Hands each version to the writer for where its weights are.

    Args:
        segment (WeightSegment): the store's memory.
        writer (SlotWriter): writes weights of the host, and what a device has brought there.
    """

    def __init__(self, segment: WeightSegment, writer: SlotWriter) -> None:
        self._segment = segment
        self._writer = writer
        self._turn = threading.Lock()
        #: Made by the first version that comes from a device.
        self.device_writer: DeviceWriter | None = None
        self._last_writer: DeviceWriter | SlotWriter = writer

    def publish(self, find: Callable[[], Sequence[torch.Tensor]], *, version: int | None) -> int:
        """Take a version; see :meth:`WeightStore.publish`, which says what it raises.

        Args:
            find (callable): gives the weights, in the order of the layout's entries.

        Keyword Args:
            version (int, optional): the number to give; default is the next one.

        Returns:
            the version.
        """
        if not self._turn.acquire(blocking=False):
            raise RuntimeError(
                "publish must be called by one learner at a time, got a second call while one is "
                "copying. Let one thread publish."
            )
        try:
            start_s = time.perf_counter()
            tensors = find()
            return self._writer_for(tensors).publish(tensors, version=version, start_s=start_s)
        finally:
            self._turn.release()

    def receive(self, fill: Callable[[torch.Tensor], None], *, version: int) -> None:
        """Take a version that comes as bytes; see :meth:`WeightStore.receive`."""
        with self._turn:
            self._writer.receive(fill, version)

    def close(self) -> None:
        """End the writers, and let the memory go."""
        self._writer.close()
        del self._segment

    def _writer_for(self, tensors: Sequence[torch.Tensor]) -> DeviceWriter | SlotWriter:
        side = device_copy.side_stream(tensors)
        writer: DeviceWriter | SlotWriter = self._writer
        if side is not None:
            if self.device_writer is None:
                self._segment.pin()
                self.device_writer = DeviceWriter(self._writer, side)
            writer = self.device_writer
        if writer is not self._last_writer:
            self._writer.releaser.finish()  # versions arrive in order
            self._last_writer = writer
        return writer
