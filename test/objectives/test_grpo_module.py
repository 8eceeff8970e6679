# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""GRPOLoss as a LossModule: keys, reference, refusals."""

from __future__ import annotations

import copy

import pytest
import torch
from tensordict import NonTensorStack, TensorDict
from torch import nn
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules.vla import TinyVLA

from torchrl_dvla.objectives import GRPOLoss


def test_only_the_actor_is_trained(cases):
    policy = cases.make_policy()
    reference = copy.deepcopy(policy)
    loss = GRPOLoss(policy, kl_to_ref_coeff=0.1, reference_network=reference)
    assert {id(p) for p in loss.parameters()} == {id(p) for p in policy.parameters()}
    batch = cases.make_batch(policy)
    out = loss(batch)
    assert out["loss_kl"].item() == pytest.approx(0.0, abs=1e-6)
    cases.drift(policy)
    out = loss(batch)
    (out["loss_objective"] + out["loss_kl"]).backward()
    assert out["kl_to_ref"].item() > 0
    assert all(p.grad is None for p in reference.parameters())
    assert any(grad.any() for grad in cases.gradients(policy))


def test_metrics_carry_no_gradient_and_losses_do(cases):
    policy = cases.make_policy()
    out = GRPOLoss(policy, entropy_coeff=0.1)(cases.make_batch(policy))
    for name, value in out.items():
        assert value.requires_grad == name.startswith("loss_"), name


def test_one_forward_pass_per_call(table):
    policy, batch = table
    GRPOLoss(policy, entropy_coeff=0.1)(batch)
    assert policy.num_forwards == 1


def test_the_batch_is_left_alone(table):
    policy, batch = table
    before = batch.clone()
    GRPOLoss(policy)(batch)
    assert set(batch.keys(True, True)) == set(before.keys(True, True))
    assert (batch == before).all()


@pytest.mark.parametrize("container", [False, True])
def test_stored_logits_do_not_replace_the_forward_pass(cases, container):
    policy = cases.make_policy(return_logits=True, return_vla_action_container=container)
    batch = cases.make_batch(policy)
    assert batch["vla_action"].logits is not None if container else True
    GRPOLoss(policy)(batch)["loss_objective"].backward()
    assert any(grad.any() for grad in cases.gradients(policy))


def test_optional_entries_may_be_missing(cases):
    policy = cases.make_policy()
    batch = cases.make_batch(policy)
    expected = GRPOLoss(policy)(batch)
    del batch["action_is_pad"]
    torch.testing.assert_close(GRPOLoss(policy)(batch).detach(), expected.detach())


def test_masks_of_torchrl_samplers_count(table):
    policy, batch = table
    batch["collector", "mask"] = torch.tensor([[True], [False]])
    out = GRPOLoss(policy)(batch)
    assert out["loss_objective"].item() == pytest.approx(-(1.28 + 0.5) / 2, rel=1e-5)


def test_policy_lag(table):
    policy, batch = table
    loss = GRPOLoss(policy)
    batch["policy_version"] = torch.tensor([[7], [4]])
    assert "policy_lag_mean" not in loss(batch)
    loss.version = 8
    out = loss(batch)
    assert out["policy_lag_mean"].item() == 2.5
    assert out["policy_lag_max"].item() == 4.0


def test_write_proximal_log_prob_centres_the_clip_range(cases):
    policy = cases.make_policy()
    batch = cases.make_batch(policy)
    cases.drift(policy, 0.5)
    loss = GRPOLoss(policy, importance="decoupled", behavior_weight_cap=None)
    with pytest.raises(KeyError, match="write_proximal_log_prob"):
        loss(batch)
    assert loss.write_proximal_log_prob(batch) is batch
    out = loss(batch)
    assert out["clip_fraction"].item() == 0.0
    assert out["max_ratio"].item() > 1.5
    # at the centre, weight * 1 * advantage: plain importance sampling
    ratio = (batch["proximal_log_prob"] - batch["vla_action", "log_probs"]).exp()
    expected = -(ratio * batch["advantage"].unsqueeze(-1)).mean()
    torch.testing.assert_close(out["loss_objective"].detach(), expected)


def test_set_keys(cases):
    policy = cases.make_policy()
    batch = cases.make_batch(policy)
    loss = GRPOLoss(policy)
    expected = loss(batch)
    batch.rename_key_("advantage", "adv")
    loss.set_keys(advantage="adv")
    assert "adv" in loss.in_keys and "advantage" not in loss.in_keys
    torch.testing.assert_close(loss(batch).detach(), expected.detach())
    loss.set_keys(advantage=None)
    assert loss.tensor_keys.advantage == "advantage"
    with pytest.raises(ValueError, match="not an accepted"):
        loss.set_keys(value="v")


def test_called_without_a_tensordict(cases):
    policy = cases.make_policy()
    batch = cases.make_batch(policy, 2)
    loss = GRPOLoss(policy)
    expected = loss(batch)["loss_objective"]
    loss.select_out_keys("loss_objective")
    got = loss(
        observation_image=batch["observation", "image"],
        observation_state=batch["observation", "state"],
        language_instruction=NonTensorStack("push", "pull"),
        vla_action_tokens=batch["vla_action", "tokens"],
        vla_action_log_probs=batch["vla_action", "log_probs"],
        advantage=batch["advantage"],
        action_is_pad=batch["action_is_pad"],
    )
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    "options", [{}, {"entropy_coeff": 0.1}, {"importance": "decoupled"}, {"kl_to_ref_coeff": 0.1}]
)
def test_out_keys_are_what_is_written(cases, options):
    policy = cases.make_policy()
    loss = GRPOLoss(policy, **options)
    batch = loss.write_proximal_log_prob(cases.make_batch(policy))
    batch["ref_log_prob"] = batch["vla_action", "log_probs"]
    assert set(loss(batch).keys()) == set(loss.out_keys)
    assert all(key in batch.keys(True) for key in loss.in_keys if key != "policy_version")


