# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Versioned weights in shared memory: published without waiting, read without copying.

**The protocol.** The store has ``num_slots`` slots in one arena. A slot's lock byte (see
:mod:`~torchrl_dvla.weight_update.locks`) is held *shared* by every reader that reads the slot, and
*exclusively* by the writer from before its first byte is written until after its last. The slot's
record says which version it holds, -1 for none. The *offer* names the newest version and its slot.

=====================================  ==========================================================
publish (the learner)                  adopt (a reader, between two batches)
=====================================  ==========================================================
1. claim: lock a slot exclusively      a. unlock the old slot
   that is not offered; skip the       b. read the offer                        ("offer read")
   refused ones       ("claimed")      c. lock its slot shared; if refused go to b
2. record := -1       ("marked")                                                ("slot locked")
3. copy, and look at  ("copying")      d. read the record; if -1 unlock, go to b  ("pinned")
   what is copied      ("looked")      e. point the module at the slot
4. record := version  ("written")
5. unlock             ("unlocked")
6. offer := version   ("offered")
=====================================  ==========================================================

**Nobody reads a mix of two versions** (invariant 3). A reader reads a slot only between its c and
its next a, holding the shared lock; the writer writes it only between 1 and 5, holding the
exclusive lock; the kernel never grants both. Each grant follows the other side's release through
the kernel's lock of the file, which orders memory: the reader sees all of the copy, and the writer
overwrites nothing that a reader has yet to load. The offer is a hint and may be as stale as it
likes.

**Only finite weights are offered.** Where the look takes time, a thread does it beside the copy
and goes on with 4 to 6 (:mod:`~torchrl_dvla.weight_update.release`); ``publish`` returns before.

**A writer that dies** in 1-5 loses the exclusive lock to the kernel and leaves the record at -1 in
a slot that is not offered: the last whole version stays offered and readable. A reader that dies
loses its pin the same way. So nothing is ever held by the dead, and nobody has to notice the death
first.

**Nobody waits** (invariant 4). A reader is refused at c only if the writer claimed the slot that
the reader had read as offered, so the offer has moved since b: each retry means that another
publish has finished. The writer waits for no reader, only for its own thread if that has not ended
with the version before. When it finds a slot, ``publish`` costs one copy. Live readers hold at most
one slot each, so ``num_slots = num_readers + 2`` always has one left beside the offered one; with
readers that adopt at every batch, three are nearly always enough, for then two different old
versions must be in use at the very moment of the publish. If they are, the version is *deferred*:
copied aside (one more copy of the weights, allocated at that time), and moved into the first slot
that a reader leaves, by a thread that gives way to the next ``publish`` within one piece of its
copy. A newer version replaces a deferred one: versions coalesce, they never queue.

A worked trace, with three slots and readers P and Q; the star is the offer::

    slot 0   slot 1   slot 2
    v0* PQ   -        -         both have adopted version 0
    v0  PQ   v1*      -         publish 1
    v0  P    v1* Q    -         Q adopts 1
    v0  P    v1  Q    v2*       publish 2
    v0  P    v1  Q    v2*       publish 3: slots 0 and 1 are pinned, 2 is offered: deferred
    v3*      v1  Q    v2  P     P adopts 2 and so leaves slot 0: version 3 moves in
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any, NoReturn

import torch

from torchrl_dvla.weight_update.copying import cast_error
from torchrl_dvla.weight_update.layout import WeightLayout, WeightSource
from torchrl_dvla.weight_update.ledger import MAX_SLOTS, Adoption, AdoptionStats
from torchrl_dvla.weight_update.places import ReaderPlaces
from torchrl_dvla.weight_update.publish_stats import PublishStats
from torchrl_dvla.weight_update.publisher import Publisher
from torchrl_dvla.weight_update.reader import WeightReader
from torchrl_dvla.weight_update.segment import WeightSegment
from torchrl_dvla.weight_update.source import SourceTensors
from torchrl_dvla.weight_update.writer import SlotWriter

__all__ = ["WeightStore"]

_POLL_S = 5e-4


