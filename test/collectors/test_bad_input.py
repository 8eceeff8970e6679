# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What cannot work ends with one clear error, and leaves no process behind."""

from __future__ import annotations

import contextlib
import multiprocessing
import re
import sys

import pytest
import torch
from tensordict.nn import TensorDictModule
from torchrl.data import Composite
from torchrl.envs import ToyVLAEnv

from torchrl_dvla import DVLACollector, InferenceConfig, PooledReplayBuffer
from torchrl_dvla.collectors import EpisodeSpec, GroupConfig, InitStateSchedule
from torchrl_dvla.collectors.validation import (
    check_episodes,
    check_same_start,
    match_policy,
    warn_of_misfits,
)
from torchrl_dvla.data import Group, Rollout, decision_layout
from torchrl_dvla.envs import ChunkEnv
from torchrl_dvla.memory import DualPool, EnvironmentPool, RowLayout
from torchrl_dvla.swimlane.env_worker import describe_env
from torchrl_dvla.testing import Fault, FaultyEnvFactory

from .counting_task import make_env, make_policy


@pytest.fixture(autouse=True)
def nothing_is_left():
    yield
    left = [p.name for p in multiprocessing.active_children() if p.name.startswith("dvla")]
    assert left == []


@pytest.fixture
def refuse(make_collector):
    """Builds a collector that must not come to life, and compares its error."""

    def refuse(match, error=ValueError, **kwargs):
        with pytest.raises(error, match=match):
            make_collector(**kwargs)
        assert not [p for p in multiprocessing.active_children() if p.name.startswith("dvla")]

    return refuse


@pytest.fixture
def no_process(monkeypatch):
    """Starting a process is an error."""
    monkeypatch.setattr(
        "torchrl_dvla.swimlane.env_processes.ManagedProcess", lambda *a, **k: pytest.fail("start")
    )


def test_no_policy_and_a_factory_of_lazy_policies_alone(no_process):
    with pytest.raises(ValueError, match="policy or policy_factory must be given, got neither"):
        DVLACollector(make_env)
    with pytest.raises(ValueError, match="policy_factory must build a policy whose .*lazy ones: "):
        DVLACollector(make_env, policy_factory=make_policy)


def test_a_factory_of_lazy_policies_in_the_lane(make_collector):
    policy = make_policy()
    collector = make_collector(policy_factory=lambda: policy)
    with pytest.raises(RuntimeError, match=r"(?s)in the inference lane.*policy_factory must build"):
        collector.start()
        next(iter(collector.replay_buffer))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (make_env(), TypeError, "must be a function that .*, got a CountingChunkEnv. Pass `lambda"),
        ({"a": make_env, "b": 3}, TypeError, "got a int. Pass `lambda"),
        ("Pendulun-v1", ValueError, "an id that gymnasium knows, got 'Pendulun-v1': .*`Pendulum`"),
        ({"a": "Mine-v0"}, ValueError, "got 'Mine-v0'.* another package registers .*'package:Id'"),
        ("no_package:Mine-v0", ValueError, "got 'no_package:Mine-v0': No module named 'no_pack"),
    ],
)
def test_what_makes_no_environment(no_process, make, error, message):
    with pytest.raises(error, match=message):
        DVLACollector(make, make_policy())


def test_an_id_without_gymnasium(no_process, monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(ImportError, match="'Pendulum-v1' needs gymnasium: pip install gymnasium"):
        DVLACollector("Pendulum-v1", make_policy())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (ToyVLAEnv, "success must give one flag .*ChunkEnv.*Its entries are .*'image'"),
        (lambda: 3, "must be an environment of TorchRL or gymnasium, .* got 3"),
        ("Pendulum-v1", r"success must give one flag .*ChunkEnv.*'observation' \[3\] float32"),
    ],
)
def test_environments_that_need_more_than_the_defaults(refuse, make, message):
    message = f"(?s)create_env_fn failed in dvla-env-0.*{message}"
    refuse(message, error=RuntimeError, create_env_fn=make)


def test_a_policy_that_reads_what_is_not_observed(refuse):
    refuse(
        r"policy must read what .*'state'\)\] .* got in_keys with \[\('observation', 'image'\)\]."
        r" .*ChunkEnv\(make_env\(\), image_key=.*render_mode='rgb_array'",
        create_env_fn=lambda: ChunkEnv("Pendulum-v1", success="terminated"),
    )


