# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What only a GPU can show: ``make test-gpu``."""

from __future__ import annotations

import copy
import functools
import sys

import cloudpickle
import pytest
import torch
from tensordict.nn import InteractionType
from torch import nn
from torchrl.checkpoint import GlobalRNGState

from torchrl_dvla import (
    DVLACollector,
    EpisodeSpec,
    GroupConfig,
    GRPOLoss,
    PooledReplayBuffer,
    WorkerConfig,
)
from torchrl_dvla.envs import ToyChunkEnv
from torchrl_dvla.memory import SharedArena
from torchrl_dvla.modules import tiny_token_policy
from torchrl_dvla.recording import RunCheckpoints
from torchrl_dvla.weight_update import WeightStore

pytestmark = pytest.mark.gpu
# The inference process cannot import this module: it gets its functions whole.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

ENV = functools.partial(ToyChunkEnv, chunk_size=4, action_dim=2, image_size=16)


def make_policy(device="cuda"):
    torch.manual_seed(0)
    policy = tiny_token_policy(
        2, 4, vocab_size=8, hidden_dim=16, default_interaction_type=InteractionType.RANDOM
    )
    policy(ENV().reset().unsqueeze(0))  # initialises the lazy layers
    return policy.to(device)


def busy(seconds: float = 0.1) -> None:
    """Kernels that keep the stream busy, so that whoever does not wait for it reads too early."""
    torch.cuda._sleep(int(seconds * 1.5e9))


def test_an_arena_is_page_locked_until_it_ends():
    arena = SharedArena(1 << 20)
    view = arena.tensor(4096, (1024,), torch.float32)
    assert not view.is_pinned()
    assert arena.pin() and arena.pin()
    assert view.is_pinned()
    view.fill_(2.0)
    assert float(view.to("cuda", non_blocking=True).sum()) == 2048.0
    arena.close()
    assert not view.is_pinned()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_version_holds_what_the_learner_had_queued_before_it_and_nothing_after(dtype):
    learner = nn.Linear(512, 512, device="cuda", dtype=dtype)
    served = {
        "cpu": nn.Linear(512, 512, dtype=dtype),
        "cuda": nn.Linear(512, 512, device="cuda", dtype=dtype),
    }
    with WeightStore(learner) as store, torch.no_grad():
        readers = {name: store.reader(name) for name in served}
        for version in range(1, 6):
            busy()
            learner.weight.fill_(version)
            learner.bias.fill_(version)
            assert store.publish() == version
            learner.weight.fill_(-1)  # queued after it, at once
            for name, module in served.items():
                assert readers[name].adopt_into(module) == version
                values = torch.cat([p.detach().flatten().cpu() for p in module.parameters()])
                assert (values == version).all(), name
        for reader in readers.values():
            reader.close()


def test_a_forward_pass_under_way_keeps_the_weights_it_began_with():
    learner, served = (nn.Linear(256, 256, bias=False, device="cuda") for _ in range(2))
    x = torch.ones(1, 256, device="cuda")
    with WeightStore(learner) as store, torch.no_grad():
        reader = store.reader("lane")
        for version in range(1, 4):
            learner.weight.fill_(version)
            store.publish()
            reader.adopt_into(served)
            busy()
            out = served(x)  # waits behind the busy kernel
            learner.weight.fill_(version + 0.5)
            store.publish()
            reader.adopt_into(served)
            assert (out == 256 * version).all()
        reader.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_not_finite_are_refused_on_the_device(dtype):
    learner = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3))).to("cuda", dtype)
    learner.register_parameter("none", nn.Parameter(torch.empty(0, device="cuda")))
    learner.register_buffer("mask", torch.full((4,), -torch.inf, device="cuda"))
    with WeightStore(learner) as store, torch.no_grad():
        for version, bad in enumerate((torch.nan, torch.inf, -torch.inf), 1):
            busy()
            learner[1].weight[3, 3] = bad
            with pytest.raises(ValueError, match=r"in 1.weight \(1 of 64 elements\) of version"):
                store.publish()
            learner[1].weight[3, 3] = torch.finfo(dtype).max
            assert store.publish() == version


