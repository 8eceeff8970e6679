# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from torchrl_dvla.testing import CountingChunkEnv, EmulatedDevice, Latency, emulate_latency


class FakeTime:
    """A clock that only moves when somebody sleeps, or says that work was done."""

    def __init__(self):
        self.now, self.sleeps = 100.0, []

    def sleep(self, duration_s):
        self.sleeps.append(duration_s)
        self.now += duration_s


@pytest.fixture
def fake():
    return FakeTime()


def device(fake, latency_s):
    return EmulatedDevice(latency_s, clock=lambda: fake.now, sleep=fake.sleep)


def test_work_of_the_call_is_part_of_its_latency(fake):
    emulated = device(fake, 0.5)

    def work(cost_s):
        fake.now += cost_s

    call = emulate_latency(work, emulated)
    call(0.125)
    assert fake.sleeps == [0.375]
    assert (emulated.num_calls, emulated.num_overruns, emulated.busy_s) == (1, 0, 0.5)
    call(2.0)  # the work itself takes longer than the device would
    assert fake.sleeps == [0.375]
    assert (emulated.num_calls, emulated.num_overruns, emulated.busy_s) == (2, 1, 2.5)


def test_latency_counts_rows(fake):
    emulated = device(fake, Latency(0.25, per_row_s=0.125))
    call = emulate_latency(lambda tensordict: tensordict, emulated)
    call(TensorDict(batch_size=[4]))
    call(TensorDict(batch_size=[]))
    assert fake.sleeps == [0.75, 0.375]


def test_heavy_tail_has_the_stated_mean_and_repeats():
    law = Latency(0.01, tail_index=3.0, seed=1)
    draws = [law.sample() for _ in range(20_000)]
    assert sum(draws) / len(draws) == pytest.approx(0.01, rel=0.03)
    assert max(draws) > 0.05
    again = Latency(0.01, tail_index=3.0, seed=1)
    assert [again.sample() for _ in range(5)] == draws[:5]


def test_module_keeps_its_identity(fake):
    policy = TensorDictModule(nn.Linear(2, 3), in_keys=["observation"], out_keys=["action"])
    names = [name for name, _ in policy.named_parameters()]
    emulated = device(fake, 0.5)
    assert emulate_latency(policy, emulated) is policy
    assert [name for name, _ in policy.named_parameters()] == names
    out = policy(TensorDict({"observation": torch.zeros(4, 2)}, [4]))
    assert out["action"].shape == (4, 3)
    assert fake.sleeps == [0.5]


def test_module_that_raises_frees_the_device(fake):
    emulated = device(fake, 0.5)
    module = emulate_latency(nn.Linear(2, 3), emulated)
    with pytest.raises(RuntimeError):
        module(torch.zeros(1, 7))
    assert ThreadPoolExecutor(1).submit(module, torch.zeros(1, 2)).result(10).shape == (1, 3)
    assert emulated.num_calls == 2


def test_nested_calls_are_one_call(fake):
    emulated = device(fake, 0.5)
    inner = emulate_latency(nn.Linear(2, 2), emulated)
    outer = emulate_latency(lambda x: inner(inner(x)), emulated)
    assert outer(torch.zeros(1, 2)).shape == (1, 2)
    assert fake.sleeps == [0.5]
    assert emulated.num_calls == 1


def test_one_device_serves_one_caller_after_the_other():
    order: list[str] = []
    inside, release = threading.Event(), threading.Event()
    emulated = EmulatedDevice(0.0)

    def first() -> None:
        inside.set()
        assert release.wait(10)
        order.append("first")

    with ThreadPoolExecutor(2) as threads:
        threads.submit(emulated.wrap(first))
        assert inside.wait(10)
        threads.submit(emulated.wrap(lambda: order.append("second")))
        release.set()
    assert order == ["first", "second"]


def test_environment_step_takes_the_latency_and_reset_does_not(fake):
    emulated = device(fake, 0.5)
    env = emulate_latency(CountingChunkEnv(), emulated)
    reset = env.reset()
    assert fake.sleeps == []
    reference = CountingChunkEnv()
    reference.reset()
    action = env.full_action_spec.zero()
    out = env.step(reset.update(action))
    assert fake.sleeps == [0.5]
    expected = reference.step(action.clone())["next"].exclude("language_instruction")
    assert (out["next"].exclude("language_instruction") == expected).all()
    env.rollout(3)
    assert emulated.num_calls == 1 + 3


def test_copies_are_devices_of_their_own():
    original = EmulatedDevice(0.001)
    layer = emulate_latency(nn.Linear(2, 2), original)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        other(torch.zeros(1, 2))
        torch.testing.assert_close(other.weight, layer.weight)
    assert original.num_calls == 0


def test_refusals():
    with pytest.raises(ValueError, match="must not be negative"):
        Latency(-0.1)
    with pytest.raises(ValueError, match="tail_index must be greater than 1"):
        Latency(0.1, tail_index=1.0)
    with pytest.raises(ValueError, match="got int"):
        emulate_latency(3, 0.1)
