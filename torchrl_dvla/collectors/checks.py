# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Arguments of a collector that could never work together."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from tensordict.nn import TensorDictModuleBase
from torch.nn.parameter import is_lazy
from torchrl.weight_update import WeightSyncScheme

from torchrl_dvla.collectors.configs import GroupConfig
from torchrl_dvla.collectors.schedule import EpisodeSpec, InitStateSchedule
from torchrl_dvla.data import Admission, PooledReplayBuffer
from torchrl_dvla.data.schema import IMAGE_KEY
from torchrl_dvla.memory import EnvironmentPool, Plan
from torchrl_dvla.weight_update import AsyncWeightUpdater

__all__ = [
    "build_policy",
    "check_buffer",
    "check_episodes",
    "check_frames",
    "check_pages",
    "check_policy",
    "check_state",
    "check_tasks",
    "check_updater",
]


def check_tasks(schedule: InitStateSchedule, tasks: Collection[str]) -> None:
    """Every task of the schedule needs a factory.

    Raises:
        ValueError: naming the tasks that have none.
    """
    unknown = set(schedule.tasks) - set(tasks)
    if unknown:
        raise ValueError(
            f"schedule must name tasks of create_env_fn ({sorted(tasks)}), got "
            f"{sorted(unknown)}. Add a factory for each."
        )


def check_policy(
    policy: TensorDictModuleBase | None,
    policy_factory: Callable[[], TensorDictModuleBase] | None,
) -> TensorDictModuleBase:
    """The learner's policy: ``policy``, or a new one of ``policy_factory``.

    Raises:
        ValueError: if there is neither, or if the factory's has lazy parameters.
    """
    if policy is not None:
        return policy
    if policy_factory is None:
        raise ValueError("policy or policy_factory must be given, got neither.")
    return build_policy(policy_factory)


def build_policy(policy_factory: Callable[[], TensorDictModuleBase]) -> TensorDictModuleBase:
    """What ``policy_factory`` builds; a lane has no observation to find missing shapes with.

    Raises:
        ValueError: naming parameters without a shape.
    """
    policy = policy_factory()
    lazy = [name for name, tensor in policy.named_parameters() if is_lazy(tensor)]
    if lazy:
        raise ValueError(
            f"policy_factory must build a policy whose parameters have shapes, got lazy ones: "
            f"{', '.join(lazy[:5])}{', ...' if len(lazy) > 5 else ''}. Call the policy once on an "
            "observation before it is returned, or pass policy, which is sent to the lane."
        )
    return policy


def check_updater(schemes: Mapping[str, WeightSyncScheme]) -> AsyncWeightUpdater:
    """The one scheme that a collector works with.

    Raises:
        ValueError: if there is another, or none.
    """
    updater = schemes.get("policy")
    if len(schemes) != 1 or not isinstance(updater, AsyncWeightUpdater):
        raise ValueError(
            f"weight_sync_schemes must be {{'policy': AsyncWeightUpdater(...)}}, got {schemes}. "
            "Other schemes write under their readers' feet or make the learner wait."
        )
    return updater


def check_pages(plan: Plan, group: GroupConfig, num_pages: int) -> None:
    """An update's groups and one rollout of an evaluation must find room at once.

    With fewer pages than the groups of an update, the learner would wait for groups that wait for
    pages; without the one rollout, a learner that waits for an evaluation would never free any.

    Raises:
        ValueError: with the inequality that fails.
    """
    pages_per_rollout = plan.pages_per_group // group.num_candidates
    needed = group.groups_per_update * plan.pages_per_group + pages_per_rollout
    if num_pages < needed:
        page_bytes = plan.rows_per_page * plan.row_bytes
        raise ValueError(
            "env_bytes must hold groups_per_update x pages of a group + pages of an evaluation "
            f"rollout = {group.groups_per_update} x {plan.pages_per_group} + {pages_per_rollout} = "
            f"{needed} pages, got {num_pages}: with fewer, learner and sampling would wait for "
            f"each other. Raise env_bytes by {(needed - num_pages) * page_bytes}, or lower "
            "groups_per_update, group_size or max_decisions."
        )


def check_buffer(buffer: PooledReplayBuffer, pool: EnvironmentPool, admission: Admission) -> None:
    """The buffer must be on the collector's pool and under its admission.

    Raises:
        ValueError: if it was built with others; groups would never be admitted again.
    """
    if buffer.pool is not pool or buffer.admission is not admission:
        raise ValueError(
            "replay_buffer must build a buffer with the pool and the admission it is given, got "
            "others. Pass functools.partial(PooledReplayBuffer, batch_size=...) without them."
        )


def check_episodes(
    episodes: Sequence[EpisodeSpec], tasks: Collection[str], quarantined: Collection[str]
) -> None:
    """Every episode of an evaluation needs a task that can be played.

    Raises:
        ValueError: naming the tasks that are unknown or in quarantine.
    """
    named = {spec.task for spec in episodes}
    if unknown := named - set(tasks):
        raise ValueError(
            f"episodes must name tasks of create_env_fn ({sorted(tasks)}), got {sorted(unknown)}."
        )
    if failing := named & set(quarantined):
        raise ValueError(
            f"episodes must not name tasks that are quarantined, got {sorted(failing)}. Their "
            "last error is in the log."
        )


def check_frames(num_frames_episodes: int, pool: EnvironmentPool) -> None:
    """Images can be kept only of an environment that has a camera.

    Raises:
        ValueError: if there is none.
    """
    if num_frames_episodes and IMAGE_KEY not in pool.rows.keys(include_nested=True):
        raise ValueError(
            f"num_frames_episodes must be 0 without {IMAGE_KEY}, got {num_frames_episodes}. The "
            "environment observes no image under this key: rename it, or keep none."
        )


def check_state(state_dict: Mapping[str, Any]) -> None:
    """The state of a collector must hold that of its replay buffer.

    Raises:
        ValueError: if it was taken before it did, or from something else.
    """
    if "buffer" not in state_dict:
        raise ValueError(
            f"state_dict must hold the replay buffer's state as 'buffer', got {sorted(state_dict)}."
            " Checkpoints of older versions kept collector and buffer apart, taken at two "
            "instants: going on from them could learn from a group twice. Load the policy and the "
            "optimizer alone, and start with an empty buffer."
        )
