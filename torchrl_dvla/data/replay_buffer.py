# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The replay buffer that a collector fills with whole groups."""

from __future__ import annotations

import functools
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from tensordict import TensorDictBase
from torchrl.data import LazyTensorStorage, RandomSampler, ReplayBuffer, StalenessAwareSampler
from torchrl.data.replay_buffers.samplers import Sampler
from torchrl.data.replay_buffers.writers import RoundRobinWriter
from torchrl.envs.transforms import Transform

from torchrl_dvla.data.cohort_plan import CohortPlan
from torchrl_dvla.data.group import Group, GroupState
from torchrl_dvla.data.group_queue import GroupQueue
from torchrl_dvla.data.instructions import InstructionTable, InstructionTransform
from torchrl_dvla.data.schema import INSTRUCTION_ID_KEY, NUM_DECISIONS_KEY
from torchrl_dvla.data.storage import READ_ONLY, PooledStorage
from torchrl_dvla.memory import EnvironmentPool, ModelPool
from torchrl_dvla.memory.row_access import RowFields
from torchrl_dvla.saved_state import Number, form_of, read_state, require_form
from torchrl_dvla.validation import Count, Range, Seconds, check

__all__ = ["PooledReplayBuffer"]

_CHECKPOINT = "groups.pt"


class WorkTrack(Protocol):
    """Record of when one thread works: :class:`torchrl_dvla.swimlane.Track`, for instance."""

    def waiting(self, reason: str) -> None:
        """From now on the thread is idle, blocked on *reason*."""

    def span(self, name: str) -> AbstractContextManager[None]:
        """The ``with`` block is work."""


class _NoTrack:
    def waiting(self, reason: str) -> None:
        pass

    def span(self, name: str) -> AbstractContextManager[None]:
        return nullcontext()


#: Settings of TorchRL's buffer that would have no effect on rows in the pages of a collector.
_OWN_ROWS_ONLY = ("storage", "writer", "checkpointer", "dim_extend", "shared")


def _unless_bound(name: str, setting: str | None = None) -> Any:
    """TorchRL's method ``name``, refused once the buffer is bound, or before if it makes a setting.

    A setting that would be lost keeps the buffer from being bound.
    """
    method = getattr(ReplayBuffer, name)
    reason = READ_ONLY if setting is None else _lost([setting])

    @functools.wraps(method)
    def guarded(self: PooledReplayBuffer, *args: Any, **kwargs: Any) -> Any:
        if self.is_bound:
            raise RuntimeError(reason)
        if setting is not None:
            self._own.append(setting)
        return method(self, *args, **kwargs)

    return guarded


def _lost(settings: Sequence[str]) -> str:
    return (
        f"{', '.join(settings)} must be left out to learn from groups, got one. The rows are those "
        "of the collector's pages; state_dict() and dumps() save them."
    )


def _copies_under_way() -> list[torch.cuda.Event]:
    """What has run once all copies have that this thread has started on CUDA devices."""
    if not torch.cuda.is_initialized():
        return []
    devices = [k for k in range(torch.cuda.device_count()) if torch.cuda.memory_reserved(k)]
    return [torch.cuda.current_stream(device).record_event() for device in devices]


def _rollout_sizes(groups: Sequence[Group]) -> list[int]:
    """Rows of each kept rollout, in the order in which the cohort counts them."""
    return [rollout.num_rows for group in groups for rollout in group.rollouts]


def _require_stateless(sampler: Sampler) -> None:
    if not isinstance(sampler, (RandomSampler, StalenessAwareSampler)):
        raise TypeError(
            f"sampler must be a RandomSampler or a StalenessAwareSampler, got a "
            f"{type(sampler).__name__}: it keeps state by position and cannot follow groups that "
            "leave. `for batch in buffer` needs no sampler."
        )


