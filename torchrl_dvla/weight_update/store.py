# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Versioned weights in shared memory: published without waiting, read without copying.

**The protocol.** The store has ``num_slots`` slots in one arena. A slot's lock byte (see
:mod:`~torchrl_dvla.weight_update.segment`) is held *shared* by every reader that reads the slot,
and *exclusively* by the writer from before its first byte is written until after its last. The
slot's record says which version it holds, -1 for none. *Latest* names the newest visible version
and its slot.

=====================================  ==========================================================
publish (the learner)                  adopt (a reader, between two batches)
=====================================  ==========================================================
1. claim: lock a slot exclusively      a. unlock the old slot
   that is not the latest; skip the    b. read *latest*                         ("latest read")
   refused ones       ("claimed")      c. lock its slot shared; if refused go to b
2. record := -1       ("marked")                                                ("slot locked")
3. copy, and check                     d. read the record; if -1 unlock, go to b  ("pinned")
   what is copied     ("copying")      e. point the module at the slot
4. record := version  ("written")
5. unlock             ("unlocked")
6. latest := version  ("visible")
=====================================  ==========================================================

**Nobody reads a mix of two versions** (invariant 3). A reader reads a slot only between its c and
its next a, holding the shared lock; the writer writes it only between 1 and 5, holding the
exclusive lock; the kernel never grants both. Each grant follows the other side's release through
the kernel's lock of the file, which orders memory: the reader sees all of the copy, and the writer
overwrites nothing that a reader has yet to load. *Latest* is a hint and may be as stale as it
likes.

**Only finite weights become visible.** Each piece of the copy is checked right after it was
written, while it is in a cache. ``publish`` returns when the version is visible, or raises; then
the claimed slot is unlocked with its record at -1, and *latest* is what it was.

**A writer that dies** in 1-5 loses the exclusive lock to the kernel and leaves the record at -1 in
a slot that is not the latest: the last whole version stays visible and readable. A reader that dies
loses its pin the same way. So nothing is ever held by the dead, and nobody has to notice the death
first.

**Nobody waits** (invariant 4). A reader is refused at c only if the writer claimed the slot that
the reader had read as the latest, so another one has become the latest since b: each retry means
that another publish has finished. The writer waits for no reader. When it finds a slot, ``publish``
costs one copy. Live readers hold at most one slot each, so ``num_slots = num_readers + 2`` always
has one left beside the latest; with readers that adopt at every batch, three are nearly always
enough, for then two different old versions must be in use at the very moment of the publish. If
they are, the version is *deferred*: copied to memory of the writer (one more copy of the weights,
allocated at that time), and moved into the first slot that its readers leave, by a thread that is
preempted by the next ``publish`` within one piece of its copy. A newer version replaces a deferred
one: versions coalesce, they never queue.

A worked trace, with three slots and readers P and Q; the star is the latest::

    slot 0   slot 1   slot 2
    v0* PQ   -        -         both have adopted version 0
    v0  PQ   v1*      -         publish 1
    v0  P    v1* Q    -         Q adopts 1
    v0  P    v1  Q    v2*       publish 2
    v0  P    v1  Q    v2*       publish 3: slots 0 and 1 are pinned, 2 is the latest: deferred
    v3*      v1  Q    v2  P     P adopts 2 and so leaves slot 0: version 3 moves in
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn

from torchrl_dvla.validation import Count, Natural, Range, check
from torchrl_dvla.weight_update.reader import WeightReader
from torchrl_dvla.weight_update.segment import (
    MAX_SLOTS,
    Adoption,
    AdoptionStats,
    LockHandle,
    ReaderState,
    SlotLedger,
    WeightSegment,
    reader_byte,
)
from torchrl_dvla.weight_update.slot_writer import PublishStats, SlotWriter
from torchrl_dvla.weight_update.weight_layout import WeightLayout, WeightSource, named_weights

if TYPE_CHECKING:
    from torchrl_dvla.memory import ModelPool

__all__ = ["ReaderRegistry", "WeightStore", "check_options"]

_POLL_S = 5e-4
_SLOTS_REMEDY = (
    "One slot is read while another is written and a third is latest; num_readers + 2 never defers "
    "a version."
)
_OPTIONS: dict[str, tuple[Any, Range]] = {
    "num_slots": (int, Range(3, MAX_SLOTS, remedy=_SLOTS_REMEDY)),
    "max_readers": (Count, Range()),
    "first_version": (Natural, Range()),
    "transport_dtype": (torch.dtype | None, Range()),
}
_OPTIONS |= dict.fromkeys(("trainable_only", "lora_only", "check_finite"), (bool, Range()))


