# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""TorchRL 0.14.1's own ways to collect the toy task, built from its own parts.

Each arrangement is a context manager that counts the decisions it has collected, and has two ways
to spend a stretch of time: ``collect_for`` takes the data and does nothing with it, ``learn_for``
takes the update of ``_toy_task`` on it and syncs the weights.
"""

from __future__ import annotations

import functools
import time
from typing import Any

import torch
from _recipe import Recipe, weights
from _toy_task import (
    CHUNK_SIZE,
    GROUP_SIZE,
    GROUPS_PER_UPDATE,
    LEARNED_SHARE,
    MAX_DECISIONS,
    MINIBATCH,
    TextlessPolicy,
    Update,
    make_policy,
    make_rival_env,
    observations,
)
from tensordict import TensorDictBase
from torchrl.collectors import AsyncBatchedCollector, Collector
from torchrl.envs import ParallelEnv, SerialEnv
from torchrl.envs.utils import ExplorationType

#: Decisions of one update.
UPDATE_DECISIONS = GROUP_SIZE * GROUPS_PER_UPDATE * MAX_DECISIONS // 2


def make_recipe(kind: str, **settings: Any) -> Recipe:
    """The arrangement of TorchRL's VLA recipe on the toy task."""
    return Recipe(
        functools.partial(make_rival_env, kind),
        make_policy,
        Update,
        group_size=GROUP_SIZE,
        minibatch=MINIBATCH,
        update_decisions=LEARNED_SHARE * UPDATE_DECISIONS,
        return_bounds=(0.05, 0.95),
        **settings,
    )


class AsyncBatched:
    """``AsyncBatchedCollector``: environments step while others wait for the policy server.

    Args:
        kind (str): environment, see ``make_rival_env``.

    Keyword Args:
        num_envs (int): environments.
        **kwargs: its settings; see ``SETTINGS`` in ``toy_throughput.py`` for the search.
    """

    def __init__(self, kind: str, *, num_envs: int, **kwargs: Any) -> None:
        policy = TextlessPolicy()
        slots = kwargs.get("transport") == "auto"  # this way the policy is built in its own process
        self._policy, self._shipped = policy.policy, policy
        self._collector = AsyncBatchedCollector(
            [functools.partial(make_rival_env, kind, k, text=False) for k in range(num_envs)],
            frames_per_batch=UPDATE_DECISIONS,
            env_backend="multiprocessing",
            exploration_type=ExplorationType.RANDOM,
            **({"policy_factory": TextlessPolicy} if slots else {"policy": policy}),
            **kwargs,
        )
        self._update = Update(self._policy)
        self._num_decisions = 0

    def __enter__(self) -> AsyncBatched:
        self._batches = iter(self._collector)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._collector.shutdown(raise_on_error=False)

    def num_decisions(self) -> int:
        return self._num_decisions

    def collect_for(self, seconds: float) -> None:
        self._run(seconds, learn=False)

    def learn_for(self, seconds: float) -> None:
        self._run(seconds, learn=True)

    def _run(self, seconds: float, *, learn: bool) -> None:
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s:
            batch = next(self._batches)
            self._num_decisions += batch.numel()
            if learn:
                _learn(self._update, batch)
                self._sync()

    def _sync(self) -> None:
        self._collector.update_policy_weights_(weights(self._shipped))


class Sync(AsyncBatched):
    """``Collector`` in this process, on a batched environment: collect, update, collect.

    Args:
        kind (str): environment, see ``make_rival_env``.

    Keyword Args:
        num_envs (int): environments of the batch.
        batched_env (str): ``"serial"`` or ``"parallel"``; a vectorised environment needs neither.
    """

    def __init__(self, kind: str, *, num_envs: int, batched_env: str) -> None:
        self._policy = make_policy()
        if kind == "vectorised":
            env = make_rival_env(kind, batch_size=(num_envs,))
        else:
            cls = {"serial": SerialEnv, "parallel": ParallelEnv}[batched_env]
            env = cls(
                num_envs, [functools.partial(make_rival_env, kind, k) for k in range(num_envs)]
            )
        self._collector = Collector(
            env,
            self._policy,
            frames_per_batch=max(1, UPDATE_DECISIONS // num_envs) * num_envs,
            total_frames=-1,
            exploration_type=ExplorationType.RANDOM,
        )
        self._update = Update(self._policy)
        self._num_decisions = 0

    def _sync(self) -> None:
        pass  # the collector calls the very policy that was updated


def _learn(update: Update, batch: TensorDictBase) -> None:
    """Learn from the share that the groups with contrast would hold."""
    batch = batch.reshape(-1)
    batch = batch[: int(LEARNED_SHARE * batch.numel())].exclude("next")
    if "language_instruction" not in set(batch.keys()):
        batch["language_instruction"] = observations(len(batch))["language_instruction"]
    if "action_is_pad" not in set(batch.keys()):
        batch["action_is_pad"] = torch.zeros(*batch.shape, CHUNK_SIZE, dtype=torch.bool)
    batch["advantage"] = torch.ones(*batch.shape, 1)
    for minibatch in batch.split(MINIBATCH):
        update(minibatch)
