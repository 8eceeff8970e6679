# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Facts about the policy that can be checked by hand."""

from __future__ import annotations

import pytest
import torch
from tensordict import NonTensorStack, TensorDict
from torch.nn import functional as F
from torchrl.data.vla import UniformActionTokenizer
from torchrl.envs import MultiAction, ToyVLAEnv, TransformedEnv
from torchrl.envs.utils import ExplorationType, set_exploration_type

from torchrl_dvla.modules import TransformersVLA

from .policies import make_observation, make_policy

TOKENS, LOG_PROBS, CHUNK = (("vla_action", name) for name in ("tokens", "log_probs", "chunk"))


@torch.no_grad()
def test_writes_tokens_log_probs_and_chunk(policy):
    td = policy(make_observation(3))
    assert td[TOKENS].shape == td[LOG_PROBS].shape == td[CHUNK].shape == (3, 4, 6)
    assert td[TOKENS].dtype == torch.int64
    # Bin centres of 16 bins over [-1, 1]: -1 + (token + 0.5) / 8.
    torch.testing.assert_close(td[CHUNK], -1.0 + (td[TOKENS] + 0.5) / 8.0)


@pytest.mark.parametrize("batch", [(), (1,), (5,), (2, 3), (2, 1, 2)])
@torch.no_grad()
def test_any_leading_batch_shape(policy, batch):
    td = make_observation(*batch)
    logits = policy.action_logits(td)
    assert logits.shape == (*batch, 4, 6, 16)
    flat = policy.action_logits(td.reshape(-1) if batch else td[None])
    torch.testing.assert_close(logits.reshape(-1, 4, 6, 16), flat)


