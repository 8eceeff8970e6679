# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""A learner of several processes takes the steps of a single one."""

from __future__ import annotations

import weakref

import pytest
import torch

from torchrl_dvla.recipes.dvla_grpo import utils
from torchrl_dvla.recording import RunCheckpoints
from torchrl_dvla.weight_update import WeightStore

from .conftest import weights_of

pytestmark = pytest.mark.filterwarnings("ignore:the policy must give decisions of its own version")


@pytest.mark.parametrize(
    ("strategy", "name"), [("ddp", "toy"), ("fsdp", "toy"), ("fsdp", "toy_flow")]
)
def test_two_ranks_take_the_steps_of_one(make_learners, strategy, name):
    # Adam divides by the size of each gradient: rounding in the smallest of them counts by the rate.
    learners = make_learners(
        "optim.lr=1e-4", "optim.micro_batch_size=2", "optim.max_grad_norm=0.05", name=name
    )
    minibatches = learners.minibatches()
    policy, _, norms = learners.learn_alone(minibatches)
    with learners.ranks(2, strategy) as ranks:
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


def test_what_is_published_from_shards_is_bit_equal_and_one_tensor_at_a_time(make_learners):
    learners = make_learners()
    policy = utils.make_policy(learners.cfg)
    largest = max(p.nbytes for p in policy.parameters())
    with WeightStore(policy) as store, learners.ranks(2, "fsdp") as ranks:
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
