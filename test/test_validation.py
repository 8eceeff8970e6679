# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Checks of settings, and that every public part of the package goes through them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import pytest
import torch
from tensordict.nn import TensorDictModule
from torch import nn

from torchrl_dvla import AsyncWeightUpdater, DVLACollector, GRPOLoss, PooledReplayBuffer
from torchrl_dvla.collectors import GroupConfig, InferenceConfig, WorkerConfig
from torchrl_dvla.data import InitStateSchedule
from torchrl_dvla.data.augmentation import RandomShift, StateNoise
from torchrl_dvla.envs import ToyChunkEnv
from torchrl_dvla.envs.libero_expert import ActionNoise
from torchrl_dvla.memory import DualPool
from torchrl_dvla.modules import TinyBackboneConfig
from torchrl_dvla.validation import (
    Count,
    Range,
    check,
    check_fields,
    describe_error,
    from_mapping,
)
from torchrl_dvla.weight_update import WeightStore


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        (3, int, 3),
        (np.int64(3), int, 3),
        (torch.tensor(3), int, 3),
        (3, float, 3.0),
        (np.float32(0.5), float, 0.5),
        (None, float | None, None),
        (np.bool_(True), bool, True),
        ("64KB", int | str, "64KB"),
        ([1, 2], tuple[float, float], (1.0, 2.0)),
        (0.2, float | tuple[float, float], 0.2),
        ({"A": "1"}, Mapping[str, str], {"A": "1"}),
        ("warn", Literal["warn", "keep"], "warn"),
    ],
)
def test_accepted_as_declared(value, kind, expected):
    found = check("x", value, kind)
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        (True, int, "a whole number of at most 63 bits, got True"),
        (2.0, int, "a whole number of at most 63 bits, got 2.0"),
        (2**63, int, "a whole number of at most 63 bits, got 9223372036854775808"),
        (torch.tensor([1, 2]), int, r"a whole number of at most 63 bits, got tensor\(\[1, 2\]\)"),
        (math.nan, float, "a finite number, got nan"),
        (torch.tensor(math.inf), float, r"a finite number, got tensor\(inf\)"),
        (10**400, float, "a finite number, got 1000"),
        (1, bool, "true or false, got 1"),
        (1, str, "a text, got 1"),
        ([1.0], tuple[float, float], "a list of a finite number and a finite number, got"),
        ({1: "a"}, Mapping[str, str], "a mapping of a text to a text, got"),
        ("a", Mapping[str, Any], "a mapping of a text to anything, got"),
        (["warn"], Literal["warn", "keep"], r"one of \['warn', 'keep'\], got \['warn'\]"),
        ({"group_size": 4}, GroupConfig, "a GroupConfig, got {'group_size': 4}"),
    ],
)
def test_refused_for_its_type(value, kind, message):
    with pytest.raises(ValueError, match=f"^x must be {message}.*Correct it.$"):
        check("x", value, kind)


@dataclass(frozen=True)
class Inner:
    size: Count
    share: Annotated[float, Range(0, 1)] | None = 0.5

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class Outer:
    name: str
    inner: Inner
    other: Inner | None = None