@torch.no_grad()
def test_greedy_takes_the_largest_logit(policy):
    td = make_observation(4)
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        policy(td)
    assert torch.equal(td[TOKENS], policy.action_logits(make_observation(4)).argmax(-1))


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
@torch.no_grad()
def test_log_probs_are_those_of_the_sampled_distribution(temperature):
    policy = make_policy(temperature=temperature)
    td = make_observation(4)
    with set_exploration_type(ExplorationType.RANDOM):
        policy(td)
    expected = F.log_softmax(policy.action_logits(td) / temperature, -1)
    expected = expected.gather(-1, td[TOKENS].unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(td[LOG_PROBS], expected)
    # What the learner computes: the importance ratio at equal weights is one.
    torch.testing.assert_close(policy.get_dist(td).log_prob(td[TOKENS]), td[LOG_PROBS])
    rescored = policy.log_prob(td.clone())
    torch.testing.assert_close(rescored[LOG_PROBS], td[LOG_PROBS])


@torch.no_grad()
def test_stored_logits_are_before_the_temperature():
    policy = make_policy(temperature=2.0, return_logits=True)
    td = policy(make_observation(2))
    logits = td["vla_action", "logits"]
    torch.testing.assert_close(logits, policy.action_logits(make_observation(2)))
    # get_dist reads them and applies the temperature once.
    torch.testing.assert_close(policy.get_dist(td).logits, F.log_softmax(logits / 2.0, -1))


@torch.no_grad()
def test_logits_only_for_supervised_training(policy):
    out = policy(make_observation(2), logits_only=True, tensordict_out=TensorDict())
    assert set(out.keys(True, True)) == {("vla_action", "logits")}
    logits = policy.action_logits(make_observation(2))
    torch.testing.assert_close(out["vla_action", "logits"], logits)


@torch.no_grad()
def test_sequence_log_prob_is_the_sum_over_tokens():
    by_token, by_sequence = make_policy(), make_policy(log_probs_mode="sequence")
    one, other = by_token(make_observation(3)), by_sequence(make_observation(3))
    assert other[LOG_PROBS].shape == (3,)
    torch.testing.assert_close(other[LOG_PROBS], one[LOG_PROBS].sum((-2, -1)))


@torch.no_grad()
def test_a_row_does_not_depend_on_its_batch(policy):
    # The rows' instructions have different lengths: alone, each is padded to another length.
    td = make_observation(3)
    together = policy.action_logits(td)
    alone = torch.stack([policy.action_logits(td[i]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_every_input_matters(policy):
    td = make_observation(2)
    logits = policy.action_logits(td)

    def changed(**kwargs: object) -> torch.Tensor:
        other = td.clone()
        for key, value in kwargs.items():
            other[("observation", key) if key != "language_instruction" else key] = value
        return (policy.action_logits(other) - logits).abs().amax((-3, -2, -1))

    image = td["observation", "image"].clone()
    image[0, :, :8, :8] = 255
    difference = changed(image=image)
    assert difference[0] > 1e-3 and difference[1] < 1e-5
    assert (changed(state=td["observation", "state"] + 1.0) > 1e-3).all()
    difference = changed(language_instruction=NonTensorStack("open it", "open the drawer"))
    assert difference[0] > 1e-3 and difference[1] < 1e-5


@torch.no_grad()
def test_location_of_a_patch_matters(policy):
    patch = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8)
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    images[0, :, :8, :8] = patch
    images[1, :, :8, 8:16] = patch  # a neighbour inside the same pixel-shuffle square
    observation = {"image": images, "state": torch.zeros(2, 6)}
    td = TensorDict({"observation": observation, "language_instruction": "lift it"}, [2])
    logits = policy.action_logits(td)
    assert (logits[0] - logits[1]).abs().max() > 1e-2


@pytest.mark.parametrize("tokens_per_step", [1, 2, 6])
@torch.no_grad()
def test_queries_per_env_step(tokens_per_step):
    policy = make_policy(tokens_per_step=tokens_per_step)
    head = policy.query_head
    assert head.queries.shape == (4 * tokens_per_step, 32)
    assert head.projection.out_features == 6 // tokens_per_step * 16
    assert policy.action_logits(make_observation(2)).shape == (2, 4, 6, 16)
    # Query q speaks for env step q // tokens_per_step, its dimensions in order.
    hidden = torch.zeros(1, 4 * tokens_per_step, 32)
    base = head(hidden)
    hidden[0, 0] = 1.0
    touched = (head(hidden) != base).any(-1)[0]
    expected = torch.zeros(4, 6, dtype=torch.bool)
    expected[0, : 6 // tokens_per_step] = True
    assert torch.equal(touched, expected)


@torch.no_grad()
def test_wrist_camera_is_read():
    policy = make_policy(num_cameras=2)
    assert ("observation", "wrist_image") in policy.in_keys
    td = make_observation(2, wrist=True)
    logits = policy.action_logits(td)
    td["observation", "wrist_image"] = td["observation", "image"]
    assert (policy.action_logits(td) - logits).abs().max() > 1e-3
    swapped = td.clone()
    with pytest.raises(KeyError, match="wrist_image"):
        policy.action_logits(swapped.exclude(("observation", "wrist_image")))


@torch.no_grad()
def test_weights_may_live_elsewhere():
    """Parameters pointed at foreign memory, or swapped for a call, are the ones that count."""
    policy, other = make_policy(), make_policy(seed=1)
    td = make_observation(2)
    wanted = other.action_logits(td)
    weights = TensorDict.from_module(other).data.clone()
    with weights.to_module(policy):
        assert torch.equal(policy.action_logits(td), wanted)
    assert not torch.equal(policy.action_logits(td), wanted)

    shared = TensorDict.from_module(policy).data.clone().share_memory_()
    shared_flat = shared.flatten_keys(".")
    for name, parameter in policy.named_parameters():
        parameter.data = shared_flat[name]
    shared.update_(weights)
    assert torch.equal(policy.action_logits(td), wanted)


def test_every_parameter_gets_a_gradient(policy):
    logits = policy.action_logits(make_observation(3)).flatten(0, -2)
    F.cross_entropy(logits, torch.arange(72) % 16).backward()
    without = [name for name, p in policy.named_parameters() if p.grad is None]
    assert without == []
    zero = [name for name, p in policy.named_parameters() if not p.grad.any()]
    # A softmax does not notice a constant added to all its scores.
    assert all(name.endswith("k_proj.bias") for name in zero)


def test_frozen_parts_stay(tmp_path):
    make_policy().save_pretrained(tmp_path)
    policy = TransformersVLA.from_pretrained(tmp_path, freeze_vision=True, freeze_language=True)
    policy.action_logits(make_observation(2)).sum().backward()
    trained = {name.split(".")[0] for name, p in policy.named_parameters() if p.requires_grad}
    assert trained == {"backbone", "state_projector", "query_head"}
    moving = {name for name, p in policy.named_parameters() if p.grad is not None}
    assert {name for name in moving if name.startswith("backbone")} == {
        "backbone.model.connector.modality_projection.proj.weight"
    }


def test_same_seed_same_weights_and_global_generator_untouched():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    one, two, other = make_policy(seed=3), make_policy(seed=3), make_policy(seed=4)
    assert torch.equal(torch.rand(1), expected)
    pairs = zip(one.parameters(), two.parameters())
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(one.query_head.queries, other.query_head.queries)


def test_scale_of_the_initial_queries():
    one, small = make_policy(), make_policy(query_std=0.02)
    torch.testing.assert_close(small.query_head.queries, 0.02 * one.query_head.queries)


def test_learns_where_the_block_is():
    """Behaviour cloning finds a block's column in a few seconds: location reaches the head."""
    bins = UniformActionTokenizer(4, low=-1.0, high=1.0)
    policy = make_policy(state_dim=0, action_tokenizer=bins)
    images = torch.zeros(16, 3, 32, 32, dtype=torch.uint8)
    column = torch.arange(16) % 4
    for i in range(16):
        row = i // 4 * 8
        images[i, :, row : row + 8, 8 * column[i] : 8 * column[i] + 8] = 255
    td = TensorDict({"observation": {"image": images}, "language_instruction": "lift it"}, [16])
    target = column[:, None, None].expand(16, 4, 6).flatten()
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    for _ in range(60):
        loss = F.cross_entropy(policy.action_logits(td).flatten(0, -2), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    with torch.no_grad():
        assert torch.equal(policy(td)[TOKENS].flatten(), target)


def test_drives_a_chunked_environment():
    env = TransformedEnv(
        ToyVLAEnv(action_dim=6, state_dim=6, image_shape=(3, 32, 32)),
        MultiAction.from_vla(stack_rewards=False),
    )
    with set_exploration_type(ExplorationType.RANDOM), torch.no_grad():
        rollout = env.rollout(2, make_policy())
    assert rollout[CHUNK].shape == (2, 4, 6)


@pytest.mark.parametrize(
    ("td", "error", "message"),
    [
        (make_observation(2, size=64), ValueError, r"\[\*B, 3, 32, 32\], got .*64\).*Render"),
        (make_observation(2, state_dim=9), ValueError, r"must have shape \[\*B, 6\], got \(2, 9\)"),
        (make_observation(2).exclude(("observation", "image")), KeyError, "image"),
        (make_observation(2).exclude(("observation", "state")), KeyError, "state"),
        (make_observation(2).exclude("language_instruction"), KeyError, "language_instruction"),
        (make_observation(1, instructions=[""]), ValueError, "at least one token"),
    ],
)
def test_bad_observations(policy, td, error, message):
    with pytest.raises(error, match=message):
        policy(td)


def test_number_of_instructions(policy):
    td = make_observation(2)
    td.batch_size = []
    td["language_instruction"] = NonTensorStack("lift it", "lift it", "lift it")
    with pytest.raises(ValueError, match="must hold 2 instructions"):
        policy.action_logits(td)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"temperature": float("inf")}, "temperature must be a finite number"),
        ({"tokens_per_step": 4}, "must be a divisor of action_dim=6, got 4"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        make_policy(**settings)


def test_diverged_weights_are_not_sampled_from(policy):
    policy.query_head.projection.weight.data.fill_(torch.nan)
    with set_exploration_type(ExplorationType.RANDOM), torch.no_grad():
        with pytest.raises(ValueError, match="must be finite"):
            policy(make_observation(1))


def test_ensembles_run_under_vmap():
    """As TorchRL's losses call ensembles: one module over stacked parameters."""
    policies = [make_policy(seed=seed) for seed in (0, 1)]
    params, td = TensorDict.from_modules(*policies, as_module=False), make_observation(3)

    def call(params):
        with params.to_module(policies[0]):
            return policies[0].action_logits(td), policies[0](td.copy())[TOKENS]

    with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
        logits, tokens = torch.vmap(call, randomness="different")(params)
    assert tokens.shape == (2, 3, 4, 6) and not torch.equal(tokens[0], tokens[1])
    for policy, found in zip(policies, logits, strict=True):
        torch.testing.assert_close(found, policy.action_logits(td))
    weights = dict(policies[1].named_parameters())
    swapped = torch.func.functional_call(policies[0], weights, (td.copy(),))
    torch.testing.assert_close(swapped[LOG_PROBS], policies[1](td.copy())[LOG_PROBS])
