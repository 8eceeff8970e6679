# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Simulated runs: cases small enough to work out by hand."""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace

import pytest

from torchrl_dvla.collectors import InferenceConfig, WorkerConfig
from torchrl_dvla.data import GroupConfig
from torchrl_dvla.topology import ClusterSpec, GPUSpec, LaneCosts, NodeSpec, plan_run, simulate_run

pytest.importorskip("simpy", reason="of the extra 'simulate'")

#: 40 ms a step, 10 ms a policy call whatever its rows, rollouts of 5 decisions; learning is free.
COSTS = LaneCosts(
    "by hand",
    env_step_s=0.04,
    env_steps_per_decision=1,
    decisions_per_rollout=5,
    call_s=0.01,
    call_row_s=1e-12,
    learn_row_s=1e-12,
    row_bytes=1,
    version_bytes=1,
)
PAIR = GroupConfig(group_size=2, groups_per_update=1)
ONE = ClusterSpec((NodeSpec("a", 64, 2**34),))
#: Rows go to the policy at once.
AT_ONCE = InferenceConfig(max_wait_s=0.0, deterministic=False)


def nodes(count, **changes):
    return ClusterSpec(tuple(NodeSpec(f"node {k}", 64, 2**34, **changes) for k in range(count)))


def shares(found):
    return {load.what: load.share for load in found.loads}


def test_one_environment_takes_turns_with_its_policy():
    found = simulate_run(ONE, COSTS, workers=WorkerConfig(num_workers=1), group=PAIR)
    assert found.decisions_per_s == pytest.approx(1 / (0.04 + 0.01))
    assert shares(found)["sampling lane"] == pytest.approx(0.04 / 0.05)
    assert shares(found)["inference lane"] == pytest.approx(0.01 / 0.05)
    assert found.bounded_by.what == "rollouts" and found.bounded_by.share == pytest.approx(1.0)
    assert found.update_s == pytest.approx(10 * 0.05)  # two rollouts of 5, one after the other


def test_a_second_environment_of_a_worker_hides_the_policy():
    workers = WorkerConfig(num_workers=1, envs_per_worker=2)
    found = simulate_run(ONE, COSTS, workers=workers, inference=AT_ONCE, group=PAIR)
    assert found.decisions_per_s == pytest.approx(1 / 0.04)
    assert found.bounded_by.what == "sampling lane"


def test_a_batch_is_waited_for():
    # Two workers in step: both rows come at once and share a call, whatever max_wait_s is.
    inference = InferenceConfig(max_batch_size=2, max_wait_s=1.0)
    found = simulate_run(
        ONE, COSTS, workers=WorkerConfig(num_workers=2), inference=inference, group=PAIR
    )
    assert found.decisions_per_s == pytest.approx(2 / 0.05)
    # With calls of one row the second waits for the first: turns of 40 + 2 * 10 ms at first, then
    # they are out of step and wait for nobody.
    single = InferenceConfig(max_batch_size=1)
    found = simulate_run(
        ONE, COSTS, workers=WorkerConfig(num_workers=2), inference=single, group=PAIR,
        num_updates=50,
    )  # fmt: skip
    assert 2 / 0.06 < found.decisions_per_s <= 2 / 0.05 + 1e-9


def test_lag_0_idles_while_the_learner_learns():
    costs = replace(COSTS, learn_row_s=0.02)
    for lag, update_s, what in (
        (0, 5 * 0.05 + 10 * 0.02, "admission"),  # sampling, then learning
        (1, 5 * 0.05, "rollouts"),  # both at once
    ):
        group = replace(PAIR, max_policy_lag=lag)
        found = simulate_run(ONE, costs, workers=WorkerConfig(num_workers=2), group=group)
        assert found.update_s == pytest.approx(update_s)
        assert found.max_lag <= lag
        assert found.bounded_by.what == what


