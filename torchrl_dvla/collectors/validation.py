# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Checks of what a collector is given: before any group is sampled, and on the first ones."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tensordict import NonTensorStack, TensorDict
from tensordict.nn import TensorDictModuleBase
from torch.nn.parameter import is_lazy
from torchrl.envs import EnvBase
from torchrl.weight_update import WeightSyncScheme

from torchrl_dvla.collectors.configs import WorkerConfig
from torchrl_dvla.collectors.policy_protocol import decide, require_observed, require_protocol
from torchrl_dvla.data import (
    EpisodeSpec,
    Group,
    GroupConfig,
    InitStateSchedule,
    PooledReplayBuffer,
    decision_layout,
)
from torchrl_dvla.data.schema import (
    ACTION_CHUNK_KEY,
    ACTION_MASK,
    ACTION_TOKENS_KEY,
    IMAGE_KEY,
    INSTRUCTION_ID_KEY,
    INSTRUCTION_KEY,
    OBSERVATION_KEY,
    recorded_keys,
)
from torchrl_dvla.envs.chunk_env import make_chunk_env, registered_env
from torchrl_dvla.memory import DualPool, EnvironmentPool, Plan, RowLayout
from torchrl_dvla.saved_state import OLDER_VERSION
from torchrl_dvla.swimlane.messages import EnvSpecs
from torchrl_dvla.weight_update import AsyncWeightUpdater

__all__ = [
    "build_policy",
    "check_episodes",
    "check_same_start",
    "check_state",
    "check_tasks",
    "check_updater",
    "env_factories",
    "match_policy",
    "plan_memory",
    "warn_of_misfits",
]

_log = logging.getLogger("torchrl_dvla")

#: Levels of 255 of a pixel and, relative to values above 1, floating-point numbers by which
#: renderers and simulators may differ from process to process in the very same scene.
_PIXEL_TOLERANCE, _STATE_TOLERANCE = 8, 1e-4


def env_factories(create_env_fn: Any) -> dict[str, Callable[[], EnvBase]]:
    """Factories of chunked environments by task name, of whatever a collector was given.

    An id is looked up here and sent to the workers as what gymnasium has registered, so one that a
    script registers itself need not be registered there.

    Args:
        create_env_fn (Callable or str or Mapping): an environment factory, the id of an environment
            of gymnasium, or several of both by task name.

    Raises:
        TypeError: for what is neither.
        ValueError: for an id that gymnasium does not know.
        ImportError: for an id without gymnasium.
    """
    tasks = create_env_fn if isinstance(create_env_fn, Mapping) else {"default": create_env_fn}
    return {
        task: functools.partial(
            make_chunk_env, _registered(make) if isinstance(make, str) else _factory(make)
        )
        for task, make in tasks.items()
    }


def _factory(make: Any) -> Callable[[], Any]:
    if not callable(make) or isinstance(make, EnvBase):  # an nn.Module, which is callable
        raise TypeError(
            "create_env_fn must be a function that makes an environment, or the id of one of "
            f"gymnasium, got a {type(make).__name__}. Pass `lambda: ...`: each worker makes its "
            "own."
        )
    return make


def _registered(env_id: str) -> Callable[[], Any]:
    spec = registered_env(env_id, "create_env_fn")
    import gymnasium

    return functools.partial(gymnasium.make, spec)


def check_tasks(schedule: InitStateSchedule, tasks: Collection[str]) -> None:
    """Require an environment factory for every task of the schedule.

    Raises:
        ValueError: naming the tasks that have none.
    """
    unknown = set(schedule.tasks) - set(tasks)
    if unknown:
        raise ValueError(
            f"schedule must name tasks of create_env_fn ({sorted(tasks)}), got "
            f"{sorted(unknown)}. Add a factory for each."
        )


