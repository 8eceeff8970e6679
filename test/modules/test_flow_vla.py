# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

import json
import math

import pytest
import torch
from tensordict import NonTensorStack, TensorDict
from torch import distributions as d
from torchrl.envs.utils import ExplorationType, set_exploration_type

from torchrl_dvla.functional import ode_step
from torchrl_dvla.modules import FlowVLA, FlowVLAConfig
from torchrl_dvla.modules.flow_vla import DenoisingPath

from .policies import make_flow_policy, make_observation

CHUNK, PATH, STEP, LOG_PROBS = (
    ("vla_action", name) for name in ("chunk", "path", "path_step", "log_probs")
)
SAMPLERS = {
    "sde": {},
    "sde, fixed step": {"stochastic_step": 2},
    "sde, all steps": {"stochastic_step": "all"},
    "cps": {"sampler": "cps"},
    "cps, all steps": {"sampler": "cps", "stochastic_step": "all"},
    "noise, all steps": {"sampler": "noise", "stochastic_step": "all"},
    "pi05": {"model_type": "pi05"},
    "smolvla": {"model_type": "smolvla"},
}
samplers = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)


def decide(policy, *batch, explore=True, seed=0, **kwargs) -> TensorDict:
    kind = ExplorationType.RANDOM if explore else ExplorationType.DETERMINISTIC
    with torch.no_grad(), torch.random.fork_rng(), set_exploration_type(kind):
        torch.manual_seed(seed)
        return policy(make_observation(*batch, **kwargs))


def log_probs_of(policy, td) -> torch.Tensor:
    return policy.get_dist(td).log_prob(td[PATH])


def _widened(argument):
    return torch.float64 if argument is torch.float32 else argument


def randomize_noise_head(policy):
    for parameter in policy.noise_head.parameters():
        parameter.data.normal_(std=0.5, generator=torch.Generator().manual_seed(0))
    return policy


@samplers
def test_writes_what_it_says(sampler):
    policy = make_flow_policy(max_action_dim=8, **sampler)
    td = decide(policy, 3)
    assert set(policy.out_keys) == {CHUNK, PATH, STEP, LOG_PROBS}
    # 4 denoising steps, the last of CPS deterministic
    num_points = {"all": 5}.get(sampler.get("stochastic_step"), 2)
    num_points -= "all" in sampler.values() and "cps" in sampler.values()
    assert td[CHUNK].shape == td[LOG_PROBS].shape == (3, 4, 6)
    assert td[PATH].shape == (3, 4, num_points, 8)
    assert td[STEP].shape == (3, 1) and td[STEP].dtype == torch.int64
    assert td[LOG_PROBS].all()


@samplers
def test_recomputed_log_probs_are_those_of_sampling(sampler):
    policy = make_flow_policy(max_action_dim=8, **sampler)
    if "noise" in sampler.values():
        randomize_noise_head(policy)
    td = decide(policy, 12)
    torch.testing.assert_close(log_probs_of(policy, td), td[LOG_PROBS], rtol=0, atol=1e-5)
    # The learner's batches are others: alone, a row has another padding.
    alone = torch.stack([log_probs_of(policy, row) for row in td])
    torch.testing.assert_close(alone, td[LOG_PROBS], rtol=0, atol=1e-5)
    rescored = policy.log_prob(td.clone().set(LOG_PROBS, torch.zeros(12, 4, 6)))
    torch.testing.assert_close(rescored[LOG_PROBS], td[LOG_PROBS], rtol=0, atol=1e-5)


def test_recomputed_log_probs_in_half_precision():
    # bfloat16 keeps 8 bits of the velocity, and a small deviation magnifies what is lost.
    policy = make_flow_policy(dtype="bfloat16")
    assert policy.network.dtype == torch.bfloat16
    td = decide(policy, 48)
    assert td[PATH].dtype == td[LOG_PROBS].dtype == torch.float32
    alone = torch.stack([log_probs_of(policy, row) for row in td])
    difference = (alone - td[LOG_PROBS]).abs()
    assert difference.mean() < 3e-3 and difference.max() < 0.3


