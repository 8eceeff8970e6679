# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The collector against an environment whose every answer is known, in real processes."""

from __future__ import annotations

import copy
import math
import multiprocessing

import pytest
import torch
from torchrl.data import ReplayBuffer

from torchrl_dvla.collectors import EpisodeSpec, GroupConfig
from torchrl_dvla.data import schema
from torchrl_dvla.weight_update import AsyncWeightUpdater

from .. import named_memory
from .counting_task import make_env, make_initialised_policy, make_policy

ONE_AT_A_TIME = GroupConfig(group_size=3, groups_per_update=1, max_policy_lag=0)


def rollouts_of(batches: list) -> dict[int, torch.Tensor]:
    """Row numbers of every rollout of one update, by rollout id, in the order of its decisions."""
    rows = torch.cat(batches)
    out = {}
    for rollout_id in rows[schema.ROLLOUT_ID_KEY].unique().tolist():
        chosen = rows[(rows[schema.ROLLOUT_ID_KEY] == rollout_id).squeeze(-1)]
        out[rollout_id] = chosen[chosen[schema.DECISION_INDEX_KEY].squeeze(-1).argsort()]
    return out


def test_weights_on_the_timeline_and_in_the_stats(start_collector):
    policy = make_policy()
    updater = AsyncWeightUpdater(transport_dtype=torch.bfloat16)
    collector = start_collector(policy=policy, weight_sync_schemes={"policy": updater})
    for _ in range(2):
        list(collector.replay_buffer)
        collector.update_policy_weights_()
    # The third update's groups were asked for after the first publication.
    list(collector.replay_buffer)
    stats = collector.stats()
    assert stats["weights/version"] == 2
    tensors = [*policy.parameters(), *policy.buffers()]
    sizes = [t.numel() * (2 if t.is_floating_point() else t.itemsize) for t in tensors]
    assert stats["planes/weight_bytes"] == 3 * sum(sizes)
    decisions = stats["collector/decisions"]
    assert decisions > 0
    assert stats["planes/data_bytes"] == decisions * collector.plan.row_bytes
    assert stats["weights/publish_stall_s"] > 0.0
    assert stats["weights/inference_adopt_p99_s"] >= stats["weights/inference_adopt_p50_s"] > 0.0
    spans = [span for span in collector.timeline.spans() if span.lane == "distribution"]
    assert [span.name for span in spans if span.track == "learner"] == ["publish", "publish"]
    adopted = [span for span in spans if span.track == "reader inference"]
    assert adopted[0].name == "adopt 0"
    assert adopted[-1].name in ("adopt 1", "adopt 2")
    assert all(span.start_s <= span.end_s for span in adopted)
    collector.shutdown()
    assert collector.stats()["weights/num_publishes"] == 3


