# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Real nodes of Ray's on this machine: they train, are killed, are stopped, join."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from multiprocessing import connection
from pathlib import Path

import cloudpickle
import pytest

from torchrl_dvla import PooledReplayBuffer, TopologyAwareCollector
from torchrl_dvla.collectors import EpisodeSpec, GroupConfig, InferenceConfig, WorkerConfig
from torchrl_dvla.topology import NodePlacement, Placement
from torchrl_dvla.topology.nodes import NodeState
from torchrl_dvla.topology.ray_runtime import LOOPBACK, stay_private

from . import counting_nodes
from .counting_nodes import fail_to_build, make_env, make_policy

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]
ray = pytest.importorskip("ray")

cloudpickle.register_pickle_by_value(counting_nodes)
SCRIPT = Path(__file__).with_name("cluster_script.py")


def placement_of(num_nodes, num_workers=1):
    workers = WorkerConfig(num_workers=num_workers, max_decisions=4)
    return Placement(
        tuple(
            NodePlacement("localhost", workers, InferenceConfig(), learner=index == 0)
            for index in range(num_nodes)
        )
    )


def make_collector(num_nodes, **kwargs):
    arguments = {
        "replay_buffer": PooledReplayBuffer(batch_size=16, timeout_s=60.0),
        "group": GroupConfig(group_size=3, groups_per_update=2),
        "heartbeat_timeout_s": 3.0,
        "address": "auto",
        **kwargs,
    }
    policy = arguments.pop("policy", None) or make_policy()
    return TopologyAwareCollector(make_env, policy, placement=placement_of(num_nodes), **arguments)


@pytest.fixture(scope="module", autouse=True)
def no_files_left():
    """Ray's logs and sockets go to a folder of their own; the paths of sockets must be short."""
    folder = tempfile.mkdtemp(prefix="ray-")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)
        yield
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def cluster():
    """The learner's node, and two that sample."""
    from ray.cluster_utils import Cluster

    stay_private()
    checks = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 200}
    checks |= {"health_check_timeout_ms": 1000, "health_check_failure_threshold": 3}
    common = {"object_store_memory": 100 << 20, "node_ip_address": LOOPBACK}
    head = {"num_cpus": 0, "include_dashboard": False, "_system_config": checks, **common}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    cluster.common = common
    for _ in range(2):
        cluster.add_node(num_cpus=1, **common)
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(scope="module")
def collector(cluster):
    collector = make_collector(2)
    yield collector
    collector.shutdown()
    assert ray.is_initialized(), "a cluster that it has not started is left alone"


def update(collector, learned):
    """Learn a cohort without changing anything; returns the largest lag of its rows."""
    lag = 0
    for batch in collector.replay_buffer:
        lag = max(lag, int((collector.policy_version - batch["policy_version"]).max()))
    learned += [group.group_id for group in collector.replay_buffer.cohort]
    collector.update_policy_weights_()
    return lag


def train_until(collector, condition, learned, timeout_s=90.0):
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, collector.cluster.history
        assert update(collector, learned) <= 1


def lost_another(collector):
    before = collector.cluster.totals["nodes_lost"]
    return lambda: collector.cluster.totals["nodes_lost"] == before + 1


def both_healthy(collector):
    def condition():
        return sum(node.state is NodeState.HEALTHY for node in collector.cluster.nodes) == 2

    return condition


def pids(collector):
    return [node.facts.pid for node in collector.cluster.nodes if node.handle is not None]


def nothing_lost(collector, learned):
    assert len(set(learned)) == len(learned), "learned twice"
    with collector.replay_buffer.groups.lock:
        stats = collector.replay_buffer.groups.stats()
    places = ("learned", "dropped", "in_flight", "stored")
    assert stats["groups_admitted"] == sum(stats[f"groups_{place}"] for place in places)
    collector.memory.environment.check()


LEARNED: list[int] = []


# -- in this order: they share nodes, which take ten seconds to start -----------------------------
def test_a_node_without_the_checkpoint_ends_the_construction(cluster):
    with pytest.raises(RuntimeError, match="No such file.*the-checkpoint"):
        make_collector(1, policy_factory=fail_to_build)


def test_more_than_there_is_is_refused(cluster):
    with pytest.raises(ValueError, match="must fit the cluster, got 1 workers for 'localhost'"):
        make_collector(3)


def test_nodes_evaluate_before_training(collector):
    episodes = [EpisodeSpec("default", seed) for seed in range(5)]
    evaluation = collector.evaluate(episodes, greedy=True, num_frames_episodes=2)
    result = evaluation.result(120.0)
    assert result.policy_version == 0 and len(result.successes) == 5
    assert sorted(result.frames) == [0, 1]
    assert [frames.shape[1:] for frames in result.frames.values()] == [(3, 16, 16)] * 2
    assert all(0 < count <= 12 for count in result.num_env_steps)


def test_two_nodes_train_within_the_bound(collector):
    collector.start()
    train_until(collector, both_healthy(collector), LEARNED)
    for _ in range(6):
        assert update(collector, LEARNED) <= 1
    nothing_lost(collector, LEARNED)
    stats = collector.stats()
    assert stats["cluster/nodes_healthy"] == 2
    assert stats["cluster/bytes_received"] > 0
    assert stats["collector/episodes"] >= 3 * len(LEARNED)
    tracks = {span.track for span in collector.timeline.spans()}
    assert {"node 0 worker 0", "node 1 worker 0", "node 0 main", "node 1 main"} <= tracks