@pytest.mark.parametrize("batch", [(), (1,), (2, 3)])
def test_any_leading_batch_shape(batch):
    policy = make_flow_policy()
    td = decide(policy, *batch)
    assert td[CHUNK].shape == (*batch, 4, 6) and td[STEP].shape == (*batch, 1)
    torch.testing.assert_close(log_probs_of(policy, td), td[LOG_PROBS], rtol=0, atol=1e-5)


@samplers
def test_passes(sampler):
    """Sampling: one prefix, an expert pass each step. Learning: one for each stochastic step."""
    policy = make_flow_policy(**sampler)
    passes = []
    if sampler.get("model_type") == "smolvla":
        vlm, norm = policy.network.vlm, policy.network.expert.norm
        modules = vlm.model.vision_model.encoder.layers[0], vlm.language_model.layers[0], norm
    else:
        pi0 = policy.network.model.model
        modules = pi0.vlm.vision_tower, pi0.vlm, pi0.dit.norm
    for name, module in zip(("images", "text", "expert"), modules):
        module.register_forward_hook(lambda *_, name=name: passes.append(name))
    td = decide(policy, 3)
    assert sorted(passes) == ["expert"] * 4 + ["images", "text"]
    passes.clear()
    policy.get_dist(td).log_prob(td[PATH]).sum().backward()
    num_stochastic = 1 if "all" not in sampler.values() else 3 if "cps" in sampler.values() else 4
    assert sorted(passes) == ["expert"] * num_stochastic + ["images", "text"]


def test_greedy_is_transformers_own_sampling():
    policy = make_flow_policy(max_action_dim=8, num_cameras=2)
    policy.action_statistics.set_statistics(torch.arange(6.0), torch.arange(6.0) + 1.0)
    td = decide(policy, 3, explore=False, wrist=True)
    pixels = torch.stack(
        [td["observation", name] / 127.5 - 1 for name in ("image", "wrist_image")], 1
    )
    text = [policy.tokenizer(str(text))["input_ids"] for text in td["language_instruction"]]
    width = max(map(len, text))
    image = [policy.network.config.vlm_config.image_token_id] * 8
    ids = torch.tensor([image + row + [0] * (width - len(row)) for row in text])
    lengths = torch.tensor([8 + len(row) for row in text])
    actions = policy.network.model.sample_actions(
        state=td["observation", "state"],
        input_ids=ids,
        pixel_values=pixels,
        noise=torch.zeros(3, 4, 8),
        attention_mask=(torch.arange(8 + width) < lengths[:, None]).long(),
        pixel_attention_mask=torch.ones(3, 2, dtype=torch.bool),
        num_steps=4,
    )
    # In the environment's units.
    expected = actions[..., :6] * (torch.arange(6.0) + 1.0) + torch.arange(6.0)
    torch.testing.assert_close(td[CHUNK], expected, rtol=1e-4, atol=1e-5)


def test_greedy_draws_nothing():
    policy = make_flow_policy()
    one, other = (decide(policy, 3, explore=False, seed=seed) for seed in (0, 1))
    assert all(torch.equal(one[key], other[key]) for key in (CHUNK, PATH, STEP))
    assert not one[LOG_PROBS].any()
    assert not torch.equal(decide(policy, 3)[CHUNK], decide(policy, 3, seed=1)[CHUNK])


