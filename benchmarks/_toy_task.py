# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The toy task, its policy and its update, the same for every arrangement that is compared.

The sizes are those of TorchRL's own toy configuration of its VLA recipe: 16x16 images, chunks of
4, at most 6 decisions an episode, a success after two env steps in a row within 0.35 of the target,
64 bins, a hidden size of 128, groups of 4, 8 groups an update, minibatches of 64.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from tensordict import NonTensorStack, TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.envs import (
    Compose,
    EnvBase,
    ExcludeTransform,
    MultiAction,
    StepCounter,
    SuccessReward,
    ToyVLAEnv,
    TransformedEnv,
)
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules.vla import TinyVLA

from torchrl_dvla.envs import ToyChunkEnv
from torchrl_dvla.modules import tiny_token_policy
from torchrl_dvla.objectives import GRPOLoss

ACTION_DIM, CHUNK_SIZE, IMAGE_SIZE, MAX_DECISIONS = 2, 4, 16, 6
GROUP_SIZE, GROUPS_PER_UPDATE, MINIBATCH = 4, 8, 64
#: Share of the collected decisions that a uniform policy's groups with contrast hold, measured in
#: this task. Arrangements without groups learn from this share of what they collect.
LEARNED_SHARE = 0.6


class GroupedToyChunkEnv(ToyChunkEnv):
    """``ToyChunkEnv`` with the group ids that TorchRL's arrangement reads off the data.

    ``DVLACollector`` seeds every reset and knows its groups by itself; ``ToyVLAEnv`` replays a
    target ``group_repeats`` times and says which group it is, and so does this one.
    """

    def __init__(self, *, group_repeats: int, group_id_offset: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.group_repeats, self.group_id_offset = group_repeats, group_id_offset
        spec = ToyVLAEnv(
            action_dim=2, state_dim=4, success_steps=2, group_repeats=1
        ).observation_spec["group_id"]
        self.observation_spec["group_id"] = spec

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> TensorDict:
        out = super()._reset(tensordict, **kwargs)
        return out.set("group_id", self._group_id.clone())

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        return super()._step(tensordict).set("group_id", self._group_id.clone())


def make_chunk_env() -> ToyChunkEnv:
    """What ``DVLACollector`` runs."""
    return ToyChunkEnv(action_dim=ACTION_DIM, chunk_size=CHUNK_SIZE, image_size=IMAGE_SIZE)


def make_rival_env(
    kind: str, worker_idx: int = 0, batch_size: tuple[int, ...] = (), *, text: bool = True
) -> EnvBase:
    """The environment of TorchRL's arrangements.

    Args:
        kind (str): ``"stock"``: ``ToyVLAEnv`` with ``MultiAction``, as the recipe builds it;
            ``"chunk"``: ``ToyChunkEnv``; ``"vectorised"``: the first with a batch dimension.
        worker_idx (int): sets the seed and the group ids apart.
        batch_size (tuple of int): of ``"vectorised"``.

    Keyword Args:
        text (bool): whether the instruction stays in the data. ``AsyncBatchedCollector`` takes its
            fast ways only where all leaves are tensors; :class:`TextlessPolicy` puts the string
            back.
    """
    dropped = () if text else (ExcludeTransform("language_instruction"),)
    group = {"group_repeats": GROUP_SIZE, "group_id_offset": worker_idx * 10**6}
    if kind == "chunk":
        env = GroupedToyChunkEnv(
            action_dim=ACTION_DIM,
            chunk_size=CHUNK_SIZE,
            image_size=IMAGE_SIZE,
            seed=worker_idx,
            **group,
        )
        return TransformedEnv(env, Compose(StepCounter(max_steps=MAX_DECISIONS), *dropped))
    stock = ToyVLAEnv(
        action_dim=ACTION_DIM,
        state_dim=2 * ACTION_DIM,
        image_shape=(3, IMAGE_SIZE, IMAGE_SIZE),
        success_steps=2,
        success_tol=0.35,
        seed=worker_idx,
        batch_size=torch.Size(batch_size),
        device="cpu",  # ParallelEnv's; else its first partial reset fails
        **({} if kind == "vectorised" else group),
    )
    transforms = (
        MultiAction.from_vla(stack_rewards=False),
        SuccessReward(),
        StepCounter(max_steps=MAX_DECISIONS),
        *dropped,
    )
    return TransformedEnv(stock, Compose(*transforms))


def make_policy() -> TinyVLA:
    """A policy whose lazy layers are there; it samples where the context asks for it."""
    torch.manual_seed(0)
    policy = tiny_token_policy(ACTION_DIM, CHUNK_SIZE, vocab_size=64, hidden_dim=128)
    with torch.no_grad():
        policy(observations(1))
    return policy


class TextlessPolicy(TensorDictModuleBase):
    """The same policy for data without strings: it adds the one instruction of the task itself."""

    def __init__(self) -> None:
        super().__init__()
        self.policy = make_policy()
        self.in_keys = [key for key in self.policy.in_keys if key != "language_instruction"]
        self.out_keys = list(self.policy.out_keys)
        self._texts: dict[int, NonTensorStack] = {}

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        size = tensordict.batch_size[0]
        if size not in self._texts:
            self._texts[size] = observations(size)["language_instruction"]
        tensordict.set("language_instruction", self._texts[size])
        return self.policy(tensordict).exclude("language_instruction")


def observations(batch_size: int) -> TensorDict:
    """A batch of what the policy reads."""
    texts = NonTensorStack(*["push the T-shaped block onto the target"] * batch_size)
    return TensorDict(
        {
            "observation": {
                "image": torch.zeros(batch_size, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8),
                "state": torch.zeros(batch_size, 2 * ACTION_DIM),
            },
            "language_instruction": texts,
        },
        batch_size=[batch_size],
    )


class Update:
    """The gradient step that every arrangement takes for each minibatch.

    The learning rate is so small that the policy stays uniform: all arrangements play episodes of
    the same lengths throughout.
    """

    def __init__(self, policy: TinyVLA) -> None:
        self._loss = GRPOLoss(policy)
        self._optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-7)

    def __call__(self, batch: TensorDictBase) -> None:
        self._loss(batch)["loss_objective"].backward()
        self._optimizer.step()
        self._optimizer.zero_grad()