def check_options(**options: Any) -> None:
    """Require that a store can be made with these arguments of :class:`WeightStore`.

    Raises:
        ValueError: for one of another type or out of range.
    """
    for name in options.keys() & _OPTIONS.keys():
        check(name, options[name], *_OPTIONS[name])


class ReaderRegistry:
    """Registry of a store's readers: which name has which reader slot of the ledger.

    Args:
        ledger (SlotLedger): the shared words.
        locks (LockHandle): the writer's, to see which readers are alive.
        max_readers (int): reader slots.

    Examples:
        >>> import torch
        >>> from torchrl_dvla.weight_update.segment import LockFile
        >>> ledger = SlotLedger(torch.zeros(SlotLedger.num_words(3, 2), dtype=torch.int64), 3)
        >>> file = LockFile()
        >>> registry = ReaderRegistry(ledger, file.open(), 2)
        >>> registry.register("a"), registry.register("b")
        (0, 1)
        >>> registry.release("a")
        >>> registry.register("c"), list(registry.stats())
        (0, ['b', 'c'])
    """

    def __init__(self, ledger: SlotLedger, locks: LockHandle, max_readers: int) -> None:
        self._ledger, self._locks, self._max_readers = ledger, locks, max_readers
        self._slots: dict[str, int] = {}
        self._num_taken: dict[str, int] = {}

    def register(self, name: str) -> int:
        """A reader slot for ``name``.

        Raises:
            ValueError: if the name has one that was not released.
            RuntimeError: if all reader slots are taken.
        """
        self._slots = self._open_slots()
        if name in self._slots:
            raise ValueError(
                f"name must be free, got {name!r}, which a reader has. Release that one first."
            )
        taken = set(self._slots.values())
        slot = next((slot for slot in range(self._max_readers) if slot not in taken), None)
        if slot is None:
            raise RuntimeError(
                f"All {self._max_readers} reader slots are taken. Release dead readers, or "
                "make the store with a larger max_readers."
            )
        self._slots[name] = slot
        self._num_taken[name] = 0
        self._ledger.set_state(slot, ReaderState.REGISTERED)
        return slot

    def release(self, name: str) -> None:
        """Free the reader slot of ``name``.

        Raises:
            KeyError: if there is no such reader.
            RuntimeError: if it is alive.
        """
        if name not in self._slots:
            raise KeyError(f"No reader is called {name!r}. There are {sorted(self._slots)}.")
        slot = self._slots[name]
        if self._is_alive(slot):
            raise RuntimeError(
                f"Reader {name!r} is alive, got a request to release it. Let its process end or "
                "call its close() there."
            )
        self._ledger.set_state(slot, ReaderState.CLOSED)
        del self._slots[name]

    def stats(self) -> dict[str, AdoptionStats]:
        """What each reader did."""
        slots = self._open_slots()
        return {name: self._ledger.adoption_stats(slot) for name, slot in slots.items()}

    def take_adoptions(self) -> dict[str, list[Adoption]]:
        """What each reader adopted since the last call."""
        taken = {}
        for name, slot in self._open_slots().items():
            first, self._num_taken[name] = self._num_taken[name], self._ledger.num_adoptions(slot)
            taken[name] = self._ledger.adoptions(slot, first, self._num_taken[name])
        return taken

    def dead(self) -> list[str]:
        """Readers whose process ended without closing them."""
        return [
            name
            for name, slot in self._open_slots().items()
            if self._ledger.state(slot) is ReaderState.ATTACHED and not self._is_alive(slot)
        ]

    def _open_slots(self) -> dict[str, int]:
        closed = ReaderState.CLOSED
        return {
            name: slot
            # A list: the collection loop releases the reader of a process that has ended meanwhile.
            for name, slot in list(self._slots.items())
            if self._ledger.state(slot) is not closed
        }

    def _is_alive(self, slot: int) -> bool:
        return self._locks.is_held_by_others(reader_byte(slot))