@pytest.mark.parametrize("std", [0.0, 0.5])
def test_the_noise_that_a_sampled_decision_starts_from(std):
    policy = make_flow_policy(initial_noise=std, stochastic_step="all", max_action_dim=8)
    start = decide(policy, 500)[PATH][:, :, 0]
    assert start.std().item() == pytest.approx(std, rel=0.02)
    barely = make_flow_policy(initial_noise=std, noise_level=1e-6)
    one, other = (decide(barely, 3, seed=seed)[CHUNK] for seed in (0, 1))
    greedy = decide(barely, 3, explore=False)[CHUNK]
    # from zero, and hardly disturbed on the way, it comes to where a greedy one does
    assert torch.allclose(one, greedy, atol=1e-4) == torch.allclose(one, other, atol=1e-4)
    assert torch.allclose(one, greedy, atol=1e-4) == (std == 0)


@pytest.mark.parametrize(("sampler", "last"), [("sde", 3), ("cps", 2)])
def test_the_stochastic_step_is_any(sampler, last):
    policy = make_flow_policy(sampler=sampler)
    steps = decide(policy, 200)[STEP]
    assert steps.unique().tolist() == [*range(last + 1)]
    assert decide(make_flow_policy(stochastic_step=1), 9)[STEP].unique().tolist() == [1]


@torch.no_grad()
def test_the_other_steps_follow_the_ode():
    """From its recorded points on, a decision can be followed to its chunk."""
    policy = make_flow_policy(num_steps=3)
    td = decide(policy, 6)
    prefix, _ = policy._observe(td)
    for row, first in enumerate(td[STEP][:, 0].tolist()):
        x = td[PATH][:, :, 1].clone()  # of the whole batch, of which one row is compared
        for i in range(first + 1, 3):
            time = torch.full((6,), 1 - i / 3)
            velocity, _ = policy.network.velocity(prefix, x, time)
            x = x - velocity / 3
        torch.testing.assert_close(x[row], td[CHUNK][row], rtol=1e-4, atol=1e-4)


@samplers
def test_padded_dimensions_have_no_log_prob(sampler):
    policy = make_flow_policy(max_action_dim=8, **sampler)
    td = decide(policy, 5)
    before, after = td[PATH][..., :-1, 6:], td[PATH][..., 1:, 6:]
    assert (before - after).abs().min() > 0
    (prefix, _), first = policy._observe(td), td[STEP][:, 0]
    for k in range(before.shape[-2]):
        x, step = td[PATH][..., k, :], first + k
        time = 1 - step / 4
        with torch.no_grad():
            velocity, _ = policy.network.velocity(prefix, x, time)
        expected = ode_step(x, velocity, time[:, None, None], (time - 0.25)[:, None, None])
        torch.testing.assert_close(after[..., k, :], expected[..., 6:], rtol=1e-4, atol=1e-5)
    # What they come out as has no say, what they come in as has: the network reads it.
    dist = policy.get_dist(td)
    path = td[PATH].clone()
    path[..., 1:, 6:] += 1.0
    assert torch.equal(dist.log_prob(path), dist.log_prob(td[PATH]))


def test_log_prob_by_hand():
    policy = make_flow_policy(stochastic_step=2)
    for parameter in policy.network.model.action_out_proj.parameters():
        parameter.data.zero_()
    td = decide(policy, 2)
    # Velocity 0 at t = 1/2: sigma^2 = 1/4 * (1/2) / (1/2), mean x - 1/4 * (1/4) / (2 * 1/2) x,
    # deviation 1/2 * sqrt(1/4).
    dist = policy.get_dist(td)
    before, after = td[PATH].unbind(2)
    torch.testing.assert_close(dist.mean_of_steps[:, :, 0], 0.9375 * before)
    assert dist.std_of_steps.unique().tolist() == [0.25]
    expected = d.Normal(0.9375 * before, 0.25).log_prob(after)
    torch.testing.assert_close(td[LOG_PROBS], expected, rtol=1e-4, atol=1e-5)
    highest = dist.log_prob(torch.zeros_like(td[PATH]) + dist.mean_of_steps)
    expected = torch.full_like(highest, -math.log(0.25 * math.sqrt(2 * math.pi)))
    torch.testing.assert_close(highest, expected)


