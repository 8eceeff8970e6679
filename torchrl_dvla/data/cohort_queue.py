# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Finished groups wait here for the learner, and the learner for them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torchrl.data import StalenessAwareSampler
from torchrl.data.replay_buffers.samplers import Sampler

from torchrl_dvla.data.admission import Admission
from torchrl_dvla.data.cohort import DropCounts
from torchrl_dvla.data.groups import GroupRecord

__all__ = ["CohortQueue"]

T = TypeVar("T")


class CohortQueue:
    """Records of the stored groups, accounts of the dropped ones, and the learner's wait.

    The collector's thread puts, the learner's thread takes. A wait ends with a cohort, with the
    time limit, or with :meth:`close`; each error says what the learner was waiting for.

    Args:
        lock (threading.RLock): the buffer's lock.
        admission (Admission, optional): the staleness rule; without it nothing can be taken.
    """

    def __init__(self, lock: Any, admission: Admission | None) -> None:
        self.admission = admission
        self.groups: dict[int, GroupRecord] = {}
        self.drops = DropCounts()
        self._drops_since_update = DropCounts()
        self._arrived = threading.Condition(lock)
        #: For each thread that waits: the groups that have to be stored before it can go on.
        self._wanted: list[int] = []
        self._closed_because: str | None = None
        self._error: BaseException | None = None
        self._num_kept = 0
        self._kept_length = 0.0
        self._wait_s = 0.0
        self._last_wait_s = 0.0
        if admission is not None:
            admission.add_listener(self._wake)

    def put(self, group: GroupRecord) -> None:
        """A kept group is stored."""
        with self._arrived:
            self.groups[group.group_id] = group
            self._num_kept += 1
            self._kept_length += group.mean_length
            if self.admission is not None:
                self.admission.complete(group.group_id)
            self._wake()

    def drop(self, group: GroupRecord) -> None:
        """A group was dropped by the assembler; its pages are free already."""
        assert group.drop_reason is not None
        with self._arrived:
            if self.admission is not None:
                self.admission.drop(group.group_id)
            self.drops.add(group.drop_reason, group.mean_length)
            self._drops_since_update.add(group.drop_reason, group.mean_length)

    def take(self, timeout_s: float | None) -> list[GroupRecord]:
        """Wait for a cohort; it stays in :attr:`groups` until :meth:`release`.

        Raises:
            TimeoutError: saying what is missing.
            RuntimeError: if the buffer was closed and no cohort is left.
        """
        admission = self.admission
        assert admission is not None
        with self._arrived:
            cohort = self._wait(
                lambda: admission.select(self.groups),
                admission.groups_per_update,
                timeout_s,
                lambda: self.describe_wait(timeout_s),
            )
            self._drops_since_update = DropCounts()
            return [self.groups[group_id] for group_id in cohort]

    def num_fresh(self, sampler: Sampler) -> int:
        """Stored groups that ``sampler`` takes rows from.

        All, unless it is a staleness-aware one with a bound, which leaves out old versions.
        Admission lets no group grow too old for itself.
        """
        if not isinstance(sampler, StalenessAwareSampler) or sampler.max_staleness < 0:
            return len(self.groups)
        oldest = sampler.consumer_version - sampler.max_staleness
        return sum(group.first_policy_version >= oldest for group in self.groups.values())

    def wait_fresh(self, num_groups: int, sampler: Sampler, timeout_s: float | None) -> None:
        """Wait until ``num_groups`` groups are fresh.

        Raises:
            TimeoutError: saying what is missing.
            RuntimeError: if the buffer was closed and there are fewer.
        """

        def describe() -> str:
            fresh = self.num_fresh(sampler)
            return (
                f"No sample within timeout_s={timeout_s:g}: {fresh} of min_groups={num_groups} "
                f"groups are fresh, {len(self.groups) - fresh} older than the sampler takes, "
                f"{self.drops.total} dropped"
                + (f" ({self.drops.describe()})" if self.drops.total else "")
                + ". Collect faster, evict old groups, raise timeout_s, or lower min_groups."
            )

        with self._arrived:
            self._wait(
                lambda: self.num_fresh(sampler) >= num_groups or None,
                num_groups,
                timeout_s,
                describe,
            )

    def _wait(
        self,
        attempt: Callable[[], T | None],
        num_groups: int,
        timeout_s: float | None,
        describe: Callable[[], str],
    ) -> T:
        """What ``attempt`` gives as soon as that is not ``None``; the lock is held.

        It gives nothing while fewer than ``num_groups`` groups are stored: until then it is not
        made, and the thread sleeps on.
        """
        start_s = time.monotonic()
        while (result := attempt()) is None:
            if self._closed_because is not None:
                raise RuntimeError(
                    f"The replay buffer was closed: {self._closed_because}"
                ) from self._error
            left_s = None if timeout_s is None else timeout_s + start_s - time.monotonic()
            if left_s is not None and left_s <= 0:
                raise TimeoutError(describe())
            self._wanted.append(num_groups)
            try:
                self._arrived.wait(left_s)
            finally:
                self._wanted.remove(num_groups)
        self._last_wait_s = time.monotonic() - start_s
        self._wait_s += self._last_wait_s
        return result

    def release(self, group_ids: list[int]) -> None:
        """The learner is done with its cohort."""
        with self._arrived:
            for group_id in group_ids:
                del self.groups[group_id]
            if self.admission is not None:
                self.admission.learned(group_ids)

    def forget(self, group_id: int) -> None:
        """A stored group was evicted unlearned; admission may grant another instead."""
        with self._arrived:
            del self.groups[group_id]
            if self.admission is not None:
                self.admission.drop(group_id)

    def close(self, reason: str, error: BaseException | None = None) -> None:
        """Nothing more will come: a learner gets what is left, then ``reason``."""
        with self._arrived:
            if self._closed_because is None:
                self._closed_because, self._error = reason, error
            self._arrived.notify_all()

    def describe_wait(self, timeout_s: float | None = None) -> str:
        """What the learner is waiting for, and what to do about it."""
        admission = self.admission
        assert admission is not None
        with self._arrived:
            in_flight = admission.in_flight
            within = "" if timeout_s is None else f" within timeout_s={timeout_s:g}"
            dropped = self._drops_since_update
            text = (
                f"No cohort of {admission.groups_per_update} groups{within}: {len(self.groups)} "
                f"finished, {len(in_flight)} in flight {in_flight[:8]}, {dropped.total} dropped "
                f"since the last update"
            )
            text += f" ({dropped.describe()}). " if dropped.total else ". "
            late = admission.missing(self.groups)
            if late:
                return text + (
                    f"Groups {late[:8]} can wait no longer than version {admission.version} and "
                    "are unfinished: look for a hung environment."
                )
            if in_flight:
                return text + "Sampling is slower than the learner waits: raise timeout_s."
            if not admission.may_admit:
                return text + (
                    "No group may begin before the last update is published: call "
                    "update_policy_weights_() after each update."
                )
            if dropped.total:
                return text + (
                    "No group had anything to teach: take easier or harder tasks, raise "
                    "candidate_group_size, or widen return_bounds."
                )
            return text + "Nothing is being collected: start the collector."

    def stats(self) -> dict[str, float]:
        """Groups kept and dropped by reason with their mean length, and the learner's waits."""
        with self._arrived:
            stats: dict[str, float] = {
                "groups_stored": len(self.groups),
                "groups_kept": self._num_kept,
                "kept_mean_length": self._kept_length / max(1, self._num_kept),
                "groups_dropped": self.drops.total,
                "wait_s": self._wait_s,
                "last_wait_s": self._last_wait_s,
            }
            for reason, counts in self.drops.by_reason().items():
                for name, value in counts.items():
                    stats[f"dropped/{reason}/{name}"] = value
            return stats

    def clear(self) -> None:
        """Forget every stored group; admission may grant others instead."""
        with self._arrived:
            for group_id in list(self.groups):
                self.forget(group_id)

    def state_dict(self) -> dict[str, Any]:
        """Plain data, without rows."""
        with self._arrived:
            return {
                "groups": [group.state_dict() for group in self.groups.values()],
                "drops": self.drops.state_dict(),
                "kept": [self._num_kept, self._kept_length],
                "wait_s": self._wait_s,
                "admission": None if self.admission is None else self.admission.state_dict(),
            }

    def load_state_dict(
        self, state_dict: Mapping[str, Any], pages: Mapping[int, list[list[int]]]
    ) -> list[int]:
        """Take a state over.

        Args:
            state_dict (Mapping): from :meth:`state_dict`.
            pages (Mapping): pages of each rollout by group.

        Returns:
            list of int: groups that were in flight. They are dropped: what had been collected of
            them is gone, and none of it was learned from.
        """
        with self._arrived:
            states = state_dict["groups"]
            self.groups = {
                state["group_id"]: GroupRecord.from_state_dict(state, pages[state["group_id"]])
                for state in states
            }
            self.drops.load_state_dict(state_dict["drops"])
            self._num_kept, self._kept_length = state_dict["kept"]
            self._wait_s = state_dict["wait_s"]
            if self.admission is None:
                return []
            if state_dict["admission"] is None:
                raise ValueError(
                    "The checkpoint must come from a buffer with admission, got one without. Build "
                    "the buffer as that run did."
                )
            self.admission.load_state_dict(state_dict["admission"])
            lost = self.admission.in_flight
            for group_id in lost:
                self.admission.drop(group_id)
            return lost

    def _wake(self) -> None:
        with self._arrived:
            if len(self.groups) >= min(self._wanted, default=0):
                self._arrived.notify_all()
