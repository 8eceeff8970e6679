# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The learner's end of a cluster, on nodes that answer by script."""

from __future__ import annotations

import asyncio
import functools

import numpy as np
import pytest
import torch

from torchrl_dvla.collectors import EpisodeSpec
from torchrl_dvla.topology import cluster_loop
from torchrl_dvla.topology.node_messages import GroupDropped, LoopEnded, TaskQuarantined
from torchrl_dvla.topology.nodes import Machine, NodeState

from .fake_cluster import FakeCluster, make_group


def on_a_cluster(**options):
    """Run an asynchronous test on a :class:`FakeCluster`."""

    def decorate(test):
        @functools.wraps(test)
        def run():
            async def main():
                async with FakeCluster(**options) as cluster:
                    await test(cluster)

            asyncio.run(main())

        del run.__wrapped__  # pytest would look for its fixtures
        return run

    return decorate


# -- grants ---------------------------------------------------------------------------------------
@on_a_cluster(completes=False)
async def test_admission_bounds_what_all_nodes_hold_together(cluster):
    await cluster.until(lambda: len(cluster.groups) == 4)
    await cluster.quiet()
    held = [[grant.group_id for grant in cluster.node(k).grants] for k in range(2)]
    assert held == [[0, 2], [1, 3]], "in turn, 2 groups_per_update x (1 + 1)"
    assert cluster.pool.stats()["pages_reserved"] == 4 * 2 * 2


@on_a_cluster(completes=False, groups_per_update=9)
async def test_a_node_is_granted_what_fills_it_and_one_group_ahead(cluster):
    await cluster.until(lambda: len(cluster.groups) == 4)
    await cluster.quiet()
    # 2 environments, groups of 2: one group at a time, one ahead
    assert [len(cluster.node(k).grants) for k in range(2)] == [2, 2]
    assert cluster.node(0).plan.num_groups == 2
    cluster.node(1).complete(1)
    await cluster.until(lambda: len(cluster.groups) == 5)
    await cluster.until(lambda: len(cluster.node(1).grants) == 2)


@on_a_cluster()
async def test_a_group_arrives_as_it_was_sampled(cluster):
    await cluster.until(lambda: len(cluster.groups.stored) == 4)
    group = cluster.groups.stored[1]
    rows = cluster.pool.rows[group.row_index(cluster.pool)]
    assert rows["group_id"].flatten().tolist() == [1] * 6
    assert rows["observation", "state"].flatten().tolist() == list(range(12))
    # "mine" has id 0 here; the node's own id 0 is another string.
    text = cluster.instructions.text(int(rows["instruction_id"][0]))
    assert text == "task of 1"
    assert cluster.instructions.text(group.rollouts[0].instruction_id) == "task of 1"
    assert [rollout.rollout_id for rollout in group.rollouts] == [2, 3]
    assert group.advantages.tolist() == pytest.approx([-(0.5**0.5), 0.5**0.5], abs=1e-3)
    cluster.pool.check()
    assert cluster.counters.totals["collector/decisions"] > 0
    assert {span.track for span in cluster.timeline.spans()} >= {"node 0 worker 0", "sender"}


@on_a_cluster()
async def test_a_group_waits_on_the_node_for_the_version_of_its_admission(cluster):
    await cluster.until(lambda: len(cluster.groups.stored) == 4)
    assert cluster.learn() == [0, 1]
    cluster.runtime.completes = False
    await cluster.until(lambda: sum(len(cluster.node(k).grants) for k in range(2)) == 2)
    grants = [grant for k in range(2) for grant in cluster.node(k).grants]
    assert [(g.min_version, g.deadline) for g in grants] == [(1, 2), (1, 2)]


@on_a_cluster()
async def test_the_lag_of_every_row_is_bounded_over_many_updates(cluster):
    learned, lags = [], []
    for _ in range(12):
        await cluster.until(lambda: cluster.groups._select() is not None)
        version = cluster.groups.version
        for group in cluster.groups._select():
            rows = cluster.pool.rows[group.row_index(cluster.pool)]
            lags += (version - rows["policy_version"].flatten()).tolist()
        learned += cluster.learn()
    assert len(set(learned)) == len(learned) == 24
    assert min(lags) >= 0 and max(lags) <= 1