def cost_alone(batch_size: int, seconds: float) -> dict[str, float]:
    """CPU seconds a decision of environment, policy and update, called directly.

    Args:
        batch_size (int): rows of one policy call.
        seconds (float): how long each is measured.
    """
    torch.set_num_threads(1)
    policy = make_policy()

    def per_call(function: Any) -> float:
        function()
        count, start_s, end_s = 0, time.thread_time(), time.monotonic() + seconds
        while time.monotonic() < end_s:
            function()
            count += 1
        return (time.thread_time() - start_s) / count

    env, state = make_chunk_env(), {"left": 0, "decisions": 0}

    def decide() -> None:
        if not state["left"]:
            state["td"], state["left"] = env.reset(), MAX_DECISIONS
        td = state["td"].set(("vla_action", "chunk"), torch.rand(CHUNK_SIZE, ACTION_DIM) * 2 - 1)
        td = env.step(td)
        state["left"] = 0 if td["next", "done"] else state["left"] - 1
        # The root of the next decision: its preparation is the collector's work, not measured.
        state["td"] = td["next"]

    batch = observations(batch_size)
    with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
        policy_s = per_call(lambda: policy(batch)) / batch_size
        minibatch = policy(observations(MINIBATCH))
    minibatch["advantage"] = torch.randn(MINIBATCH, 1)
    minibatch["action_is_pad"] = torch.zeros(MINIBATCH, CHUNK_SIZE, dtype=torch.bool)
    update = Update(policy)
    return {
        "env_s": per_call(decide),
        "policy_s": policy_s,
        "update_s": per_call(lambda: update(minibatch)) / MINIBATCH,
    }