class WeightStore:
    """Store of versioned weights that the readers of this node adopt from: the learner's side.

    Args:
        source (nn.Module, TensorDictBase or mapping): the weights; they are published at once, as
            the first version, and are what :meth:`publish` takes when it is given nothing.
        num_slots (int): versions that can be in use at one time; at least 3. Default: 3.

    Keyword Args:
        max_readers (int): readers at one time. Default: 64.
        trainable_only (bool): publish parameters with ``requires_grad=False`` once, at
            construction. On the CPU the source's are pointed at the store's, so that learner, store
            and readers have them once together. Default: ``False``.
        lora_only (bool): publish everything but low-rank adapters once, as above. A reader without
            adapters gets them merged. Default: ``False``.
        transport_dtype (torch.dtype, optional): keep floating-point weights in this dtype
            (``torch.bfloat16`` halves the bytes of fp32 masters, at a relative error of 2**-8).
        check_finite (bool): refuse NaN and infinite weights; a module's buffers may hold
            infinities, as attention masks do. Default: ``True``.
        first_version (int): number of the first version, for a run that is resumed. Default: 0.
        model_pool (ModelPool, optional): gives the shared memory, within its budget. Default: none.

    Raises:
        ValueError: if ``num_slots`` is below 3, ``source`` has no weights, or they are not finite.
        RuntimeError: if the shared memory cannot be had.

    Examples:
        >>> model = torch.nn.Linear(2, 2)
        >>> store = WeightStore(model)
        >>> store.version, store.publish(), store.version
        (0, 1, 1)
        >>> reader = store.reader("worker 0")
        >>> version, weights = reader.pin()
        >>> version, weights["weight"].shape
        (1, torch.Size([2, 2]))
        >>> store.adopted_versions()
        {'worker 0': 1}
        >>> store.close()
    """

    #: Frozen parameters of the source, which must stay what they are.
    _frozen: dict[str, torch.Tensor]

    def __init__(
        self,
        source: WeightSource,
        num_slots: int = 3,
        *,
        max_readers: int = 64,
        trainable_only: bool = False,
        lora_only: bool = False,
        transport_dtype: torch.dtype | None = None,
        check_finite: bool = True,
        first_version: int = 0,
        model_pool: ModelPool | None = None,
    ) -> None:
        check_options(num_slots=num_slots, max_readers=max_readers, first_version=first_version)
        check_options(trainable_only=trainable_only, lora_only=lora_only, check_finite=check_finite)
        check_options(transport_dtype=transport_dtype)
        self._source = source
        layout = WeightLayout(
            source,
            trainable_only=trainable_only,
            lora_only=lora_only,
            transport_dtype=transport_dtype,
        )
        self._open(layout, num_slots, max_readers, check_finite=check_finite, model_pool=model_pool)
        try:
            tensors = self.layout.tensors_of(source)
            self._writer.write_frozen(tensors)
            # Buffers are left out: a module may make its caches anew.
            self._frozen = {
                entry.name: tensor
                for entry, tensor in zip(self.layout.entries, tensors, strict=True)
                if entry.is_frozen and isinstance(tensor, nn.Parameter)
            }
            self.publish(version=first_version)
            self._share_frozen(source)
        except BaseException:
            self.close()
            raise

    def _open(
        self,
        layout: WeightLayout,
        num_slots: int,
        max_readers: int,
        *,
        check_finite: bool,
        model_pool: ModelPool | None = None,
    ) -> None:
        """Make the memory of a store without a version."""
        self._pid = os.getpid()
        self._is_closed = False
        self._last_stats: dict[str, AdoptionStats] = {}
        self._last_version = -1
        self.layout = layout
        self._segment = WeightSegment(
            layout, num_slots=num_slots, max_readers=max_readers, model_pool=model_pool
        )
        self._writer = SlotWriter(self._segment, check_finite=check_finite)
        self._ledger = self._segment.ledger()
        self._registry = ReaderRegistry(self._ledger, self._writer.locks, max_readers)
        self._frozen = {}

    def _share_frozen(self, source: WeightSource) -> None:
        """Point the source's frozen parameters at the store's: this machine has them once.

        They stay there when the store is closed. On another device, or of another dtype than the
        store's, they stay where they are.
        """
        weights = named_weights(source)
        views = self._segment.views(0).entries
        for entry, view in zip(self.layout.entries, views, strict=True):
            for name in entry.names if entry.is_frozen else ():
                tensor = weights[name]
                is_parameter = isinstance(tensor, nn.Parameter) and not tensor.requires_grad
                if is_parameter and tensor.device.type == "cpu" and tensor.dtype == entry.dtype:
                    tensor.data = view

    def provides(self, module: nn.Module) -> list[torch.Tensor]:
        """The module's tensors whose values a reader's module gets with its first version.

        They need not be sent to its process: on the CPU it points its own at the store's.
        """
        weights = named_weights(module)
        if self.layout.differences(weights, as_reader=True):
            return []
        if self.layout.is_without_adapters(weights):
            return []
        index_of = self.layout.index_of
        return [
            tensor
            for name, tensor in weights.items()
            if tensor.device.type == "cpu"
            and tensor.dtype == self.layout.entries[index_of[name]].dtype
        ]

    @staticmethod
    def bytes_for(
        source: WeightSource, num_slots: int = 3, *, max_readers: int = 64, **options: Any
    ) -> int:
        """Bytes of shared memory that a store of these arguments takes."""
        names = ("trainable_only", "lora_only", "transport_dtype")
        layout = WeightLayout(source, **{name: options[name] for name in names if name in options})
        return WeightSegment.bytes_for(layout, num_slots=num_slots, max_readers=max_readers)

    # -- publishing ----------------------------------------------------------------------------

    @property
    def version(self) -> int:
        """The version published last, a deferred one included."""
        return self._last_version if self._is_closed else self._writer.version

    @property
    def visible_version(self) -> int:
        """The newest version that readers can adopt: :attr:`version`, unless that is deferred."""
        self._require_writer()
        return self._ledger.latest_version

    def publish(
        self,
        source: WeightSource | Iterator[tuple[str, torch.Tensor]] | None = None,
        *,
        version: int | None = None,
    ) -> int:
        """Copy the weights and make them the latest version. Never waits for a reader.

        When it returns the version is visible (or deferred, if every other slot is in use); when it
        raises, nothing has changed. Weights on CUDA are checked there and copied to the slots,
        which are page-locked; the call waits for that copy, so for all that the current stream was
        given before.

        Args:
            source (optional): the weights; default is what the store was made from, walked anew:
                a layer that was replaced in a module is found. An iterator of names and tensors is
                asked for one after the other, such as parameters that are gathered from several
                processes: no second copy of all of them is made.

        Keyword Args:
            version (int, optional): the number to give; default is the next one.

        Returns:
            the version.

        Raises:
            ValueError: if the weights are not finite (the last good version stays), if the layout
                differs (the differences are listed), if a frozen weight was replaced, or if
                ``version`` does not grow.
            RuntimeError: if another thread publishes right now, or this is not the process that
                made the store.
        """
        self._require_writer()
        if isinstance(source, Iterator):
            return self._writer.publish_each(source, version=version)
        return self._writer.publish(lambda: self._find(source), version=version)

    def _find(self, source: WeightSource | None) -> Sequence[torch.Tensor]:
        found = self._source if source is None else source
        tensors = self.layout.tensors_of(found)
        for entry, tensor in zip(self.layout.entries, tensors, strict=True):
            if found is self._source and self._frozen.get(entry.name, tensor) is not tensor:
                raise ValueError(
                    f"source must keep its frozen weights, got another {entry.name!r}: they were "
                    "published once, when the store was made. Replace it before that."
                )
        return tensors

    def stats(self) -> PublishStats:
        """Counters of the writing side."""
        return self._writer.stats

    def scalars(self) -> dict[str, float]:
        """Scalars of both sides; of a store that is closed, what was known then.

        Returns:
            ``version``; of the learner's side ``num_publishes``, ``num_coalesced``,
            ``num_deferred``, ``num_refused``, ``published_bytes``, ``publish_stall_s`` (the last
            one) and ``publish_stall_max_s``; of each reader ``<reader>_adopt_p50_s``,
            ``<reader>_adopt_p99_s``, ``<reader>_skipped`` and ``<reader>_lag``.
        """
        publish = self.stats()
        out: dict[str, float] = {
            "version": self.version,
            "num_publishes": publish.num_publishes,
            "num_coalesced": publish.num_coalesced,
            "num_deferred": publish.num_deferred,
            "num_refused": publish.num_refused,
            "published_bytes": publish.bytes_total,
            "publish_stall_s": publish.stall_last_s,
            "publish_stall_max_s": publish.stall_max_s,
        }
        for name, adopted in self.adoption_stats().items():
            reader = re.sub(r"\W", "_", name)
            out[f"{reader}_adopt_p50_s"] = adopted.latency_p50_s
            out[f"{reader}_adopt_p99_s"] = adopted.latency_p99_s
            out[f"{reader}_skipped"] = adopted.num_skipped
            out[f"{reader}_lag"] = self.version - adopted.version
        return out

    # -- readers -------------------------------------------------------------------------------

    def reader(self, name: str | int) -> WeightReader:
        """Register one more reader.

        Args:
            name (str or int): how it is called in :meth:`adopted_versions` and in errors.

        Returns:
            a reader for a child process (it travels while that is spawned) or for one thread.

        Raises:
            ValueError: if the name is taken by a reader that was not released.
            RuntimeError: if ``max_readers`` reader slots are taken.
        """
        self._require_writer()
        name = str(name)
        slot = self._registry.register(name)
        return WeightReader(self._segment, reader_slot=slot, name=name, writer=self._writer)

    def release(self, reader: WeightReader | str | int) -> None:
        """Forget a reader. Its pin needs no taking back: the kernel freed it with the process.

        Raises:
            KeyError: if there is no such reader.
            RuntimeError: if it is alive in another process or thread; it must close itself.
        """
        self._require_writer()
        name = reader.name if isinstance(reader, WeightReader) else str(reader)
        if isinstance(reader, WeightReader):
            reader.close()
        self._registry.release(name)

    def adopted_versions(self) -> dict[str, int]:
        """The version each reader has adopted; -1 for one that has not begun."""
        return {name: stats.version for name, stats in self.adoption_stats().items()}

    def adoption_stats(self) -> dict[str, AdoptionStats]:
        """Adoptions, skipped versions and latency of each reader; after the end, the last known."""
        return self._last_stats if self._is_closed else self._registry.stats()

    def take_adoptions(self) -> dict[str, list[Adoption]]:
        """Each reader's adoptions since the last call, for a timeline.

        The last 64 of a reader are kept; nothing waits for them to be taken.
        """
        return {} if self._is_closed else self._registry.take_adoptions()

    def wait(self, version: int | None = None, timeout_s: float = 60.0) -> None:
        """Wait until every reader has adopted ``version`` (default: the last one) or a newer one.

        Raises:
            TimeoutError: naming the readers that are behind and their versions.
            RuntimeError: naming the readers that have died.
        """
        self._require_writer()
        version = self.version if version is None else version
        deadline = time.monotonic() + timeout_s
        while True:
            dead = self._registry.dead()
            if dead:
                raise RuntimeError(
                    f"Readers {dead} died before they adopted version {version}. Release them with "
                    "WeightStore.release()."
                )
            late = {n: v for n, v in self.adopted_versions().items() if v < version}
            if not late:
                return
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"Version {version} was not adopted within {timeout_s} s by {late} (-1: never "
                    "read). Readers adopt between two batches: check that they are being called."
                )
            time.sleep(_POLL_S)

    # -- lifecycle -----------------------------------------------------------------------------

    def close(self) -> None:
        """End the store; a version that is deferred is dropped. Safe to call twice.

        Readers keep what is visible now. The memory goes with the last view on it, so with this
        store and its last reader; closing the arena would empty it under those that still act.
        """
        if self._is_closed or os.getpid() != self._pid:
            return
        self._last_stats, self._last_version = self.adoption_stats(), self.version
        self._is_closed = True
        self._writer.close()
        self._segment.locks.close()
        del self._segment, self._ledger, self._registry, self._frozen

    def publishes_from(self, addresses: set[int]) -> bool:
        """Whether one of the memory addresses belongs to the weights published last."""
        return self._writer.publishes_from(addresses)

    def _require_writer(self) -> None:
        if os.getpid() != self._pid:
            raise RuntimeError(
                "WeightStore must be used by the process that made it, got a forked child. Publish "
                "from one learner; give children WeightStore.reader()."
            )
        if self._is_closed:
            raise RuntimeError(
                "WeightStore was closed by close() or the shutdown() of its updater or collector. "
                "Make a new one."
            )

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "WeightStore must stay in the process that made it, got a request to pickle it. "
            "Send WeightStore.reader() instead."
        )

    def __enter__(self) -> WeightStore:
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self.close()
