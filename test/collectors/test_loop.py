# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import random
import time

import pytest
import torch

from torchrl_dvla.collectors import EpisodeSpec, InferenceConfig
from torchrl_dvla.collectors.failures import FailureAction
from torchrl_dvla.data import Rollout
from torchrl_dvla.swimlane.messages import Failed

from .scripted_lanes import Bench


def on_a_bench(**options):
    """Run an asynchronous test on a :class:`Bench`."""

    def decorate(test):
        @functools.wraps(test)
        def run():
            async def main():
                async with Bench(**options) as bench:
                    await test(bench)

            asyncio.run(main())

        del run.__wrapped__  # pytest would look for its fixtures
        return run

    return decorate


# -- groups ---------------------------------------------------------------------------------------
@on_a_bench(groups_per_update=2)
async def test_a_group_is_sampled_whole_from_one_scene_and_completed(bench):
    await bench.until(lambda: len(bench.groups.stored) == 2)
    assert bench.resets() == [0, 0, 1, 1]
    first, second = bench.groups.stored
    assert [rollout.rollout_id for rollout in first.rollouts] == [0, 1]
    assert [rollout.num_rows for rollout in second.rollouts] == [2, 2]
    assert [rollout.init_state_hash for rollout in first.rollouts] == [1000, 1000]
    assert (first.init_state_hash, second.init_state_hash) == (1000, 1001)
    rows = bench.pool.rows[first.row_index(bench.pool)]
    assert rows["rollout_id"].flatten().tolist() == [0, 0, 1, 1]
    assert rows["decision_index"].flatten().tolist() == [0, 1, 0, 1]
    assert bench.counters.totals["collector/decisions"] == 8


@on_a_bench()
async def test_admission_holds_further_groups_back_until_the_publish(bench):
    await bench.until(lambda: bench.groups.stored)
    await bench.quiet()
    assert len(bench.resets()) == 2, "lag 0: one group a version"
    bench.publish()
    await bench.until(lambda: len(bench.resets()) == 4)


@on_a_bench(num_workers=1, num_pages=3 * 2 + 1, groups_per_update=2)
async def test_a_group_waits_for_the_pages_of_all_its_rollouts(bench):
    # Beside the first group, a rollout of an evaluation always has room, and nothing more.
    await bench.until(lambda: bench.groups.stored)
    await bench.quiet()
    assert bench.resets() == [0, 0]
    assert bench.groups.admit() == "no_page"


@on_a_bench(hold=True, num_workers=2, max_policy_lag=1)
async def test_a_lost_rollout_is_sampled_again_before_a_new_group(bench):
    bench.processes.crash(0)
    await bench.until(lambda: bench.processes.num_replaced == 1 and len(bench.resets()) == 3)
    assert bench.resets() == [0, 0, 0], "the scene of the group"
    bench.processes.release()
    await bench.until(lambda: len(bench.groups.stored) == 2)
    assert [r.num_failures for r in bench.groups.stored[0].rollouts] == [1, 0]
    assert bench.pool.stats()["pages_reserved"] == 0


@on_a_bench(hold=True, num_workers=2, workers={"max_rollout_failures": 1, "max_task_failures": 5})
async def test_a_group_that_keeps_failing_is_dropped_and_leaves_no_page(bench):
    bench.processes.crash(0)
    await bench.until(lambda: bench.processes.num_replaced == 1)
    await bench.quiet()
    assert bench.groups.drop_counts() == {}, "the other rollout's worker may still write its rows"
    bench.processes.release()
    await bench.until(lambda: bench.groups.drop_counts())
    assert bench.counters.totals["faults/groups_dropped"] == 1
    await bench.until(lambda: bench.groups.stored)
    assert bench.groups.stored[0].group_id == 1
    assert bench.groups.drop_counts()["the environment kept failing"]["count"] == 1
    assert bench.groups.quarantined == set()