def test_a_dataclass_from_texts():
    data = {"name": 7, "inner": {"size": "2", "share": "1e-1"}, "other": None}
    assert from_mapping(Outer, data) == Outer("7", Inner(2, 0.1))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"inner": {"size": 1}}, "name must be given, got nothing. Pass name=<value>."),
        ({"name": "???", "inner": {"size": 1}}, "name must be given"),
        ({"name": "a", "inner": {"size": 0}}, "inner.size must be at least 1, got 0. Correct it."),
        ({"name": "a", "inner": {"size": 1, "share": 2}}, "inner.share .* The default is 0.5."),
        ({"name": "a", "inner": {"siz": 1}}, r"inner.siz must be .* Did you mean inner.size\?"),
        ({"name": "a", "inner": {"zzz": 1}}, "inner.zzz must be .* There are size, share."),
    ],
)
def test_errors_have_dotted_names(data, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        from_mapping(Outer, data)


COUNTS, TIMES = (0, -1, 1.5, math.nan, True, "3", 2**70), (0, -1.0, math.nan, math.inf, True, "3")
SWITCHES, SEEDS = (None, 1, "yes"), (0.5, math.nan, 2**70, True, None)


def token_loss(**kwargs):
    policy = TensorDictModule(nn.Linear(1, 1), in_keys=["a"], out_keys=["b"])
    policy.get_dist = policy.forward
    return GRPOLoss(policy, **kwargs)


def store(**kwargs):
    return WeightStore(nn.Linear(1, 1), **kwargs)


def collector(**kwargs):  # before a worker is started
    return DVLACollector(ToyChunkEnv, nn.Linear(1, 1), **kwargs)


@pytest.mark.parametrize(
    ("target", "names", "values"),
    [
        (GroupConfig, "group_size groups_per_update max_no_signal_groups", COUNTS),
        (GroupConfig, "max_policy_lag candidate_group_size", COUNTS[1:]),
        (GroupConfig, "candidate_group_size", (1, 2)),  # fewer than those that are kept
        (GroupConfig, "on_no_signal", ("stop", None, 1)),
        (GroupConfig, "return_bounds", (0.5, (0.1,), (0, math.inf), (1, 0), "ab")),
        (GroupConfig, "advantage", (None, True, "std", torch.sum, lambda returns: returns / 0)),
        (WorkerConfig, "num_workers envs_per_worker max_decisions num_threads", COUNTS),
        (WorkerConfig, "max_failures max_rollout_failures max_task_failures", COUNTS),
        (WorkerConfig, "reset_timeout_s step_timeout_s start_timeout_s stop_timeout_s", TIMES),
        (WorkerConfig, "max_rss_bytes", (0, -1, 1.5, True, "many", "infGB", "1e99GB")),
        (WorkerConfig, "env_vars", ({"A": 1}, ["A"], None)),
        (WorkerConfig, "start_method", ("fork", None, 1)),
        (InferenceConfig, "max_batch_size num_threads", COUNTS),
        (InferenceConfig, "timeout_s start_timeout_s", TIMES),
        (InferenceConfig, "max_wait_s", (*TIMES[1:], None)),
        (InferenceConfig, "deterministic", (1, "yes")),
        (PooledReplayBuffer, "batch_size num_epochs num_staging max_size", COUNTS),
        (PooledReplayBuffer, "timeout_s", TIMES),
        (PooledReplayBuffer, "seed", SEEDS),
        (PooledReplayBuffer, "shuffle", SWITCHES),
        (DualPool, "env_bytes model_bytes", (-1, 1.5, True, "many", "-1GB", math.nan)),
        (AsyncWeightUpdater, "num_slots max_readers", COUNTS),
        (AsyncWeightUpdater, "transport_dtype", ("bfloat16", 16)),
        (store, "num_slots max_readers", COUNTS),
        (store, "trainable_only lora_only check_finite", SWITCHES),
        (InitStateSchedule, "seed", SEEDS),
        (InitStateSchedule, "tasks", ("ab", {"a": 1}, [0], math.nan, ())),
        (InitStateSchedule, "init_state_ids", ([-2], ["a"], [0.5], ())),
        (token_loss, "check_finite", SWITCHES),
        (ToyChunkEnv, "action_dim chunk_size image_size success_steps", COUNTS),
        (ToyChunkEnv, "success_tol", TIMES),
        (ToyChunkEnv, "seed", SEEDS[:-1]),
        (TinyBackboneConfig, "image_size patch_size vision_size vision_layers text_size", COUNTS),
        (TinyBackboneConfig, "text_layers head_size scale_factor", COUNTS),
        (TinyBackboneConfig, "mlp_ratio", TIMES),
        (ActionNoise, "push jitter", TIMES[1:]),
        (ActionNoise, "push_steps", COUNTS),
        (RandomShift, "max_shift", COUNTS[1:]),
        (StateNoise, "scale", TIMES[1:]),
        (collector, "group workers inference", ({"group_size": 4}, DualPool(), None)),
        (collector, "memory", ("4GB", 64, GroupConfig())),
        (collector, "rows_per_page", COUNTS),
        (collector, "seed", SEEDS),
    ],
)
def test_every_part_refuses_by_name(target, names, values):
    for name in names.split():
        for value in values:
            with pytest.raises(ValueError, match=f"^{name} must .*, got .*[.]"):
                target(**{name: value})


def test_a_checks_error_is_described_by_its_message_and_any_other_by_its_traceback():
    described = []
    for cause in (
        lambda: check("size", 0, int, Range(1)),
        lambda: DualPool("many"),
        lambda: int("many"),
        lambda: check_fields(None),  # raised by Python, in code of this package
    ):
        try:
            cause()
        except Exception as error:
            described.append(describe_error(error))
    assert described[0].startswith("ValueError: size must be at least 1, got 0. ")
    assert described[1].startswith("ValueError: env_bytes must be ")
    assert [text.startswith("Traceback (most recent call last)") for text in described] == [
        *[False, False, True, True]
    ]
    assert "ValueError: invalid literal for int()" in described[2]
