# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The replay buffer of whole groups."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase
from torchrl.data.replay_buffers.samplers import ConsumingSampler, Sampler
from torchrl.envs.transforms import Compose, Transform

from torchrl_dvla.data.admission import Admission
from torchrl_dvla.data.cohort import CohortPlan
from torchrl_dvla.data.cohort_queue import CohortQueue
from torchrl_dvla.data.groups import GroupRecord
from torchrl_dvla.data.instructions import InstructionTable, InstructionTransform
from torchrl_dvla.data.row_buffer import RowReplayBuffer
from torchrl_dvla.data.samplers import check_sampler_for_groups, follow_eviction
from torchrl_dvla.data.storage import PooledStorage
from torchrl_dvla.data.work_track import NoTrack, WorkTrack
from torchrl_dvla.memory import EnvironmentPool

__all__ = ["PooledReplayBuffer"]


class PooledReplayBuffer(RowReplayBuffer):
    """A TorchRL replay buffer over an environment pool that hands out whole groups.

    ``extend(GroupRecord)`` adopts the pages of a finished group: no tensor moves. One pass of
    ``for batch in buffer`` is one learner update: it waits until admission grants a cohort of
    ``groups_per_update`` groups, hands out ``num_epochs`` passes of minibatches without
    replacement, gathered into persistent staging batches, and then evicts the cohort::

        collector.start()
        for _ in range(num_updates):
            for batch in buffer:
                loss = loss_module(batch)
                ...
            collector.update_policy_weights_()      # Admission.advance() happens here

    Leaving the loop early evicts the cohort as learned. The collector's thread extends while the
    learner iterates.

    Without ``admission`` and ``groups_per_update`` it is an ordinary replay buffer: ``add``,
    ``extend(TensorDict)``, ``sample``, samplers, writers, transforms and checkpoints work as
    TorchRL's, and iterating samples for ever. Groups can be stored in it too, sampled by any
    sampler, and evicted by :meth:`evict`; with ``consume_after_n_samples`` a group leaves by itself
    when all of its rows have been sampled so often.

    **Batches.** With ``num_staging`` batches of persistent memory, pinned where CUDA is, a batch
    is a view on one of them: it is valid until ``num_staging`` further batches have been asked for,
    and a copy of it to the device may run until then. Nothing is allocated.

    **Positions.** An index counts the stored rows, rollout after rollout, oldest group first. An
    eviction moves the positions behind it up, and what the sampler knows about them with it. Use an
    index that :meth:`sample` returned, for :meth:`update_priority` for instance, before the next
    eviction.

    Keyword Args:
        pool (EnvironmentPool): rows.
        admission (Admission, optional): the staleness rule, shared with the collector.
        groups_per_update (int, optional): builds an :class:`Admission` if none is given.
        max_policy_lag (int): its lag bound. Defaults to 1.
        batch_size (int, optional): rows of a minibatch.
        num_epochs (int): passes over a cohort. Defaults to 1.
        sampler (Sampler, optional): for :meth:`sample`. Defaults to TorchRL's random sampler.
        transform (Transform, optional): applied to every batch.
        instructions (InstructionTable, optional): strings by id. With it, batches carry
            ``"language_instruction"``.
        timeout_s (float, optional): how long an update waits for its cohort, and :meth:`sample` for
            ``min_groups``. ``None`` waits for ever.
        min_groups (int): :meth:`sample` waits until so many groups are stored, and with TorchRL's
            ``StalenessAwareSampler`` until so many are fresh enough for it. Defaults to 0.
        num_staging (int, optional): persistent batches. Defaults to 2 with admission; else to 0:
            every batch is new memory, as in TorchRL. With ``prefetch`` twice as many more as are
            prefetched are held.
        seed (int): seed of the minibatch permutations.
        shuffle (bool): permute rows within an epoch. Defaults to ``True``.
        max_size (int, optional): rows that are kept by value. Defaults to all rows of the pool.
        **kwargs: ``model_pool``, a :class:`~torchrl_dvla.memory.ModelPool` whose budget takes the
            persistent batches, and further arguments of :class:`torchrl.data.ReplayBuffer`, such as
            ``prefetch``.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl_dvla.memory import EnvironmentPool, RowLayout
        >>> pool = EnvironmentPool(RowLayout({"x": ((1,), torch.float32)}), 4, rows_per_page=2)
        >>> buffer = PooledReplayBuffer(pool=pool, batch_size=4)
        >>> index = buffer.extend(TensorDict({"x": torch.ones(6, 1)}, [6]))
        >>> buffer.sample()["x"].shape
        torch.Size([4, 1])
        >>> pool.close()
    """

    def __init__(
        self,
        *,
        pool: EnvironmentPool,
        admission: Admission | None = None,
        groups_per_update: int | None = None,
        max_policy_lag: int = 1,
        batch_size: int | None = None,
        num_epochs: int = 1,
        sampler: Sampler | None = None,
        transform: Transform | None = None,
        instructions: InstructionTable | None = None,
        timeout_s: float | None = None,
        seed: int = 0,
        shuffle: bool = True,
        max_size: int | None = None,
        min_groups: int = 0,
        num_staging: int | None = None,
        **kwargs: Any,
    ) -> None:
        if admission is None and groups_per_update is not None:
            admission = Admission(groups_per_update, max_policy_lag)
        if num_staging is None:
            num_staging = 0 if admission is None else 2
        if num_staging < (admission is not None):
            raise ValueError(
                f"num_staging must be at least {int(admission is not None)}, got {num_staging}. 2 "
                "lets one batch travel to the device while the next is gathered."
            )
        if num_epochs < 1:
            raise ValueError(f"num_epochs must be at least 1, got {num_epochs}. 1 is one pass.")
        if instructions is not None:
            strings = InstructionTransform(instructions)
            transform = strings if transform is None else Compose(strings, transform)
        super().__init__(
            storage=PooledStorage(pool, max_size=max_size),
            sampler=sampler,
            transform=transform,
            batch_size=batch_size,
            num_staging=num_staging,
            **kwargs,
        )
        self.pool = pool
        self.admission = admission
        self.num_epochs = num_epochs
        self.instructions = instructions
        self.timeout_s = timeout_s
        self.seed = seed
        self.shuffle = shuffle
        self.min_groups = min_groups
        self._queue = CohortQueue(self._replay_lock, admission)
        self._cohort: list[GroupRecord] = []
        self._plan: CohortPlan | None = None
        #: Told what the learner does: one batch gathered, one learned from, waiting for a cohort.
        self.track: WorkTrack = NoTrack()
        self._iterating = False
        self._num_updates = 0
        #: Groups that were being collected when the loaded checkpoint was taken; they are dropped.
        self.lost_in_flight: list[int] = []

    # -- writing --------------------------------------------------------------------------------

    def extend(self, data: Any, *, update_priority: bool | None = None) -> torch.Tensor:
        """Adopt a group, or copy rows in.

        Args:
            data (GroupRecord or TensorDictBase): a group, whose pages the buffer owns from now on;
                a dropped group is accounted for. Or rows ``[B]`` with the fields of the layout.

        Keyword Args:
            update_priority (bool, optional): as for :class:`torchrl.data.ReplayBuffer`.

        Returns:
            torch.Tensor: positions of the rows; empty for a dropped group.

        Raises:
            KeyError: if admission does not know the group, or rows have other fields.
            RuntimeError: if a page is not sealed or belongs to another pool.
            TypeError: if the sampler cannot follow groups that leave; it is named.
        """
        if not isinstance(data, GroupRecord):
            return super().extend(data, update_priority=update_priority)
        with self._replay_lock:
            if self.admission is not None:
                self.admission.deadline(data.group_id)  # the group must be known
            if not data.kept:
                self._queue.drop(data)
                return torch.empty(0, dtype=torch.int64)
            check_sampler_for_groups(self._sampler)
            index = self._storage.adopt(
                data.group_id,
                [rollout.pages for rollout in data.rollouts],
                [rollout.num_rows for rollout in data.rollouts],
            )
            self._writer._write_count += len(index)
            self._age_handles(index)
            self.mark_update(index)
            self._sampler.extend(index)
            self._queue.put(data)
        return index

    def evict(self, group_id: int) -> None:
        """Free a stored group's pages without learning from it.

        Raises:
            KeyError: if it is not stored.
            RuntimeError: if the learner has it in hand.
        """
        with self._replay_lock:
            if self._plan is not None and group_id in self._plan.group_ids:
                raise RuntimeError(f"Group {group_id} is being learned from. Let the update end.")
            self._free(group_id)
            self._queue.forget(group_id)

    def _free(self, group_id: int) -> None:
        length = len(self._storage)
        start, stop = self._storage.evict(group_id)
        self._age_handles(torch.arange(start, length))
        follow_eviction(self._sampler, start, stop, length)

    def _age_handles(self, index: torch.Tensor) -> None:
        """Tell whoever tracks generations that other rows are at these positions now."""
        if self._writer.tracks_generations:
            self._writer._bump_generation(index, None)

    def empty(self, empty_write_count: bool = True) -> None:
        """Free all pages; stored groups are dropped, an update in hand ends."""
        with self._replay_lock:
            self._plan = None
            self._queue.clear()
            super().empty(empty_write_count)

    # -- sampling -------------------------------------------------------------------------------

    def can_sample(self, batch_size: int | None = None) -> bool:
        """Whether :meth:`sample` can give a batch now."""
        with self._replay_lock:
            is_fresh = self._queue.num_fresh(self._sampler) >= self.min_groups
            return is_fresh and super().can_sample(batch_size)

    def sample(self, batch_size: int | None = None, return_info: bool = False) -> Any:
        """A batch as the sampler draws it, see :class:`torchrl.data.ReplayBuffer`.

        Raises:
            TimeoutError: if fewer than ``min_groups`` groups are fresh after ``timeout_s``; it says
                why.
            RuntimeError: if the buffer was closed while it waited.
        """
        if self.min_groups:
            self._queue.wait_fresh(self.min_groups, self._sampler, self.timeout_s)
        return super().sample(batch_size, return_info)

    def _after_draw(self) -> None:
        if not isinstance(self._sampler, ConsumingSampler):
            return
        in_hand = () if self._plan is None else self._plan.group_ids
        for group_id in self._storage.segments():
            start, stop = self._storage.segment_positions(group_id)
            if group_id not in in_hand and not self._sampler._live_mask[start:stop].any():
                self.evict(group_id)

    # -- learning -------------------------------------------------------------------------------

    @property
    def cohort(self) -> list[GroupRecord]:
        """The groups of the current update, or of the last one between updates."""
        return list(self._cohort)

    def __iter__(self) -> Iterator[TensorDictBase]:
        """The minibatches of one learner update.

        Raises:
            TimeoutError: if no cohort is complete within ``timeout_s``; it says why.
            RuntimeError: if the buffer was closed, or another update is being iterated.
        """
        if self.admission is None:
            yield from super().__iter__()
            return
        if self._iterating:
            raise RuntimeError(
                "The buffer is being iterated already. One learner takes one update at a time: "
                "finish or leave the first loop."
            )
        self._iterating = True
        self.track.waiting("no_batch")
        try:
            plan = self._plan = self._plan or self._begin_update()
            rows = torch.cat([self._storage.segment_rows(key) for key in plan.group_ids])
            for ordinals in plan:
                if self._plan is not plan:
                    return  # emptied, or a checkpoint was loaded
                with self.track.span("gather"):
                    batch = self._gather(rows[ordinals])
                with self.track.span("learn"):  # until the learner asks for more
                    yield batch
            self._end_update(plan)
        except GeneratorExit:
            # The learner left the loop. Its cohort was admitted for this version only: keeping the
            # rest for the next one could break the bound on staleness.
            self._end_update(plan)
            raise
        finally:
            self.track.waiting("elsewhere")
            self._iterating = False

    def _begin_update(self) -> CohortPlan:
        self._cohort = self._queue.take(self.timeout_s)
        assert self._batch_size is not None
        return CohortPlan(
            group_ids=[group.group_id for group in self._cohort],
            num_rows=sum(group.num_rows for group in self._cohort),
            batch_size=self._batch_size,
            num_epochs=self.num_epochs,
            seed=self.seed,
            update=self._num_updates,
            shuffle=self.shuffle,
        )

    def _gather(self, rows: torch.Tensor) -> TensorDictBase:
        assert self._staging is not None
        # Without the lock: the cohort's pages are the learner's until the update ends.
        batch = self._storage.gather_into(rows, self._staging.next())
        return self._transform(batch) if len(self._transform) else batch

    def _end_update(self, plan: CohortPlan) -> None:
        with self._replay_lock:
            if self._plan is not plan:
                return
            self._plan = None
            self._num_updates += 1
            # Freed first: admission's listeners may lease the pages at once.
            for group_id in plan.group_ids:
                self._free(group_id)
            self._queue.release(list(plan.group_ids))

    # -- life -----------------------------------------------------------------------------------

    def close(self, reason: str = "collection ended", error: BaseException | None = None) -> None:
        """No more groups will come: wake a waiting learner.

        Cohorts that are complete are still handed out; then the learner gets a ``RuntimeError``.

        Args:
            reason (str): told to the learner.
            error (BaseException, optional): the cause of its error.
        """
        self._queue.close(reason, error)

    def shutdown(self, timeout: float | None = None) -> None:
        """Close, and end TorchRL's own executors. The pool stays with its owner."""
        self._queue.close("it was shut down")
        super().shutdown(timeout)

    def stats(self) -> dict[str, int | float | bool]:
        """TorchRL's statistics, and groups kept and dropped by reason, and the learner's waits."""
        stats = {**super().stats(), **self._queue.stats(), "updates": self._num_updates}
        if self.admission is not None:
            stats["policy_version"] = self.admission.version
            stats["groups_in_flight"] = self.admission.num_in_flight
        return stats

    def drop_counts(self) -> dict[str, dict[str, float]]:
        """``{"count", "mean_length"}`` of the dropped groups by reason."""
        return self._queue.drops.by_reason()

    # -- checkpoints ----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Rows, groups, admission and the position in the current update.

        Taken inside the loop, after the optimiser step, it resumes with the next minibatch.
        """
        with self._replay_lock:
            return {**super().state_dict(), "_groups": self._group_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a checkpoint was taken; no stored group is lost or learned from twice.

        Groups that were being collected then are dropped, see :attr:`lost_in_flight`.

        Raises:
            ValueError: if the checkpoint has other specs or another staleness bound.
        """
        with self._replay_lock:
            super().load_state_dict(state_dict)
            self._load_group_state(state_dict["_groups"])

    def dumps(self, path: Path | str) -> None:
        """Write a checkpoint folder."""
        with self._replay_lock:
            super().dumps(path)
            (Path(path) / "groups.json").write_text(json.dumps(self._group_state()))

    def loads(self, path: Path | str) -> None:
        """Read a checkpoint folder, as :meth:`load_state_dict`."""
        with self._replay_lock:
            super().loads(path)
            self._load_group_state(json.loads((Path(path) / "groups.json").read_text()))

    def _group_state(self) -> dict[str, Any]:
        return {
            "queue": self._queue.state_dict(),
            "plan": None if self._plan is None else self._plan.state_dict(),
            "num_updates": self._num_updates,
        }

    def _load_group_state(self, state: Mapping[str, Any]) -> None:
        pages = {key: self._storage.segment_pages(key) for key in self._storage.segments()}
        self.lost_in_flight = self._queue.load_state_dict(state["queue"], pages)
        self._num_updates = state["num_updates"]
        self._plan = None if state["plan"] is None else CohortPlan.from_state_dict(state["plan"])
        ids = () if self._plan is None else self._plan.group_ids
        self._cohort = [self._queue.groups[group_id] for group_id in ids]