@on_a_bench(
    num_workers=2,
    tasks=("bad", "good"),
    fail_tasks=("bad",),
    workers={"max_rollout_failures": 1, "max_task_failures": 1},
)
async def test_a_task_that_keeps_failing_is_quarantined(bench):
    await bench.until(lambda: bench.groups.quarantined == {"bad"})
    assert bench.processes.first_task == "good"
    await bench.until(lambda: bench.groups.stored)
    assert {group.spec.task for group in bench.groups.stored} == {"good"}
    evaluation = bench.evaluate(EpisodeSpec("good", 7))
    assert evaluation.finished() == {}
    await bench.until(evaluation.done)
    assert len(evaluation.result().successes) == 1
    ((number, (rollout, frames)),) = evaluation.finished().items()
    assert (number, rollout.init_state_hash, frames) == (0, 1007, None)
    assert 0 < rollout.duration_s < 60


@on_a_bench(num_workers=2, refusals=(True, True), max_policy_lag=1, lockstep=True)
async def test_a_rollout_that_is_refused_costs_its_group_and_no_worker(bench):
    await bench.until(lambda: len(bench.groups.stored) == 2)
    assert [group.group_id for group in bench.groups.stored] == [1, 2], "no second try"
    totals = bench.counters.totals
    assert (totals["faults/rollouts_refused"], totals["faults/groups_dropped"]) == (2, 1)
    assert bench.processes.num_replaced == 0
    assert bench.pool.stats()["pages_reserved"] == 0


@on_a_bench(num_workers=1, refusals=(True,) * 9, workers={"max_task_failures": 3})
async def test_a_task_that_is_always_refused_ends_with_the_reason(bench):
    error = await bench.error()
    assert "failed max_task_failures (3) x max_rollout_failures (3) times in a row" in error
    assert "Worker 0: NaN" in error
    assert bench.counters.totals["faults/groups_dropped"] == 9
    assert bench.processes.num_replaced == 0


@on_a_bench(hold=True, num_workers=1, workers={"step_timeout_s": 0.05, "max_failures": 1})
async def test_a_worker_that_hangs_is_replaced_until_there_were_too_many(bench):
    bench.processes.answer(0)  # the reset; the step never is
    await bench.until(lambda: bench.processes.num_replaced == 1)
    await bench.until(lambda: bench.processes.held)
    bench.processes.answer(0)
    error = await bench.error()
    assert "max_failures (1)" in error
    assert "stepping took more than step_timeout_s=0.05 s. Stack:\nthe stack" in error


@on_a_bench(
    hold=True,
    num_workers=1,
    workers={"envs_per_worker": 2, "reset_timeout_s": 1e3, "step_timeout_s": 60.0},
)
async def test_a_step_that_waits_for_the_reset_before_it_is_not_late(bench):
    bench.processes.answer(1)  # the other environment of the worker is still being reset
    await bench.until(lambda: [c for _, c in bench.processes.sent if not hasattr(c, "seed")])
    assert bench.loop.envs._deadline(0) > time.monotonic() + 900.0
    bench.processes.answer(0)
    await bench.until(lambda: bench.loop.envs._deadline(0) < time.monotonic() + 61.0)


@on_a_bench(hold=True, num_workers=1, workers={"step_timeout_s": 0.05, "max_rss_bytes": 1})
async def test_a_worker_that_hangs_before_it_is_recycled_has_failed(bench):
    bench.loop.envs._recycled.add(0)
    bench.processes.answer(0)  # the reset; the step never is
    await bench.until(lambda: bench.processes.num_replaced == 1)
    assert bench.counters.totals["faults/workers_replaced"] == 1
    assert bench.counters.totals["faults/workers_recycled"] == 0


# -- evaluations ----------------------------------------------------------------------------------
@on_a_bench(hold=True, num_workers=1, groups_per_update=8)
async def test_evaluations_are_played_one_after_the_other_before_new_groups(bench):
    first = bench.evaluate(EpisodeSpec("task", 71), EpisodeSpec("task", 72))
    second = bench.evaluate(EpisodeSpec("task", 73))
    bench.processes.release()
    await bench.until(lambda: second.done() and not bench.inference.has_snapshot)
    await bench.until(lambda: len(bench.resets()) >= 5)
    # The first rollout had begun: the evaluations come next, then the other one of its group.
    assert bench.resets()[:5] == [0, 71, 72, 73, 0]
    assert first.result().num_env_steps == [4, 4]


