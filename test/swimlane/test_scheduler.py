# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The scheduler on a model of the lanes whose best setting is known."""

from __future__ import annotations

import itertools
import logging
import random
from typing import Any

import pytest

from torchrl_dvla.swimlane import Knob, Measurement, Reading, Scheduler

from .lane_model import LaneModel

#: Windows within which it has to find its way: two minutes of a run's.
MAX_WINDOWS = 120


def knobs(**start: float) -> list[Knob]:
    bounds = {
        "num_envs": (1, 32, "all", 1),
        "max_batch_size": (1, 32, "inference", 1),
        "batch_wait_s": (0.0, 0.032, "inference", 0.001),
        "inference_threads": (1, 7, "inference", 1),
        "num_epochs": (1, 4, "gradient", 1),
    }
    takes = {"inference_threads": "gradient"}
    follows = {"max_batch_size": "num_envs" if "num_envs" in start else ""}
    return [
        Knob(
            name,
            value,
            *bounds[name],
            takes_from=takes.get(name, ""),
            follows=follows.get(name, ""),
        )
        for name, value in start.items()
    ]


def converge(
    model: LaneModel, scheduler: Scheduler, noise: float = 0.0, seed: int = 0
) -> tuple[float, int]:
    """The rate that the scheduler ends with, and the windows it took to come to rest."""
    draw = random.Random(seed)
    num_windows = 0
    while num_windows < MAX_WINDOWS and not scheduler.at_rest:
        num_windows += 1
        rate, reading = model.run(**_integers(scheduler.settings))
        scheduler.observe(Measurement(rate * (1 + noise * draw.gauss(0, 1)), reading))
    return model.run(**_integers(scheduler.settings))[0], num_windows


def _integers(settings: dict[str, float]) -> dict[str, Any]:
    return {name: v if name == "batch_wait_s" else int(v) for name, v in settings.items()}


def best_static(model: LaneModel, **grid: list[float]) -> float:
    """The best of all settings, by trying every one."""
    names = list(grid)
    return max(
        model.run(**_integers(dict(zip(names, values))))[0]
        for values in itertools.product(*grid.values())
    )


# -- the model itself, against what can be worked out on paper ---------------------------------


def test_one_environment_alternates_between_step_and_call():
    rate, reading = LaneModel(step_s=0.03, infer_s=0.008, infer_row_s=0.002).run(
        num_envs=1, max_batch_size=1
    )
    assert rate == pytest.approx(1 / 0.04)
    assert reading.shares()["inference"] == pytest.approx(0.25, abs=0.01)


def test_single_row_calls_limit_the_rate():
    rate, reading = LaneModel(infer_s=0.018, infer_row_s=0.002).run(num_envs=16, max_batch_size=1)
    assert rate == pytest.approx(1 / 0.02, rel=0.01)
    assert reading.critical_lane == "inference"


def test_all_workers_stepping_limit_the_rate():
    rate, _ = LaneModel(step_s=0.05, infer_s=0.005).run(num_envs=12, max_batch_size=8)
    assert rate == pytest.approx(4 / 0.05, rel=0.01)


def test_the_learner_limits_the_rate():
    rate, reading = LaneModel(learn_row_s=0.02).run(num_envs=16, max_batch_size=8, num_epochs=2)
    assert rate == pytest.approx(1 / 0.04, rel=0.1)
    assert reading.critical_lane == "gradient"


# -- from bad corners to the best setting ------------------------------------------------------

MODELS = {
    "sampling": LaneModel(step_s=0.06, infer_s=0.02),
    "inference": LaneModel(step_s=0.01, infer_s=0.05),
    "balanced": LaneModel(step_s=0.04, infer_s=0.06, infer_row_s=0.0),
}
CORNERS = [
    {"num_envs": 1, "max_batch_size": 1, "batch_wait_s": 0.0},
    {"num_envs": 32, "max_batch_size": 1, "batch_wait_s": 0.0},
    {"num_envs": 1, "max_batch_size": 32, "batch_wait_s": 0.032},
    {"num_envs": 2, "max_batch_size": 2, "batch_wait_s": 0.032},
]
GRID = {
    "num_envs": [1, 2, 4, 8, 12, 16, 24, 32],
    "max_batch_size": [1, 2, 4, 8, 12, 16, 24, 32],
    "batch_wait_s": [0.0, 0.008, 0.032],
}


@pytest.fixture(scope="module")
def best() -> dict[str, float]:
    return {name: best_static(model, **GRID) for name, model in MODELS.items()}


@pytest.mark.parametrize("noise", [0.0, 0.03])
@pytest.mark.parametrize("corner", range(len(CORNERS)))
@pytest.mark.parametrize("name", list(MODELS))
def test_it_converges_to_within_5_percent(best, name, corner, noise):
    scheduler = Scheduler(knobs(**CORNERS[corner]))
    first, _ = MODELS[name].run(**_integers(scheduler.settings))
    rate, num_windows = converge(MODELS[name], scheduler, noise, seed=corner)
    assert rate >= 0.95 * best[name], (first, rate, best[name], scheduler.settings)
    assert scheduler.at_rest, f"still moving after {num_windows} windows"


@pytest.mark.parametrize("start", [1, 7])
def test_it_shares_out_the_cores(start):
    model = LaneModel(num_cores=8, infer_s=0.12, infer_row_s=0.002, learn_row_s=0.02)
    setting = {"num_envs": 16, "max_batch_size": 16}
    best = max(model.run(**setting, inference_threads=k)[0] for k in range(1, 8))
    scheduler = Scheduler(knobs(**setting, inference_threads=start))
    first, _ = model.run(**_integers(scheduler.settings))
    rate, _ = converge(model, scheduler)
    assert first < 0.8 * best
    assert rate >= 0.95 * best


