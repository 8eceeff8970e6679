# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""A device whose two streams hold their work back for as long as CUDA might."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable

import torch

from torchrl_dvla.weight_update.device_copy import SideStream


class LazyEvent:
    """Happens when the stream that it was recorded on gets there."""

    has_happened = False

    def happen(self) -> None:
        self.has_happened = True


class LazyDevice(SideStream):
    """Stands for a :class:`SideStream`; memory is the CPU's, and the order is what CUDA promises.

    Nothing that is given to a stream happens until somebody waits for it, or :meth:`run_current`
    lets the learner's stream run ahead. A stream waits for another one only where it was told to.
    While the device is held, the host's waits do not return.

    Examples:
        >>> device, weight = LazyDevice(), torch.zeros(1)
        >>> snapshot, host = torch.zeros(1), torch.zeros(1)
        >>> taken = device.on_current(lambda: snapshot.copy_(weight))
        >>> device.compute(lambda: weight.fill_(2.0))
        >>> copied = device.on_side(lambda: host.copy_(snapshot), after=taken)
        >>> _ = weight.fill_(1.0)  # the host is faster: the device has not begun
        >>> device.run_current()
        >>> device.wait(copied)
        >>> host.item(), weight.item()
        (1.0, 2.0)
    """

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.trace: list[str] = []
        self.asked = threading.Semaphore(0)
        self._is_held = False
        self._go = threading.Semaphore(0)
        self._current: deque[Callable[[], object]] = deque()
        self._side: deque[Callable[[], object] | LazyEvent] = deque()
        self._mutex = threading.RLock()

    def of(self, tensors: Iterable[torch.Tensor]) -> LazyDevice:
        """In the place of ``side_stream``: everything is on this device."""
        return self

    def compute(self, work: Callable[[], object]) -> None:
        """What the learner, or a policy, gives to the stream that it computes on."""
        with self._mutex:
            self._current.append(work)

    def run_current(self) -> None:
        """Let the learner's stream do all that it was given."""
        with self._mutex:
            while self._current:
                self._current.popleft()()

    def hold(self) -> None:
        """From now on the host's waits do not return before :meth:`step` or :meth:`release`."""
        self._is_held = True

    def step(self) -> None:
        """Let one wait of the host return, once there is one."""
        self.await_host()
        self._go.release()

    def await_host(self) -> None:
        """Until the host waits for this device."""
        assert self.asked.acquire(timeout=30.0)

    def release(self) -> None:
        """Hold nothing any more."""
        self._is_held = False
        self._go.release(1000)

    def on_current(self, work: Callable[[], object]) -> LazyEvent:  # type: ignore[override]
        event = LazyEvent()
        with self._mutex:
            self._current += [work, event.happen]
        return event

    def on_side(  # type: ignore[override]
        self, work: Callable[[], object], *, after: LazyEvent
    ) -> LazyEvent:
        event = LazyEvent()
        with self._mutex:
            self._side += [after, self._traced(work), event.happen]
        return event

    def wait(self, event: LazyEvent) -> None:  # type: ignore[override]
        with self._mutex:
            while not event.has_happened:
                item = self._side.popleft()
                if isinstance(item, LazyEvent):
                    while not item.has_happened:
                        self._current.popleft()()
                else:
                    item()
        if self._is_held:
            self.asked.release()
            assert self._go.acquire(timeout=30.0)
        self.trace.append("waited")

    def _traced(self, work: Callable[[], object]) -> Callable[[], object]:
        def run() -> None:
            self.trace.append(work.__name__)
            work()

        return run