@on_a_bench(hold=True, num_workers=3, num_pages=6, groups_per_update=2)
async def test_an_evaluation_without_room_holds_no_group_up_that_has_it(bench):
    assert len(bench.resets()) == 2, "one group has room, and one rollout of an evaluation"
    evaluation = bench.evaluate(*[EpisodeSpec("task", seed) for seed in (7, 8)])
    await bench.quiet()
    assert bench.resets() == [0, 0, 7], "no page for the second episode"
    bench.processes.release()
    await bench.until(evaluation.done)
    assert bench.pool.stats()["pages_reserved"] == 0


@on_a_bench(num_workers=2)
async def test_an_evaluation_that_lost_its_weights_is_played_again_from_its_first_episode(bench):
    bench.groups.set_paused(True)
    await bench.until(lambda: bench.groups.stored)
    bench.inference.hold = True
    evaluation = bench.evaluate(*[EpisodeSpec("task", seed) for seed in (7, 8, 9)])
    await bench.until(lambda: bench.inference.held)
    bench.inference.hold, bench.inference.version = False, 1
    bench.inference.crash()
    await bench.until(evaluation.done)
    assert evaluation.result().policy_version == 1
    assert bench.inference.num_started == 2
    assert bench.counters.totals["faults/inference_restarts"] == 1
    assert bench.pool.stats()["pages_reserved"] == 0


@on_a_bench(num_workers=1, workers={"max_rollout_failures": 2, "max_failures": 9})
async def test_an_evaluation_that_keeps_failing_ends_with_its_error(bench):
    bench.groups.set_paused(True)
    await bench.until(lambda: bench.groups.stored)
    bench.processes.fail_tasks = {"task"}
    evaluation = bench.evaluate(EpisodeSpec("task", 7), EpisodeSpec("task", 8))
    await bench.until(evaluation.done)
    with pytest.raises(RuntimeError, match=r"(?s)failed 2 times.*It crashed"):
        evaluation.result()
    bench.processes.fail_tasks = set()
    again = bench.evaluate(EpisodeSpec("task", 7))
    await bench.until(again.done)
    assert again.result().successes == [False]


@on_a_bench(num_workers=1, workers={"max_rollout_failures": 2})
async def test_a_refused_episode_is_played_again_and_then_counts_as_a_failure(bench):
    bench.groups.set_paused(True)
    await bench.until(lambda: bench.groups.stored)
    bench.processes.refusals = [True]
    evaluation = bench.evaluate(EpisodeSpec("task", 7))
    await bench.until(evaluation.done)
    assert evaluation.result().num_env_steps == [4]
    bench.processes.refusals = [True, False, False, True]  # between the tries the other is played
    evaluation = bench.evaluate(EpisodeSpec("task", 7), EpisodeSpec("task", 8))
    await bench.until(evaluation.done)
    result = evaluation.result()
    assert (result.successes, result.num_env_steps[1]) == ([False, False], 4)
    assert result.policy_version == 0, "the other's: it has no decision"
    assert bench.pool.stats()["pages_reserved"] == 0


@on_a_bench(
    num_workers=4, workers={"max_rollout_failures": 1, "max_task_failures": 1}, tasks=("a", "b")
)
async def test_an_evaluation_that_was_given_up_keeps_its_weights_beside_the_next(bench):
    bench.groups.set_paused(True)
    await bench.until(lambda: bench.groups.stored)
    await bench.quiet()
    bench.processes.hold = True
    bench.evaluate(EpisodeSpec("a", 70), EpisodeSpec("b", 71))
    await bench.until(lambda: len(bench.processes.held) == 2)
    following = bench.evaluate(EpisodeSpec("b", 80))
    lost = Rollout(EpisodeSpec("a", 1), 5, 99)
    bench.loop._on_crash(lost, FailureAction.QUARANTINE_TASK, "It crashed.")
    bench.loop._on_change()
    await bench.until(lambda: len(bench.processes.held) == 3)
    while not following.done():
        await bench.until(lambda: len(bench.processes.held) == 3)
        bench.processes.answer(2)
        await bench.quiet()
    bench.processes.answer(1)  # the healthy one of the first, which asks the policy
    await bench.quiet()
    bench.processes.release()
    await bench.until(lambda: not bench.inference.has_snapshot)
    assert not bench._main.done()


