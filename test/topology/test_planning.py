# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Every bound of the planner, with numbers worked out by hand."""

from __future__ import annotations

import pytest

from torchrl_dvla.collectors import InferenceConfig, WorkerConfig
from torchrl_dvla.data import GroupConfig
from torchrl_dvla.topology import (
    ClusterSpec,
    GPUSpec,
    LaneCosts,
    NodeSpec,
    draw_plan,
    plan_placement,
    plan_run,
)

GIB = 2**30
#: Two workers with four environments each: eight rollouts, batches of four.
TWO_BY_FOUR = {"workers": WorkerConfig(envs_per_worker=4), "num_workers": 2}
#: Two rollouts of ten decisions an update: 20 decisions.
SMALL = GroupConfig(group_size=2, groups_per_update=1)


def node(host="a", cores=8, **kwargs):
    return NodeSpec(host, cores, 64 * GIB, **kwargs)


def cluster(*nodes):
    return ClusterSpec(nodes or (node(),))


def costs(**kwargs):
    """An env step of 100 ms, 10 ms of policy and 20 ms of learner for a row."""
    values = {
        "env_step_s": 0.1,
        "env_steps_per_decision": 1,
        "decisions_per_rollout": 10,
        "call_row_s": 0.01,
        "learn_row_s": 0.02,
        "row_bytes": 1000,
        "version_bytes": 1000,
    }
    return LaneCosts("test", **{**values, **kwargs})


def gpus(number, **kwargs):
    return tuple(GPUSpec("H100", **kwargs) for _ in range(number))


def test_workers_bound():
    plan = plan_run(cluster(), costs(), **TWO_BY_FOUR)
    # 2 / 0.1 s. Beside them: 1 / 0.01 s of policy, 8 / (0.1 + 4 * 0.01) s of turns, 8 cores for
    # 0.13 s, 1 / 0.02 s of learner.
    assert plan.decisions_per_s == pytest.approx(20)
    assert plan.bounded_by.what == "sampling lane"
    shares = {load.what: load.share for load in plan.loads}
    assert shares == pytest.approx(
        {
            "rollouts": 20 * 0.14 / 8,
            "sampling lane": 1.0,
            "inference lane": 0.2,
            "collector's thread": 0.0,
            "cores": 20 * 0.13 / 8,
            "gradient lane": 0.4,
        }
    )


def test_resets_and_unlearned_rows_count():
    # 0.1 + 0.5 / 10 = 0.15 s of a worker
    plan = plan_run(cluster(), costs(reset_s=0.5, learned_share=0.5), **TWO_BY_FOUR)
    assert plan.decisions_per_s == pytest.approx(2 / 0.15)
    assert plan.loads[-1].share == pytest.approx(2 / 0.15 * 0.02 * 0.5)


def test_the_policy_bounds():
    options = {"workers": WorkerConfig(envs_per_worker=2), "num_workers": 4}
    plan = plan_run(cluster(), costs(call_s=0.2), **options)
    assert plan.decisions_per_s == pytest.approx(1 / (0.2 / 4 + 0.01))  # batches of four
    assert plan.bounded_by.what == "inference lane"
    plan = plan_run(cluster(), costs(call_s=0.2), inference=InferenceConfig(2), **options)
    assert plan.decisions_per_s == pytest.approx(1 / (0.2 / 2 + 0.01))


def test_too_few_rollouts_bound():
    plan = plan_run(cluster(), costs(loop_s=0.04), num_workers=2)
    assert plan.decisions_per_s == pytest.approx(2 / (0.1 + 0.01 + 0.04))
    assert plan.bounded_by.what == "rollouts"


def test_cores_bound():
    plan = plan_run(cluster(node(cores=2)), costs(), **TWO_BY_FOUR)
    assert plan.decisions_per_s == pytest.approx(2 / 0.13)
    assert (plan.bounded_by.what, plan.bounded_by.where) == ("cores", "a")


def test_the_learner_bounds():
    plan = plan_run(cluster(), costs(learn_row_s=0.2), **TWO_BY_FOUR)
    assert plan.decisions_per_s == pytest.approx(5)
    assert plan.bounded_by.what == "gradient lane"
    assert plan.gains == pytest.approx({"node": 1.0})


def test_the_thread_of_the_collector_bounds():
    plan = plan_run(cluster(), costs(loop_s=0.1), **TWO_BY_FOUR)
    assert plan.decisions_per_s == pytest.approx(10)
    assert plan.bounded_by.what == "collector's thread"


def test_the_learner_takes_cores_of_the_first_node():
    # A decision takes 0.11 s of its node's cores and 0.02 s of the first one's: four cores carry
    # 4 / 0.13 = 30.8, of which the second node makes 2 / 0.11 = 18.2.
    plan = plan_run(cluster(node(cores=2), node("b", cores=2)), costs(), **TWO_BY_FOUR)
    assert plan.decisions_per_s == pytest.approx(4 / 0.13)
    assert plan.nodes[1].decisions_per_s == pytest.approx(2 / 0.11)
    busy = {load.where: load.share for load in plan.loads if load.what == "cores"}
    assert busy == pytest.approx({"a": 1.0, "b": 1.0})


