# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""A learner of several processes takes the steps of a single one."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import os
import signal
import time
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from torchrl_dvla import PooledReplayBuffer
from torchrl_dvla.learner import LearnerRanks, check_same_on_all_ranks
from torchrl_dvla.recipes.dvla_grpo import utils
from torchrl_dvla.recipes.dvla_grpo.settings import compose_settings
from torchrl_dvla.recording import RunCheckpoints
from torchrl_dvla.weight_update import WeightStore

from .conftest import Learners, weights_of

pytestmark = pytest.mark.filterwarnings("ignore:the policy must give decisions of its own version")


# Made in rank 1 only: rank 0 is given its policy.


def _make_unknown_policy(device):
    raise AssertionError("the other processes cannot import this module")


#: Adam divides by the size of each gradient: rounding in the smallest counts by the rate.
STEPS = ("optim.lr=1e-4", "optim.micro_batch_size=2", "optim.max_grad_norm=0.05")


def check_steps(learners, ranks):
    """The first steps of two ranks are those of a learner of one process."""
    minibatches = learners.minibatches()
    policy, _, norms = learners.learn_alone(minibatches)
    steps = learners.learn(ranks, minibatches)
    found = weights_of(ranks)
    assert [norm for _, norm in steps] == pytest.approx(norms, rel=1e-5)
    assert min(norms) > 0.05  # clipped, by the norm over all ranks
    # 6 rows are 3 a rank, 5 are 2 and 3: two passes each, on both ranks.
    assert [[size for size, *_ in parts] for parts, _ in steps] == [[1, 2, 1, 2], [1, 1, 1, 2]]
    expected = dict(policy.named_parameters())
    assert set(expected) == set(found.keys()) & set(expected)
    begun = dict(utils.make_policy(learners.cfg).named_parameters())
    assert max(float((found[name] - begun[name].data).abs().max()) for name in expected) > 1e-4
    for name, parameter in expected.items():
        torch.testing.assert_close(found[name], parameter.data, rtol=0, atol=1e-6)


def test_two_ranks_keep_rollouts_whole_for_a_ratio_of_each(make_learners):
    learners = make_learners(
        "optim.lr=1e-4",
        "optim.micro_batch_size=4",
        "loss.ratio_level=trajectory_mean",
        "loss.reduction=trajectory_mean",
    )
    # Rollouts of 4 and 2 decisions, and of 3, 1 and 1.
    minibatches = [torch.tensor([8, 9, 10, 11, 1, 2]), torch.tensor([3, 4, 5, 0, 6])]
    policy, _, norms = learners.learn_alone(minibatches)
    with learners.ranks(2, "ddp") as ranks:
        steps = learners.learn(ranks, minibatches)
        found = weights_of(ranks)
        split = PooledReplayBuffer(batch_size=6)
        with pytest.raises(ValueError, match="whole_rollouts must be True for a loss with one"):
            ranks.bind(split)
    assert [norm for _, norm in steps] == pytest.approx(norms, rel=1e-5)
    assert [[size for size, *_ in parts] for parts, _ in steps] == [[4, 2], [3, 2]]
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(found[name], parameter.data, rtol=0, atol=1e-6)


@contextlib.contextmanager
def two_ranks(strategy, *overrides):
    torch.manual_seed(0)
    with contextlib.closing(Learners(*STEPS, *overrides)) as learners:
        with learners.ranks(2, strategy) as ranks:
            yield learners, ranks


@pytest.mark.slow
def test_two_ranks_of_a_flow_policy_take_the_steps_of_one(make_learners):
    learners = make_learners(*STEPS, "loss.reduction=token_mean", name="toy_flow")
    with learners.ranks(2, "fsdp") as ranks:
        check_steps(learners, ranks)


@pytest.fixture(scope="class")
def replicas():
    # Each row knows how many decisions its rollout has: no rank needs whole ones.
    with two_ranks("ddp", "loss.reduction=trajectory_mean") as replicas:
        yield replicas