@pytest.mark.parametrize("by_error", [False, True])
def test_a_loop_that_ends_while_an_evaluation_begins_anew_ends(by_error):
    @on_a_bench(hold=True, num_workers=4)
    async def end(bench):
        bench.evaluate(EpisodeSpec("task", 7), EpisodeSpec("task", 8))
        await bench.until(lambda: len(bench.processes.held) == 4)
        bench.inference.hold = True
        bench.processes.answer(2)  # the other episode is still being reset
        await bench.until(lambda: bench.inference.held)
        bench.inference.crash()
        await bench.until(lambda: bench.inference.num_started == 2)
        await bench.quiet()
        if by_error:
            bench.processes.answer(0)
            await bench.until(lambda: bench.inference.held)
            bench.inference._theirs.send(Failed("out of memory"))
            assert "out of memory" in await bench.error()
        else:
            bench._main.cancel()
            await bench.until(bench._main.done)

    end()


def test_an_ended_collection_fails_its_evaluations():
    @on_a_bench(hold=True)
    async def end(bench):
        evaluations.append(bench.evaluate(EpisodeSpec("task", 0)))
        await bench.quiet()
        bench.loop._close()
        evaluations.append(bench.evaluate(EpisodeSpec("task", 0)))  # nobody is there to play it

    evaluations = []
    end()
    for evaluation in evaluations:
        with pytest.raises(RuntimeError, match="ended before the evaluation"):
            evaluation.result(0.0)


# -- decisions ------------------------------------------------------------------------------------
@on_a_bench(hold=True, num_workers=2, inference=InferenceConfig(max_batch_size=3, max_wait_s=1e6))
async def test_a_row_waits_for_what_is_being_simulated(bench):
    bench.processes.answer(0)
    await bench.until(lambda: bench.loop.batcher._waiting)
    await bench.quiet()
    assert bench.inference.rows == [] or len(bench.inference.rows[-1]) == 2
    num_before = len(bench.inference.rows)
    bench.processes.answer()  # nothing more can come
    await bench.until(lambda: len(bench.inference.rows) == num_before + 1)
    assert len(bench.inference.rows[-1]) == 2


@on_a_bench(hold=True, num_workers=2, inference=InferenceConfig(max_batch_size=3, max_wait_s=0.01))
async def test_a_row_waits_no_longer_than_it_may(bench):
    bench.processes.answer(0)
    await bench.until(lambda: bench.inference.rows)
    assert len(bench.inference.rows[-1]) == 1


@on_a_bench(num_workers=2, inference=InferenceConfig(max_batch_size=1, max_wait_s=1e6))
async def test_a_full_batch_waits_for_nobody(bench):
    await bench.until(lambda: bench.groups.stored)
    assert all(len(rows) == 1 for rows in bench.inference.rows)


@on_a_bench(num_workers=2, hold_inference=True)
async def test_a_lost_batch_is_repeated_with_the_same_seed(bench):
    await bench.until(lambda: bench.inference.held)
    request = bench.inference.held[0]
    bench.inference.crash()
    await bench.until(lambda: bench.inference.held)
    assert bench.inference.held[0][:2] == request[:2]
    assert bench.inference.held[0].seed == request.seed
    assert bench.inference.held[0].new_instructions == {0: "task"}


@on_a_bench(num_workers=1, num_decisions=3, new_instruction="turn back")
async def test_an_instruction_that_changes_is_decided_for_from_then_on(bench):
    await bench.until(lambda: bench.groups.stored)
    ids = [message.instruction_ids for message in bench.inference.sent]
    assert ids == [[0], [1], [1]] * 2