def test_publishing_and_resets_are_part_of_the_time():
    costs = replace(COSTS, reset_s=0.1, publish_s=0.15)
    group = replace(PAIR, max_policy_lag=0)
    found = simulate_run(ONE, costs, workers=WorkerConfig(num_workers=2), group=group)
    assert found.update_s == pytest.approx(0.1 + 5 * 0.05 + 0.15)
    assert found.transfer_s == pytest.approx(0.15)


def test_cores_bound_what_workers_do_at_once():
    small = ClusterSpec((NodeSpec("a", 1, 2**34),))
    found = simulate_run(small, COSTS, workers=WorkerConfig(num_workers=4), inference=AT_ONCE)
    # Each decision takes the core for its step, and a call for the rows that have come.
    assert found.decisions_per_s <= 1 / 0.04
    assert found.bounded_by.what == "cores" and found.bounded_by.share == pytest.approx(1.0)


def test_a_version_goes_along_a_chain():
    # 1 GB at 1 GB/s, then a bucket of 4 MiB and 2 ms for each further node; the learner's node
    # has it already.
    costs = replace(COSTS, version_bytes=10**9, env_step_s=1.0)
    found = simulate_run(
        nodes(5, network_bytes_per_s=1e9), costs, workers=WorkerConfig(num_workers=2),
        group=replace(PAIR, groups_per_update=5), hop_s=0.002,
    )  # fmt: skip
    assert found.transfer_s == pytest.approx(1.0 + 4 * 0.002 + 3 * 4 * 2**20 / 1e9)


def test_a_lag_hides_the_transfer():
    # Sampling an update takes 5 * 50 ms on both nodes, a version is on its way for 0.2 s.
    costs = replace(COSTS, version_bytes=20_000_000)
    cluster = nodes(2, network_bytes_per_s=1e8)
    group = replace(PAIR, groups_per_update=2)

    def update_s(lag):
        return simulate_run(
            cluster, costs, workers=WorkerConfig(num_workers=2),
            group=replace(group, max_policy_lag=lag),
        ).update_s  # fmt: skip

    assert update_s(0) == pytest.approx(0.25 + 0.2)
    assert update_s(1) == pytest.approx(0.25)


def test_rows_travel_to_the_learner():
    # 10 rows of 1 MB a group, 10 MB/s: 1 s a group of the other node; nodes sample a group in 0.25.
    costs = replace(COSTS, row_bytes=10**6)
    found = simulate_run(
        nodes(2, network_bytes_per_s=1e7), costs, workers=WorkerConfig(num_workers=2),
        group=replace(PAIR, groups_per_update=2, max_policy_lag=3),
    )  # fmt: skip
    assert found.bounded_by.what == "network, rows"
    # Of 5 groups a second one at most comes from there, and 4 from the learner's node.
    assert 10 < found.decisions_per_s <= 50 + 1e-9


def test_ranks_gather_and_reduce():
    gpu = GPUSpec("GPU", 2**36, link_bytes_per_s=1e9)
    costs = replace(
        COSTS, policy_device="cuda", learn_row_s=0.2, version_bytes=10**8, trained_bytes=10**8,
        optimizer_steps_per_row=0.1,
    )  # fmt: skip
    cluster = ClusterSpec((NodeSpec("a", 64, 2**34, gpus=(gpu,) * 3),))
    found = simulate_run(
        cluster, costs, workers=WorkerConfig(num_workers=2), group=PAIR, num_learner_gpus=2
    )
    # An update has 10 rows and one optimizer step: 10 * 0.2 s on two ranks, and three times half
    # of 100 MB at 1 GB/s.
    assert found.update_s == pytest.approx(1.0 + 0.15)
    assert found.bounded_by.what == "gradient lane, work"
    slow = replace(costs, learn_row_s=0.002)
    found = simulate_run(
        cluster, slow, workers=WorkerConfig(num_workers=2), group=PAIR, num_learner_gpus=2
    )
    assert found.update_s == pytest.approx(5 * 0.05)  # it waits for the rollouts
    assert "FSDP traffic" in shares(found)