class WeightStore:
    """The learner's side: versioned slots that readers of this node adopt from.

    Args:
        source (nn.Module, TensorDictBase or mapping): the weights; they are published at once, as
            the first version, and are what :meth:`publish` takes when it is given nothing. A
            :class:`WeightLayout` makes an empty store, for versions that come from another node.
        num_slots (int): versions that can be in use at one time; at least 3. Default: 3.

    Keyword Args:
        max_readers (int): readers at one time. Default: 64.
        trainable_only (bool): publish parameters with ``requires_grad=False`` once, at
            construction; they take memory once instead of ``num_slots`` times. Default: ``False``.
        lora_only (bool): publish everything but low-rank adapters once. A reader without adapters
            gets them merged. Default: ``False``.
        transport_dtype (torch.dtype, optional): keep floating-point weights in this dtype
            (``torch.bfloat16`` halves the bytes of fp32 masters; see :meth:`cast_error`).
        check_finite (bool): refuse NaN and infinite weights. Default: ``True``.
        checksum (bool): let readers compare a checksum of each bucket at each adoption, a pass over
            the weights on both sides; it finds modules that write what they adopted. Default:
            ``False``.
        first_version (int): number of the first version, for a run that is resumed. Default: 0.

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

    def __init__(
        self,
        source: WeightSource | WeightLayout,
        num_slots: int = 3,
        *,
        max_readers: int = 64,
        trainable_only: bool = False,
        lora_only: bool = False,
        transport_dtype: torch.dtype | None = None,
        check_finite: bool = True,
        checksum: bool = False,
        first_version: int = 0,
    ) -> None:
        if not 3 <= num_slots <= MAX_SLOTS:
            raise ValueError(
                f"num_slots must be from 3 to {MAX_SLOTS}, got {num_slots}. One slot is read while "
                "another is written and a third is newest; num_readers + 2 never defers a version."
            )
        if max_readers < 1:
            raise ValueError(f"max_readers must be positive, got {max_readers}. Use 64.")
        self._source = source
        self._pid = os.getpid()
        self._is_closed = False
        self._last_stats: dict[str, AdoptionStats] = {}
        #: What :meth:`cast_error` measured last.
        self.last_cast_error = 0.0
        self.layout = (
            source
            if isinstance(source, WeightLayout)
            else WeightLayout(
                source,
                trainable_only=trainable_only,
                lora_only=lora_only,
                transport_dtype=transport_dtype,
            )
        )
        self._tensors = SourceTensors(self.layout)
        self._segment = WeightSegment(self.layout, num_slots=num_slots, max_readers=max_readers)
        self._writer = SlotWriter(self._segment, check_finite=check_finite, checksum=checksum)
        #: What it does after :meth:`publish` has returned.
        self.releaser = self._writer.releaser
        #: Called after each offer by the thread that makes it; they neither block nor raise.
        self.offer_listeners = self._writer.offer_listeners
        self._publisher = Publisher(self._segment, self._writer)
        self._ledger = self._segment.ledger()
        self._places = ReaderPlaces(self._ledger, self._writer.locks, max_readers)
        if isinstance(source, WeightLayout):
            return
        try:
            self._writer.write_frozen(self.layout.tensors_of(source))
            self.publish(version=first_version)
            self.finish()
            self.cast_error()
        except BaseException:
            self.close()
            raise

    # -- publishing ----------------------------------------------------------------------------

    @property
    def version(self) -> int:
        """The version published last, deferred ones and those not looked at yet included."""
        return self._writer.newest

    @property
    def offered_version(self) -> int:
        """The newest version that readers can adopt now.

        It is below :attr:`version` until a new version was looked at, while one is deferred, and
        while publishing is paused.
        """
        self._require_writer()
        return self._ledger.offer // MAX_SLOTS

    def publish(self, source: WeightSource | None = None, *, version: int | None = None) -> int:
        """Copy the weights and make them the newest version. Never waits for a reader.

        Where it would take time to look for NaN and infinity (from 4 MiB), a thread does it, a few
        pieces behind the copy, and offers the version when it has ended; :meth:`finish` waits for
        it. A refusal is raised by this call or by the next of ``publish``, :meth:`finish` and
        :meth:`wait`, which then does nothing else. A look that has not ended is waited for.

        Weights on CUDA are copied within the device, on the current stream, and looked at and
        brought to the host by that thread; see :mod:`~torchrl_dvla.weight_update.device_writer`.
        Not run on a GPU here.

        Args:
            source (optional): the weights; default is what the store was made from.

        Keyword Args:
            version (int, optional): the number to give; default is the next one.

        Returns:
            the version.

        Raises:
            ValueError: if these weights, or those published before, are not finite (the last good
                version stays), if the layout differs (the differences are listed), or if
                ``version`` does not grow.
            RuntimeError: if another thread publishes right now, or this is not the process that
                made the store.
        """
        self._require_writer()
        return self._publisher.publish(
            lambda: self._tensors.of(self._source if source is None else source), version=version
        )

    def finish(self) -> None:
        """Wait until what was published was looked at, and is on the host.

        From then on it is offered, unless publishing is paused or every other slot is in use.

        Raises:
            ValueError: if it was refused since the weights are not finite.
        """
        self.releaser.finish()

    def receive(self, fill: Callable[[torch.Tensor], None], *, version: int) -> None:
        """Take a version that comes as bytes, from the store of another node.

        Args:
            fill (callable): writes all of the memory it is given, uint8 ``[layout.slot_bytes]``.
                The version is offered when it returns. If it raises, no reader ever sees what it
                wrote, and :attr:`version` is what is still whole.

        Keyword Args:
            version (int): its number.

        Raises:
            ValueError: if ``version`` does not grow.
        """
        self._require_writer()
        self._publisher.receive(fill, version=version)

    @property
    def frozen_memory(self) -> torch.Tensor:
        """The weights that travel once, uint8 ``[layout.frozen_bytes]``.

        In an empty store they are written here, before the first version is.
        """
        self._require_writer()
        return self._segment.frozen_memory()

    def pause(self) -> None:
        """Go on taking versions without showing them.

        Readers keep, and new ones get, what is offered now. One slot is bound meanwhile.
        """
        self._require_writer()
        self._writer.pause()

    def resume(self) -> None:
        """Offer the newest version that was taken during the pause."""
        self._require_writer()
        self._writer.resume()

    def stats(self) -> PublishStats:
        """Counters of the writing side."""
        return self._writer.counter.stats

    def cast_error(self, source: WeightSource | None = None) -> float:
        """Largest ``|stored - weight| / |weight|`` that ``transport_dtype`` makes; 0 without it.

        A measurement, not part of :meth:`publish`: it takes several passes over the weights. It is
        taken once when the store is made; :attr:`last_cast_error` has the latest.
        """
        if self.layout.transport_dtype is None:
            return 0.0
        tensors = self._tensors.of(self._source if source is None else source)
        self.last_cast_error = cast_error(self.layout, tensors)
        return self.last_cast_error

    # -- readers -------------------------------------------------------------------------------

    def reader(self, name: str | int) -> WeightReader:
        """A place for one more reader.

        Args:
            name (str or int): how it is called in :meth:`adopted_versions` and in errors.

        Returns:
            a reader for a child process (it travels while that is spawned) or for one thread.

        Raises:
            ValueError: if the name is taken by a reader that was not released.
            RuntimeError: if ``max_readers`` places are taken.
        """
        self._require_writer()
        name = str(name)
        return WeightReader(self._segment, row=self._places.issue(name), name=name, store=self)

    def release(self, reader: WeightReader | str | int) -> None:
        """Forget a reader. Its pin needs no taking back: the kernel freed it with the process.

        Raises:
            KeyError: if there is no such reader.
            RuntimeError: if it is alive in another process or thread; it must close itself.
        """
        self._require_writer()
        name = reader.name if isinstance(reader, WeightReader) else str(reader)
        self._places.require(name)
        if isinstance(reader, WeightReader):
            reader.close()
        self._places.release(name)

    def adopted_versions(self) -> dict[str, int]:
        """The version each reader has adopted; -1 for one that has not begun."""
        return {name: stats.version for name, stats in self.adoption_stats().items()}

    def adoption_stats(self) -> dict[str, AdoptionStats]:
        """Adoptions, skipped versions and latency of each reader; after the end, the last known."""
        return self._last_stats if self._is_closed else self._places.stats()

    def take_adoptions(self) -> dict[str, list[Adoption]]:
        """Each reader's adoptions since the last call, for a timeline.

        The last 64 of a reader are kept; nothing waits for them to be taken.
        """
        return {} if self._is_closed else self._places.take_adoptions()

    def dead_readers(self) -> list[str]:
        """Readers whose process ended without closing them."""
        self._require_writer()
        return self._places.dead()

    def wait(self, version: int | None = None, timeout_s: float = 60.0) -> None:
        """Wait until every reader has adopted ``version`` (default: the last one) or a newer one.

        Raises:
            TimeoutError: naming the readers that are behind and their versions.
            RuntimeError: naming the readers that have died.
        """
        version = self.version if version is None else version
        self.finish()
        deadline = time.monotonic() + timeout_s
        while True:
            dead = self.dead_readers()
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

    # -- life ----------------------------------------------------------------------------------

    def close(self) -> None:
        """Offer what was published, then end; a version that is deferred is dropped.

        Readers keep what is offered now. The memory goes with the last view on it, so with this
        store and its last reader; closing the arena would empty it under those that still act.
        """
        if self._is_closed or os.getpid() != self._pid:
            return
        self._publisher.close()
        self._last_stats = self.adoption_stats()
        self._is_closed = True
        self._segment.locks.close()
        del self._segment, self._ledger, self._places

    def publishes_from(self, addresses: set[int]) -> bool:
        """Whether one of the memory addresses belongs to the weights published last."""
        return not self._writer.source_addresses.isdisjoint(addresses)

    def set_gate(self, gate: Callable[[str], None]) -> None:
        """Have ``gate`` called with the name of each step of the protocol, for tests of races."""
        self._writer.gate = gate

    def _require_writer(self) -> None:
        if os.getpid() != self._pid:
            raise RuntimeError(
                "WeightStore must be used by the process that made it, got a forked child. Publish "
                "from one learner; give children WeightStore.reader()."
            )
        if self._is_closed:
            raise RuntimeError("WeightStore is closed. Make a new one.")

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "WeightStore must stay in the process that made it, got a request to pickle it. "
            "Send WeightStore.reader() instead."
        )

    def __enter__(self) -> WeightStore:
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self.close()