def test_the_network_bounds_by_rows_and_by_versions():
    nodes = [node(host, network_bytes_per_s=1e4) for host in "ab"]
    # Half of the decisions come from b: 500 bytes each.
    plan = plan_run(cluster(*nodes), costs(version_bytes=1), group=SMALL, **TWO_BY_FOUR)
    assert plan.decisions_per_s == pytest.approx(1e4 / 500)
    assert plan.bounded_by.what == "network, rows"
    # One version goes to b for 20 decisions: 0.4 s.
    few = costs(row_bytes=1, version_bytes=16_000)
    plan = plan_run(cluster(*nodes), few, group=SMALL, **TWO_BY_FOUR)
    assert plan.decisions_per_s == pytest.approx(20 / 1.6)
    assert plan.bounded_by.what == "network, versions"
    assert plan.transfer_s == pytest.approx(1.6)
    # Two more nodes of the chain have it a bucket later each, here of all its bytes.
    nodes += [node(host, network_bytes_per_s=1e4) for host in "cd"]
    plan = plan_run(cluster(*nodes), few, group=SMALL, **TWO_BY_FOUR)
    assert plan.decisions_per_s == pytest.approx(20 / 1.6)
    assert plan.transfer_s == pytest.approx(1.6 + 2 * 1.6)


def test_admission_bounds_and_the_lag_that_does_not():
    slow = costs(call_s=0.4, publish_s=0.1)
    options = {"group": SMALL, **TWO_BY_FOUR}
    plan = plan_run(cluster(), slow, **options)
    assert plan.decisions_per_s == pytest.approx(1 / 0.11)  # the policy, in batches of four
    # Eight rollouts of ten decisions are four updates of 20, each 2.2 s long; learned in 0.4 s and
    # published in 0.1: five updates are under way.
    assert plan.max_policy_lag == 4
    assert plan_run(cluster(), slow, max_policy_lag=4, **options).bounded_by.what != "admission"
    # Of lag 1, two: ten turns of 0.54 s, learning and publishing.
    plan = plan_run(cluster(), slow, max_policy_lag=1, **options)
    assert plan.decisions_per_s == pytest.approx(2 * 20 / (5.4 + 0.4 + 0.1))
    assert plan.bounded_by.what == "admission"


def test_without_lag_the_lanes_take_turns():
    lockstep = {"max_policy_lag": 0, **TWO_BY_FOUR}
    # Two rollouts of ten turns of 0.14 s; 20 rows are learned in 0.4 s and published in 0.2.
    plan = plan_run(cluster(), costs(publish_s=0.2), group=SMALL, **lockstep)
    assert plan.decisions_per_s == pytest.approx(20 / (1.4 + 0.4 + 0.2))
    # Of twenty rollouts the workers make 20 decisions a second.
    group = GroupConfig(group_size=20, groups_per_update=1)
    plan = plan_run(cluster(), costs(publish_s=0.2), group=group, **lockstep)
    assert plan.decisions_per_s == pytest.approx(200 / (10 + 4 + 0.2))


def test_one_version_of_lag_hides_what_is_shorter_than_sampling():
    group = GroupConfig(group_size=20, groups_per_update=1)
    # A cohort of 200 is sampled in 10 s, learned in 4, and sent within the other 6, or not.
    for publish_s, lag in ((5.9, 1), (6.1, 2)):
        plan = plan_run(cluster(), costs(publish_s=publish_s), group=group, **TWO_BY_FOUR)
        assert (plan.update_s, plan.max_policy_lag) == (pytest.approx(10), lag)


ON_GPU = {"policy_device": "cuda", "env_device": "cuda", "env_step_s": 0.03}
MANY = {"workers": WorkerConfig(envs_per_worker=64)}


def test_rollout_and_learner_gpus():
    # 40 ms of a rollout GPU, 20 ms of a learner's.
    eight = cluster(node(gpus=gpus(8)))
    for learning, expected in ((1, 50), (2, 100), (3, 125), (4, 100)):
        plan = plan_run(eight, costs(**ON_GPU), num_learner_gpus=learning, **MANY)
        assert plan.decisions_per_s == pytest.approx(expected), learning
    plan = plan_run(eight, costs(**ON_GPU), **MANY)
    assert (plan.nodes[0].rollout_gpus, plan.nodes[0].learner_gpus) == (5, 3)
    # a ninth samples: 6 / 0.04; a second node: 16 GPUs as 11 and 5, min(275, 250), or 10 and 6
    assert plan.gains == pytest.approx({"GPU": 1.2, "node": 2.0})


