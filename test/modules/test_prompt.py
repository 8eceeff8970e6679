# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Layout of the token stream: ids, positions, and who sees whom."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tensordict import TensorDict

from torchrl_dvla.modules import TransformersVLA
from torchrl_dvla.modules.backbones import PromptStyle
from torchrl_dvla.modules.prompt import Prompt, PromptBuilder

Make = Callable[..., TransformersVLA]
CPU, F32 = torch.device("cpu"), torch.float32


def builder(policy: TransformersVLA, **kwargs: object) -> PromptBuilder:
    defaults = {
        "style": PromptStyle(), "num_cameras": 1, "use_state": True, "num_queries": 2,
        "bidirectional": False,
    }  # fmt: skip
    return PromptBuilder(policy.backbone, policy.tokenizer, **{**defaults, **kwargs})


def lay_out(prompt: PromptBuilder, *instructions: str) -> Prompt:
    return prompt(list(instructions), device=CPU, dtype=F32)


def test_ids_are_padded_on_the_right(policy: TransformersVLA):
    prompt = lay_out(builder(policy), "lift it", "open the drawer")
    vocabulary = policy.tokenizer.get_vocab()
    expected = [[vocabulary[w] for w in ("lift", "it")] + [0]]
    expected += [[vocabulary[w] for w in ("open", "the", "drawer")]]
    assert prompt.token_ids.tolist() == expected


def test_positions_count_from_the_end_of_the_own_instruction(policy: TransformersVLA):
    # 32 x 32 image, patch 8, shuffle 2: 4 image tokens; then one state token.
    prompt = lay_out(builder(policy), "lift it", "open the drawer")
    assert prompt.position_ids.tolist() == [
        [
            [0, 1, 2, 3, 4, 5, 6, 7, 7, 8],  # the padding's own position is of no account
            [0, 1, 2, 3, 4, 5, 6, 7, 8, 9],
        ]
    ]


@pytest.mark.parametrize("bidirectional", [False, True])
def test_who_sees_whom(policy: TransformersVLA, bidirectional: bool):
    prompt = lay_out(builder(policy, bidirectional=bidirectional), "lift it", "open the drawer")
    seen = prompt.attention_bias == 0
    assert seen.shape == (2, 1, 10, 10)
    assert ((prompt.attention_bias == 0) | (prompt.attention_bias == -torch.inf)).all()
    for row, padding in enumerate(([7], [])):
        for query in range(10):
            for key in range(10):
                if key in padding:
                    wanted = False
                elif query >= 8:
                    wanted = True  # queries see the prompt and each other, both ways
                elif key >= 8:
                    wanted = False
                else:
                    wanted = bidirectional or key <= query
                assert seen[row, 0, query, key] == wanted, (row, query, key)


def test_mask_is_shared_where_nothing_is_padded(policy: TransformersVLA):
    prompt = lay_out(builder(policy), "lift it", "lift it")
    assert prompt.attention_bias.shape[0] == 1


def test_frame_of_two_cameras_with_text(policy: TransformersVLA):
    style = PromptStyle("pick", "up the", "it", "{instruction} it")
    prompt = builder(policy, style=style, num_cameras=2)
    # pick | up the | 4 image | it | up the | 4 image | it | state
    assert prompt.frame_length == 1 + 2 * (2 + 4 + 1) + 1
    assert (len(prompt.start_ids), len(prompt.image_start_ids), len(prompt.image_end_ids)) == (
        1,
        2,
        1,
    )
    assert len(prompt.instruction_ids("lift")) == 2


def test_small_batches_are_remembered(policy: TransformersVLA):
    prompt = builder(policy, cache_size=2)
    first = lay_out(prompt, "lift it")
    assert lay_out(prompt, "lift it") is first
    assert lay_out(prompt, "open it") is not first
    lay_out(prompt, "pick it")
    assert lay_out(prompt, "lift it") is not first  # only two are kept


@torch.no_grad()
def test_queries_see_each_other_but_not_backwards(
    policy: TransformersVLA, make_observation: Callable[..., TensorDict]
):
    """Changing the last action query changes the first action, and nothing in the prompt."""
    td = make_observation(2)
    states: list[torch.Tensor] = []
    last = policy.backbone.model.text_model.layers[-1]
    handle = last.register_forward_hook(lambda module, args, output: states.append(output))
    before = policy.action_logits(td)
    policy.query_head.queries.data[-1] += 1.0
    after = policy.action_logits(td)
    handle.remove()
    assert (before[:, 0] - after[:, 0]).abs().max() > 1e-3
    num_queries = len(policy.query_head.queries)
    assert torch.equal(states[0][:, :-num_queries], states[1][:, :-num_queries])
    assert not torch.equal(states[0][:, -num_queries:], states[1][:, -num_queries:])


@torch.no_grad()
def test_padding_changes_nothing(
    policy: TransformersVLA, make_observation: Callable[..., TensorDict]
):
    """Whatever the padding embeds to, logits stay; and a longer neighbour adds padding only."""
    td = make_observation(2, instructions=["lift it", "pick up the black bowl"])
    before = policy.action_logits(td)
    policy.backbone.model.text_model.embed_tokens.weight.data[0] = 123.0
    assert torch.equal(policy.action_logits(td), before)
    alone = policy.action_logits(td[:1])
    torch.testing.assert_close(alone, before[:1], rtol=1e-4, atol=1e-4)


def test_style_needs_a_place_for_the_instruction():
    with pytest.raises(ValueError, match=r"must contain '{instruction}', got 'do it'"):
        PromptStyle(instruction="do it")