def build_policy(policy_factory: Callable[[], TensorDictModuleBase]) -> TensorDictModuleBase:
    """A policy of the factory; a lane has no observation to find missing shapes with.

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


def match_policy(
    policy: TensorDictModuleBase, specs: EnvSpecs, instruction: str = "."
) -> RowLayout:
    """Call ``policy`` once on zeros and compare what it writes with what the environment takes.

    Args:
        policy (TensorDictModuleBase): the policy; lazy parameters are initialised by the call.
        specs (EnvSpecs): what the environment reads and writes.
        instruction (str): what the policy is told. By default no word, since a tokenizer need not
            know any.

    Returns:
        RowLayout: the row of one decision.

    Raises:
        ValueError: if the policy reads what is not observed, or does not speak the protocol, see
            :func:`~torchrl_dvla.collectors.policy_protocol.require_protocol`.
    """
    require_observed(policy, specs)
    # Zeros, but an action mask of ones: one of zeros would forbid everything.
    zeros = TensorDict(
        {
            key: torch.full((1, *shape), key[-1] == ACTION_MASK, dtype=dtype)
            for key, shape, dtype in specs.observation
        },
        batch_size=[1],
    )
    zeros.set(INSTRUCTION_KEY, NonTensorStack(instruction))
    decisions = decide(policy, zeros)
    require_protocol(policy, decisions, specs)
    recorded = {}
    for key in recorded_keys(policy.out_keys):
        value = decisions.get(key)
        dtype = torch.float32 if value.is_floating_point() else value.dtype
        dtype = torch.int64 if key == ACTION_TOKENS_KEY else dtype
        recorded[key] = (value.shape[1:], dtype)
    chunk_size, action_dim = recorded[ACTION_CHUNK_KEY][0]
    observation = {key: (shape, dtype) for key, shape, dtype in specs.observation}
    return decision_layout(
        observation, chunk_size=chunk_size, action_dim=action_dim, recorded=recorded
    )


def warn_of_misfits(policy: TensorDictModuleBase, specs: EnvSpecs) -> None:
    """Log what a policy and an environment can do without, but are hardly meant to."""
    if not specs.has_instruction and INSTRUCTION_KEY in getattr(policy, "in_keys", ()):
        _log.warning(
            "The environment's specs have no %r, which the policy reads: every decision is taken "
            "for an empty one. Return the task's description.",
            INSTRUCTION_KEY,
        )
    tokenizer: Any = getattr(policy, "action_tokenizer", None)
    if specs.action_bounds is None or not hasattr(tokenizer, "low"):
        return
    span = float(tokenizer.low.min()), float(tokenizer.high.max())
    if not np.allclose(span, specs.action_bounds):
        _log.warning(
            "The policy's actions lie in [%g, %g], those of the environment in [%g, %g]: some are "
            "never tried, or clipped. Wrap the environment in gymnasium.wrappers.RescaleAction("
            "env, %g, %g), or give the policy an action_tokenizer of the environment's bounds.",
            *(*span, *specs.action_bounds, *span),
        )


def check_same_start(group: Group, pool: EnvironmentPool) -> None:
    """Require that the rollouts of a group have started from the same observation and instruction.

    Advantages compare the rollouts of a group with each other, which says something about actions
    only if they started alike. An environment that ignores its seed would be learned from all the
    same. States may differ by 1e-4, pixels by 8 of 255 levels (floating-point entries of three
    dimensions: of their largest magnitude), everything else not at all.

    Args:
        group (Group): its rollouts have taken their first decision.
        pool (EnvironmentPool): their rows.

    Raises:
        ValueError: naming the task and the entry that differs.
    """
    rollouts = group.rollouts
    index = pool.row_index_of([rollout.pages[:1] for rollout in rollouts], [1] * len(rollouts))
    rows = pool.rows.select(OBSERVATION_KEY, INSTRUCTION_ID_KEY)
    for key, values in rows.items(True, True):
        first = values[index].double()
        allowed = torch.zeros(())
        if values.dtype == torch.uint8:
            allowed = torch.tensor(_PIXEL_TOLERANCE)
        elif values.dtype.is_floating_point and values.ndim > 3:  # rows, then those of an image
            allowed = _PIXEL_TOLERANCE / 255 * first[0].abs().max()
        elif values.dtype.is_floating_point:
            allowed = _STATE_TOLERANCE * first[0].abs().clamp_min(1)
        gap = (first - first[0]).abs()
        if (gap > allowed).any():
            raise ValueError(
                "Rollouts of a group must start from the same observation, got "
                f"{key} that differs by {gap.max():g} between two of "
                f"{group.spec}. The environment of task {group.spec.task!r} ignores its seed: let "
                "everything random at a reset, noise too, follow from env.set_seed(seed); in "
                "gymnasium from self.np_random, which super().reset(seed=seed) seeds."
            )


def plan_memory(
    memory: DualPool,
    layout: RowLayout,
    *,
    group: GroupConfig,
    workers: WorkerConfig,
    rollouts_per_env: int = 1,
    replay_buffer: PooledReplayBuffer,
    weight_bytes: int,
    rows_per_page: int,
) -> Plan:
    """Sizes of both pools of a collector, with space for the episodes of an evaluation.

    The groups of an update and one rollout of an evaluation must find pages at once: with fewer
    pages than those groups, the learner would wait for groups that wait for pages; without the one
    rollout, a learner that waits for an evaluation would never free any.

    Raises:
        ValueError: if a budget is too small, with the inequality that fails.
    """
    plan = memory.plan(
        layout=layout,
        group_size=group.group_size,
        candidate_group_size=group.candidate_group_size,
        groups_per_update=group.groups_per_update,
        max_policy_lag=group.max_policy_lag,
        max_decisions=workers.max_decisions,
        num_env=workers.num_workers * workers.envs_per_worker * rollouts_per_env,
        rows_per_page=rows_per_page,
        num_spare_groups=1,  # pages for episodes of an evaluation beside all groups
        weight_bytes=weight_bytes,
        batch_size=replay_buffer.batch_size or 0,
        num_staging=replay_buffer.num_staging,
    )
    batch_size = replay_buffer.batch_size
    if replay_buffer.whole_rollouts and batch_size and batch_size < workers.max_decisions:
        raise ValueError(
            f"batch_size must be at least max_decisions={workers.max_decisions} with "
            f"whole_rollouts, got {batch_size}: a minibatch could not hold the longest rollout. "
            "Raise it or lower WorkerConfig.max_decisions."
        )
    pages_per_rollout = plan.pages_per_group // group.num_candidates
    needed = group.groups_per_update * plan.pages_per_group + pages_per_rollout
    if plan.num_pages < needed:
        page_bytes = plan.rows_per_page * plan.row_bytes
        raise ValueError(
            "env_bytes must hold groups_per_update x pages of a group + pages of an evaluation "
            f"rollout = {group.groups_per_update} x {plan.pages_per_group} + {pages_per_rollout} = "
            f"{needed} pages, got {plan.num_pages}: with fewer, learner and sampling would wait "
            f"for each other. Raise env_bytes by {(needed - plan.num_pages) * page_bytes}, or "
            "lower groups_per_update, group_size or max_decisions."
        )
    return plan


def check_episodes(
    episodes: Sequence[EpisodeSpec],
    tasks: Collection[str],
    quarantined: Collection[str],
    num_frames_episodes: int,
    pool: EnvironmentPool,
) -> None:
    """Require that the episodes of an evaluation can be played, and that there are images to keep.

    Raises:
        ValueError: naming the tasks that are unknown or quarantined, or the missing image.
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
    if num_frames_episodes and IMAGE_KEY not in pool.rows.keys(include_nested=True):
        raise ValueError(
            f"num_frames_episodes must be 0 without {IMAGE_KEY}, got {num_frames_episodes}. The "
            "environment observes no image under this key: rename it, or keep none."
        )


def check_state(state_dict: Mapping[str, Any], seed: int) -> None:
    """Require a collector's state to hold that of its replay buffer, and to be of the same seed.

    Raises:
        ValueError: if it was taken before it did, with another seed, or from something else.
    """
    if missing := {"buffer", "seed"} - state_dict.keys():
        raise ValueError(
            f"The collector's state must hold {sorted(missing)}, got {sorted(state_dict)}. "
            f"{OLDER_VERSION}"
        )
    if state_dict["seed"] != seed:
        raise ValueError(
            f"seed must equal the checkpoint's {state_dict['seed']}, got {seed}. Build the "
            "collector with it, or call set_seed first; with another seed, start anew."
        )