@on_a_cluster(num_nodes=1, completes=False)
async def test_a_dropped_group_gives_its_pages_back(cluster):
    await cluster.until(lambda: cluster.node(0).grants)
    first = cluster.node(0).grants[0].group_id
    cluster.node(0).send(GroupDropped(first, "the environment kept failing"))
    await cluster.until(lambda: cluster.groups.drop_counts())
    assert cluster.groups.drop_counts()["the environment kept failing"]["count"] == 1
    cluster.pool.check()


@on_a_cluster(completes=False)
async def test_a_task_that_fails_on_one_node_begins_on_none(cluster):
    await cluster.until(lambda: cluster.node(0).grants and cluster.node(1).grants)
    cluster.node(0).send(TaskQuarantined("a", "it broke"))
    await cluster.until(lambda: cluster.node(1).failing == ["a"])
    assert cluster.groups.quarantined == {"a"}
    cluster.node(1).send(TaskQuarantined("b", "it broke as well"))
    assert "it broke as well" in str(await cluster.error())


# -- nodes that are lost --------------------------------------------------------------------------
@on_a_cluster(completes=False)
async def test_the_groups_of_a_lost_node_are_sampled_again_by_another(cluster):
    await cluster.until(lambda: len(cluster.groups) == 4)
    lost = cluster.node(0)
    del cluster.runtime.members["m0"]  # the machine is gone
    await cluster.quiet()
    lost.is_lost = True
    await cluster.until(lambda: cluster.nodes[0].state is NodeState.DEAD)
    assert lost.is_killed
    cluster.node(1).complete()
    await cluster.until(lambda: len(cluster.groups.stored) == 2)
    await cluster.until(lambda: len(cluster.node(1).grants) == 2)
    cluster.node(1).complete()
    await cluster.until(lambda: len(cluster.groups.stored) == 4)
    assert [group.group_id for group in cluster.groups.stored] == [0, 1, 2, 3]
    assert [group.spec.seed for group in cluster.groups.stored] == [0, 1, 2, 3]
    assert cluster.loop.totals["groups_resampled"] == 2
    cluster.pool.check()


@on_a_cluster()
async def test_a_node_that_is_started_again_gets_the_newest_version_first(cluster):
    await cluster.until(lambda: len(cluster.groups.stored) == 4)
    cluster.learn()
    await cluster.until(lambda: cluster.node(0).version == 1)
    cluster.node(0).hangs = True
    await cluster.until(lambda: len(cluster.runtime.started) == 3)
    await cluster.until(lambda: cluster.nodes[0].state is NodeState.HEALTHY)
    again = cluster.node(0)
    assert again.versions == [1] and again.machine_id == "m0"
    states = [state for _, name, state in cluster.loop.history if name == "node 0"]
    assert states == [
        NodeState.STALE, NodeState.HEALTHY, NodeState.DEAD,
        NodeState.RESTARTING, NodeState.STALE, NodeState.HEALTHY,
    ]  # fmt: skip
    assert cluster.loop.stats()["cluster/nodes_lost"] == 1


@on_a_cluster(num_nodes=1)
async def test_a_node_that_is_always_lost_ends_the_run(cluster):
    await cluster.until(lambda: cluster.nodes[0].state is NodeState.HEALTHY)
    cluster.runtime.completes = False
    for _ in range(4):
        await cluster.until(lambda: cluster.nodes[0].state is NodeState.HEALTHY)
        cluster.node(0).send(LoopEnded("RuntimeError: the policy failed", False))
        await cluster.until(
            lambda: cluster._main.done() or cluster.nodes[0].state is not NodeState.HEALTHY
        )
    assert "the policy failed" in str(await cluster.error())


@on_a_cluster()
async def test_an_environment_that_ignores_its_seed_ends_the_run(cluster):
    await cluster.until(lambda: cluster.nodes[0].state is NodeState.HEALTHY)
    cluster.node(0).send(LoopEnded("ValueError: the same observation", True))
    assert "the same observation" in str(await cluster.error())