def test_chunks_of_another_length_than_the_policys(refuse):
    refuse(r"chunk_size=4, action_dim=2.*got \[5, 2\]", policy=make_policy(chunk_size=5))


def test_numbered_initial_states_that_the_environment_would_not_hear_of(refuse, make_collector):
    def make():  # nested, so that it is pickled by value
        env = make_env()
        env.set_spec_lock_(False)
        env.state_spec = Composite()
        return env

    message = r"task 'default' must declare 'init_state_id' .* start from init state 4\. Set self"
    schedule = InitStateSchedule(init_state_ids=[-1, 4])
    refuse(message, create_env_fn=make, schedule=schedule)
    collector = make_collector(make)
    with pytest.raises(ValueError, match=message):
        collector.evaluate([EpisodeSpec("default", 0), EpisodeSpec("default", 0, 4)])
    assert len(collector.evaluate([EpisodeSpec("default", 0)]).result(60.0).successes) == 1


def test_an_environment_without_instructions_is_said_once(make_collector, caplog):
    def make():
        env = make_env()
        env.set_spec_lock_(False)
        del env.observation_spec["language_instruction"]
        return env

    make_collector(make, workers={"num_workers": 2})
    assert caplog.text.count("have no 'language_instruction', which the policy reads") == 1


@pytest.mark.parametrize(
    ("bounds", "says"),
    [
        ((-1.0, 1.0), None),
        (None, None),
        ((-2.0, 2.0), r"lie in \[-1, 1\], .* in \[-2, 2\].*Rescale"),
    ],
)
def test_actions_that_the_policy_never_takes_are_said(caplog, bounds, says):
    warn_of_misfits(make_policy(), describe_env(make_env())._replace(action_bounds=bounds))
    assert re.search(says or "^$", caplog.text)


def test_specs_that_differ_between_workers(refuse):
    def make():  # nested, so that it is pickled by value
        size = 8 if multiprocessing.current_process().name == "dvla-env-1" else 16
        return make_env(image_size=(size, size))

    refuse(
        "(?s)same specs.*worker 0.*worker 1.*Make create_env_fn deterministic",
        error=RuntimeError,
        create_env_fn=make,
        workers={"num_workers": 2},
    )


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.randn, "must write integers .* got torch.float32.*Gaussian"),
        (lambda shape: torch.full(shape, 8), "at least 0, at most 7, got 8 in 1 of 1 rows"),
        (lambda shape: torch.full(shape, -1), "at least 0, at most 7, got -1 in 1 of 1 rows"),
    ],
)
def test_tokens_that_are_none(tokens, message):
    policy = make_policy()
    write = lambda _, __, td: td.set(("vla_action", "tokens"), tokens((1, 4, 2)))  # noqa: E731
    policy.register_forward_hook(write)
    with pytest.raises(ValueError, match=message):
        match_policy(policy, describe_env(make_env()))


@pytest.mark.parametrize("missing", ["log_probs", "chunk", "tokens"])
def test_a_policy_that_writes_too_little(refuse, missing):
    policy = make_policy()
    forget = TensorDictModule(lambda: (), in_keys=[], out_keys=[])

    class Forgetful(torch.nn.Module):
        in_keys, out_keys = policy.in_keys, policy.out_keys

        def __init__(self):
            super().__init__()
            self.policy, self.forget = policy, forget

        def forward(self, tensordict):
            tensordict = self.policy(tensordict)
            del tensordict["vla_action", missing]
            return tensordict

    refuse(rf"policy must write \('vla_action', '{missing}'\)", policy=Forgetful())


def test_a_constructor_that_raises_on_every_worker_is_told_once(make_collector):
    factory = FaultyEnvFactory(make_env, [Fault("raise", "constructor")])
    with pytest.raises(RuntimeError) as caught:
        make_collector(factory, workers={"num_workers": 3})
    assert str(caught.value).count("InjectedFault: injected") == 1
    assert str(caught.value).count("Traceback") == 1


def test_a_constructor_that_hangs_is_named_at_the_deadline(refuse):
    fault = Fault("hang", "constructor", repeat=True)
    refuse(
        r"start_timeout_s must cover the construction .*\['dvla-env-0'\] took more than 0.5 s",
        error=TimeoutError,
        create_env_fn=FaultyEnvFactory(make_env, [fault]),
        workers={"start_timeout_s": 0.5, "stop_timeout_s": 0.1},
    )


