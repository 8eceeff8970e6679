# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""One node with real workers and a real inference process, asked as the learner asks it."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import cloudpickle
import pytest
import torch

from torchrl_dvla.collectors import EpisodeSpec, InferenceConfig, WorkerConfig
from torchrl_dvla.collectors.validation import match_policy
from torchrl_dvla.data import InstructionTable
from torchrl_dvla.memory import EnvironmentPool
from torchrl_dvla.topology.node_loop import NodeLoop, policy_payload
from torchrl_dvla.topology.node_messages import (
    EvaluationDone,
    Grant,
    GroupDone,
    RunPlan,
    unpack_rows,
)
from torchrl_dvla.weight_update import WeightStore, new_key, send_along_chain, weight_digest

from . import counting_nodes
from .counting_nodes import fail_to_build, make_env, make_policy

cloudpickle.register_pickle_by_value(counting_nodes)
WORKERS = WorkerConfig(num_workers=1, envs_per_worker=2, max_decisions=4)


@pytest.fixture
def node():
    """A node, and what the learner has of it."""
    loop = NodeLoop(cloudpickle.dumps({"default": make_env}), WORKERS, InferenceConfig())
    policy = make_policy()
    layout = match_policy(policy, loop.facts().specs)
    store = WeightStore(policy)
    reader = store.reader("nodes")
    plan = RunPlan(layout, store.layout, 2, 2, num_candidates=2, num_groups=2)
    loop.begin(plan, policy_payload(policy, None))

    def publish() -> None:
        reader.unpin()
        version, live, _ = reader.pin_bytes()
        key, digest = new_key(), weight_digest(live)
        with ThreadPoolExecutor() as threads:
            taking = threads.submit(loop.receive, version, digest, key, None, 30.0)
            send_along_chain(live, loop.facts().address, key, 30.0)
            taking.result()

    pool = EnvironmentPool(layout, 16, rows_per_page=2)
    yield SimpleNamespace(loop=loop, policy=policy, store=store, publish=publish, pool=pool)
    loop.stop(3.0)
    store.close()
    pool.close()


def events_of(loop, kind, count):
    """The next events of a kind."""
    found, deadline_s = [], time.monotonic() + 90.0
    while len(found) < count:
        assert time.monotonic() < deadline_s
        found += [event for event in loop.report(0.5).events if isinstance(event, kind)]
    return found


def test_what_is_granted_comes_back_as_bytes(node):
    node.publish()
    grants = [
        Grant(7 + k, EpisodeSpec("default", 3 + k), 20 + 2 * k, 5, min_version=0) for k in range(2)
    ]
    node.loop.grant(grants, [], seed=11)
    first, second = sorted(events_of(node.loop, GroupDone, 2))
    assert [first.group_id, second.group_id] == [7, 8]
    assert [rollout.rollout_id for rollout in second.rollouts] == [22, 23]

    # At the learner, where other instructions have the first ids.
    table = InstructionTable(["another"])
    ids = {number: table.id(text) for number, text in second.instructions.items()}
    sizes = [rollout.num_rows for rollout in second.rollouts]
    pages = [[node.pool.lease(k) for _ in range(-(-size // 2))] for k, size in enumerate(sizes)]
    index = node.pool.row_index_of(pages, sizes)
    unpack_rows(node.pool, index, second.rows, ids)
    rows = node.pool.rows[index]
    assert rows["group_id"].flatten().tolist() == [8] * sum(sizes)
    assert rows["rollout_id"].flatten().tolist() == [22] * sizes[0] + [23] * sizes[1]
    assert rows["policy_version"].flatten().tolist() == [0] * sum(sizes)
    assert table.text(int(rows["instruction_id"][0])) == "push the way the arrow points"
    # Every image shows its scene, decision and count, so rows that were mixed up betray themselves.
    env = make_env()
    scene = env.scene(4)
    shown = rows["observation", "image"][:, :, 0, 0]
    assert shown[:, 0].tolist() == [scene.scene_id] * sum(sizes)
    assert shown[:, 1].tolist() == [*range(sizes[0]), *range(sizes[1])]
    rewards = rows["next", "reward"].flatten().split(sizes)
    returns = [rollout.episode_return for rollout in second.rollouts]
    assert [float(part.sum()) for part in rewards] == returns
    report = node.loop.report(0.0)
    assert report.events == [] and node.loop._pool.stats()["pages_free"] == 12


def test_a_group_waits_for_its_version_and_an_evaluation_has_the_newest(node):
    node.publish()
    node.loop.grant([Grant(0, EpisodeSpec("default", 1), 0, 5, min_version=2)], [], seed=1)
    node.loop.evaluate(9, [EpisodeSpec("default", 5), EpisodeSpec("default", 6)], True, 1)
    (done,) = events_of(node.loop, EvaluationDone, 1)
    assert (done.evaluation_id, done.result.policy_version) == (9, 0)
    assert done.result.frames[0].shape[1:] == (3, 16, 16)
    assert node.loop._groups.admit() == "no_version"
    for _ in range(2):
        with torch.no_grad():
            next(node.policy.parameters()).add_(0.1)
        node.store.publish()
    node.publish()  # version 1 is skipped
    (group,) = events_of(node.loop, GroupDone, 1)
    assert {r.first_policy_version for r in group.rollouts} == {2}
    lanes = {span.lane for span in node.loop._timeline.spans()}
    assert lanes <= {"sampling", "inference", "distribution"}


def test_a_policy_that_cannot_be_built_here_ends_the_start():
    factories = cloudpickle.dumps({"default": make_env})
    payload = policy_payload(make_policy(), fail_to_build)
    with pytest.raises(RuntimeError, match="policy_factory failed.*(?s:.*)the-checkpoint"):
        NodeLoop(factories, WORKERS, InferenceConfig(), payload)