@pytest.fixture(scope="class")
def shards():
    with two_ranks("fsdp", "loss.reduction=token_mean") as shards:
        yield shards


class TestReplicas:
    """In this order: they share two ranks, which take seconds to start, and the last ends them."""

    def test_two_ranks_take_the_steps_of_one(self, replicas):
        check_steps(*replicas)

    def test_gradients_that_are_not_finite_leave_all_ranks_as_they_were(self, replicas):
        learners, ranks = replicas
        before = weights_of(ranks)
        hook = ranks.own._parameters[0].register_hook(lambda grad: grad * torch.inf)
        with pytest.raises(RuntimeError, match="norm of the gradients must be finite"):
            learners.learn(ranks, [torch.arange(8)])
        hook.remove()
        assert not ranks.has_failed
        assert all((weights_of(ranks)[name] == tensor).all() for name, tensor in before.items())

    def test_a_stopped_rank_ends_the_update_within_the_deadline(self, replicas):
        learners, ranks = replicas
        (process,) = ranks.processes
        learners.learn(ranks, learners.minibatches()[:1])
        os.kill(process.pid, signal.SIGSTOP)
        # Shorter only now: to start takes as long as a busy machine needs.
        for group in (dist.group.WORLD, ranks._control):
            options = group._get_backend(torch.device("cpu")).options
            assert options._timeout == datetime.timedelta(seconds=ranks.timeout_s)
            dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=2.0), group)
        begun_s = time.monotonic()
        with pytest.raises(RuntimeError, match=r"does not answer within.*learner\.timeout_s"):
            learners.learn(ranks, learners.minibatches())
        assert time.monotonic() - begun_s < 60.0  # not the 120 s of the start
        ranks.close()
        assert not Path(f"/proc/{process.pid}").exists()


class TestShards:
    """In this order, as above."""

    def test_two_ranks_take_the_steps_of_one(self, shards):
        check_steps(*shards)

    def test_what_is_published_from_shards_is_bit_equal_and_one_tensor_at_a_time(self, shards):
        learners, ranks = shards
        policy = utils.make_policy(learners.cfg)
        largest = max(p.nbytes for p in policy.parameters())
        with WeightStore(policy) as store:
            reader, alive, most = store.reader("lane"), weakref.WeakSet(), 0

            def watched(weights):
                nonlocal most
                for name, tensor in weights:
                    alive.add(tensor)
                    most = max(most, sum(one.nbytes for one in alive))
                    yield name, tensor
                    del tensor

            learners.learn(ranks, learners.minibatches()[:1])
            with ranks.weights() as weights:
                assert store.publish(watched(weights)) == 1
            served = utils.make_policy(learners.cfg)
            for parameter in served.parameters():
                parameter.data.fill_(-1.0)
            assert reader.adopt_into(served) == 1
            for name, tensor in weights_of(ranks).items():
                if name in dict(policy.named_parameters()):
                    assert torch.equal(served.get_parameter(name), tensor), name
            assert not torch.equal(next(served.parameters()), next(policy.parameters()))
            assert most == largest
            shards = sum(p.to_local().nbytes for p in ranks.policy.parameters())
            assert shards < 0.6 * sum(p.nbytes for p in policy.parameters())
            # What raises in the middle leaves no rank behind.
            with pytest.raises(ZeroDivisionError), ranks.weights() as weights:
                next(weights)
                raise ZeroDivisionError
            assert not ranks.has_failed
            learners.learn(ranks, learners.minibatches()[:1])
            reader.close()

    def test_a_killed_rank_ends_the_update_with_its_name(self, shards):
        learners, ranks = shards
        (process,) = ranks.processes
        learners.learn(ranks, learners.minibatches()[:1])
        os.kill(process.pid, signal.SIGKILL)
        begun_s = time.monotonic()
        with pytest.raises(RuntimeError, match=r"learner rank 1 was ended by SIGKILL.*resume=auto"):
            learners.learn(ranks, learners.minibatches())
        assert time.monotonic() - begun_s < 60.0  # not the 120 s that ranks wait for each other
        assert ranks.has_failed
        with pytest.raises(RuntimeError, match="learner rank 1 was ended"):
            weights_of(ranks)
        ranks.close()
        assert not dist.is_initialized()
        with pytest.raises(RuntimeError, match="were closed|was ended"):
            weights_of(ranks)