def test_a_group_larger_than_the_workers_can_hold_runs_one_after_the_other(start_collector):
    group = GroupConfig(group_size=7, groups_per_update=2, max_policy_lag=0)
    collector = start_collector(group=group, workers={"num_workers": 1, "envs_per_worker": 1})
    rows = torch.cat([batch.clone() for batch in collector.replay_buffer])
    assert rows["rollout_id"].unique().numel() == 14


def test_pages_for_the_groups_but_not_for_an_evaluation(refuse, make_collector, start_collector):
    probe = make_collector()
    plan = probe.plan
    probe.shutdown()
    enough = plan.min_env_bytes + plan.rows_per_page * plan.row_bytes + 4096
    refuse(
        r"env_bytes must hold .* = 2 x 3 \+ 1 = 7 pages, got 6.*would wait for each other",
        memory=DualPool(env_bytes=plan.min_env_bytes),
    )
    refuse("env_bytes must be at least", memory=DualPool(env_bytes="20KB"))
    collector = start_collector(memory=DualPool(env_bytes=enough))
    for _ in range(3):
        list(collector.replay_buffer)
        collector.update_policy_weights_()


def test_minibatches_that_cannot_hold_the_longest_rollout(refuse):
    refuse(
        "batch_size must be at least max_decisions=4 with whole_rollouts, got 3: a minibatch could",
        replay_buffer=PooledReplayBuffer(batch_size=3, whole_rollouts=True),
    )


def test_a_buffer_of_another_collector(refuse, make_collector):
    other = make_collector()
    with pytest.raises(RuntimeError, match="bound to a collector already"):
        make_collector(replay_buffer=other.replay_buffer)


def test_settings_are_refused_before_a_process_starts(refuse, no_process):
    deterministic = InferenceConfig(deterministic=True)
    refuse("deterministic must be None or False", inference=deterministic)  # at lag 1
    refuse("schedule must name tasks", schedule=InitStateSchedule(("other",)))
    refuse("weight_sync_schemes must be", weight_sync_schemes={"policy": object()})


def test_frames_of_an_environment_without_a_camera():
    layout = RowLayout({("observation", "state"): ((4,), torch.float32)})
    with EnvironmentPool(layout, num_pages=1, rows_per_page=1) as pool:
        check_episodes([], {}, set(), 0, pool)
        with pytest.raises(ValueError, match=r"num_frames_episodes must be 0 without .*got 2"):
            check_episodes([], {}, set(), 2, pool)


@pytest.mark.parametrize(
    ("key", "gap", "message"),
    [
        (("observation", "state"), 1e-3, r"'state'\) that differs by 0.00[0-9]* .* task 'reach'"),
        (("observation", "image"), 9, r"'image'\) that differs by 9 "),
        ("instruction_id", 1, "instruction_id that differs by 1 "),
        (("observation", "state"), 1e-5, None),
        (("observation", "image"), 8, None),
        (("observation", "float_image"), 0.024, r"'float_image'\) that differs by 0.024 "),
        (("observation", "float_image"), 0.015, None),  # 4 of 255 levels
    ],
)
def test_rollouts_of_a_group_start_alike(key, gap, message):
    specs = describe_env(make_env())
    observation = {name: (shape, dtype) for name, shape, dtype in specs.observation}
    observation["observation", "float_image"] = (3, 4, 4), torch.float32
    layout = decision_layout(observation, chunk_size=4, action_dim=2)
    with EnvironmentPool(layout, num_pages=4, rows_per_page=2) as pool:
        spec = EpisodeSpec("reach", 3)
        rollouts = [Rollout(spec, 0, index, [pool.lease(index)]) for index in range(4)]
        pool.rows["observation", "float_image"].fill_(0.75)  # 8/255 of it are 0.0235
        pool.rows[key][6] += gap  # the first row of the last
        pool.rows["observation", "state"][7] += 1  # decisions after the first may differ
        refused = pytest.raises(ValueError, match=message)
        with contextlib.nullcontext() if message is None else refused:
            check_same_start(Group(0, spec, 0, rollouts), pool)
