# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""TorchRL: ``ClipPPOLoss`` with the data of each of its arrangements.

Settings: ``arrangement``, ``num_workers``, ``envs_per_worker``, ``frames_per_batch``,
``learner_threads``, and what the arrangement takes:

sync         ``Collector`` in this process, on ``SerialEnv`` or ``ParallelEnv`` (``batched_env``).
multi_sync   ``MultiSyncCollector``: collecting processes with a policy each, in step.
multi_async  ``MultiAsyncCollector``: the same, while the learner learns from an earlier batch.
async        ``AsyncBatchedCollector``: environments in processes, the policy in one of its own
             (``transport`` auto) or in a thread of this one (driver); ``max_batch_size``,
             ``server_timeout``.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from common import Clock, report, settings
from environment import ACTION_DIM, ReachEnv
from network import (
    CLIP,
    EPOCHS,
    GAE_LAMBDA,
    GAMMA,
    LEARNING_RATE,
    MINIBATCH,
    NUM_FEATURES,
    GaussianHead,
    Torso,
)
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule as Mod
from tensordict.nn import TensorDictSequential
from torch import nn
from torchrl.collectors import (
    AsyncBatchedCollector,
    Collector,
    MultiAsyncCollector,
    MultiSyncCollector,
)
from torchrl.envs import EnvBase, GymWrapper, ParallelEnv, SerialEnv
from torchrl.envs.utils import ExplorationType
from torchrl.modules import IndependentNormal, ProbabilisticActor, ValueOperator
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value.functional import vec_generalized_advantage_estimate


def make_env() -> EnvBase:
    """Images under ``"pixels"``, ``[3, H, W]``."""
    return GymWrapper(ReachEnv(channels_first=True))


def make_batched_env(cls: type[EnvBase], num_envs: int) -> EnvBase:
    return make_env() if num_envs == 1 else cls(num_envs, make_env)


def make_parts() -> tuple[Mod, ProbabilisticActor, ValueOperator]:
    """Torso, actor and critic; the last two read what the first has written."""
    torch.manual_seed(0)
    torso = Mod(Torso(), in_keys=["observation"], out_keys=["hidden"])
    actor = ProbabilisticActor(
        Mod(GaussianHead(ACTION_DIM), in_keys=["hidden"], out_keys=["loc", "scale"]),
        in_keys=["loc", "scale"],
        distribution_class=IndependentNormal,
        distribution_kwargs={"tanh_loc": False},
        return_log_prob=True,
    )
    return torso, actor, ValueOperator(nn.Linear(NUM_FEATURES, 1), in_keys=["hidden"])


def make_policy() -> TensorDictSequential:
    """Actor and critic over one torso. What is recorded beside actions is little: no features."""
    return TensorDictSequential(
        *make_parts(),
        selected_out_keys=["action", "action_log_prob", "state_value"],
    )


def make_collector(chosen: dict[str, Any], policy: TensorDictSequential) -> Any:
    shared = {
        "frames_per_batch": chosen["frames_per_batch"],
        "total_frames": -1,
        "exploration_type": ExplorationType.RANDOM,
    }
    arrangement, num_workers = chosen["arrangement"], chosen["num_workers"]
    if arrangement == "sync":
        cls = {"serial": SerialEnv, "parallel": ParallelEnv}[chosen["batched_env"]]
        return Collector(make_batched_env(cls, num_workers), policy, **shared)
    if arrangement == "async":
        in_process = chosen["transport"] == "auto"
        return AsyncBatchedCollector(
            [make_env] * (num_workers * chosen["envs_per_worker"]),
            **({"policy_factory": make_policy} if in_process else {"policy": policy}),
            **({} if in_process else {"envs_per_worker": chosen["envs_per_worker"]}),
            env_backend="multiprocessing",
            transport=chosen["transport"],
            max_batch_size=chosen["max_batch_size"],
            server_timeout=chosen["server_timeout"],
            **shared,
        )
    make = functools.partial(make_batched_env, SerialEnv, chosen["envs_per_worker"])
    if arrangement == "multi_sync":
        return MultiSyncCollector([make] * num_workers, policy, cat_results="stack", **shared)
    return MultiAsyncCollector([make] * num_workers, policy, **shared)


def by_environment(batch: TensorDictBase) -> Iterator[TensorDictBase]:
    """Consecutive decisions ``[T]`` of one environment at a time, whatever shape batches have."""
    if "env_index" in batch:
        index = batch["env_index"]
        index = index.flatten() if isinstance(index, torch.Tensor) else torch.tensor(list(index))
        for env in index.unique():
            yield batch[index == env]
    else:
        yield from batch.reshape(-1, batch.shape[-1]).unbind(0) if batch.ndim > 1 else [batch]


@torch.no_grad()
def with_advantages(batch: TensorDictBase, torso: Mod, critic: ValueOperator) -> TensorDictBase:
    """Rows ``[N]`` with advantages from the values that were recorded while collecting.

    The value after a decision is that before the next one, so that the critic is run for the
    last decision of each environment alone.
    """
    rows = list(by_environment(batch))
    last = torch.stack([row["next", "observation"][-1] for row in rows])
    last_values = critic.module(torso.module(last))
    found = []
    for row, last_value in zip(rows, last_values):
        value = row["state_value"]
        done, terminated = row["next", "done"], row["next", "terminated"]
        advantage, target = vec_generalized_advantage_estimate(
            GAMMA,
            GAE_LAMBDA,
            value,
            torch.cat([value[1:], last_value[None]]),
            row["next", "reward"],
            done=done,
            terminated=terminated,
        )
        kept = row.select("observation", "action", "action_log_prob", "state_value")
        found.append(kept.update({"advantage": advantage, "value_target": target}))
    rows = torch.cat([row.to_tensordict() for row in found])
    advantage = rows["advantage"]
    return rows.set("advantage", (advantage - advantage.mean()) / advantage.std().clamp_min(1e-6))


def main() -> None:
    warnings.filterwarnings("ignore")
    asked = settings()
    chosen = asked["settings"]
    torch.set_num_threads(chosen["learner_threads"])
    policy = make_policy()
    torso, actor, critic = (policy.module[k] for k in range(3))
    loss_module = ClipPPOLoss(actor, critic, clip_epsilon=CLIP, entropy_coeff=0.0)
    parameters = [*torso.parameters(), *loss_module.parameters()]
    optimizer = torch.optim.Adam(parameters, LEARNING_RATE)
    collector = make_collector(chosen, policy)
    clock = Clock(asked["warm_up_s"], asked["seconds"])
    for batch in collector:
        rows = with_advantages(batch, torso, critic)
        for _ in range(EPOCHS):
            for index in torch.randperm(len(rows)).split(MINIBATCH):
                minibatch = torso(rows[index])  # once, for actor and critic
                losses = loss_module(minibatch)
                (losses["loss_objective"] + losses["loss_critic"]).backward()
                optimizer.step()
                optimizer.zero_grad()
        if chosen["arrangement"] != "sync":  # there the collector calls the very policy
            collector.update_policy_weights_(TensorDict.from_module(policy).data.clone())
        if clock.learned(len(rows)):
            break
    collector.shutdown()
    report(clock, "torchrl", "tensordict", "torch", "gymnasium")


if __name__ == "__main__":
    main()