@pytest.mark.slow
def test_a_checkpoint_of_two_ranks_goes_on_with_one_and_with_three(make_learners, tmp_path):
    learners = make_learners("optim.lr=1e-4")
    first, second = learners.minibatches()
    policy, optimizer, _ = learners.learn_alone([first])
    utils.make_scheduler(learners.cfg, optimizer, lambda: 0.0)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"]
    RunCheckpoints(tmp_path / "one", policy=policy, optimizer=optimizer).save(1)
    expected = dict(learners.learn_alone([first, second])[0].named_parameters())

    def check(found):
        for name, parameter in expected.items():
            torch.testing.assert_close(found[name], parameter.data, rtol=0, atol=1e-6)

    with learners.ranks(2, "fsdp") as ranks:
        learners.learn(ranks, [first])
        parts = {"policy": ranks.gathered_policy(), "optimizer": ranks}
        saved = RunCheckpoints(tmp_path / "two", **parts).save(1)
    assert not list(saved.glob("components/*-optimizer/state.pt"))
    policy, optimizer, _ = learners.learn_alone([])
    RunCheckpoints(tmp_path / "x", policy=policy, optimizer=optimizer).load(saved)
    check(dict(learners.learn_alone([second], policy, optimizer)[0].named_parameters()))
    for num_ranks, strategy, folder in ((3, "fsdp", "two"), (2, "ddp", "one")):
        path = tmp_path / folder / saved.name
        policy = utils.make_policy(learners.cfg)
        RunCheckpoints(tmp_path / "x", policy=policy).load(path)
        with learners.ranks(num_ranks, strategy, policy=policy) as ranks:
            RunCheckpoints(tmp_path / "x", optimizer=ranks).load(path)
            learners.learn(ranks, [second])
            check({name: tensor.clone() for name, tensor in weights_of(ranks).items()})


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            functools.partial(utils.make_policy, compose_settings("toy", ["policy.vocab_size=16"])),
            ValueError,
            "same parameters and buffers on all ranks, got others on rank 1 than on rank 0: ",
        ),
        (
            functools.partial(utils.make_policy, None),
            RuntimeError,
            r"(?s)learner rank 1 failed:.*'NoneType' object has no attribute 'policy'",
        ),
        (_make_unknown_policy, ValueError, r"(?s)learner rank 1 failed.*ModuleNotFoundError"),
    ],
    ids=["other shapes", "an error", "not to be imported"],
)
def test_ranks_that_cannot_start_say_why(make_learners, make, error, message):
    learners = make_learners()
    factory = dataclasses.replace(utils.make_learner_factory(learners.cfg), policy=make)
    with pytest.raises(error, match=message):
        LearnerRanks(factory, utils.make_policy(learners.cfg), num_ranks=2, timeout_s=60.0)
    assert not dist.is_initialized()


def test_policies_that_ranks_cannot_share_are_refused():
    with pytest.raises(ValueError, match=r"running statistics in '0' in training mode"):
        check_same_on_all_ranks(nn.Sequential(nn.BatchNorm1d(2)))
    check_same_on_all_ranks(nn.Sequential(nn.BatchNorm1d(2)).eval())
    with pytest.raises(ValueError, match="know its shapes, got the lazy 'weight'"):
        check_same_on_all_ranks(nn.LazyLinear(2))