def test_it_learns_more_often_while_the_learner_has_time():
    model = LaneModel(step_s=0.08, learn_row_s=0.005)  # 50 a second: one pass takes a quarter
    scheduler = Scheduler(knobs(num_envs=12, max_batch_size=8, num_epochs=1))
    for _ in range(MAX_WINDOWS):
        rate, reading = model.run(**_integers(scheduler.settings))
        scheduler.observe(Measurement(rate, reading))
    assert scheduler.settings["num_epochs"] == 3  # four would take all of its time
    assert rate == pytest.approx(50.0, rel=0.02)


def test_it_learns_less_often_when_sampling_waits_for_the_learner():
    model = LaneModel(step_s=0.08, learn_row_s=0.009)  # 50 a second: two passes take nine tenths
    scheduler = Scheduler(knobs(num_envs=12, max_batch_size=8, num_epochs=4))
    for _ in range(MAX_WINDOWS):
        rate, reading = model.run(**_integers(scheduler.settings))
        scheduler.observe(Measurement(rate, reading))
    assert scheduler.settings["num_epochs"] == 2
    assert rate == pytest.approx(50.0, rel=0.02)


# -- one trial after the other -----------------------------------------------------------------


def reading(**shares: float) -> Reading:
    return Reading(1.0, shares, {}, dict.fromkeys(shares, 1))


def test_noise_moves_nothing_for_good():
    scheduler, draw = Scheduler(knobs(num_envs=8, max_batch_size=8)), random.Random(0)
    kept = []
    for _ in range(300):
        rate = 100.0 * (1 + 0.05 * draw.gauss(0, 1))
        scheduler.observe(Measurement(rate, reading(sampling=0.99)))
        if scheduler.at_rest:
            kept.append(dict(scheduler.settings))
    assert kept, "it comes to rest"
    assert all(4 <= setting["num_envs"] <= 16 for setting in kept)


def test_a_change_of_the_load_wakes_it():
    scheduler = Scheduler(knobs(max_batch_size=4), num_windows=1, num_settle=0)
    while not scheduler.at_rest:
        scheduler.observe(Measurement(100.0, reading(inference=1.0)))
    assert scheduler.observe(Measurement(95.0, reading(inference=1.0))) == []
    scheduler.observe(Measurement(60.0, reading(inference=1.0)))
    assert any(scheduler.observe(Measurement(60.0, reading(inference=1.0))) for _ in range(4))


def test_a_saturated_learner_lets_the_other_lanes_rest():
    scheduler = Scheduler(knobs(num_envs=4, max_batch_size=4), num_windows=1)
    assert scheduler.observe(Measurement(50.0, reading(gradient=0.99, sampling=0.5))) == []
    assert scheduler.at_rest


def test_every_move_is_explained_in_the_log(caplog):
    scheduler = Scheduler(knobs(num_envs=1, max_batch_size=1), num_windows=1, num_settle=0)
    with caplog.at_level(logging.INFO, logger="torchrl_dvla"):
        moves = scheduler.observe(Measurement(10.0, reading(inference=1.0, sampling=0.5)))
    assert [str(move) for move in moves] == [
        "num_envs: 1 -> 2, because inference is the critical lane (busy 100 %); hoping for up to "
        "+100%",
        "max_batch_size: 1 -> 2, because it keeps its share of num_envs",
    ]
    said = [record.getMessage() for record in caplog.records]
    assert said == [f"Scheduler: {move}." for move in moves]


def test_a_batch_is_no_larger_than_what_is_under_way():
    scheduler = Scheduler(knobs(num_envs=1, max_batch_size=32), num_windows=1, num_settle=0)
    moves = scheduler.observe(Measurement(10.0, reading(sampling=0.5)))
    assert [(move.knob, move.new) for move in moves] == [("num_envs", 2), ("max_batch_size", 2)]


def test_a_saturated_lane_that_no_setting_helps_ends_the_search():
    scheduler = Scheduler(knobs(num_envs=4, max_batch_size=4), num_windows=1)
    assert scheduler.observe(Measurement(50.0, reading(sampling=0.99, inference=0.5))) == []
    assert scheduler.at_rest


def test_a_step_that_was_taken_back_says_nothing_about_what_to_try():
    scheduler = Scheduler(knobs(num_envs=4), num_windows=1, num_settle=0)
    scheduler.observe(Measurement(100.0, reading(sampling=0.3)))
    moves = scheduler.observe(Measurement(50.0, reading(sampling=1.0)))
    assert [move.new for move in moves] == [4, 2], "sampling has time left with 4"
    assert not scheduler.at_rest


def test_after_a_fine_step_that_paid_coarse_ones_are_tried_again():
    scheduler = Scheduler(knobs(num_envs=4), num_windows=1, num_settle=0)
    rates = iter([100.0, 90.0, 90.0, 150.0])  # at 4, 8, 2 and 6
    moves = [scheduler.observe(Measurement(next(rates), reading(sampling=0.3))) for _ in range(4)]
    assert [move[-1].new for move in moves] == [8, 2, 6, 12]


def test_a_knob_outside_its_bounds_is_refused():
    with pytest.raises(ValueError, match=r"num_envs must lie in \[1, 32\], got 64"):
        knobs(num_envs=64)