@pytest.mark.parametrize(
    "changes",
    [
        {"rows": np.zeros(64, np.uint8)},
        {"instructions": {}},
        {"rollouts": []},
        {"group_id": 99},
    ],
)
def test_a_node_that_sends_something_else_is_lost_and_its_group_sampled_again(changes):
    @on_a_cluster(num_nodes=1, completes=False)
    async def run(cluster):
        await cluster.until(lambda: len(cluster.groups) == 2)
        await cluster.until(lambda: cluster.node(0).grants)
        bad = cluster.node(0)
        bad.send(make_group(bad.grants[0], 0, **changes))
        await cluster.until(lambda: len(cluster.runtime.started) == 2)
        await cluster.until(lambda: cluster.nodes[0].state is NodeState.HEALTHY)
        await cluster.until(lambda: len(cluster.node(0).grants) == 2)
        cluster.node(0).complete()
        await cluster.until(lambda: len(cluster.groups.stored) == 2)
        assert [group.group_id for group in cluster.groups.stored] == [0, 1]
        cluster.pool.check()

    run()


@on_a_cluster(completes=False)
async def test_decisions_of_an_older_version_than_the_admission_are_refused(cluster):
    await cluster.until(lambda: len(cluster.groups) == 4)
    for k in range(2):
        await cluster.until(lambda k=k: len(cluster.node(k).grants) == 2)
        cluster.node(k).complete()
    await cluster.until(lambda: len(cluster.groups.stored) == 4)
    cluster.learn()
    await cluster.until(lambda: cluster.node(0).grants)
    node = cluster.node(0)
    node.send(make_group(node.grants[0], version=0))
    await cluster.until(lambda: cluster.loop.totals["nodes_lost"] == 1)


# -- members --------------------------------------------------------------------------------------
@on_a_cluster(num_nodes=1)
async def test_a_machine_that_joins_is_used(cluster):
    await cluster.until(lambda: len(cluster.groups.stored) == 4)
    cluster.runtime.members["new"] = Machine("there", 2.0)
    cluster.runtime.members["small"] = Machine("there", 1.0)
    await cluster.until(lambda: len(cluster.nodes) == 2)
    await cluster.until(lambda: cluster.nodes[1].state is NodeState.HEALTHY)
    assert cluster.node(1).machine_id == "new"
    cluster.learn()
    await cluster.until(lambda: cluster.loop.num_batches[0] == 2)
    assert cluster.node(0).seed != cluster.node(1).seed


@on_a_cluster(completes=False)
async def test_a_machine_that_leaves_finishes_what_it_has(cluster):
    await cluster.until(lambda: len(cluster.groups) == 4)
    await cluster.until(lambda: len(cluster.node(0).grants) == 2)
    leaving = cluster.node(0)
    cluster.runtime.members["m0"] = Machine("here", 4.0, is_leaving=True)
    await cluster.until(lambda: cluster.nodes[0].is_leaving)
    leaving.complete()
    await cluster.until(lambda: cluster.nodes[0].state is NodeState.DEAD)
    assert leaving.is_killed and cluster.loop.totals["nodes_lost"] == 0
    assert len(cluster.groups.stored) == 2
    cluster.runtime.members["new"] = Machine("there", 4.0)
    await cluster.until(lambda: cluster.nodes[0].state is NodeState.HEALTHY)
    assert cluster.node(0).machine_id == "new" and len(cluster.nodes) == 2


@on_a_cluster(num_nodes=1)
async def test_a_start_that_is_not_like_the_others_is_no_node(cluster):
    await cluster.until(lambda: len(cluster.groups.stored) == 4)
    cluster.runtime.versions = {**cluster.runtime.versions, "torch": "2.12"}
    cluster.node(0).is_lost = True
    error = await cluster.error()
    assert "torch 2.13 and 2.12" in str(error)


# -- weights --------------------------------------------------------------------------------------
@on_a_cluster()
async def test_nodes_skip_the_versions_that_come_while_one_of_them_is_slow(cluster):
    await cluster.until(lambda: len(cluster.groups.stored) == 4)
    slow = cluster.node(0)
    slow.holds_weights = True
    cluster.updater.publish()
    cluster.loop.notify()
    await cluster.quiet()
    assert cluster.node(1).version == 0, "it is behind the slow one"
    for _ in range(2):
        cluster.updater.publish()
    slow.holds_weights = False
    await cluster.until(lambda: [node.version for node in cluster.nodes] == [3, 3])
    assert all(cluster.node(k).versions in ([0, 1, 3], [0, 3]) for k in range(2))
    _, live, frozen = cluster.loop._reader.pin_bytes()
    assert [len(part) for part in live] == [64], "three elements on a cache line"
    num_sent = sum(len(cluster.node(k).versions) for k in range(2))
    num_bytes = num_sent * 64 + 2 * len(frozen[0])
    assert cluster.loop.stats()["cluster/bytes_sent"] == num_bytes
    assert cluster.loop.stats()["cluster/version_lag"] == 0
    assert cluster.runtime.num_puts == 1, "the policy, once"