# -- rounds ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_a_round_is_handled_in_the_order_of_the_environments(order):
    rows = []

    @on_a_bench(
        hold=True, num_workers=3, num_decisions=1, group_size=3, groups_per_update=2, lockstep=True
    )
    async def play(bench):
        for _ in range(4):  # two groups, each a reset and a step
            await bench.until(lambda: len(bench.processes.held) == 3)
            chosen = [bench.processes.held[index] for index in order]
            for entry in chosen:
                bench.processes.answer(bench.processes.held.index(entry))
                await bench.quiet()
        await bench.until(lambda: len(bench.groups.stored) == 2)
        stored = torch.cat([group.row_index(bench.pool) for group in bench.groups.stored])
        rows.append(bench.pool.rows["rollout_id"][stored].flatten().tolist())
        assert [len(batch) for batch in bench.inference.rows] == [3, 3]
        assert bench.inference.rows[0] == sorted(bench.inference.rows[0])

    play()
    assert rows == [[0, 1, 2, 3, 4, 5]]


@on_a_bench(hold=True, num_workers=2, lockstep=True)
async def test_a_worker_that_is_lost_after_its_answer_takes_it_along(bench):
    bench.processes.answer(0)  # worker 0 waits for the round to end
    await bench.quiet()
    bench.processes.crash(0)
    await bench.until(lambda: bench.processes.num_replaced == 1)
    bench.processes.release()
    await bench.until(lambda: bench.groups.stored)
    assert [r.num_rows for r in bench.groups.stored[0].rollouts] == [2, 2]


@on_a_bench(
    hold=True,
    num_workers=3,
    groups_per_update=2,
    lockstep=True,
    workers={"max_rollout_failures": 1, "max_task_failures": 5},
)
async def test_an_answer_held_for_a_cancelled_rollout_reaches_no_other(bench):
    bench.processes.answer(0, 1, 2)  # resets of group 0 and of the first rollout of group 1
    await bench.until(lambda: len(bench.processes.held) == 3)
    bench.processes.answer(1)  # held back: the others are still stepping
    await bench.quiet()
    bench.processes.crash(0)  # group 0 is dropped
    await bench.until(lambda: bench.groups.drop_counts())
    bench.processes.release()
    await bench.until(lambda: len(bench.groups.stored) == 2)
    assert not bench._main.done()


@on_a_bench(hold=True, num_workers=2, lockstep=True, groups_per_update=2)
async def test_in_lockstep_an_evaluation_has_the_environments_to_itself(bench):
    evaluation = bench.evaluate(EpisodeSpec("task", 70), EpisodeSpec("task", 71))
    bench.processes.release()
    await bench.until(evaluation.done)
    assert bench.resets() == [0, 0, 1, 1, 70, 71], "after the last group"
    bench.publish()
    await bench.until(lambda: len(bench.resets()) == 10)


# -- batched environments -------------------------------------------------------------------------
@on_a_bench(hold=True, num_workers=1, rollouts_per_env=2, workers={"envs_per_worker": 2})
async def test_a_batched_environment_is_stepped_when_each_rollout_has_a_decision(bench):
    assert len(bench.processes.held) == 2, "a group of two"
    bench.processes.answer(1)
    await bench.until(lambda: bench.inference.rows)
    await bench.quiet()
    assert bench.processes.steps == [], "the other one is being reset"
    assert bench.loop.envs._deadline(0) > time.monotonic() + 100.0, "and no step is late"
    bench.processes.answer(0)
    await bench.until(lambda: bench.processes.steps)
    assert bench.processes.steps == [[0, 1]]
    assert bench.loop.envs._deadline(0) < time.monotonic() + 61.0
    bench.processes.release()
    await bench.until(lambda: bench.groups.stored)
    assert bench.processes.steps == [[0, 1], [0, 1]]