def test_coefficients_can_be_scheduled(table):
    policy, batch = table
    loss = GRPOLoss(policy)
    loss.clip_epsilon_high = 0.5
    assert loss.clip_epsilon_high.dtype == torch.float32
    assert loss(batch)["loss_objective"].item() == pytest.approx(-(1.5 + 0.5 - 2) / 3, abs=1e-6)


def test_transformers_policy():
    pytest.importorskip("transformers")
    from torchrl_dvla.modules import TransformersVLA

    policy = TransformersVLA.tiny(["push", "pull"], action_dim=2, chunk_size=3, state_dim=4)
    batch = TensorDict(
        {
            "observation": {
                "image": torch.randint(0, 256, (3, 3, 128, 128), dtype=torch.uint8),
                "state": torch.randn(3, 4),
            },
            "language_instruction": NonTensorStack("push", "pull", "pull"),
            "action_is_pad": torch.tensor([[False] * 3, [False, True, True], [True] * 3]),
            "advantage": torch.tensor([[1.0], [-1.0], [0.5]]),
        },
        batch_size=[3],
    )
    with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
        batch = policy(batch)
    loss = GRPOLoss(
        policy,
        kl_to_ref_coeff=0.1,
        kl_estimator="exact",
        reference_network=copy.deepcopy(policy),
    )
    out = loss(batch)
    assert out["ESS"].item() == pytest.approx(1.0, abs=1e-4)
    assert out["loss_kl"].item() == pytest.approx(0.0, abs=1e-5)
    assert out["loss_objective"].item() == pytest.approx(-(6 - 2) / 8, abs=1e-4)
    out["loss_objective"].backward()
    trained = [p for p in policy.parameters() if p.requires_grad]
    reached = sum(p.numel() for p in trained if p.grad is not None and p.grad.any())
    assert reached > 0.5 * sum(p.numel() for p in trained)


# -- refusals --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("key", "writer"),
    [
        (("vla_action", "tokens"), "policy writes it while collecting"),
        (("vla_action", "log_probs"), "log_probs_mode='token'"),
        ("advantage", "group_advantage"),
        (("observation", "image"), "Environment workers write observations"),
    ],
)
def test_missing_entry_names_its_writer(cases, key, writer):
    policy = cases.make_policy()
    batch = cases.make_batch(policy)
    del batch[key]
    with pytest.raises(KeyError) as error:
        GRPOLoss(policy)(batch)
    assert writer in str(error.value)
    assert str(key) in str(error.value)


def test_missing_reference_names_its_writer(cases):
    policy = cases.make_policy()
    with pytest.raises(KeyError, match="Pass reference_network"):
        GRPOLoss(policy, kl_to_ref_coeff=0.1)(cases.make_batch(policy))


def test_wrong_shapes(cases):
    policy = cases.make_policy()
    loss = GRPOLoss(policy)
    batch = cases.make_batch(policy)
    with pytest.raises(ValueError, match=r"advantage must have shape \[6, 1\].*unsqueeze"):
        loss(batch.clone().set("advantage", torch.zeros(6)))
    with pytest.raises(ValueError, match=r"'action_is_pad' must have shape.*chunk size"):
        loss(batch.clone().set("action_is_pad", torch.zeros(6, 3, dtype=torch.bool)))
    batch["vla_action", "log_probs"] = batch["vla_action", "log_probs"].sum((-2, -1))
    with pytest.raises(ValueError, match="sample_log_prob must have the shape of the tokens"):
        loss(batch)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip_epsilon": (0.1, 0.2, 0.3)}, "a number or a pair"),
        ({"clip_epsilon": 1.0}, "0 <= low < 1"),
        ({"clip_epsilon": (0.2, -0.1)}, "high >= 0"),
        ({"dual_clip": 1.2}, "dual_clip must be greater than 1"),
        ({"behavior_weight_cap": 0.5}, "behavior_weight_cap must be at least 1"),
        ({"ratio_level": "word"}, "ratio_level must be one of"),
        ({"importance": "prox"}, "importance must be one of"),
        ({"reduction": "mean"}, "reduction must be one of"),
        ({"kl_estimator": "k1"}, "kl_estimator must be one of"),
        ({"kl_to_ref_coeff": -1.0}, "kl_to_ref_coeff must not be negative"),
        ({"kl_to_ref_coeff": 0.1, "kl_estimator": "exact"}, "without a reference_network"),
    ],
)
def test_options_out_of_range(cases, options, message):
    with pytest.raises(ValueError, match=message):
        GRPOLoss(cases.make_policy(), **options)


def test_references_that_make_no_sense(cases):
    policy = cases.make_policy()
    with pytest.raises(ValueError, match="must not share parameters"):
        GRPOLoss(policy, kl_to_ref_coeff=0.1, reference_network=policy)
    with pytest.raises(ValueError, match="must come with kl_to_ref_coeff"):
        GRPOLoss(policy, reference_network=copy.deepcopy(policy))


def test_policies_without_token_distribution():
    with pytest.raises(ValueError, match="must have action_head='tokens', got 'continuous'"):
        GRPOLoss(TinyVLA(action_dim=2, chunk_size=4))
    with pytest.raises(ValueError, match=r"must have a get_dist method.*got Linear"):
        GRPOLoss(nn.Linear(2, 2))
