# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Predictions by assumptions: memory and costs worked out by hand, and what is refused."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from torchrl_dvla.topology import Load, SimulatedRun
from torchrl_dvla.topology.scaling import (
    MEANINGS,
    Assumptions,
    Prediction,
    predict,
    predict_policy,
    with_efficiency,
)
from torchrl_dvla.topology.scaling_svg import draw_scaling

#: 12 * 128² * L³ parameters have L layers: here 10, of width 1280.
SIZE = 12 * 128**2 * 10**3


def run(rate, what="gradient lane", share=1.0):
    return SimulatedRun(
        rate, rate, 1.0, 0.1, 1, (Load(what, "", share), Load("admission", "", 0.0))
    )


def test_memory_of_a_policy():
    given = Assumptions()
    memory = given.memory(SIZE)
    assert given.num_layers(SIZE) == pytest.approx(10)
    # 2 bytes of weights, 4 of gradients, 8 of AdamW, 4 of masters
    assert memory.weights == memory.trained == 2 * SIZE and memory.states == 18 * SIZE
    assert memory.fixed == pytest.approx(2 * 2 * SIZE / 10, abs=1)  # two of ten layers
    # inputs of 10 layers and 17 numbers of one more, a thousand tokens wide 1280, 2 bytes each
    assert memory.decision == pytest.approx(2 * 1000 * 1280 * (10 + 17), rel=1e-6)
    tenth = Assumptions(trained_share=0.1).memory(SIZE)
    assert tenth.trained == 0.1 * tenth.weights
    assert tenth.states == pytest.approx((2 + 1.6) * SIZE)


def test_costs_of_a_policy():
    given = Assumptions(gpu_flops=1e15, achieved=0.5, gpu_bytes_per_s=1e12)
    costs = given.costs(1e9, num_ranks=8)
    assert costs.call_row_s == pytest.approx(2 * 1e9 * 1000 / 5e14)  # 2 FLOP a parameter and token
    assert costs.learn_row_s == pytest.approx(4 * costs.call_row_s)
    assert costs.call_s == pytest.approx(2e9 / 1e12)  # each call reads the weights
    assert costs.publish_s == pytest.approx(2e9 / (8 * 50e9))
    micro_batch = given.micro_batch(1e9, 8)
    assert costs.optimizer_steps_per_row == pytest.approx(1 / (8 * micro_batch))
    # Ranks on several nodes: the version comes to the first one over the network.
    assert given.costs(1e9, 16).publish_s == pytest.approx(2e9 / 400e9 + 2e9 / 400e9)
    # 200 B in bfloat16 are 400 GB: 64 GiB a GPU make six shards.
    assert given.costs(2e11, 64).call_s == pytest.approx(4e11 / 6 / 1e12)


@pytest.mark.parametrize(
    ("changes", "size", "num_gpus", "problem"),
    [
        ({}, 3e9, 8, ""),
        ({}, 1e12, 8192, r"inference: 1\.8 TiB of weights .* which hold 512\.0 GiB"),
        ({"host_bytes": 2**37}, 70e9, 64, r"weight store: 3 versions of 130\.4 GiB in 115\.2 GiB"),
        ({}, 70e9, 8, r"learner: 1[45]\d\.\d GiB a rank on 8 GPUs, which hold 72\.0 GiB"),
        ({}, 70e9, 64, ""),
    ],
)
def test_what_does_not_fit(changes, size, num_gpus, problem):
    found = Assumptions(**changes).problem(size, num_gpus)
    assert re.match(problem, found) if problem else found == ""


def test_the_lag_that_is_needed():
    rates = {1: 10.0, 2: 20.0, 3: 20.1, 4: 99.0}
    found = predict("x", lambda lag: run(rates[lag]))
    assert found.max_policy_lag == 2 and found.run == run(20.0)  # 3 brings less than 1 %
    assert predict("x", lambda lag: run(rates[lag]), max_policy_lag=4).max_policy_lag == 4
    assert predict("x", lambda lag: run(rates[lag]), bound=10.05).max_policy_lag == 1
    assert predict("x", lambda lag: run(10.0**lag), most=3).max_policy_lag == 3


def test_rates_have_three_digits():
    rates = [Prediction("x", 8, run(rate)).rate for rate in (103_444.0, 790.9, 8.999)]
    assert rates == ["103,000", "791", "9"] and Prediction("x", 8, problem="no").rate == ""


def test_efficiency_is_over_the_smallest_feasible_cluster():
    row = [Prediction("x", 8, problem="no"), Prediction("x", 16, run(32.0))]
    row.append(Prediction("x", 64, run(64.0)))
    assert [each.efficiency for each in with_efficiency(row)] == [None, 1.0, 0.5]
    assert with_efficiency(row[:1]) == row[:1]


def test_a_policy_on_a_few_nodes():
    pytest.importorskip("simpy", reason="of the extra 'simulate'")
    found = predict_policy(4, 3e9, num_updates=4)
    assert found.run is not None and 0.8 < (found.work_share or 0) < 1.001
    # Learning takes four policy calls of 12 ms, sampling 18 ms and one: two or three of four nodes.
    assert found.num_learner_gpus in (16, 24) and found.max_policy_lag >= 1
    slow = Assumptions(network_bytes_per_s=1e8)
    late = predict_policy(4, 3e9, slow, max_policy_lag=1, num_updates=4)
    assert late.run.decisions_per_s < 0.5 * found.run.decisions_per_s
    assert late.run.bounded_by.what in ("FSDP traffic", "admission", "network, versions")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Assumptions(achieved=1.5), "achieved must be at most 1, got 1.5"),
        (lambda: Assumptions(trained_share=0.0), "trained_share must be positive, got 0.0"),
        (lambda: Assumptions(tokens=0), "tokens must be at least 1, got 0"),
        (lambda: predict_policy(1, 3e9), "num_nodes must be at least 2, got 1"),
        (lambda: predict_policy(8, 0.0), "num_parameters must be positive, got 0.0"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_every_assumption_has_a_meaning():
    lines = Assumptions().lines()
    assert set(MEANINGS) == set(Assumptions.__dataclass_fields__)
    assert lines[0].split(maxsplit=2) == ["8", "gpus_per_node", "GPUs of a node"]


def test_picture():
    row = with_efficiency([Prediction("3 B", 8, run(800.0), max_policy_lag=1)])
    row.append(replace(row[0], num_nodes=64, run=run(2.0, "FSDP traffic"), efficiency=0.25))
    svg = draw_scaling([*row, Prediction("1 T", 8, problem="learner: <1 TiB")], "a title")
    assert "Predicted, not measured: a title" in svg and svg.count("<rect") == 1 + 3 + 2
    assert ">8 nodes<" in svg and ">64 nodes<" in svg and ">0.25; lag 1<" in svg
    assert ">no room:<" in svg and ">learner<" in svg and "learner: &lt;1 TiB" in svg
    assert svg.index("bounded by: gradient lane") > 0 and ">FSDP traffic<" in svg