def test_the_loss_on_the_device_is_that_on_the_cpu():
    policy, env = make_policy(), ENV()
    batch = torch.stack([env.reset(seed=seed) for seed in range(16)]).to("cuda")
    batch["advantage"] = torch.linspace(-1, 1, 16, device="cuda").unsqueeze(-1)
    with torch.no_grad():
        batch = policy(batch)
        for parameter in policy.parameters():
            parameter.mul_(1.01)  # ratios other than one
    losses, gradients = {}, {}
    for device in ("cpu", "cuda"):
        moved = copy.deepcopy(policy).to(device)
        loss = GRPOLoss(moved, entropy_coeff=0.01, check_finite=True).to(device)
        out = loss(batch.to(device))
        total = sum(value for key, value in out.items() if key.startswith("loss_"))
        total.backward()
        losses[device] = total.detach().cpu()
        gradients[device] = torch.cat([p.grad.flatten().cpu() for p in moved.parameters()])
    torch.testing.assert_close(losses["cuda"], losses["cpu"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gradients["cuda"], gradients["cpu"], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("lane", ["cuda", "cpu"])
def test_a_learner_on_the_device_learns_from_its_lane(lane):
    policy = make_policy()
    buffer = PooledReplayBuffer(batch_size=8, num_epochs=1, timeout_s=120.0)
    loss = GRPOLoss(policy)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.01)
    with DVLACollector(
        ENV,
        policy,
        policy_factory=functools.partial(make_policy, lane) if lane == "cpu" else None,
        replay_buffer=buffer,
        group=GroupConfig(group_size=4, groups_per_update=2, on_no_signal="keep"),
        workers=WorkerConfig(num_workers=2, envs_per_worker=4, max_decisions=4),
    ) as collector:
        versions, copies = [], []
        for _ in zip(range(4), collector):
            for batch in buffer:
                assert batch["observation", "image"].is_pinned()
                state = batch["observation", "state"].clone()
                busy(0.02)  # the copy has not run when the next batch is asked for
                batch = batch.to("cuda", non_blocking=True)
                copies.append((state, batch["observation", "state"]))
                out = loss(batch)
                out["loss_objective"].backward()
                optimizer.step()
                optimizer.zero_grad()
                versions += batch["policy_version"].flatten().tolist()
            collector.update_policy_weights_()
        assert all(torch.equal(state, copied.cpu()) for state, copied in copies)
        assert max(versions) > 0
        assert collector.stats()["policy_version"] == 4


def test_a_batched_environment_on_the_device_plays_as_on_the_cpu():
    episodes = [EpisodeSpec("default", seed) for seed in range(12)]
    results = []
    for device in ("cpu", "cuda"):
        with DVLACollector(
            lambda device=device: ENV(batch_size=[4], success_steps=1).to(device),
            make_policy("cpu"),
            group=GroupConfig(group_size=4, groups_per_update=2),
            workers=WorkerConfig(num_workers=1, max_decisions=4),
        ) as collector:
            results.append(collector.evaluate(episodes).result(120.0))
    on_cpu, on_device = results
    assert on_cpu.successes == on_device.successes
    assert on_cpu.num_env_steps == on_device.num_env_steps


def test_a_checkpoint_brings_optimizer_and_random_numbers_back_to_the_device(tmp_path):
    policy = make_policy()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.01)
    sum(p.sum() for p in policy.parameters()).backward()
    optimizer.step()
    checkpoints = RunCheckpoints(tmp_path, policy=policy, optimizer=optimizer, rng=GlobalRNGState())
    checkpoints.save(1)
    drawn = torch.rand(4, device="cuda")
    expected = copy.deepcopy(optimizer.state_dict())
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.zero_()
    sum(p.sum() for p in policy.parameters()).backward()
    optimizer.step()
    checkpoints.load(checkpoints.latest())
    assert torch.equal(torch.rand(4, device="cuda"), drawn)
    for key, state in optimizer.state_dict()["state"].items():
        assert state["exp_avg"].is_cuda
        assert torch.equal(state["exp_avg"], expected["state"][key]["exp_avg"])
    assert all(p.is_cuda and bool(p.any()) for p in policy.parameters())
