# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Small policies of every family, and observations for them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tensordict import NonTensorStack, TensorDict
from torchrl.data.vla import UniformActionTokenizer

from torchrl_dvla.modules import TinyBackboneConfig, TransformersVLA

INSTRUCTIONS = ["pick up the black bowl and place it on the plate", "open the drawer", "lift it"]
ACTION_DIM, CHUNK, STATE_DIM, BINS = 6, 4, 6, 16

#: A backbone of a few ten thousand parameters: facts about layout do not need more.
SMALL = TinyBackboneConfig(
    image_size=32, patch_size=8, vision_size=32, vision_layers=2, text_size=32, text_layers=2,
    head_size=16, mlp_ratio=2.0,
)  # fmt: skip


def small_policy(**kwargs: object) -> TransformersVLA:
    kwargs.setdefault("action_tokenizer", UniformActionTokenizer(BINS, low=-1.0, high=1.0))
    kwargs.setdefault("state_dim", STATE_DIM)
    policy = TransformersVLA.tiny(
        INSTRUCTIONS, action_dim=ACTION_DIM, chunk_size=CHUNK, backbone=SMALL, **kwargs
    )
    # The head starts nearly uniform; with larger logits a wrong token shows.
    policy.query_head.projection.weight.data.mul_(30.0)
    return policy


def observation(
    *batch: int,
    instructions: list[str] | None = None,
    size: int = 32,
    state_dim: int = STATE_DIM,
    wrist: bool = False,
) -> TensorDict:
    generator = torch.Generator().manual_seed(0)

    def image() -> torch.Tensor:
        shape = (*batch, 3, size, size)
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)

    num_rows = torch.Size(batch).numel()
    names = instructions or [INSTRUCTIONS[i % len(INSTRUCTIONS)] for i in range(num_rows)]
    td = TensorDict(
        {
            "observation": {
                "image": image(),
                "state": torch.randn(*batch, state_dim, generator=generator),
            }
        },
        batch_size=list(batch),
    )
    if wrist:
        td["observation", "wrist_image"] = image()
    if batch:
        strings = NonTensorStack(*names)
        td["language_instruction"] = strings.view(*batch) if len(batch) > 1 else strings
    else:
        td["language_instruction"] = names[0]
    return td


@pytest.fixture
def policy() -> TransformersVLA:
    return small_policy()


@pytest.fixture
def make_policy() -> Callable[..., TransformersVLA]:
    return small_policy


@pytest.fixture
def make_observation() -> Callable[..., TensorDict]:
    return observation