@on_a_bench(
    hold=True, num_workers=1, rollouts_per_env=2, workers={"envs_per_worker": 2}, group_size=4
)
async def test_two_batched_environments_of_a_worker_do_not_wait_for_each_other(bench):
    bench.processes.answer(2, 3)  # one is simulated while the policy decides for the other
    await bench.until(lambda: bench.processes.steps)
    assert bench.processes.steps == [[2, 3]]
    bench.processes.answer(0)
    await bench.quiet()
    bench.processes.answer(0)
    await bench.until(lambda: len(bench.processes.steps) == 2)
    assert bench.processes.steps[1] == [0, 1]


@on_a_bench(num_workers=1, rollouts_per_env=3)
async def test_an_entry_without_a_rollout_is_not_waited_for(bench):
    await bench.until(lambda: bench.groups.stored)
    assert bench.processes.steps == [[0, 1], [0, 1]]


@pytest.mark.parametrize("lockstep", [False, True])
def test_a_rollout_that_is_cancelled_while_it_holds_its_step_lets_the_others_go_on(lockstep):
    @on_a_bench(
        hold=True,
        num_workers=2,
        rollouts_per_env=4,
        lockstep=lockstep,
        groups_per_update=2,
        group_size=6,
        num_pages=64,
        workers={"max_rollout_failures": 1, "max_task_failures": 9},
    )
    async def play(bench):
        # Of group 0, worker 0 plays four and worker 1 two, beside two of group 1.
        await bench.until(lambda: len(bench.processes.held) == 8)
        bench.processes.answer(*range(1, 7))  # one in each worker is still being reset
        await bench.until(lambda: bench.inference.rows or lockstep)
        await bench.quiet()
        assert bench.processes.steps == []
        bench.processes.crash(0)  # group 0 is dropped
        await bench.until(lambda: bench.groups.drop_counts())
        bench.processes.release()
        await bench.until(lambda: len(bench.groups.stored) == 2)
        assert [group.group_id for group in bench.groups.stored] == [1, 2]
        bench.pool.check()

    play()


@on_a_bench(
    hold=True,
    hold_inference=True,
    num_workers=1,
    rollouts_per_env=4,
    groups_per_update=2,
    tasks=("good", "bad"),
    inference=InferenceConfig(max_batch_size=2),
)
async def test_a_rollout_that_is_given_up_is_not_waited_for(bench):
    bench.groups.set_paused(True)  # nothing takes its place
    bench.processes.answer()
    await bench.until(lambda: bench.inference.held)
    bench.inference.answer()
    await bench.until(lambda: bench.inference.held)
    await bench.quiet()
    assert bench.processes.steps == []
    bench.groups.quarantine("bad")
    bench.inference.answer()
    await bench.until(lambda: bench.processes.steps)
    assert bench.processes.steps == [[0, 1]]


@on_a_bench(
    hold=True,
    num_workers=1,
    rollouts_per_env=3,
    group_size=3,
    inference=InferenceConfig(max_wait_s=1e6),
)
async def test_the_policy_waits_for_no_row_of_a_rollout_that_holds_its_step(bench):
    bench.inference.hold = True
    bench.loop.batcher.max_batch_size = 2
    bench.processes.answer(0, 2)
    await bench.until(lambda: bench.inference.held)
    bench.inference.answer()
    await bench.quiet()
    bench.processes.answer(0)  # alone, for nothing else can come
    await bench.until(lambda: bench.inference.held)
    assert [len(rows) for rows in bench.inference.rows] == [2, 1]
    bench.inference.answer()
    await bench.until(lambda: bench.processes.steps)
    assert bench.processes.steps == [[0, 1, 2]]


@on_a_bench(
    hold=True,
    num_workers=3,
    rollouts_per_env=2,
    group_size=6,
    inference=InferenceConfig(max_batch_size=3, max_wait_s=1e6),
)
async def test_a_batched_environment_is_decided_for_in_one_call(bench):
    bench.inference.hold = True
    rows = {
        index: [command.row for worker, command in bench.processes.held if worker == index]
        for index in range(3)
    }

    async def answer(worker):
        bench.processes.answer([index for index, _ in bench.processes.held].index(worker))
        await bench.quiet()

    await answer(0)
    await answer(1)
    assert bench.inference.rows == [], "of neither are all rows there"
    await answer(0)
    assert bench.inference.rows == [rows[0]]
    for worker in (2, 1, 2):
        await answer(worker)
    bench.inference.answer()
    await bench.until(lambda: len(bench.inference.rows) == 2)
    assert bench.inference.rows[1] == rows[1], "a row of the other would fit in"