def test_rows_hold_what_the_environment_did(start_collector):
    collector = start_collector(workers={"num_workers": 2})
    rollouts = rollouts_of([batch.clone() for batch in collector.replay_buffer])
    groups: dict[int, set] = {}
    oracle = make_env()
    for rows in rollouts.values():
        num = rows.shape[0]
        assert rows[schema.DECISION_INDEX_KEY].squeeze(-1).tolist() == list(range(num))
        assert rows[schema.DONE_KEY].squeeze(-1).tolist() == [False] * (num - 1) + [True]
        assert (rows[schema.POLICY_VERSION_KEY] == 0).all()
        assert rows[schema.INSTRUCTION_KEY][0] == oracle.instruction
        # The image counts decisions and right steps: a row of another rollout would not fit.
        assert rows[schema.IMAGE_KEY][:, 1, 0, 0].tolist() == list(range(num))
        target = rows[schema.STATE_KEY][0, :2]
        right = ((rows["vla_action", "chunk"] @ target) > 0) & ~rows["action_is_pad"]
        counted = torch.cat([torch.zeros(1, dtype=torch.long), right.sum(-1).cumsum(0)[:-1]])
        assert rows[schema.IMAGE_KEY][:, 2, 0, 0].tolist() == counted.tolist()
        assert float(rows[schema.REWARD_KEY].sum()) == float(rows[schema.SUCCESS_KEY].any())
        scene_id = int(rows[schema.IMAGE_KEY][0, 0, 0, 0])
        groups.setdefault(int(rows[schema.GROUP_ID_KEY][0]), set()).add(scene_id)
    assert len(groups) == 2
    assert all(len(scenes) == 1 for scenes in groups.values()), "a group shares its scene"
    assert len(rollouts) == 6
    # Their advantages are those of the groups' returns.
    by_group: dict[int, list] = {}
    for rows in rollouts.values():
        entry = (float(rows[schema.REWARD_KEY].sum()), float(rows[schema.ADVANTAGE_KEY][0]))
        assert (rows[schema.ADVANTAGE_KEY] == entry[1]).all()
        by_group.setdefault(int(rows[schema.GROUP_ID_KEY][0]), []).append(entry)
    for entries in by_group.values():
        returns = torch.tensor([entry[0] for entry in entries])
        assert 0 < returns.mean() < 1, "a group without contrast teaches nothing"
        centred = torch.tensor([entry[1] for entry in entries])
        assert torch.equal(centred > 0, returns > returns.mean())
        assert abs(float(centred.sum())) < 1e-5


def test_published_weights_take_the_next_decisions(start_collector):
    policy = make_policy()
    collector = start_collector(policy=policy, group=ONE_AT_A_TIME)
    list(collector.replay_buffer)
    with torch.no_grad():  # the first action of a chunk is 7, 7; chance decides the others
        for parameter in policy.head.parameters():
            parameter.zero_()
        policy.head.bias.view(4, 2, 8)[0, :, 7] = 50.0
    collector.update_policy_weights_(policy)
    rows = torch.cat([batch.clone() for batch in collector.replay_buffer])
    assert (rows[schema.POLICY_VERSION_KEY] == 1).all()
    assert (rows["vla_action", "tokens"][:, 0] == 7).all()
    assert not (rows["vla_action", "tokens"][:, 1:] == 7).all()


def test_weights_that_are_refused_leave_version_and_lanes_as_they_were(make_collector):
    policy = make_policy()
    collector = make_collector(policy=policy)
    bias = next(policy.head.parameters())
    good = bias.detach().clone()
    for _ in range(2):
        with torch.no_grad():
            bias.fill_(float("nan"))
        with pytest.raises(ValueError, match="weights must be finite, got NaN .* of version 1"):
            collector.update_policy_weights_()
    groups = collector.replay_buffer.groups
    assert collector.policy_version == groups.version == 0
    collector.start()  # and who waits for groups is not left waiting
    list(collector.replay_buffer)
    with torch.no_grad():
        bias.copy_(good)
    collector.update_policy_weights_()
    assert collector.policy_version == groups.version == 1


def test_iterating_yields_one_update_at_a_time(make_collector):
    collector = make_collector()
    for version, data in enumerate(collector):
        assert data[schema.GROUP_ID_KEY].unique().numel() == 2
        collector.update_policy_weights_()
        if version == 2:
            break
    assert collector.stats()["buffer/groups_kept"] >= 6


def test_evaluation_runs_beside_training_and_keeps_its_order(make_collector):
    collector = make_collector(workers={"num_workers": 2})
    episodes = [EpisodeSpec("default", seed=5, init_state_id=k) for k in range(7)]
    before = collector.evaluate(episodes, num_frames_episodes=2).result(60.0)
    collector.start()
    during = collector.evaluate(episodes, num_frames_episodes=2)
    list(collector.replay_buffer)
    # Greedy decisions of one version in the same scenes: the same episodes.
    assert during.result(60.0).successes == before.successes
    assert during.result().num_env_steps == before.num_env_steps
    env = make_env()
    for index in (0, 1):
        scene = env.scene(5, index)
        assert int(before.frames[index][0, 0, 0, 0]) == scene.scene_id
    assert sorted(before.frames) == [0, 1]


