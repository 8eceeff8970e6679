# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The reading side of a weight store."""

from __future__ import annotations

import dataclasses
import os
import time
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from tensordict import TensorDict
from torch import nn

from torchrl_dvla.weight_update.binding import ModuleBinding, memory_of
from torchrl_dvla.weight_update.layout import WeightLayout
from torchrl_dvla.weight_update.ledger import MAX_SLOTS, Ledger, ReaderState
from torchrl_dvla.weight_update.locks import LockHandle
from torchrl_dvla.weight_update.segment import (
    WRITER_BYTE,
    SlotViews,
    WeightSegment,
    reader_byte,
    slot_byte,
)

if TYPE_CHECKING:
    from torchrl_dvla.weight_update.store import WeightStore

__all__ = ["PinnedSlot", "WeightReader"]

_NOTHING = -2  # below every offer, so that the next look takes the newest version
_POLL_S = 5e-4


@dataclasses.dataclass(frozen=True)
class PinnedSlot:
    """The bytes of a pinned version, for those that carry it on.

    Args:
        version (int): which version it is.
        live (torch.Tensor): what every version brings, uint8 ``[slot_bytes]``.
        frozen (torch.Tensor): what travels once, uint8 ``[frozen_bytes]``.
        published_ns (int): monotonic clock of this machine when it was offered.
    """

    version: int
    live: torch.Tensor
    frozen: torch.Tensor
    published_ns: int