def test_environments_on_cores_and_the_policy_on_gpus():
    plan = plan_run(
        cluster(node(gpus=gpus(3))), costs(policy_device="cuda"), num_learner_gpus=1, **TWO_BY_FOUR
    )
    assert plan.decisions_per_s == pytest.approx(20)
    shares = {load.what: load.share for load in plan.loads}
    # two inference lanes with 10 ms each, and nothing but simulation on eight cores
    assert shares["inference lane"] == pytest.approx(0.1)
    assert shares["cores"] == pytest.approx(20 * 0.1 / 8)
    assert plan.nodes[0].batch_size == 2  # of eight rollouts on two GPUs, halved


def test_one_gpu_is_shared():
    plan = plan_run(cluster(node(gpus=gpus(1))), costs(**ON_GPU), **MANY)
    assert plan.decisions_per_s == pytest.approx(1 / 0.06)
    assert plan.bounded_by.what == "the GPU"


def test_ranks_gather_weights_and_reduce_gradients():
    # Twice 8 GB and once 4, half of it from the other rank: 10 GB at 100 GB/s, 0.1 s in each of the
    # optimizer steps, of which 100 rows have one; 10 ms of work a row and 1 ms for others.
    big = costs(
        **ON_GPU, version_bytes=8_000_000_000, trained_bytes=4_000_000_000,
        optimizer_steps_per_row=0.01,
    )  # fmt: skip
    one_node = cluster(node(gpus=gpus(8, link_bytes_per_s=100e9)))
    plan = plan_run(one_node, big, num_learner_gpus=2, **MANY)
    assert plan.learner_efficiency == pytest.approx(10 / 11)
    assert plan.decisions_per_s == pytest.approx(1 / 0.011)
    # On two nodes it is the network's speed that counts: 10 ms.
    pair = [node(host, gpus=gpus(1), network_bytes_per_s=10e9) for host in "ab"]
    third = node("c", gpus=gpus(6), network_bytes_per_s=10e9)
    plan = plan_run(cluster(*pair, third), big, num_learner_gpus=2, **MANY)
    assert plan.learner_efficiency == pytest.approx(0.5)
    assert [n.learner_gpus for n in plan.nodes] == [1, 1, 0]
    assert [n.num_workers for n in plan.nodes][:2] == [0, 0]


def test_as_few_workers_as_are_as_fast():
    plan = plan_run(cluster(), costs(loop_s=0.05), workers=WorkerConfig(envs_per_worker=4))
    assert plan.nodes[0].num_workers == 2  # the collector's thread bounds at 20
    plan = plan_run(cluster(), costs(learn_row_s=0.2), workers=WorkerConfig(envs_per_worker=4))
    assert plan.nodes[0].num_workers == 1  # the learner at 5
    plan = plan_run(cluster(), costs(env_bytes=8 * GIB))
    assert plan.nodes[0].num_workers == 4  # in half of 64 GiB


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_workers": 9}, r"num_workers must be from 1 to 8 on a, which has 8 cores"),
        ({"num_workers": 0}, "num_workers must be from 1"),
        ({"num_learner_gpus": 2}, r"num_learner_gpus must be one of \[0\], got 2"),
        ({"costs": costs(env_bytes=40 * GIB)}, "env_memory_bytes must fit into 50%"),
        ({"costs": costs(policy_device="cuda")}, "cluster must have a GPU"),
    ],
)
def test_a_plan_for_more_than_there_is(options, message):
    given = {"costs": costs(), **options}
    with pytest.raises(ValueError, match=message):
        plan_run(cluster(), given.pop("costs"), **given)


def test_more_learner_gpus_than_can_be():
    with pytest.raises(ValueError, match=r"one of \[1\], got 2: of the 2 GPUs"):
        plan_run(cluster(node(gpus=gpus(2))), costs(policy_device="cuda"), num_learner_gpus=2)


def test_a_placement_with_costs_takes_the_planners_workers():
    nodes = cluster(node(), node("b", cores=4))
    options = {"env_memory_bytes": GIB, "workers": WorkerConfig(envs_per_worker=4)}
    placement = plan_placement(nodes, costs=costs(loop_s=0.05), **options)
    assert [n.workers.num_workers for n in placement.nodes] == [2, 2]
    assert [n.inference.max_batch_size for n in placement.nodes] == [4, 4]
    assert placement.learner.host == "a"
    with pytest.raises(ValueError, match=r"one on several GPUs, for \['a'\]"):
        plan_run(cluster(node(gpus=gpus(4))), costs(**ON_GPU)).placement()


def test_the_table_and_the_picture_name_the_bound():
    plan = plan_run(cluster(), costs(), **TWO_BY_FOUR)
    text = str(plan)
    assert "decisions/s     20\n" in text and "bounded by      sampling lane of a" in text
    assert "one more node   x 2.00" in text
    svg = draw_plan(plan)
    assert "20 decisions/s, bounded by: sampling lane of a" in svg
    assert svg.count("<title>sampling lane: 100.0%</title>") == 1
    ten = [node(f"n{k}") for k in range(10)]
    assert "and 2 more nodes" in draw_plan(plan_run(cluster(*ten), costs(), **TWO_BY_FOUR))