@samplers
def test_gradients_are_finite_differences(sampler, monkeypatch):
    policy = make_flow_policy(max_action_dim=8, **sampler)
    if "noise" in sampler.values():
        randomize_noise_head(policy)
    td = decide(policy, 3)
    policy, td[PATH] = policy.double(), td[PATH].double()
    # Norms round to single precision, Gemma's by the one and Llama's by the other.
    to = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(
        torch.Tensor, "to", lambda x, *args, **kwargs: to(x, *map(_widened, args), **kwargs)
    )
    weight = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(1)).double()

    def objective() -> torch.Tensor:
        return (weight * log_probs_of(policy, td)).sum()

    objective().backward()
    moved = [p for p in policy.parameters() if p.grad is not None]
    # One random direction through all weights, and one through those of the expert.
    expert = {id(p) for name, p in policy.named_parameters() if ".vlm." not in name}
    for chosen in (moved, [p for p in moved if id(p) in expert]):
        generator = torch.Generator().manual_seed(2)
        direction = [torch.randn(p.shape, generator=generator).double() for p in chosen]
        expected = sum((p.grad * v).sum() for p, v in zip(chosen, direction))
        values = []
        for sign in (1, -2):  # from +h to -h
            for parameter, v in zip(chosen, direction):
                parameter.data.add_(v, alpha=sign * 1e-6)
            values.append(objective().detach())
        for parameter, v in zip(chosen, direction):
            parameter.data.add_(v, alpha=1e-6)
        found = (values[0] - values[1]) / 2e-6
        assert found.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("model_type", ["pi0", "pi05", "smolvla"])
@torch.no_grad()
def test_every_input_matters(model_type):
    policy = make_flow_policy(model_type, num_cameras=2)
    td = decide(policy, 2, wrist=True)
    before = log_probs_of(policy, td)

    def changed(key, value) -> torch.Tensor:
        return (log_probs_of(policy, td.clone().set(key, value)) - before).abs().amax((-2, -1))

    for name in ("image", "wrist_image"):
        image = td["observation", name].clone()
        image[0] = 255 - image[0]
        difference = changed(("observation", name), image)
        assert difference[0] > 1e-3 and difference[1] == 0
    assert (changed(("observation", "state"), td["observation", "state"] + 1.0) > 1e-3).all()
    text = NonTensorStack("lift the drawer", str(td["language_instruction"][1]))
    difference = changed("language_instruction", text)
    assert difference[0] > 1e-3 and difference[1] < 1e-5
    assert (changed(STEP, (td[STEP] + 1) % 4) > 1e-3).all()


@pytest.mark.parametrize("model_type", ["pi0", "pi05", "smolvla"])
@pytest.mark.parametrize("freeze_prefix", [False, True])
def test_exactly_what_is_to_be_trained_gets_a_gradient(model_type, freeze_prefix):
    policy = make_flow_policy(model_type, freeze_prefix=freeze_prefix)
    td = decide(policy, 3)
    log_probs_of(policy, td).sum().backward()
    moving = {name for name, p in policy.named_parameters() if p.grad is not None}
    assert moving == {name for name, p in policy.named_parameters() if p.requires_grad}
    expert = {name for name, _ in policy.named_parameters() if ".vlm." not in name}
    if freeze_prefix:
        assert moving == {name for name in expert if "network.state_proj" not in name}
    else:  # no one reads the last hidden states of the prefix
        assert moving > expert
        names = [name for name, p in policy.named_parameters() if p.grad is None]
        assert {name.split("layers.1.")[-1].split("model.norm")[-1] for name in names} == {
            "self_attn.q_proj.weight", "self_attn.o_proj.weight", "mlp.gate_proj.weight",
            "mlp.up_proj.weight", "mlp.down_proj.weight", "post_attention_layernorm.weight",
            ".weight",
        }  # fmt: skip