class WeightReader:
    """One reader's place in a :class:`WeightStore`: it pins whole versions and never waits.

    Made by :meth:`WeightStore.reader`. Hand it to one process (it travels while that is being
    spawned) or to one thread; it attaches there at its first use. All calls come from the thread
    that runs the policy, between two of its batches.

    A module adopted into reads the slot itself until the next adoption, so on the CPU a node holds
    ``num_slots`` copies of the weights however many readers it has. Outputs of the policy that are
    views of its parameters (a state-independent standard deviation, say) must be cloned if they are
    kept longer than that.

    Examples:
        >>> import torch
        >>> from torchrl_dvla.weight_update import WeightStore
        >>> trained, served = nn.Linear(2, 1), nn.Linear(2, 1)
        >>> store = WeightStore(trained)
        >>> reader = store.reader("worker 0")
        >>> reader.adopt_into(served)
        0
        >>> with torch.no_grad():
        ...     _ = trained.weight.fill_(3.0)
        >>> store.publish()
        1
        >>> reader.has_update()
        True
        >>> reader.adopt_into(served), served.weight.tolist()
        (1, [[3.0, 3.0]])
        >>> reader.close(); store.close()
    """

    def __init__(self, segment: WeightSegment, *, row: int, name: str, store: WeightStore) -> None:
        self.name = name
        self.row = row
        self._segment = segment
        self._store_ref: weakref.ref[WeightStore] | None = weakref.ref(store)
        self._store_pid = os.getpid()
        self._reset()

    def _reset(self) -> None:
        self._ledger: Ledger | None = None
        self._locks: LockHandle | None = None
        self._views: dict[int, SlotViews] = {}
        self._bindings: weakref.WeakKeyDictionary[nn.Module, ModuleBinding] = (
            weakref.WeakKeyDictionary()
        )
        self._seen = _NOTHING
        self._slot: int | None = None
        self._version = -1
        self._is_closed = False
        self._listener: Callable[[], None] | None = None
        _READERS.add(self)
        # Tests step through the protocol here; the names are those of the trace in store.py.
        self._gate: Callable[[str], None] = _open_gate

    @property
    def version(self) -> int:
        """The version adopted last; -1 before the first."""
        return self._version

    def has_update(self) -> bool:
        """Whether a version newer than the adopted one is there: one read of shared memory."""
        ledger = self._ledger or self._attach()
        return ledger.offer // MAX_SLOTS > self._version

    def listen(self, listener: Callable[[], None]) -> bool:
        """Have ``listener()`` called after each offer, until this reader is closed.

        The thread that makes the offer calls it: it must neither block nor raise.

        Returns:
            False if nobody will call it, since the store is in another process. There, only
            :meth:`has_update` tells of a new version.
        """
        store = self._store_ref() if self._store_ref is not None else None
        if store is None or os.getpid() != self._store_pid:
            return False
        self._listener = listener
        store.offer_listeners.append(listener)
        return True

    def adopt_into(self, module: nn.Module, *, copy: bool = False) -> int:
        """Let ``module`` read the newest version from now on.

        Nothing happens, at the price of one read of shared memory, if it does already.

        Args:
            module (nn.Module): a module with the parameters and buffers of the published one. All
                modules that this reader was given move together.

        Keyword Args:
            copy (bool): copy into the module's own memory instead of pointing it at the slot; it is
                decided when the module is first given. Default: ``False``.

        Returns:
            the version that the module reads now.

        Raises:
            ValueError: if the module's layout differs, with the differences, or if it is the
                published module itself.
            RuntimeError: if the reader is closed, was released, or is in use somewhere else.
        """
        ledger = self._ledger or self._attach()
        if ledger.offer <= self._seen and module in self._bindings:
            return self._version
        if module not in self._bindings:
            self._bind(module, copy)
        self._advance(ledger)
        if not any(binding.holds_memory for binding in self._bindings.values()):
            self._unlock()  # everything was copied: the slot is free for the writer again
        return self._version

    def pin(self) -> tuple[int, TensorDict]:
        """Pin the newest version; it stays whole until :meth:`unpin` or the next adoption.

        Returns:
            the version, and its weights as a nested tensordict of views on the slot.
        """
        slot = self._pin(self._ledger or self._attach())
        return self._version, self._segment.layout.unflatten(self._views[slot].entries)

    def pin_slot(self) -> PinnedSlot:
        """As :meth:`pin`, for a version that is carried on as bytes."""
        ledger = self._ledger or self._attach()
        slot = self._pin(ledger)
        return PinnedSlot(
            self._version,
            self._views[slot].memory,
            self._segment.frozen_memory(),
            ledger.published_ns(slot),
        )

    @property
    def layout(self) -> WeightLayout:
        """What the store holds."""
        return self._segment.layout

    def unpin(self) -> None:
        """Give the slot back before a long idle time.

        Modules must not be called until the next :meth:`adopt_into`: the memory they point to may
        be written.
        """
        self._unlock()
        self._seen = _NOTHING

    def wait(self, version: int, timeout_s: float) -> int:
        """Wait until ``version`` or a newer one can be adopted; returns the newest.

        Raises:
            TimeoutError: after ``timeout_s``, saying whether the writer is still there.
        """
        ledger = self._ledger or self._attach()
        deadline = time.monotonic() + timeout_s
        while ledger.offer // MAX_SLOTS < version:
            if time.monotonic() > deadline:
                state = "is alive" if self.is_writer_alive() else "is gone"
                raise TimeoutError(
                    f"Reader {self.name!r} waited {timeout_s} s for version {version}, got "
                    f"{ledger.offer // MAX_SLOTS}; the process that publishes {state}. Check the "
                    "learner, or wait longer."
                )
            time.sleep(_POLL_S)
        return ledger.offer // MAX_SLOTS

    def is_writer_alive(self) -> bool:
        """Whether the process of the store still lives."""
        if self._locks is None:
            self._attach()
        assert self._locks is not None
        return self._locks.is_held_by_others(WRITER_BYTE)

    def detach(self, module: nn.Module) -> None:
        """Give ``module`` memory of its own, with the version it reads now, and forget it."""
        binding = self._bindings.pop(module, None)
        if binding is not None:
            binding.detach()
            del _READER_OF[module]

    def close(self) -> None:
        """Give the pin and the place back.

        Modules still point at the slot, which the writer may now overwrite: :meth:`detach` those
        that are used further.
        """
        if self._is_closed:
            return
        store = self._store_ref() if self._store_ref is not None else None
        if store is not None and self._listener is not None:
            store.offer_listeners.remove(self._listener)
        if self._locks is not None:
            if self._ledger is not None and self._locks.is_open:
                self._ledger.set_state(self.row, ReaderState.CLOSED)
            self._locks.close()
        for module in list(self._bindings):
            del _READER_OF[module]
        self._reset()
        self._is_closed = True

    def _attach(self) -> Ledger:
        if self._is_closed:
            raise RuntimeError(
                f"Reader {self.name!r} is closed. Take another one from WeightStore.reader()."
            )
        ledger = self._segment.ledger()
        locks = self._segment.locks.open()
        if ledger.state(self.row) not in (ReaderState.ISSUED, ReaderState.ATTACHED):
            raise RuntimeError(
                f"Reader {self.name!r} was released. Take another one from WeightStore.reader()."
            )
        if not locks.try_exclusive(reader_byte(self.row)):
            raise RuntimeError(
                f"Reader {self.name!r} is in use by another process or thread. Take one from "
                "WeightStore.reader() for each."
            )
        ledger.set_state(self.row, ReaderState.ATTACHED)
        self._ledger, self._locks = ledger, locks
        return ledger

    def _pin(self, ledger: Ledger) -> int:
        if ledger.offer > self._seen or self._slot is None:
            self._advance(ledger)
        assert self._slot is not None
        return self._slot

    def _advance(self, ledger: Ledger) -> None:
        """Pin the newest version and move every bound module to it."""
        start_ns = time.monotonic_ns()
        slot, version = self._pin_newest(ledger)
        if slot not in self._views:
            self._views[slot] = self._segment.views(slot)
        offer, is_new = version * MAX_SLOTS + slot, version != self._version
        if is_new:
            self._verify(ledger, slot, version)
        for binding in list(self._bindings.values()):
            if binding.applied_offer != offer:
                binding.apply(self._views[slot].entries)
                binding.applied_offer = offer
        # Last: what fails until here is tried again by the next call, and not taken for done.
        self._version, self._seen = version, offer
        if is_new:
            ledger.record_adoption(
                self.row,
                version=version,
                published_ns=ledger.published_ns(slot),
                start_ns=start_ns,
                end_ns=time.monotonic_ns(),
            )

    def _pin_newest(self, ledger: Ledger) -> tuple[int, int]:
        assert self._locks is not None
        if ledger.offer < 0:
            raise RuntimeError(
                f"Reader {self.name!r} has nothing to adopt: no version has arrived yet. Call "
                "wait(0, timeout_s=...) before the first adoption."
            )
        # The old pin goes first, so that a reader never holds two: R readers pin at most R slots.
        self._unlock()
        while True:
            slot = ledger.offer % MAX_SLOTS
            self._gate("offer read")
            if self._locks.try_shared(slot_byte(slot)):
                self._gate("slot locked")
                # Under the lock nobody writes the slot, so what its record says stays true. The
                # offer was only a hint: the slot may hold a newer version by now, or none.
                version = ledger.version_in(slot)
                if version >= 0:
                    self._slot = slot
                    self._gate("pinned")
                    return slot, version
                self._locks.unlock(slot_byte(slot))
            # Refused or torn: the newest slot is never claimed, so a newer offer is out by now.

    def _verify(self, ledger: Ledger, slot: int, version: int) -> None:
        expected = ledger.checksums_in(slot)
        if not expected:
            return
        found = self._segment.checksums(slot)
        buckets = [b.dtype for b, x, y in zip(self.layout.buckets, expected, found) if x != y]
        if buckets:
            raise RuntimeError(
                f"Version {version} has other checksums than when it was published, in its weights "
                f"of {', '.join(map(str, buckets))}. Something writes weights through a module "
                "that adopted them: readers' modules must not be trained."
            )

    def _unlock(self) -> None:
        if self._slot is not None and self._locks is not None:
            self._locks.unlock(slot_byte(self._slot))
        self._slot = None

    def _bind(self, module: nn.Module, copy: bool) -> None:
        store = self._store_ref() if self._store_ref is not None else None
        if store is not None and store.publishes_from(memory_of(module)):
            raise ValueError(
                "module must not be the one that is published, got the learner's own. "
                "Build a second one: its parameters will point into the store."
            )
        other = _READER_OF.get(module)
        if other is not None and other is not self:
            raise ValueError(
                f"module must have one reader, got one that reader {other.name!r} serves. "
                "Detach it there first."
            )
        self._bindings[module] = ModuleBinding(module, self._segment.layout, copy=copy)
        if self._bindings[module].is_uploaded:
            self._segment.pin()
        _READER_OF[module] = self

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name, "row": self.row, "segment": self._segment}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.name, self.row, self._segment = state["name"], state["row"], state["segment"]
        self._store_ref = None
        self._reset()

    def __repr__(self) -> str:
        return f"{type(self).__name__}(name={self.name!r}, version={self._version})"


# A module that reads a slot keeps its reader, and so the pin, alive.
_READER_OF: weakref.WeakKeyDictionary[nn.Module, WeightReader] = weakref.WeakKeyDictionary()
_READERS: weakref.WeakSet[WeightReader] = weakref.WeakSet()


def _forget_attachment_after_fork() -> None:
    # The pin stayed with the parent: the child's next adoption must find that out.
    for reader in list(_READERS):
        reader._ledger = reader._locks = None


os.register_at_fork(after_in_child=_forget_attachment_after_fork)


def _open_gate(step: str) -> None:
    """In production nobody watches the steps."""
