# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Copies between a device and the host on a stream of their own: all that is said to CUDA here.

Written against PyTorch's documentation and tested with fakes; not run on a GPU by this project.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import torch

__all__ = ["SideStream", "side_stream"]


class SideStream:
    """A stream of a device beside the one that the caller computes on.

    Work that is given to it starts CUDA copies and kernels, and does not wait for them.

    Args:
        device (torch.device): a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)

    def on_current(self, work: Callable[[], object]) -> torch.cuda.Event:
        """Start ``work`` on the caller's stream; the event happens when it is done there."""
        work()
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    def on_side(self, work: Callable[[], object], *, after: torch.cuda.Event) -> torch.cuda.Event:
        """Start ``work`` on the side stream, once ``after`` has happened."""
        self._stream.wait_event(after)
        with torch.cuda.stream(self._stream):
            work()
        event = torch.cuda.Event()
        event.record(self._stream)
        return event

    def wait(self, event: torch.cuda.Event) -> None:
        """Wait on the host until ``event`` has happened."""
        event.synchronize()


def side_stream(tensors: Iterable[torch.Tensor]) -> SideStream | None:
    """The side stream of the first CUDA device among ``tensors``; None if all are elsewhere."""
    device = next((tensor.device for tensor in tensors if tensor.is_cuda), None)
    return None if device is None else _side_stream_of(device)


@functools.cache
def _side_stream_of(device: torch.device) -> SideStream:
    return SideStream(device)
