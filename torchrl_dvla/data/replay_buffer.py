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
from torchrl.data import ReplayBuffer
from torchrl.data.replay_buffers.samplers import (
    ConsumingSampler,
    PrioritizedSampler,
    Sampler,
)
from torchrl.data.replay_buffers.writers import RoundRobinWriter
from torchrl.envs.transforms import Compose, Transform

from torchrl_dvla.data.admission import Admission
from torchrl_dvla.data.cohort import CohortPlan, Staging
from torchrl_dvla.data.cohort_queue import CohortQueue
from torchrl_dvla.data.groups import GroupRecord
from torchrl_dvla.data.instructions import InstructionTable, InstructionTransform
from torchrl_dvla.data.storage import PooledStorage
from torchrl_dvla.data.work_track import NoTrack, WorkTrack
from torchrl_dvla.memory import EnvironmentPool

__all__ = ["PooledReplayBuffer"]


class PooledReplayBuffer(ReplayBuffer):
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

    A batch is a view on a staging batch: it is valid until the second next batch is asked for.
    Leaving the loop early evicts the cohort as learned. The collector's thread extends while the
    learner iterates.

    Without ``admission`` and ``groups_per_update`` it is an ordinary replay buffer: ``add``,
    ``extend(TensorDict)``, ``sample``, samplers, writers, transforms and checkpoints work as
    TorchRL's, and iterating samples for ever.

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
        timeout_s (float, optional): how long an update waits for its cohort. ``None`` waits for
            ever.
        seed (int): seed of the minibatch permutations.
        shuffle (bool): permute rows within an epoch. Defaults to ``True``.
        max_size (int, optional): rows that are kept by value. Defaults to all rows of the pool.
        **kwargs: further arguments of :class:`torchrl.data.ReplayBuffer`, such as ``prefetch``.

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
        **kwargs: Any,
    ) -> None:
        if admission is None and groups_per_update is not None:
            admission = Admission(groups_per_update, max_policy_lag)
        if admission is not None and batch_size is None:
            raise ValueError(
                "batch_size must be given to learn from groups, got None. Set the rows of one "
                "minibatch."
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
            # Compilable: its counters are plain numbers, not named semaphores in /dev/shm.
            **{"writer": RoundRobinWriter(compilable=True), **kwargs},
        )
        self.pool = pool
        self.admission = admission
        self.num_epochs = num_epochs
        self.instructions = instructions
        self.timeout_s = timeout_s
        self.seed = seed
        self.shuffle = shuffle
        self._queue = CohortQueue(self._replay_lock, admission)
        self._cohort: list[GroupRecord] = []
        self._plan: CohortPlan | None = None
        #: Told what the learner does: one batch gathered, one learned from, waiting for a cohort.
        self.track: WorkTrack = NoTrack()
        self._iterating = False
        self._num_updates = 0
        #: Groups that were being collected when the loaded checkpoint was taken; they are dropped.
        self.lost_in_flight: list[int] = []
        self._staging: Staging | None = None
        if admission is not None and batch_size is not None:
            self._staging = Staging(pool.layout, min(batch_size, pool.num_rows))

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
            RuntimeError: if a page is not sealed, belongs to another pool, or the sampler keeps
                state by position.
        """
        if not isinstance(data, GroupRecord):
            return super().extend(data, update_priority=update_priority)
        with self._replay_lock:
            if self.admission is not None:
                self.admission.deadline(data.group_id)  # the group must be known
            if not data.kept:
                self._queue.drop(data)
                return torch.empty(0, dtype=torch.int64)
            if isinstance(self._sampler, (PrioritizedSampler, ConsumingSampler)):
                raise RuntimeError(
                    f"sampler must not keep state by position for groups, got "
                    f"{type(self._sampler).__name__}: positions move when a group is evicted. Take "
                    "another sampler, or extend the buffer with TensorDicts."
                )
            index = self._storage.adopt(
                data.group_id,
                [rollout.pages for rollout in data.rollouts],
                [rollout.num_rows for rollout in data.rollouts],
            )
            self._writer._write_count += len(index)
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
            self._storage.evict(group_id)
            self._queue.forget(group_id)

    def empty(self, empty_write_count: bool = True) -> None:
        """Free all pages; stored groups are dropped, an update in hand ends."""
        with self._replay_lock:
            self._plan = None
            self._queue.clear()
            super().empty(empty_write_count)

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
        staging, batch = self._staging.next(len(rows))
        # Without the lock: the cohort's pages are the learner's until the update ends.
        self._storage.gather_into(rows, staging)
        return self._transform(batch) if len(self._transform) else batch

    def _end_update(self, plan: CohortPlan) -> None:
        with self._replay_lock:
            if self._plan is not plan:
                return
            self._plan = None
            self._num_updates += 1
            # Freed first: admission's listeners may lease the pages at once.
            for group_id in plan.group_ids:
                self._storage.evict(group_id)
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