def test_a_batched_environment_shares_the_gpus_with_the_policy():
    gpu = GPUSpec("GPU", 2**36)
    costs = replace(
        COSTS, env_device="cuda", policy_device="cuda", env_step_s=0.02, call_s=0.0,
        call_row_s=0.01,
    )  # fmt: skip
    cluster = ClusterSpec((NodeSpec("a", 64, 2**34, gpus=(gpu,) * 3),))
    workers = WorkerConfig(num_workers=1, envs_per_worker=8)
    found = simulate_run(
        cluster, costs, workers=workers, group=GroupConfig(group_size=4), num_learner_gpus=1
    )
    # Two GPUs, 30 ms of each a decision.
    assert found.decisions_per_s == pytest.approx(2 / 0.03, rel=1e-6)
    assert found.bounded_by.what == "sampling and inference on GPUs"


def test_groups_without_contrast_are_not_learned():
    costs = replace(COSTS, learned_share=0.5)
    found = simulate_run(
        ONE, costs, workers=WorkerConfig(num_workers=2), group=PAIR, num_updates=400
    )
    assert found.decisions_per_s == pytest.approx(2 / 0.05, rel=1e-6)
    assert found.learned_per_s / found.decisions_per_s == pytest.approx(0.5, abs=0.06)


def test_a_straggler_is_waited_for_within_the_lag():
    # Worker 0 takes ten times as long as worker 1, and all groups have rollouts on both.
    slow = itertools.count()

    def law(_):
        return itertools.repeat(10.0 if next(slow) == 0 else 1.0)

    found = simulate_run(
        ONE, COSTS, workers=WorkerConfig(num_workers=2),
        inference=InferenceConfig(max_batch_size=2, deterministic=False),
        group=replace(PAIR, max_policy_lag=0), step_law=law,
    )  # fmt: skip
    assert found.update_s == pytest.approx(5 * (0.4 + 0.01))


def test_it_never_exceeds_the_planners_bounds():
    costs = replace(COSTS, call_row_s=0.003, learn_row_s=0.004, reset_s=0.05, loop_s=0.001)
    for num_workers, count in ((1, 1), (8, 1), (1, 3)):
        cluster = nodes(count)
        bound = plan_run(cluster, costs, num_workers=num_workers)
        workers = WorkerConfig(num_workers=num_workers)
        found = simulate_run(cluster, costs, workers=workers, num_updates=30)
        assert 0.5 * bound.decisions_per_s < found.decisions_per_s
        assert found.decisions_per_s < 1.02 * bound.decisions_per_s


def test_the_same_seed_gives_the_same_run():
    costs = replace(COSTS, decisions_per_rollout=4.5, learned_share=0.7)
    runs = [simulate_run(ONE, costs, group=PAIR, seed=seed) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_updates": 0}, "num_updates must be at least 1, got 0"),
        ({"hop_s": -1.0}, "hop_s must be at least 0, got -1.0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"num_learner_gpus": 1}, "num_learner_gpus must be from 0 to 0 for .*'cpu' .* got 1"),
        (
            {"costs": replace(COSTS, policy_device="cuda")},
            "num_learner_gpus must be from 1 to 0 for .*'cuda' and 0 GPUs, got 0",
        ),
    ],
)
def test_bad_input(changes, message):
    costs = changes.pop("costs", COSTS)
    with pytest.raises(ValueError, match=message):
        simulate_run(ONE, costs, group=PAIR, **changes)


def test_a_group_that_fits_no_batched_environment():
    costs = replace(COSTS, env_device="cuda", policy_device="cuda")
    cluster = ClusterSpec((NodeSpec("a", 64, 2**34, num_gpus=2),))
    with pytest.raises(ValueError, match="must have rollouts that can begin, got none"):
        simulate_run(cluster, costs, workers=WorkerConfig(num_workers=1), num_learner_gpus=1)


def test_without_simpy(monkeypatch):
    monkeypatch.setitem(sys.modules, "simpy", None)
    with pytest.raises(ImportError, match=r"pip install 'torchrl-dvla\[simulate\]'"):
        simulate_run(ONE, COSTS, group=PAIR)