def test_a_learned_deviation_stays_within_its_bounds():
    policy = make_flow_policy(sampler="noise", stochastic_step="all")
    td = decide(policy, 3)
    dist = policy.get_dist(td)
    middle = math.sqrt(0.08 * 0.16)
    torch.testing.assert_close(dist.std_of_steps, torch.full((3, 4, 4, 6), middle))
    # 4 steps of entropy log(std) + log(2 pi e) / 2
    expected = 4 * (math.log(middle) + 0.5 * math.log(2 * math.pi * math.e))
    torch.testing.assert_close(dist.entropy(), torch.full((3, 4, 6), expected))
    dist.entropy().sum().backward()
    assert policy.noise_head[2].weight.grad.any()
    std = randomize_noise_head(policy).get_dist(td).std_of_steps
    assert 0.08 <= std.min() < 0.1 < 0.14 < std.max() <= 0.16


def test_divergence_of_paths_by_hand():
    # two steps of deviation 1 / 2, means 1 and 2 apart: (1 + 4) / (2 * 1 / 4)
    std = torch.full((1, 2, 1), 0.5)
    p = DenoisingPath(torch.zeros(1, 2, 1), std)
    q = DenoisingPath(torch.tensor([[[1.0], [-2.0]]]), std)
    assert d.kl_divergence(p, q).tolist() == [[10.0]]


# -- supervised training ---------------------------------------------------------------------------
@torch.no_grad()
def test_flow_matching_error_by_hand(monkeypatch):
    policy = make_flow_policy(max_action_dim=8)
    head = policy.network.model.action_out_proj
    head.weight.zero_()
    head.bias.fill_(0.5)
    policy.action_statistics.set_statistics(torch.ones(6), torch.full((6,), 2.0))
    monkeypatch.setattr(torch, "randn_like", lambda tensor: torch.full_like(tensor, 2.0))
    # An action of 7 is 3 deviations from the mean; velocity 1/2, target 2 - 3.
    error = policy.flow_matching_error(make_observation(2), torch.full((2, 4, 6), 7.0))
    assert error.shape == (2, 4, 6)
    torch.testing.assert_close(error, torch.full((2, 4, 6), 2.25))


def test_a_clone_acts_like_its_expert():
    policy = make_flow_policy()
    td = make_observation(6)
    # The expert does what the state says.
    expert = td["observation", "state"][:, None].expand(-1, 4, -1).clamp(-1, 1) * 0.5
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for _ in range(100):
            optimizer.zero_grad()
            policy.flow_matching_error(td, expert).mean().backward()
            optimizer.step()
    before = decide(make_flow_policy(), 6, explore=False)[CHUNK]
    after = decide(policy, 6, explore=False)[CHUNK]
    assert (before - expert).abs().mean() > 0.3
    assert (after - expert).abs().mean() < 0.15
    assert (decide(policy, 6)[CHUNK] - expert).abs().mean() < 0.25


# -- checkpoints -----------------------------------------------------------------------------------
@pytest.mark.parametrize("model_type", ["pi0", "pi05", "smolvla"])
def test_round_trip_is_exact(model_type, tmp_path):
    policy = make_flow_policy(model_type, sampler="noise", num_steps=3, seed=7, max_action_dim=8)
    randomize_noise_head(policy)
    for each in (policy.action_statistics, policy.state_statistics):
        set_ = each.set_range if model_type == "pi05" else each.set_statistics
        set_(torch.arange(6.0), torch.arange(6.0) + 1.0)
    policy.save_pretrained(tmp_path)
    again = FlowVLA.from_pretrained(tmp_path)
    assert again.config == policy.config
    for (name, one), (_, other) in zip(policy.state_dict().items(), again.state_dict().items()):
        assert torch.equal(one, other), name
    for (name, one), (_, other) in zip(policy.named_buffers(), again.named_buffers()):
        assert torch.equal(one, other), name
    assert torch.equal(decide(policy, 3)[CHUNK], decide(again, 3)[CHUNK])
    assert policy.read_weights(tmp_path).keys() == policy.state_dict().keys()