def test_a_killed_process_of_a_node_is_started_again(collector):
    collector.start()
    train_until(collector, both_healthy(collector), LEARNED)
    lost = lost_another(collector)
    os.kill(collector.cluster.nodes[1].facts.pid, signal.SIGKILL)
    train_until(collector, lost, LEARNED)
    train_until(collector, both_healthy(collector), LEARNED)
    nothing_lost(collector, LEARNED)


def test_a_stopped_process_of_a_node_is_ended_and_started_again(collector):
    collector.start()
    train_until(collector, both_healthy(collector), LEARNED)
    lost, stopped = lost_another(collector), collector.cluster.nodes[0].facts.pid
    os.kill(stopped, signal.SIGSTOP)
    train_until(collector, lost, LEARNED)
    train_until(collector, both_healthy(collector), LEARNED)
    nothing_lost(collector, LEARNED)
    assert stopped not in pids(collector)
    assert not Path(f"/proc/{stopped}").exists()


def test_a_killed_node_is_replaced_by_one_that_joins(cluster, collector):
    collector.start()
    train_until(collector, both_healthy(collector), LEARNED)
    lost, machine = lost_another(collector), collector.cluster.nodes[1].machine_id
    killed = next(node for node in cluster.list_all_nodes() if node.node_id == machine)
    cluster.remove_node(killed, allow_graceful=False)
    train_until(collector, lost, LEARNED)
    assert collector.cluster.nodes[1].state is NodeState.DEAD
    for _ in range(3):
        assert update(collector, LEARNED) <= 1  # by the other one
    cluster.add_node(num_cpus=1, **cluster.common)
    train_until(collector, both_healthy(collector), LEARNED)
    assert collector.cluster.nodes[1].machine_id != machine
    nothing_lost(collector, LEARNED)


def test_a_node_that_cannot_be_reached_for_a_while_is_replaced_and_not_heard_again(
    cluster, collector
):
    collector.start()
    train_until(collector, both_healthy(collector), LEARNED)
    node = collector.cluster.nodes[1]
    lost, machine = lost_another(collector), node.machine_id
    away = next(ray_node for ray_node in cluster.list_all_nodes() if ray_node.node_id == machine)
    raylet = away.all_processes["raylet"][0].process.pid
    stopped = [raylet, node.facts.pid]
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    train_until(collector, lost, LEARNED)
    for pid in stopped:  # what it has sampled meanwhile is nobody's
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    for _ in range(3):
        assert update(collector, LEARNED) <= 1
    cluster.remove_node(away, allow_graceful=False)
    cluster.add_node(num_cpus=1, **cluster.common)
    train_until(collector, both_healthy(collector), LEARNED)
    nothing_lost(collector, LEARNED)


def test_a_node_that_is_drained_finishes_what_it_has(cluster, collector):
    collector.start()
    train_until(collector, both_healthy(collector), LEARNED)
    node, before = collector.cluster.nodes[1], collector.cluster.totals.copy()
    # What `ray drain-node` does.
    reason = ray.core.generated.autoscaler_pb2.DRAIN_NODE_REASON_PREEMPTION
    deadline_ms = int(1000 * (time.time() + 600.0))
    client = ray._raylet.GcsClient(address=cluster.address)
    assert client.drain_node(node.machine_id, reason, "a test", deadline_ms) == (True, "")
    train_until(collector, lambda: node.state is NodeState.DEAD, LEARNED)
    for name in ("nodes_lost", "groups_resampled"):
        assert collector.cluster.totals[name] == before[name]
    cluster.add_node(num_cpus=1, **cluster.common)
    train_until(collector, both_healthy(collector), LEARNED)
    nothing_lost(collector, LEARNED)


@pytest.mark.parametrize("way", ["wait", "leave"])
def test_nothing_outlives_a_learner_that_is_killed_or_leaves(way):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, sys.path))}
    environment.pop("RAY_ADDRESS", None)
    process = subprocess.Popen(
        [sys.executable, SCRIPT, way],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    try:
        line = process.stdout.readline()
        assert line, process.stderr.read()
        family = handles_of(json.loads(line))
        if way == "wait":
            # Two raylets, two nodes, and of each worker, inference and their fork server.
            assert sum("Agent" not in command_of(pid)[1] for pid in family) > 9
        else:
            error = process.communicate(timeout=90.0)[1]
            assert process.returncode == 0 and "Traceback" not in error, error
    finally:
        process.kill()
        process.communicate()
    deadline_s = time.monotonic() + 60.0
    for pid, handle in family.items():
        # Ray's two agents of each node look for the head for a minute before they end.
        if "Agent" not in command_of(pid)[1]:
            ended = connection.wait([handle], max(0.0, deadline_s - time.monotonic()))
            assert ended, command_of(pid)
        os.close(handle)


def handles_of(pids):
    """Descriptors that tell when a process ends, of those that have not yet."""
    handles = {}
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            handles[pid] = os.pidfd_open(pid)
    return handles


def command_of(pid):
    try:
        return pid, Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip()[:200]
    except OSError:
        return pid, "gone"
