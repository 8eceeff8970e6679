# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Which rollout runs next, with a real pool and a real admission."""

from __future__ import annotations

import pytest
import torch

from torchrl_dvla.collectors.evaluation import Evaluation
from torchrl_dvla.collectors.rollout import Rollout
from torchrl_dvla.collectors.rollout_queue import RolloutQueue
from torchrl_dvla.collectors.schedule import EpisodeSpec, InitStateSchedule
from torchrl_dvla.data import Admission
from torchrl_dvla.memory import EnvironmentPool, RowLayout

PAGES_PER_ROLLOUT = 2


@pytest.fixture
def make_queue():
    pools = []

    def make(
        num_pages: int, *, groups_per_update: int = 1, tasks: tuple[str, ...] = ("task",)
    ) -> RolloutQueue:
        layout = RowLayout({"x": ((1,), torch.float32)})
        pools.append(EnvironmentPool(layout, num_pages, rows_per_page=1))
        queue = RolloutQueue(
            InitStateSchedule(tasks),
            Admission(groups_per_update, max_policy_lag=0),
            num_candidates=2,
            pages_per_rollout=PAGES_PER_ROLLOUT,
            pool=pools[-1],
        )
        queue.admitting.set()
        return queue

    yield make
    for pool in pools:
        pool.close()


def take(queue: RolloutQueue) -> Rollout:
    rollout = queue.next()
    assert isinstance(rollout, Rollout), rollout
    return rollout


def test_a_group_is_admitted_whole_and_shares_its_scene(make_queue):
    queue = make_queue(num_pages=8)
    first, second = take(queue), take(queue)
    assert first.group_id == second.group_id == 0
    assert first.spec == second.spec
    assert (first.rollout_id, second.rollout_id) == (0, 1)
    assert queue.next() == "no_admission", "lag 0: one group a version"


def test_a_group_waits_for_the_pages_of_all_its_rollouts(make_queue):
    # Beside the group, a rollout of an evaluation always has room.
    queue = make_queue(num_pages=3 * PAGES_PER_ROLLOUT + 1, groups_per_update=2)
    first, second = take(queue), take(queue)
    assert queue.next() == "no_page"
    # What finished rollouts did not take is free for others; one page is taken.
    first.pages = [queue._pool.lease(first.rollout_id)]
    queue.finish(first)
    queue.finish(second)
    assert queue._pool.num_free_pages == 6
    assert take(queue).group_id == 1


def test_a_lost_rollout_comes_first_and_keeps_its_promise(make_queue):
    queue = make_queue(num_pages=6, groups_per_update=2)
    first, _ = take(queue), take(queue)
    first.pages = [queue._pool.lease(first.rollout_id)]
    first.num_decisions = 1
    queue.retry(first)
    again = take(queue)
    assert (again.rollout_id, again.num_decisions, again.pages) == (first.rollout_id, 0, [])
    assert queue._pool.num_free_pages == 2, "both rollouts hold their promises"
    again.pages = [queue._pool.lease(again.rollout_id) for _ in range(PAGES_PER_ROLLOUT)]


def test_an_evaluation_without_room_does_not_hold_up_the_groups_that_have_it(make_queue):
    queue = make_queue(num_pages=6, groups_per_update=2)
    first = take(queue)
    episodes = [EpisodeSpec("task", 7), EpisodeSpec("task", 8)]
    queue.add_evaluation(Evaluation(episodes, greedy=True, num_frames_episodes=0))
    assert queue.next_evaluation() is not None
    assert take(queue).evaluation is not None, "one rollout of an evaluation always has room"
    second = take(queue)
    assert second.group_id == first.group_id
    assert queue.next() == "no_page", "the evaluation comes before a new group"
    queue.finish(first)
    assert take(queue).evaluation is not None


def test_evaluations_run_one_after_the_other_and_before_new_groups(make_queue):
    queue = make_queue(num_pages=8)
    evaluations = [
        Evaluation([EpisodeSpec("task", seed)] * 2, greedy=True, num_frames_episodes=0)
        for seed in (1, 2)
    ]
    for evaluation in evaluations:
        queue.add_evaluation(evaluation)
    assert queue.next_evaluation() is evaluations[0]
    episodes = [take(queue), take(queue)]
    assert [rollout.spec.seed for rollout in episodes] == [1, 1]
    assert queue.next_evaluation() is None, "the first one is still played"
    for index, rollout in enumerate(episodes):
        queue.finish(rollout)
        evaluations[0].finish_episode(
            index, success=True, episode_return=1.0, num_env_steps=3, policy_version=0
        )
    assert queue.next_evaluation() is evaluations[1]
    assert take(queue).spec.seed == 2