def test_a_policy_factory_alone_builds_the_learners_policy_too(start_collector):
    collector = start_collector(policy=False, policy_factory=make_initialised_policy)
    weights = dict(collector.policy.named_parameters())
    assert weights.keys() == dict(make_initialised_policy().named_parameters()).keys()
    list(collector.replay_buffer)
    with torch.no_grad():
        for weight in weights.values():
            weight.zero_()
    collector.update_policy_weights_()
    for _ in range(3):  # at lag 1, groups of version 0 come first
        rows = torch.cat([batch.clone() for batch in collector.replay_buffer])
        collector.update_policy_weights_()
    # Nothing but zeros in the policy: all of the eight tokens are equally likely.
    assert rows[schema.POLICY_VERSION_KEY].min() >= 1
    log_probs = rows[schema.SAMPLE_LOG_PROB_KEY]
    torch.testing.assert_close(log_probs, torch.full_like(log_probs, -math.log(8)))


def test_pause_admits_no_group(start_collector):
    collector = start_collector()
    with collector.pause():
        admitted = collector.stats()["buffer/groups_admitted"]
        episodes = [EpisodeSpec("default", 0)] * 3
        collector.evaluate(episodes).result(60.0)
        assert collector.stats()["buffer/groups_admitted"] == admitted
    list(collector.replay_buffer)


def test_shutdown_leaves_no_process_and_no_shared_memory(start_collector):
    before = named_memory.named()
    collector = start_collector(workers={"num_workers": 2})
    list(collector.replay_buffer)
    collector.shutdown()
    assert not [p for p in multiprocessing.active_children() if p.name.startswith("dvla")]
    assert named_memory.left_behind(before) == set()


def test_a_resumed_collector_begins_unfinished_groups_anew(make_collector, start_collector):
    first = start_collector()
    list(first.replay_buffer)
    first.update_policy_weights_()
    with first.pause():
        state = first.state_dict()
    running = [group.spec.seed for group in first.replay_buffer.groups.running]
    first.shutdown()
    second = make_collector()
    second.load_state_dict(state)
    assert second.policy_version == 1, "rows to come carry the versions that admission counts"
    groups = second.replay_buffer.groups
    groups.set_paused(False)
    begun = [group.spec.seed for group in groups.running]
    assert begun[: len(running)] == running[: len(begun)]


def test_a_collector_that_was_shut_down_says_so(start_collector, tmp_path):
    collector = start_collector()
    for _ in collector.replay_buffer:
        break
    collector.shutdown()
    for call in (
        collector.state_dict,
        collector.update_policy_weights_,
        collector.start,
        lambda: collector.pause().__enter__(),
        lambda: collector.evaluate([EpisodeSpec("default", 0)]),
        lambda: collector.set_seed(0),
        lambda: collector.load_state_dict({}),
        lambda: collector.memory.environment.rows,
        lambda: collector.memory.model.empty((1,)),
        lambda: collector._updater.reader("late"),
        collector._updater.publish,
        lambda: len(collector.replay_buffer),
        collector.replay_buffer.sample,
        lambda: next(iter(collector.replay_buffer)),
        lambda: next(iter(collector)),
    ):
        with pytest.raises(RuntimeError, match="shut down|closed by"):
            call()
    # What the run was like can still be told.
    assert collector.stats()["frames"] > 0 and collector.policy_version == 0
    collector.timeline.export_chrome_trace(tmp_path / "timeline.json")
    assert "infer" in (tmp_path / "timeline.json").read_text()


