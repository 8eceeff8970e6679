# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Reading side of the protocol that :mod:`torchrl_dvla.weight_update.store` describes."""

from __future__ import annotations

import copy
import os
import time
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torch import nn

from torchrl_dvla.weight_update.lora import LoraUpdate
from torchrl_dvla.weight_update.segment import (
    MAX_SLOTS,
    WRITER_BYTE,
    LockHandle,
    ReaderState,
    SlotLedger,
    SlotViews,
    WeightSegment,
    reader_byte,
    slot_byte,
    wait_for_devices,
)
from torchrl_dvla.weight_update.slot_writer import SlotWriter
from torchrl_dvla.weight_update.weight_layout import WeightLayout, iter_weights, named_weights

__all__ = ["ModuleBinding", "WeightReader"]

#: A parameter on the meta device: its dictionary and key there, its entry, what merges into it.
_Missing = tuple[dict[str, torch.Tensor | None], str, int, LoraUpdate | None]

_NOTHING = -2  # below every *latest*, so that the next comparison finds a newer version
_POLL_S = 5e-4


class ModuleBinding:
    """Map of a module's parameters and buffers to the entries of the store that they read.

    A tensor of the store's dtype on the CPU is pointed at the slot: the :class:`torch.nn.Parameter`
    object stays the same, its memory is the slot's. Parameters on the meta device are replaced by
    frozen ones that are pointed. A tensor on another device or of another precision is copied into,
    which :meth:`apply` waits for.

    A module without the low-rank adapters of the published one gets the adapted weights *merged*,
    in private memory of those layers alone; see :mod:`~torchrl_dvla.weight_update.lora`.

    Args:
        module (nn.Module): the module to bind. Nothing of it is changed before :meth:`apply`.
        layout (WeightLayout): the store's layout.

    Keyword Args:
        copy (bool): copy into every tensor. Default: ``False``.

    Raises:
        ValueError: listing the differences, if the module does not fit the layout, or naming the
            adapters that cannot be merged.

    Examples:
        >>> source, reader = nn.Linear(2, 1), nn.Linear(2, 1)
        >>> binding = ModuleBinding(reader, WeightLayout(source))
        >>> binding.apply([torch.ones(1, 2), torch.zeros(1)])
        >>> reader(torch.tensor([3.0, 4.0])).item()
        7.0
    """

    def __init__(self, module: nn.Module, layout: WeightLayout, *, copy: bool = False) -> None:
        if layout.differences(module, as_reader=True):
            raise layout.mismatch("module", module, as_reader=True)
        merges = layout.is_without_adapters(named_weights(module))
        index_of = layout.plain_index_of if merges else layout.index_of
        updates = layout.lora_updates if merges else {}
        _refuse_obstacles(updates)
        pointed: dict[int, tuple[torch.Tensor, int]] = {}
        copied: dict[int, tuple[torch.Tensor, int]] = {}
        merged: dict[int, tuple[torch.Tensor, LoraUpdate]] = {}
        self._entries = layout.entries
        self._missing: list[_Missing] = []
        found: dict[int, tuple[int, LoraUpdate | None]] = {}
        for name, tensor, owner, key in iter_weights(module):
            index, update = index_of[name], updates.get(name)
            if tensor.device.type == "meta":
                self._missing.append((owner, key, index, update))
                continue
            first, same = found.setdefault(id(tensor), (index, update))
            if (first, same) != (index, update):
                raise ValueError(
                    f"module must not tie {name!r} to {layout.entries[first].name!r}, got one "
                    "tensor for two weights of the store, or for one with and one without an "
                    "adapter. Build both from one configuration."
                )
            same_kind = tensor.device.type == "cpu" and tensor.dtype == layout.entries[index].dtype
            if update is not None:
                merged[id(tensor)] = tensor, update
            elif same_kind and not copy:
                pointed[id(tensor)] = tensor, index
            else:
                copied[id(tensor)] = tensor, index
        self._pointed = list(pointed.values())
        self._copied = list(copied.values())
        self._merged = list(merged.values())
        #: The module's tensors that are the same in every version.
        self.frozen = [
            tensor
            for tensor, index in (*self._pointed, *self._copied)
            if layout.entries[index].is_frozen
        ]
        self._is_applied = False
        #: *Latest* as it was when the module was last made to read it.
        self.applied = _NOTHING

    @property
    def reads_slot(self) -> bool:
        """Whether the module reads the slot itself, so that the slot must stay pinned."""
        return any(not self._entries[index].is_frozen for _, index in self._pointed)

    @property
    def is_on_device(self) -> bool:
        """Whether the module is on a device that slots are copied up to."""
        return any(tensor.is_cuda for tensor, _ in self._copied)

    def apply(self, views: Sequence[torch.Tensor]) -> None:
        """Make the module read ``views``, which are in the order of the layout's entries."""
        if not self._is_applied:
            self._materialise(views)
        for tensor, index in self._pointed:
            tensor.data = views[index]
        with torch.no_grad():
            for tensor, index in self._copied:
                tensor.data.copy_(views[index], non_blocking=tensor.is_cuda)
        for tensor, update in self._merged:
            update.merge(views, tensor.data)
        # After what the caller has started there: forward passes still read the old weights.
        wait_for_devices(tensor for tensor, _ in self._copied)
        # What is frozen is the same in every version.
        self._copied = [pair for pair in self._copied if not self._entries[pair[1]].is_frozen]

    def _materialise(self, views: Sequence[torch.Tensor]) -> None:
        """Make the parameters that are missing, and private memory for the merged ones."""
        made: dict[tuple[int, bool, LoraUpdate | None], torch.Tensor] = {}
        for owner, key, index, update in self._missing:
            kind = index, isinstance(owner[key], nn.Parameter), update
            if kind not in made:
                view = views[index]
                made[kind] = nn.Parameter(view, requires_grad=False) if kind[1] else view.detach()
                if update is None:
                    self._pointed.append((made[kind], index))
                    self.frozen += [made[kind]] * self._entries[index].is_frozen
                else:
                    self._merged.append((made[kind], update))
            owner[key] = made[kind]
        for tensor, _ in self._merged:
            # What the module came with may be the learner's memory, or shared among workers.
            tensor.data = torch.empty_like(tensor.data)
        self._is_applied = True