def test_another_sampler_for_a_checkpoint(tmp_path):
    supervised = make_flow_policy()
    supervised.save_pretrained(tmp_path / "supervised")
    policy = FlowVLA.from_pretrained(
        tmp_path / "supervised", sampler="noise", stochastic_step="all", num_steps=2,
        freeze_prefix=True, dtype="bfloat16",
    )  # fmt: skip
    assert policy.network.dtype == torch.bfloat16
    td = decide(policy, 2)  # its head is as new
    assert policy.get_dist(td).std_of_steps.unique().tolist() == [pytest.approx(0.1131, abs=1e-4)]
    policy.save_pretrained(tmp_path / "trained")
    again = FlowVLA.from_pretrained(tmp_path / "trained", sampler="sde", dtype="float32")
    assert not hasattr(again, "noise_head") and again.config.num_steps == 2


# -- bad input -------------------------------------------------------------------------------------
def test_a_path_of_another_sampler_is_refused():
    td = decide(make_flow_policy(), 3)
    with pytest.raises(ValueError, match=r"shape \[\*B, 4, 5, 6\], got \[3, 4, 2, 6\]\. Learn"):
        make_flow_policy(stochastic_step="all").get_dist(td)
    for step in (-1, 4):
        late = td.clone().set(STEP, torch.tensor([[0], [step], [3]]))
        with pytest.raises(
            ValueError, match=rf"path_step.* must be from 0 to 3, got {step}\. Learn"
        ):
            make_flow_policy().get_dist(late)
    for key in (PATH, STEP):
        with pytest.raises(KeyError, match="the batch must hold .*path.* record both"):
            make_flow_policy().get_dist(td.exclude(key))


def test_a_chunk_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"chunk must have shape \[2, 4, 6\], got \[2, 3, 6\]"):
        make_flow_policy().flow_matching_error(make_observation(2), torch.zeros(2, 3, 6))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"max_action_dim": 5},
            "action_dim must be at most max_action_dim=5 of the back",
        ),
        ({"state_dim": 0, "model_type": "pi06"}, "model_type must be one of"),
        ({"sampler": "ddpm"}, "sampler must be one of"),
        ({"noise_level": 0.0}, "noise_level must be positive"),
        ({"initial_noise": -1.0}, "initial_noise must be at least 0"),
        (
            {"sampler": "cps", "noise_level": 1.5},
            "noise_level must be at most 1 with sampler",
        ),
        ({"sampler": "cps", "num_steps": 1}, "num_steps must be at least 2 with sampler='cps'"),
        ({"stochastic_step": 4}, "stochastic_step must be below 4 with num_steps=4"),
        ({"sampler": "cps", "stochastic_step": 3}, "stochastic_step must be below 3"),
        ({"stochastic_step": "last"}, "stochastic_step must be"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        make_flow_policy(**settings)


def test_a_network_or_prompt_that_does_not_fit_is_refused():
    policy = make_flow_policy("pi05")
    data = policy.config.to_dict()
    with pytest.raises(ValueError, match="state_dim must be at least 1 with a prompt that has"):
        FlowVLAConfig.from_dict(data | {"state_dim": 0})
    config = FlowVLAConfig.from_dict(data | {"backbone": {**data["backbone"], "model_type": "x"}})
    with pytest.raises(
        ValueError, match=r"model_type must be one of \['pi0', 'pi05', .*\], got 'x'"
    ):
        FlowVLA(config, tokenizer=policy.tokenizer)


def test_config_survives_json():
    config = make_flow_policy(stochastic_step=1).config
    assert FlowVLAConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    other = make_flow_policy(stochastic_step="all", sampler="cps", num_cameras=2).config
    assert config.differences(other) == ["'num_cameras' is 2 instead of 1"]