def test_what_is_inherited_is_honoured_or_refused(make_collector):
    collector, seen = make_collector(), []
    with pytest.raises(RuntimeError, match="Non-terminating"):
        len(collector)
    with pytest.raises(NotImplementedError, match="timeline"):
        collector.enable_profile()
    for call in (collector.receive_weights, lambda: collector.register_scheme_receiver({})):
        with pytest.raises(NotImplementedError, match="update_policy_weights_"):
            call()
    with pytest.raises(NotImplementedError, match="weight_updater must be left alone, got a dict"):
        collector.weight_updater = {}
    with pytest.raises(TypeError, match="cannot be pickled or copied"):
        copy.deepcopy(collector)
    with pytest.raises(TypeError, match="replay_buffer must be a PooledReplayBuffer"):
        make_collector(replay_buffer=ReplayBuffer())
    with pytest.raises(ValueError, match="close_env must be True"):
        collector.shutdown(close_env=False)
    assert collector.set_seed(7) != 7 and collector.set_seed(7, static_seed=True) == 7
    collector.post_collect_hook = seen.append
    data = next(iter(collector))
    assert seen == [data]
    first, second = collector.stats(), collector.stats()
    assert first["frames"] == second["frames"] > 0 and first["policy_version"] == 0
    with pytest.raises(RuntimeError, match="update_policy_weights_"):
        next(iter(collector))


def test_a_refused_publish_moves_no_version(make_collector):
    collector = make_collector(group=ONE_AT_A_TIME)
    next(iter(collector))
    collector.update_policy_weights_()
    while not collector.replay_buffer.groups.running and not len(collector.replay_buffer):
        pass  # a group was begun under version 1, and nothing of it was learned
    with pytest.raises(RuntimeError, match="max_policy_lag"):
        collector.update_policy_weights_()
    assert collector.policy_version == collector.replay_buffer.groups.version == 1


def test_a_plain_script_gets_a_whole_timeline(start_collector):
    collector = start_collector(group=ONE_AT_A_TIME)
    collector.stats()
    for _ in range(4):
        for _batch in collector.replay_buffer:
            pass
        collector.update_policy_weights_()
    stats = collector.stats()
    names = {(span.lane, span.name) for span in collector.timeline.spans()}
    assert names >= {
        ("sampling", "reset"),
        ("sampling", "step"),
        ("inference", "infer"),
        ("gradient", "gather"),
        ("gradient", "learn"),
        ("distribution", "publish"),
    }
    for reason in (
        "sampling_idle_no_decision",
        "sampling_idle_no_admission",
        "inference_idle_no_ready_row",
        "gradient_idle_no_batch",
        "gradient_idle_elsewhere",
        "distribution_idle_no_update",
    ):
        assert 0 < stats[f"lane/{reason}"] <= 1, reason
    for lane in ("sampling", "inference", "gradient"):
        shares = [value for key, value in stats.items() if key.startswith(f"lane/{lane}_")]
        # Work that is under way is told at its end; all else is accounted for.
        assert 0.7 < sum(shares) < 1.05, lane


def test_a_checkpoint_without_the_buffer_is_refused(make_collector):
    collector = make_collector()
    state = collector.state_dict()
    buffer = state.pop("buffer")
    cursor = next(collector.schedule).seed
    of_main = {"counters": state["counters"], "num_batches": state["num_batches"], "buffer": buffer}
    for older, lacks in ((state, "buffer"), (of_main, "seed")):
        refused = rf"\['{lacks}'\], got \['.*older version.*load the po"
        with pytest.raises(ValueError, match=refused):
            collector.load_state_dict(older)
    assert next(collector.schedule).seed == cursor + 1, "nothing was taken over"
    state["buffer"] = buffer
    for damage in (
        {"num_batches": [0, -1]},
        {"num_batches": [0]},
        {"counters": {"totals": {"collector/episodes": float("nan")}, "episodes": []}},
        {"counters": {"totals": {}, "episodes": [[True]]}},
        {"foreign": 1},
        {"buffer": [1]},
    ):
        with pytest.raises(ValueError, match=r"'(collector|buffer)\b.*is damaged"):
            collector.load_state_dict({**state, **damage})
    with pytest.raises(ValueError, match="'collector' must be a mapping, got None"):
        collector.load_state_dict(None)
    with pytest.raises(ValueError, match="seed must equal the checkpoint's 7, got "):
        collector.load_state_dict({**state, "buffer": buffer, "seed": 7})
    collector.load_state_dict({**state, "buffer": buffer})
    assert next(collector.schedule).seed == cursor
