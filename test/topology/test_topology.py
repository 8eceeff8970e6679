# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Plans of machines that nobody has to own, and the collector that takes one."""

from __future__ import annotations

import functools

import pytest

from torchrl_dvla.collectors import WorkerConfig
from torchrl_dvla.data import PooledReplayBuffer
from torchrl_dvla.modules import tiny_token_policy
from torchrl_dvla.testing import CountingChunkEnv
from torchrl_dvla.topology import ClusterSpec, NodeSpec, TopologyAwareCollector, plan_placement

GIB = 2**30


def test_cores_and_memory_both_bound_the_workers_of_a_node():
    nodes = (
        NodeSpec("few-cores", num_cores=3, memory_bytes=64 * GIB),
        NodeSpec("little-memory", num_cores=32, memory_bytes=16 * GIB),
    )
    workers = WorkerConfig(envs_per_worker=2)
    placement = plan_placement(ClusterSpec(nodes), env_memory_bytes=2 * GIB, workers=workers)
    assert [node.workers.num_workers for node in placement.nodes] == [3, 2]
    assert placement.learner.host == "few-cores"


def test_no_node_and_one_without_room_are_refused():
    with pytest.raises(ValueError, match="at least one NodeSpec"):
        ClusterSpec(())
    cluster = ClusterSpec((NodeSpec("tiny", num_cores=2, memory_bytes=1 * GIB),))
    with pytest.raises(ValueError, match="env_memory_bytes.*tiny"):
        plan_placement(cluster, env_memory_bytes=2 * GIB)


def test_on_one_node_it_is_the_collector_of_that_node():
    local, workers = ClusterSpec.local(), WorkerConfig(max_decisions=4)
    placement = plan_placement(local, env_memory_bytes=GIB // 64, workers=workers)
    collector = TopologyAwareCollector(
        functools.partial(CountingChunkEnv, chunk_size=4, max_env_steps=12),
        tiny_token_policy(2, 4, vocab_size=8),
        placement=placement,
        replay_buffer=PooledReplayBuffer(batch_size=16, timeout_s=60.0),
    )
    collector.start()
    assert sum(batch.shape[0] for batch in collector.replay_buffer) > 0
    collector.update_policy_weights_()
    assert collector.policy_version == 1
    collector.shutdown()
