# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""``DVLACollector`` with ``GRPOLoss`` and ``PooledReplayBuffer``.

Settings: ``num_workers``, ``envs_per_worker``, ``num_scenes`` (of a batched environment; 0: single
ones), ``groups_per_update``, ``group_size``,
``max_policy_lag``, ``max_batch_size``, ``max_wait_s``, ``inference_threads``, ``learner_threads``,
``check_finite``. Beside the result it tells what the lanes did in the stretch.
"""

from __future__ import annotations

import functools

import torch
from common import Clock, report, settings
from environment import ACTION_DIM, EPISODE_STEPS, ReachEnv
from network import CLIP, EPOCHS, LEARNING_RATE, MINIBATCH, GaussianHead, Torso
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential
from tensordict.nn import TensorDictModule as Mod
from torch import distributions, nn
from torchrl.data import Bounded, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase

from torchrl_dvla import (
    DVLACollector,
    GroupConfig,
    GRPOLoss,
    InferenceConfig,
    PooledReplayBuffer,
    WorkerConfig,
)
from torchrl_dvla.envs import ChunkEnv

COUNTS = (
    "collector/decisions",
    "collector/inference_batches",
    "buffer/groups_kept",
    "buffer/no_signal_groups",
    "buffer/groups_dropped",
    "buffer/wait_s",
)


class Policy(nn.Module):
    """Images to mean and standard deviation of chunks of one action, ``[*B, 1, action_dim]``."""

    def __init__(self) -> None:
        super().__init__()
        self.torso, self.head = Torso(), GaussianHead(ACTION_DIM)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, std = self.head(self.torso(image))
        return mean.unsqueeze(-2), std.unsqueeze(-2)


class BatchedReach(EnvBase):
    """``N`` scenes that are stepped one after the other, for one command and one answer.

    Args:
        num_scenes (int): how many.
    """

    def __init__(self, num_scenes: int) -> None:
        super().__init__(batch_size=[num_scenes])
        self._scenes = [ReachEnv(channels_first=True) for _ in range(num_scenes)]
        shape = self._scenes[0].observation_space.shape
        assert shape is not None
        flag = Categorical(2, dtype=torch.bool, shape=(num_scenes, 1))
        image = Unbounded((num_scenes, *shape), dtype=torch.uint8)
        self.observation_spec = Composite(pixels=image, success=flag, shape=self.batch_size)
        self.action_spec = Bounded(-1.0, 1.0, (num_scenes, ACTION_DIM))
        self.reward_spec = Unbounded((num_scenes, 1))
        self.full_done_spec = Composite(done=flag, terminated=flag.clone(), shape=self.batch_size)
        seeds = Unbounded((num_scenes, 1), dtype=torch.int64)
        self.state_spec = Composite(seed=seeds, shape=self.batch_size)
        self._pixels = torch.zeros(num_scenes, *shape, dtype=torch.uint8)

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: object) -> TensorDictBase:
        request = TensorDict({}, self.batch_size) if tensordict is None else tensordict
        everyone = torch.ones(*self.batch_size, 1, dtype=torch.bool)
        seeds = request.get("seed", self.state_spec["seed"].zero()).flatten()
        for k in request.get("_reset", everyone).flatten().nonzero().flatten().tolist():
            image, _ = self._scenes[k].reset(seed=int(seeds[k]))
            self._pixels[k] = torch.from_numpy(image)
        no = torch.zeros(*self.batch_size, 1, dtype=torch.bool)
        entries = {"pixels": self._pixels, "success": no, "done": no, "terminated": no}
        return TensorDict({name: value.clone() for name, value in entries.items()}, self.batch_size)

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        reward = torch.zeros(*self.batch_size, 1)
        done, success = torch.zeros(2, *self.batch_size, 1, dtype=torch.bool)
        everyone = torch.ones(self.batch_size, dtype=torch.bool)
        actions = tensordict["action"].numpy()
        for k in tensordict.get("_step", everyone).flatten().nonzero().flatten().tolist():
            image, reward[k], done[k], _, info = self._scenes[k].step(actions[k])
            success[k] = info["success"]
            self._pixels[k] = torch.from_numpy(image)
        entries = {"pixels": self._pixels.clone(), "success": success, "reward": reward}
        return TensorDict({**entries, "done": done, "terminated": done.clone()}, self.batch_size)

    def _set_seed(self, seed: int | None) -> None:
        """Each episode has one of its own."""


def make_env(num_scenes: int) -> ChunkEnv:
    if num_scenes:
        return ChunkEnv(BatchedReach(num_scenes), chunk_size=1)
    return ChunkEnv(ReachEnv(), chunk_size=1)


def make_policy() -> ProbabilisticTensorDictSequential:
    torch.manual_seed(0)
    return ProbabilisticTensorDictSequential(
        Mod(Policy(), in_keys=[("observation", "image")], out_keys=["loc", "scale"]),
        ProbabilisticTensorDictModule(
            in_keys=["loc", "scale"],
            out_keys=[("vla_action", "chunk")],
            distribution_class=distributions.Normal,
            return_log_prob=True,
            log_prob_key=("vla_action", "log_probs"),
        ),
    )


def main() -> None:
    asked = settings()
    chosen = asked["settings"]
    torch.set_num_threads(chosen["learner_threads"])
    policy = make_policy().eval()
    loss = GRPOLoss(policy, clip_epsilon=CLIP, check_finite=chosen["check_finite"])
    optimizer = torch.optim.Adam(policy.parameters(), LEARNING_RATE)
    buffer = PooledReplayBuffer(batch_size=MINIBATCH, num_epochs=EPOCHS)
    clock = Clock(asked["warm_up_s"], asked["seconds"])
    with DVLACollector(
        functools.partial(make_env, chosen["num_scenes"]),
        policy,
        replay_buffer=buffer,
        group=GroupConfig(
            group_size=chosen["group_size"],
            groups_per_update=chosen["groups_per_update"],
            max_policy_lag=chosen["max_policy_lag"],
        ),
        workers=WorkerConfig(
            num_workers=chosen["num_workers"],
            envs_per_worker=chosen["envs_per_worker"],
            max_decisions=EPISODE_STEPS,
        ),
        inference=InferenceConfig(
            max_batch_size=chosen["max_batch_size"],
            max_wait_s=chosen["max_wait_s"],
            num_threads=chosen["inference_threads"],
        ),
    ) as collector:
        usage, before = collector.timeline.usage(), collector.stats()
        is_over = False
        while not is_over:
            rows = 0
            for batch in buffer:
                loss(batch)["loss_objective"].backward()
                optimizer.step()
                optimizer.zero_grad()
                rows += len(batch)
            collector.update_policy_weights_()
            had_started = clock.has_started
            is_over = clock.learned(rows // EPOCHS)
            if clock.has_started and not had_started:
                usage, before = collector.timeline.usage(), collector.stats()
        stretch, after = collector.timeline.usage().since(usage), collector.stats()
        lanes = {name: round(value, 3) for name, value in stretch.scalars().items()}
        counts = {name: after[name] - before[name] for name in COUNTS}
    report(clock, "torch", "torchrl", "tensordict", lanes=lanes, counts=counts)


if __name__ == "__main__":
    main()