def test_an_evaluation_that_lost_its_weights_is_played_again_from_its_first_episode(make_queue):
    queue = make_queue(num_pages=8)
    assert not queue.replay_evaluation(), "none is under way"
    evaluation = Evaluation([EpisodeSpec("task", 7)] * 3, greedy=True, num_frames_episodes=0)
    queue.add_evaluation(evaluation)
    assert not queue.replay_evaluation(), "it has not begun: its weights are still to be copied"
    queue.next_evaluation()
    finished, running = take(queue), take(queue)
    queue.finish(finished)
    evaluation.finish_episode(
        0, success=True, episode_return=1.0, num_env_steps=3, policy_version=0
    )
    assert queue.replay_evaluation()
    assert running.cancelled and evaluation.num_finished == 0
    queue.finish(running)
    for episode in range(3):
        rollout = take(queue)
        assert rollout.episode == episode
        assert rollout.rollout_id not in (finished.rollout_id, running.rollout_id)
        queue.finish(rollout)
        evaluation.finish_episode(
            episode, success=False, episode_return=0.0, num_env_steps=3, policy_version=1
        )
    assert evaluation.result(0.0).successes == [False] * 3
    assert not queue.replay_evaluation()


def test_the_rest_of_an_abandoned_evaluation_still_needs_weights(make_queue):
    queue = make_queue(num_pages=8)
    evaluation = Evaluation([EpisodeSpec("task", 7)] * 3, greedy=True, num_frames_episodes=0)
    queue.add_evaluation(evaluation)
    queue.next_evaluation()
    running = take(queue)
    queue.abandon_evaluation(evaluation, RuntimeError("given up"))
    assert queue.replay_evaluation(), "a decision of the rollout may be under way"
    queue.finish(running)
    assert not queue.replay_evaluation()


def test_a_group_that_is_given_up_leaves_no_promise_and_no_rollout(make_queue):
    queue = make_queue(num_pages=6, groups_per_update=2)
    running = take(queue)
    queue.abandon(running.group_id)
    assert running.cancelled and queue.state_dict()["reopened"] == []
    queue.retry(running)  # its worker is lost as well
    assert queue._pool.num_free_pages == 6
    assert take(queue).group_id == 1


def test_a_quarantined_task_is_skipped_and_the_last_one_ends_the_run(make_queue):
    queue = make_queue(num_pages=16, groups_per_update=3, tasks=("a", "b"))
    first = take(queue), take(queue)
    assert {rollout.spec.task for rollout in first} == {"a"}
    evaluation = Evaluation([EpisodeSpec("a", 0)], greedy=True, num_frames_episodes=0)
    queue.add_evaluation(evaluation)
    error = RuntimeError("a keeps failing")
    assert queue.quarantine("a", error) == [0]
    queue.abandon(0)
    with pytest.raises(RuntimeError, match="a keeps failing"):
        evaluation.result(0.0)
    assert [take(queue).spec.task for _ in range(4)] == ["b"] * 4
    with pytest.raises(RuntimeError, match="b too"):
        queue.quarantine("b", RuntimeError("b too"))


def test_groups_that_wait_to_be_begun_anew_are_not_forgotten(make_queue):
    queue = make_queue(num_pages=16, groups_per_update=3)
    for _ in range(6):
        take(queue)
    state = queue.state_dict()
    other = make_queue(num_pages=16, groups_per_update=3)
    other.load_state_dict(state)
    take(other)
    assert other.state_dict()["reopened"] == state["reopened"], "begun or not, all three"


def test_unfinished_groups_are_begun_anew_after_a_resume(make_queue):
    queue = make_queue(num_pages=16, groups_per_update=3)
    specs = [take(queue).spec for _ in range(6)][::2]
    queue.close_group(1)
    other = make_queue(num_pages=16, groups_per_update=3)
    other.load_state_dict(queue.state_dict())
    resumed = [take(other) for _ in range(4)][::2]
    assert [rollout.spec for rollout in resumed] == [specs[0], specs[2]]
    assert [rollout.group_id for rollout in resumed] == [3, 4], "ids are never used twice"


def test_an_ended_collection_fails_its_evaluations(make_queue):
    queue = make_queue(num_pages=8)
    evaluation = Evaluation([EpisodeSpec("task", 0)], greedy=True, num_frames_episodes=0)
    queue.add_evaluation(evaluation)
    queue.fail_evaluations(RuntimeError("over"))
    with pytest.raises(RuntimeError, match="over"):
        evaluation.result(0.0)
    # The collector may end between its own look and this call: nobody is there to play it.
    late = Evaluation([EpisodeSpec("task", 0)], greedy=True, num_frames_episodes=0)
    queue.add_evaluation(late)
    with pytest.raises(RuntimeError, match="over"):
        late.result(0.0)