@pytest.mark.parametrize(
    ("lockstep", "envs_per_worker", "rows"),
    [(False, 1, 3), (False, 2, 6), (True, 1, 6), (True, 2, 12)],
)
def test_a_policy_call_takes_the_rows_of_whole_environments(lockstep, envs_per_worker, rows):
    @on_a_bench(
        hold=True,
        num_workers=2,
        rollouts_per_env=3,
        lockstep=lockstep,
        workers={"envs_per_worker": envs_per_worker},
    )
    async def play(bench):
        assert bench.loop.batcher.max_batch_size == rows

    play()


@on_a_bench(
    hold=True,
    num_workers=2,
    rollouts_per_env=2,
    group_size=4,
    max_policy_lag=1,
    workers={"max_rollout_failures": 2},
)
async def test_a_crash_of_a_batched_environment_counts_for_its_first_rollout(bench):
    await bench.until(lambda: len(bench.processes.held) == 4)
    bench.processes.crash(0)
    await bench.until(lambda: bench.processes.num_replaced == 1 and len(bench.resets()) == 6)
    [group] = bench.groups.running
    assert [rollout.num_failures for rollout in group.rollouts] == [1, 0, 0, 0]
    bench.processes.release()
    await bench.until(lambda: bench.groups.stored)
    assert bench.groups.stored[0].group_id == 0, "all are sampled again"


@pytest.mark.parametrize("seed", range(10))
def test_nothing_that_happens_to_some_rollouts_keeps_the_others_from_going_on(seed):
    draw = random.Random(seed)
    lockstep = seed % 2 == 1

    @on_a_bench(
        hold=True,
        num_workers=2,
        rollouts_per_env=3,
        num_decisions=3,
        num_pages=400,
        group_size=4,
        groups_per_update=2,
        max_policy_lag=0 if lockstep else 2,
        lockstep=lockstep,
        inference=InferenceConfig(max_wait_s=draw.choice([0.0, 1e6])),
        workers={
            "envs_per_worker": 2,
            "max_rollout_failures": 1,
            "max_task_failures": 10**6,
            "max_failures": 10**6,
        },
    )
    async def play(bench):
        def publish():
            with contextlib.suppress(TimeoutError):  # there is no cohort yet
                bench.publish()
                return True

        async def happen():
            what = draw.random()
            if what < 0.6 and bench.processes.held:
                some = draw.sample(range(len(bench.processes.held)), 1)
                bench.processes.refusals = [draw.random() < 0.1]
                bench.processes.answer(*some)
            elif what < 0.8 and bench.inference.held:
                bench.inference.answer()
            elif what < 0.84:
                bench.processes.crash(draw.randrange(2))
            elif what < 0.86 and bench.inference.held:
                bench.inference.crash()
            elif what < 0.9:
                bench.evaluate(EpisodeSpec("task", draw.randrange(99)))
            else:
                publish()
            for _ in range(draw.choice([1, 3, 30])):
                await asyncio.sleep(0)

        bench.inference.hold = True
        for _ in range(300):
            await happen()
        bench.processes.refusals = []
        bench.inference.hold = False
        if bench.inference.held:
            bench.inference.answer()
        bench.processes.release()
        for _ in range(3):  # whole updates, one after the other
            await bench.until(publish)
        final = bench.evaluate(EpisodeSpec("task", 5))
        await bench.until(final.done)
        bench.groups.set_paused(True)
        await bench.until(lambda: not bench.groups.running)
        await bench.quiet()
        bench.pool.check()
        stats = bench.pool.stats()
        assert (stats["pages_leased"], stats["pages_reserved"]) == (0, 0)
        assert not bench._main.done()

    play()