def _refuse_obstacles(updates: Mapping[str, LoraUpdate]) -> None:
    lines = [f"{name}: {update.obstacle}" for name, update in updates.items() if update.obstacle]
    if lines:
        listed = "\n  ".join(lines[:20])
        raise ValueError(
            f"module must have the adapters of the published one where they cannot be merged, got "
            f"a module without adapters, and {len(lines)} weights whose adapter cannot:\n  "
            f"{listed}\nBuild the reader's module with the adapters."
        )


def memory_of(module: nn.Module) -> set[int]:
    """Addresses of the module's parameters and buffers."""
    return {tensor.data_ptr() for tensor in named_weights(module).values() if tensor.numel()}


class WeightReader:
    """Reader of a :class:`WeightStore`: it pins whole versions and never waits.

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

    def __init__(
        self, segment: WeightSegment, *, reader_slot: int, name: str, writer: SlotWriter
    ) -> None:
        self.name = name
        self.reader_slot = reader_slot
        self._segment = segment
        self._writer_ref: weakref.ref[SlotWriter] | None = weakref.ref(writer)
        self._writer_pid = os.getpid()
        self._reset()

    def _reset(self) -> None:
        self._ledger: SlotLedger | None = None
        self._locks: LockHandle | None = None
        self._views: dict[int, SlotViews] = {}
        self._bindings: weakref.WeakKeyDictionary[nn.Module, ModuleBinding] = (
            weakref.WeakKeyDictionary()
        )
        self._seen = _NOTHING  # *latest* at the last adoption
        self._slot: int | None = None
        self._version = -1
        self._is_closed = False
        _READERS.add(self)

    @property
    def version(self) -> int:
        """The version adopted last; -1 before the first."""
        return self._version

    def has_update(self) -> bool:
        """Whether a version newer than the adopted one is there: one read of shared memory."""
        ledger = self._ledger or self._attach()
        return ledger.latest_version > self._version

    def adopt_into(self, module: nn.Module, *, copy: bool = False) -> int:
        """Let ``module`` read the latest version from now on.

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
        if ledger.latest <= self._seen and module in self._bindings:
            return self._version
        if module not in self._bindings:
            self._bind(module, copy)
        self._advance(ledger)
        if not any(binding.reads_slot for binding in self._bindings.values()):
            self._unlock()  # everything was copied: the slot is free for the writer again
        return self._version

    def copy_of(self, module: nn.Module) -> nn.Module:
        """Copy of a module that was adopted into, which stays at its version.

        Frozen weights are not copied: they are the same in every version.
        """
        shared = {id(tensor): tensor for tensor in self._bindings[module].frozen}
        return copy.deepcopy(module, shared)

    def pin(self) -> tuple[int, TensorDict]:
        """Pin the latest version; it stays whole until :meth:`unpin` or the next adoption.

        Returns:
            the version, and its weights as a nested tensordict of views on the slot.
        """
        slot = self._pin(self._ledger or self._attach())
        return self._version, self._segment.layout.unflatten(self._views[slot].entries)

    def pin_bytes(self) -> tuple[int, list[np.ndarray], list[np.ndarray]]:
        """As :meth:`pin`, for a transfer to another node.

        Returns:
            the version, its bytes and those of the frozen weights, uint8, as views, in parts.
        """
        slot = self._pin(self._ledger or self._attach())
        live, frozen = self._segment.raw(slot)
        parts = [
            live[bucket.offset_bytes :][: bucket.numel * bucket.dtype.itemsize]
            for bucket in self._segment.layout.buckets
        ]
        return self._version, parts, [frozen]

    def unpin(self) -> None:
        """Let the slot go, before a long idle time.

        Modules must not be called until the next :meth:`adopt_into`: the memory they point to may
        be written.
        """
        self._unlock()
        self._seen = _NOTHING

    def wait(self, version: int, timeout_s: float) -> int:
        """Wait until ``version`` or a newer one can be adopted; returns the latest.

        Raises:
            TimeoutError: after ``timeout_s``, saying whether the writer is still there.
        """
        ledger = self._ledger or self._attach()
        deadline = time.monotonic() + timeout_s
        while ledger.latest_version < version:
            if time.monotonic() > deadline:
                state = "is alive" if self._is_writer_alive() else "is gone"
                raise TimeoutError(
                    f"Reader {self.name!r} waited {timeout_s} s for version {version}, got "
                    f"{ledger.latest_version}; the process that publishes {state}. Check the "
                    "learner, or wait longer."
                )
            time.sleep(_POLL_S)
        return ledger.latest_version

    def close(self) -> None:
        """Give the pin and the reader slot back.

        Modules still point at the weights' slot, which the writer may now overwrite: make a
        ``copy.deepcopy`` of those that are used further, which owns its memory, before.
        """
        if self._is_closed:
            return
        if self._locks is not None:
            if self._ledger is not None and self._locks.is_open:
                self._ledger.set_state(self.reader_slot, ReaderState.CLOSED)
            self._locks.close()
        for module in list(self._bindings):
            del _READER_OF[module]
        self._reset()
        self._is_closed = True

    def _writer(self) -> SlotWriter | None:
        """The writer, if it is in this process."""
        if self._writer_ref is None or os.getpid() != self._writer_pid:
            return None
        return self._writer_ref()

    def _is_writer_alive(self) -> bool:
        assert self._locks is not None
        return self._locks.is_held_by_others(WRITER_BYTE)

    def _attach(self) -> SlotLedger:
        if self._is_closed:
            raise RuntimeError(
                f"Reader {self.name!r} is closed. Take another one from WeightStore.reader()."
            )
        ledger = self._segment.ledger()
        locks = self._segment.locks.open()
        if ledger.state(self.reader_slot) not in (ReaderState.REGISTERED, ReaderState.ATTACHED):
            raise RuntimeError(
                f"Reader {self.name!r} was released. Take another one from WeightStore.reader()."
            )
        if not locks.try_exclusive(reader_byte(self.reader_slot)):
            raise RuntimeError(
                f"Reader {self.name!r} is in use by another process or thread. Take one from "
                "WeightStore.reader() for each."
            )
        ledger.set_state(self.reader_slot, ReaderState.ATTACHED)
        self._ledger, self._locks = ledger, locks
        return ledger

    def _pin(self, ledger: SlotLedger) -> int:
        if ledger.latest > self._seen or self._slot is None:
            self._advance(ledger)
        assert self._slot is not None
        return self._slot

    def _advance(self, ledger: SlotLedger) -> None:
        """Pin the latest version and move every bound module to it."""
        start_ns = time.monotonic_ns()
        slot, version = self._pin_latest(ledger)
        if slot not in self._views:
            self._views[slot] = self._segment.views(slot)
        latest, is_new = version * MAX_SLOTS + slot, version != self._version
        for binding in list(self._bindings.values()):
            if binding.applied != latest:
                binding.apply(self._views[slot].entries)
                binding.applied = latest
        # Last: what fails until here is tried again by the next call, and not taken for done.
        self._version, self._seen = version, latest
        if is_new:
            ledger.record_adoption(
                self.reader_slot,
                version=version,
                published_ns=ledger.published_ns(slot),
                start_ns=start_ns,
                end_ns=time.monotonic_ns(),
            )

    def _pin_latest(self, ledger: SlotLedger) -> tuple[int, int]:
        assert self._locks is not None
        # The old pin goes first, so that a reader never holds two: R readers pin at most R slots.
        self._unlock()
        while True:
            slot = ledger.latest_slot
            if self._locks.try_shared(slot_byte(slot)):
                # Under the lock nobody writes the slot, so what its record says stays true. What
                # was latest was only a hint: the slot may hold a newer version by now, or none.
                version = ledger.version_in(slot)
                if version >= 0:
                    self._slot = slot
                    return slot, version
                self._locks.unlock(slot_byte(slot))
            # Refused or torn: the latest slot is never claimed, so another one is latest by now.

    def _unlock(self) -> None:
        if self._slot is not None and self._locks is not None:
            self._locks.unlock(slot_byte(self._slot))
        self._slot = None

    def _bind(self, module: nn.Module, copy: bool) -> None:
        writer = self._writer()
        if writer is not None and writer.publishes_from(memory_of(module)):
            raise ValueError(
                "module must not be the one that is published, got the learner's own. "
                "Build a second one: its parameters will point into the store."
            )
        other = _READER_OF.get(module)
        if other is not None and other is not self:
            raise ValueError(
                f"module must have one reader, got one that reader {other.name!r} serves. "
                "Close that one first."
            )
        self._bindings[module] = ModuleBinding(module, self._segment.layout, copy=copy)
        if self._bindings[module].is_on_device:
            self._segment.pin()
        _READER_OF[module] = self

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name, "reader_slot": self.reader_slot, "segment": self._segment}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.name, self._segment = state["name"], state["segment"]
        self.reader_slot = state["reader_slot"]
        self._writer_ref, self._writer_pid = None, -1
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