class PooledReplayBuffer(ReplayBuffer):
    """A TorchRL replay buffer that a collector fills with whole groups, in its own pages.

    The user makes it; the collector *binds* it to its :class:`GroupQueue`. One pass of ``for batch
    in buffer`` is one learner update: it waits for a cohort of ``groups_per_update`` groups and
    hands out ``num_epochs`` passes of minibatches without replacement, gathered into persistent
    staging batches::

        buffer = PooledReplayBuffer(batch_size=32)
        with DVLACollector(make_env, policy, replay_buffer=buffer) as collector:
            for update in range(num_updates):
                for batch in buffer:
                    loss_module(batch)["loss_objective"].backward()
                    ...
                collector.update_policy_weights_()      # the cohort counts as learned here

    The cohort stays in hand until the update is published. Leaving the loop before, by ``break`` or
    an exception, loses no group: iterating again goes on with the next minibatch of the cohort. A
    minibatch counts as taken when it is handed out, also the one in which an exception came.

    :meth:`sample` and indexing read all stored groups, at any time. ``buffer[i]`` is a *position*:
    rows are counted oldest group first, and move up when groups before them leave. Only samplers
    without state by position can follow that: TorchRL's random sampler, the default, and its
    ``StalenessAwareSampler``. Rows come from the collector, so ``add``, ``extend`` and whatever
    else writes is refused.

    Before it is bound, it is TorchRL's own :class:`~torchrl.data.ReplayBuffer` over a
    ``LazyTensorStorage``, for rows by value, with any sampler, writer and transform.

    **Batches.** A batch of an update is a view on one of ``num_staging`` batches of persistent
    memory, pinned where CUDA is: it is valid until ``num_staging`` further batches have been asked
    for. Copies to CUDA devices that were started before the next one was asked for, on the current
    streams of that thread, are waited for before their batch is written anew. No row is allocated.
    Beside the rows a batch has ``"num_decisions"`` ``[B, 1]``, the decisions of each row's rollout.

    **Whole rollouts.** A loss with one ratio for each rollout, as that of
    ``GRPOLoss(ratio_level="trajectory")``, needs all decisions of a rollout in one minibatch: with
    *whole_rollouts*, one takes as many rollouts as have no more than ``batch_size`` rows together,
    rollout after rollout.

    Keyword Args:
        batch_size (int, optional): rows of a minibatch.
        num_epochs (int): passes over a cohort. Defaults to 1.
        timeout_s (float, optional): how long an update waits for its cohort. ``None`` waits for
            ever.
        seed (int): seed of the minibatch permutations.
        shuffle (bool): permute rows, or whole rollouts, within an epoch. Defaults to ``True``.
        whole_rollouts (bool): split no rollout over minibatches of an update, of which
            ``batch_size`` is then the most rows. Defaults to ``False``.
        num_staging (int): persistent batches. Defaults to 2: one travels to the device while the
            next is gathered.
        max_size (int): rows by value that a buffer holds that is not bound.
        sampler (Sampler, optional): for :meth:`sample`. Defaults to TorchRL's random sampler.
        transform (Transform, optional): applied to every batch.
        **kwargs: further arguments of :class:`torchrl.data.ReplayBuffer`.

    Raises:
        ValueError: for an argument of another type or out of range.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> buffer = PooledReplayBuffer(batch_size=4)
        >>> index = buffer.extend(TensorDict({"x": torch.ones(6, 1)}, [6]))
        >>> buffer.sample()["x"].shape
        torch.Size([4, 1])
    """

    def __init__(
        self,
        *,
        batch_size: int | None = None,
        num_epochs: int = 1,
        timeout_s: float | None = None,
        seed: int = 0,
        shuffle: bool = True,
        whole_rollouts: bool = False,
        num_staging: int = 2,
        max_size: int = 1000,
        sampler: Sampler | None = None,
        transform: Transform | None = None,
        **kwargs: Any,
    ) -> None:
        batch_size = check("batch_size", batch_size, Count | None)
        staging = "2 lets one batch travel to the device while the next is gathered."
        self.num_epochs = check("num_epochs", num_epochs, int, Range(1, remedy="1 is one pass."))
        self.timeout_s = check("timeout_s", timeout_s, Seconds | None)
        self.seed = check("seed", seed, int)
        self.shuffle = check("shuffle", shuffle, bool)
        self.whole_rollouts = check("whole_rollouts", whole_rollouts, bool)
        self.num_staging = check("num_staging", num_staging, int, Range(1, remedy=staging))
        max_size = check("max_size", max_size, Count)
        self._own: list[str] = []
        #: The groups of the collector that the buffer is bound to.
        self.groups: GroupQueue | None = None
        # Compilable: counters are plain numbers of this process, not named semaphores in /dev/shm.
        compilable = kwargs.get("compilable")
        if compilable is None:
            compilable = "storage" not in kwargs and not kwargs.get("shared")
        defaults = {
            "storage": LazyTensorStorage(max_size, compilable=compilable),
            "writer": RoundRobinWriter(compilable=compilable),
        }
        super().__init__(
            batch_size=batch_size, sampler=sampler, transform=transform, **{**defaults, **kwargs}
        )
        self._own = [name for name in _OWN_ROWS_ONLY if kwargs.get(name) not in (None, False)]
        self._plan: CohortPlan | None = None
        self._ended_plan: CohortPlan | None = None
        self._staging: list[RowFields] = []
        # What ends the copies of each staging batch to devices: queued ones have yet to read it.
        self._copies: list[list[torch.cuda.Event]] = []
        self._num_staged = 0
        self._iterating = False
        self._track: WorkTrack = _NoTrack()

    # -- binding --------------------------------------------------------------------------------

    @property
    def is_bound(self) -> bool:
        """Whether a collector fills it."""
        return self.groups is not None

    @property
    def pool(self) -> EnvironmentPool:
        """The pool of its rows; it must be bound."""
        return self._bound().pool

    @property
    def cohort(self) -> list[Group]:
        """The groups of the current update, or of the last one between updates."""
        return self._bound().cohort

    def bind(
        self,
        groups: GroupQueue,
        instructions: InstructionTable | None = None,
        *,
        model_pool: ModelPool | None = None,
        track: WorkTrack | None = None,
    ) -> None:
        """Take rows from ``groups`` from now on; the collector calls it, once.

        Args:
            groups (GroupQueue): the collector's groups.
            instructions (InstructionTable, optional): strings by id. With it, batches carry
                ``"language_instruction"``.

        Keyword Args:
            model_pool (ModelPool, optional): its budget takes the staging batches. By default they
                are allocated by themselves.
            track (WorkTrack, optional): told what the learner does: a batch gathered, a batch
                learned from, waiting for a cohort.

        Raises:
            RuntimeError: if the buffer is bound or holds rows, or the budget is spent.
            TypeError: if the sampler cannot follow groups that leave; it is named.
            ValueError: if it prefetches, or was given a storage.
        """
        self._init()  # TorchRL may have put it off
        if self.is_bound:
            raise RuntimeError("The buffer is bound to a collector already. Make one for each.")
        if len(self):
            raise RuntimeError(
                f"The buffer holds {len(self)} rows and cannot be bound to a collector. Call "
                "empty() first, or make another."
            )
        _require_stateless(self._sampler)
        if self._own:
            raise ValueError(_lost(self._own))
        if self._prefetch_cap:
            raise ValueError(
                f"prefetch must be 0 to learn from groups, got {self._prefetch_cap}. Rows that "
                "were sampled ahead would outlive their groups."
            )
        layout = groups.pool.layout
        # Without a batch size nothing is gathered: its owner takes whole cohorts.
        for _ in range(self.num_staging if self._batch_size else 0):
            if model_pool is not None:
                rows = model_pool.rows(layout, self._batch_size, "staging batches")
            else:
                rows = layout.empty(self._batch_size, pin_memory=torch.cuda.is_available())
            self._staging.append(RowFields(rows, layout))
            self._copies.append([])
        if instructions is not None:
            self.insert_transform(0, InstructionTransform(instructions))
        storage = PooledStorage(groups)
        super().set_storage(storage, collate_fn=self._collate_fn)
        self._writer.register_storage(storage)
        self.set_rng(self._rng)
        # One lock for both: positions are those of one instant, from the sampler to the copy.
        self._replay_lock = groups.lock
        self._track = track or self._track
        self.groups = groups

    def _bound(self) -> GroupQueue:
        if self.groups is None:
            raise RuntimeError(
                "The buffer must be bound to a collector for that: pass it as replay_buffer to a "
                "DVLACollector, or call sample() for rows of your own."
            )
        return self.groups

    # -- learning -------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[TensorDictBase]:
        """The minibatches of one learner update; before it is bound, TorchRL's samples.

        Raises:
            TimeoutError: if no cohort is complete within ``timeout_s``; it says why.
            RuntimeError: if the buffer is empty, collection has ended, another update is being
                iterated, or the last one is not published.
        """
        if self.groups is None and len(self):
            yield from super().__iter__()
            return
        with closing(self._minibatches()) as minibatches:
            for plan, rows, num_decisions in minibatches:
                with self._track.span("gather"):
                    batch = self._gather(rows, num_decisions)
                # Counted as it is handed out: a checkpoint that the learner takes after its
                # optimiser step does not repeat the minibatch.
                plan.position += 1
                with self._track.span("learn"):  # until the learner asks for more
                    yield batch

    def row_minibatches(self) -> Generator[tuple[torch.Tensor, torch.Tensor], None, None]:
        """The minibatches of one learner update by the numbers of their rows; nothing is gathered.

        For a learner of several processes, each of which gathers its part by itself. In all else,
        what it raises included, it is as iterating the buffer.

        Yields:
            Row numbers of the pool, int64 ``[B]``, and the decisions of each row's rollout ``[B]``.
        """
        with closing(self._minibatches()) as minibatches:
            for plan, rows, num_decisions in minibatches:
                plan.position += 1
                with self._track.span("learn"):
                    yield rows, num_decisions

    def _minibatches(self) -> Generator[tuple[CohortPlan, torch.Tensor, torch.Tensor], None, None]:
        """The plan and the rows of each minibatch; whoever hands one out counts it there."""
        groups = self._bound()
        if self._iterating:
            raise RuntimeError(
                "The buffer is being iterated already. One learner takes one update at a time: "
                "finish or leave the first loop."
            )
        self._iterating = True
        self._track.waiting("no_batch")
        try:
            plan = self._plan = self._current_plan(groups)
            rows = torch.cat([group.row_index(groups.pool) for group in groups.cohort])
            sizes = torch.tensor(_rollout_sizes(groups.cohort))
            num_decisions = sizes.repeat_interleave(sizes)
            while not plan.is_over:
                self._require_current(plan, groups)
                ordinals = plan.row_ordinals()
                yield plan, rows[ordinals], num_decisions[ordinals]
            self._ended_plan = plan
        finally:
            self._track.waiting("elsewhere")
            self._iterating = False

    def _current_plan(self, groups: GroupQueue) -> CohortPlan:
        """The update that was left, or one over the next cohort."""
        groups.require_open()
        if self._plan is not None and self._plan.update == groups.num_updates:
            # Left, or saved, at its last minibatch: what remains of it is an empty pass.
            if self._plan is self._ended_plan:
                raise RuntimeError(
                    "The update has handed out its last minibatch and is not published. No group "
                    "may begin before the last update is published: call "
                    "update_policy_weights_() after each update."
                )
            return self._plan
        if self._batch_size is None:
            raise ValueError(
                "batch_size must be given to learn from groups, got None. Set the rows of one "
                "minibatch."
            )
        cohort = groups.wait_cohort(self.timeout_s)
        sizes = _rollout_sizes(cohort) if self.whole_rollouts else None
        if sizes is not None and max(sizes) > self._batch_size:
            raise ValueError(
                f"batch_size must be at least {max(sizes)}, the decisions of the longest rollout, "
                f"with whole_rollouts, got {self._batch_size}. Raise it, or lower "
                "WorkerConfig.max_decisions."
            )
        return CohortPlan(
            num_rows=sum(group.num_rows for group in cohort),
            batch_size=self._batch_size,
            num_epochs=self.num_epochs,
            seed=self.seed,
            update=groups.num_updates,
            shuffle=self.shuffle,
            rollout_sizes=sizes,
        )

    def _require_current(self, plan: CohortPlan, groups: GroupQueue) -> None:
        groups.require_open()
        if self._plan is not plan or plan.update != groups.num_updates:
            raise RuntimeError(
                "The update was published, or a checkpoint was loaded, before its last minibatch "
                "was handed out. Call update_policy_weights_() after the loop, or leave the loop."
            )

    def _gather(self, rows: torch.Tensor, num_decisions: torch.Tensor) -> TensorDictBase:
        # Without the lock: the cohort's pages are the learner's until the update is published.
        number = self._num_staged % self.num_staging
        self._copies[number - 1] = _copies_under_way()  # of the batch before this one
        for event in self._copies[number]:
            event.synchronize()
        self._num_staged += 1
        fields = self._storage._fields.gather(rows, self._staging[number])
        batch = self._collate_fn(fields.set(NUM_DECISIONS_KEY, num_decisions.unsqueeze(-1)))
        return self._transform(batch) if len(self._transform) else batch

    # -- TorchRL's interface --------------------------------------------------------------------

    add = _unless_bound("add")
    extend = _unless_bound("extend")
    empty = _unless_bound("empty")
    set_ = _unless_bound("set_")
    set_at_ = _unless_bound("set_at_")
    update_ = _unless_bound("update_")
    __setitem__ = _unless_bound("__setitem__")
    set_storage = _unless_bound("set_storage", "storage")
    set_writer = _unless_bound("set_writer", "writer")
    register_save_hook = _unless_bound("register_save_hook", "save hooks")
    register_load_hook = _unless_bound("register_load_hook", "load hooks")

    def share(self, shared: bool = True) -> PooledReplayBuffer:
        """Let other processes write, too, as TorchRL's.

        Raises:
            RuntimeError: if it counts its rows in this process alone: they would be overwritten.
        """
        if shared and self._initialized and self._storage._compilable:
            raise RuntimeError(
                "shared must be given to the constructor, got a buffer that counts its rows in "
                "this process alone. Make a PooledReplayBuffer(shared=True) for rows of your own."
            )
        super().share(shared)
        return self

    def set_sampler(self, sampler: Sampler) -> None:
        """Replace the sampler, once it is bound by one that can follow groups that leave."""
        if self.is_bound:
            _require_stateless(sampler)
        super().set_sampler(sampler)

    @property
    def write_count(self) -> int:
        """Rows written so far: by ``add`` and ``extend``, or in the groups of the collector."""
        if self.groups is None:
            return super().write_count
        return int(self.groups.stats()["rows_kept"])

    def stats(self) -> dict[str, int | float | bool]:
        """TorchRL's statistics, and once it is bound those of its groups."""
        if self.groups is None:
            return super().stats()
        return {**super().stats(), **self.groups.stats(), "write_count": self.write_count}

    def shutdown(self, timeout: float | None = None) -> None:
        """End TorchRL's own executors, and the wait of a learner."""
        if self.groups is not None:
            self.groups.end("it was shut down")
        super().shutdown(timeout)

    def __getstate__(self) -> dict[str, Any]:
        if self.is_bound:
            raise TypeError(
                "A PooledReplayBuffer that is bound to a collector cannot be pickled or copied: "
                "its rows are pages of this process. Use state_dict(), dumps() or sample()."
            )
        return super().__getstate__()

    # -- checkpoints ----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As TorchRL's; of a bound buffer rows, groups and the position in the current update.

        Taken inside the loop, after the optimiser step, it resumes with the next minibatch.
        """
        if self.groups is None:
            return super().state_dict()
        with self.groups.lock:
            return {
                **super().state_dict(),
                "_groups": self.groups.state_dict(),
                "_plan": None if self._plan is None else asdict(self._plan),
            }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a checkpoint was taken; bind the buffer first if it was bound then.

        No stored group is lost or learned from twice. Groups that were being collected then are
        begun anew.

        Raises:
            ValueError: if the checkpoint has other specs, another staleness bound or another batch
                size, does not fit, is damaged, or is one of a buffer that was not bound; nothing
                has changed then.
        """
        require_form({object: object}, state_dict, "buffer")
        if self.is_bound != ("_groups" in state_dict):
            raise ValueError(
                f"The checkpoint must come from a buffer that was {'' if self.is_bound else 'not '}"
                "bound to a collector. Load it as that run did: after, or without, bind()."
            )
        if self.groups is None:
            super().load_state_dict(state_dict)
            return
        groups = self.groups.check_state(state_dict["_groups"])
        num_rows = sum(group.num_rows for group in groups)
        self._storage.check_state(state_dict.get("_storage"), num_rows)
        batch_size = state_dict.get("_batch_size")
        if isinstance(batch_size, torch.Tensor) or batch_size != self._batch_size:
            raise ValueError(
                f"batch_size must equal the checkpoint's {batch_size}, got "
                f"{self._batch_size}. An update that was begun goes on with its own minibatches."
            )
        own, plan = super().state_dict(), state_dict.get("_plan")
        if isinstance(plan, dict):  # older versions dealt no whole rollouts
            plan = {"rollout_sizes": None, **plan}
            state_dict = {**state_dict, "_plan": plan}
        form = form_of(own) | dict.fromkeys(("_storage", "_groups", "_batch_size", "_plan"), object)
        form["_transforms"] = {
            # Instructions are added as they come.
            key: {"texts": [str]}
            if isinstance(value, dict) and "texts" in value
            else form_of(value)
            for key, value in own["_transforms"].items()
        }
        if plan is not None:
            form["_plan"] = form_of(asdict(CohortPlan(1, 1, 1, 0, 0)))
            form["_plan"] |= dict.fromkeys(("batch_size", "num_epochs"), Number(1, whole=True))
            form["_plan"] |= {"seed": Number(whole=True), "shuffle": bool}
            form["_plan"]["rollout_sizes"] = list | None
        require_form(form, state_dict, "buffer")
        num_updates = state_dict["_groups"]["counts"]["updates"]
        if plan is not None and plan["update"] == num_updates:
            self._check_plan(plan, [group for group in groups if group.state is GroupState.IN_HAND])
        ids = dict(zip(self.pool.layout, state_dict["_storage"]["fields"])).get(INSTRUCTION_ID_KEY)
        for key in [key for key, value in form["_transforms"].items() if value == {"texts": [str]}]:
            num_texts = len(state_dict["_transforms"][key]["texts"])
            if ids is not None and not ((ids >= 0) & (ids < num_texts)).all():
                raise ValueError(
                    f"'{INSTRUCTION_ID_KEY}' must be below {num_texts}, the number of "
                    "instructions, in every row. The checkpoint is damaged: load an older one."
                )
        self.groups.load_state_dict(state_dict["_groups"])
        super().load_state_dict(state_dict)
        self._plan = None if plan is None else CohortPlan(**plan)

    def _check_plan(self, plan: Mapping[str, Any], in_hand: Sequence[Group]) -> None:
        """Refuse the saved plan of an update that does not fit its groups, or these settings."""
        sizes = _rollout_sizes(in_hand)
        if (plan["rollout_sizes"] is not None) != self.whole_rollouts:
            raise ValueError(
                f"whole_rollouts must be {not self.whole_rollouts}, as in the checkpoint, got "
                f"{self.whole_rollouts}. An update that was begun goes on with its own minibatches."
            )
        for name, found, expected in (
            ("num_rows", plan["num_rows"], sum(sizes)),
            ("rollout_sizes", plan["rollout_sizes"], sizes if self.whole_rollouts else None),
        ):
            if found != expected:
                raise ValueError(
                    f"'buffer._plan.{name}' must be the {expected} rows in the learner's hand, got "
                    f"{found}. The checkpoint is damaged: load an older one."
                )

    def dumps(self, path: Path | str) -> None:
        """Write a checkpoint folder; that of a bound buffer holds one file."""
        if not self.is_bound:
            super().dumps(path)
            return
        folder = Path(path)
        folder.mkdir(exist_ok=True, parents=True)
        torch.save(self.state_dict(), folder / _CHECKPOINT)

    def loads(self, path: Path | str) -> None:
        """Read a checkpoint folder, as :meth:`load_state_dict`."""
        if not self.is_bound:
            super().loads(path)
            return
        self.load_state_dict(read_state(Path(path) / _CHECKPOINT))