@on_a_cluster(num_nodes=4)
async def test_a_chain_that_breaks_goes_on_without_the_node_that_broke_it(cluster):
    await cluster.until(lambda: len(cluster.groups.stored) == 4)
    starts = [cluster.node(k) for k in range(4)]
    starts[1].receiver.close()  # what it is sent does not arrive; else it is well
    cluster.updater.publish()
    cluster.loop.notify()
    await cluster.until(lambda: [node.version for node in cluster.nodes] == [1] * 4)
    assert [cluster.node(k) is starts[k] for k in range(4)] == [True, False, True, True]
    assert cluster.node(1).versions == [1], "it was started again"
    assert cluster.loop.totals["nodes_lost"] == 1


@on_a_cluster()
async def test_a_version_that_is_published_during_a_transfer_is_sent_afterwards(cluster):
    await cluster.until(lambda: len(cluster.groups.stored) == 4)
    other, real = cluster.node(1), cluster_loop.weight_digest

    def publish_meanwhile(parts):
        if cluster.node(0) is not first and cluster.updater.store.version == 0:
            cluster.updater.publish()
        return real(parts)

    first = cluster.node(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster_loop, "weight_digest", publish_meanwhile)
        first.is_lost = True
        await cluster.until(lambda: len(cluster.runtime.started) == 3)
        await cluster.until(lambda: [node.version for node in cluster.nodes] == [1, 1])
    assert cluster.node(0).versions == other.versions == [0, 1]
    assert cluster.node(1) is other, "it was not sent what it had"


@on_a_cluster()
async def test_a_node_that_joins_gets_the_frozen_weights_first(cluster):
    await cluster.until(lambda: len(cluster.groups.stored) == 4)
    cluster.runtime.members["new"] = Machine("there", 4.0)
    await cluster.until(lambda: len(cluster.nodes) == 3)
    await cluster.until(lambda: cluster.nodes[2].state is NodeState.HEALTHY)
    weights = cluster.node(2).weights.reader("test").pin()[1]
    for name, tensor in cluster.model.state_dict().items():
        assert torch.equal(weights[name], tensor)


# -- evaluations ----------------------------------------------------------------------------------
EPISODES = [EpisodeSpec("a", seed) for seed in range(5)]


@on_a_cluster(paused=True)
async def test_an_evaluation_is_dealt_to_all_nodes_while_weights_stand_still(cluster):
    evaluation = cluster.evaluate(*EPISODES, num_frames=3)
    await cluster.until(evaluation.done)
    result = evaluation.result()
    assert result.episode_returns == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert {k: float(frame) for k, frame in result.frames.items()} == {0: 0.0, 1: 1.0, 2: 2.0}
    assert result.policy_version == 0


@on_a_cluster(completes=False)
async def test_an_evaluation_beside_training_is_played_by_one_node_or_by_the_next(cluster):
    await cluster.until(lambda: len(cluster.groups) == 4)
    evaluation = cluster.evaluate(*EPISODES)
    await cluster.until(lambda: any(node.evaluations for node in cluster.runtime.started))
    (player,) = (node for node in cluster.runtime.started if node.evaluations)
    assert len(player.evaluations[0][1]) == 5
    player.is_lost = True
    await cluster.until(
        lambda: any(node.evaluations for node in cluster.runtime.started if node is not player)
    )
    (other,) = (n for n in cluster.runtime.started if n.evaluations and n is not player)
    other.finish_evaluation()
    await cluster.until(evaluation.done)
    assert evaluation.result().episode_returns == [0.0, 1.0, 2.0, 3.0, 4.0]


@on_a_cluster(paused=True, completes=False)
async def test_an_evaluation_ends_with_the_collector(cluster):
    evaluation = cluster.evaluate(*EPISODES)
    await cluster.until(lambda: cluster.node(0).evaluations)
    cluster.loop._close()
    with pytest.raises(RuntimeError, match="ended before the evaluation"):
        evaluation.result()
    assert cluster.runtime.is_closed
