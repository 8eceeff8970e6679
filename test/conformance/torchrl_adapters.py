# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Pytest plugin for TorchRL's own tests: this package's classes in the place of TorchRL's.

``test_torchrl.py`` runs it; by hand:

    ADAPTER=groups PYTHONPATH=test/conformance python -m pytest -p torchrl_adapters test/rb
"""

from __future__ import annotations

import functools
import importlib
import itertools
import json
import os
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict
from torchrl.data.vla import UniformActionTokenizer
from torchrl.envs.transforms import ExcludeTransform
from torchrl.modules.vla import TinyVLA

from torchrl_dvla import DVLACollector, GroupConfig, GRPOLoss, PooledReplayBuffer, WorkerConfig
from torchrl_dvla.data import Group, GroupQueue, InitStateSchedule
from torchrl_dvla.memory import EnvironmentPool, RowLayout
from torchrl_dvla.modules import TinyBackboneConfig, TransformersVLA, tiny_token_policy
from torchrl_dvla.testing import CountingChunkEnv
from torchrl_dvla.weight_update import AsyncWeightUpdater


class GroupBuffer(PooledReplayBuffer):
    """A bound buffer: the rows of each ``extend`` are a group of two rollouts, in order."""

    def __init__(self, *, storage=None, **kwargs):
        self._num_rows = getattr(storage, "max_size", 1000)
        super().__init__(**kwargs)

    def extend(self, data):
        is_tensor = isinstance(data, torch.Tensor)
        if is_tensor:
            data = TensorDict({"data": data}, [len(data)])
        if not self.is_bound:
            fields = {k: (v.shape[1:], v.dtype) for k, v in data.items(True, True)}
            layout = RowLayout({**fields, "advantage": ((1,), torch.float32)})
            pool = EnvironmentPool(layout, 4 * self._num_rows, rows_per_page=1)
            config = GroupConfig(group_size=2, groups_per_update=1, max_policy_lag=self._num_rows)
            groups = GroupQueue(config, pool, InitStateSchedule(), pages_per_rollout=self._num_rows)
            groups.set_paused(False)
            self.bind(groups)
            self.append_transform(ExcludeTransform("advantage"))
            if is_tensor:
                self.append_transform(lambda rows: rows["data"])
        group = self.groups.admit()
        assert isinstance(group, Group), group
        for success, rollout, rows in zip((1, 0), group.rollouts, data.split(-(len(data) // -2))):
            for _ in range(len(rows)):
                rollout.pages.append(self.pool.lease(rollout.rollout_id, rollout.rollout_id))
                rollout.record(policy_version=0, reward=0.0, success=bool(success), num_env_steps=1)
            for key, value in rows.items(True, True):
                self.pool.rows.get(key)[torch.tensor(rollout.pages)] = value
            rollout.episode_return = float(success)
            self.groups.finish(rollout)
        self.groups.complete(group)
        return torch.arange(len(self) - len(data), len(self))


class Scheme(AsyncWeightUpdater):
    """The updater under the arguments of TorchRL's schemes."""

    def __init__(self, strategy="tensordict", sync=True):
        super().__init__()


class ChunkCollector(DVLACollector):
    """The collector on a task of ours, with batches of the size that a test asks for."""

    def __init__(self, env, policy, *, frames_per_batch, total_frames=-1, **kwargs):
        hooks = kwargs.pop("pre_collect_hook", None), kwargs.pop("post_collect_hook", None)
        num_decisions = frames_per_batch // 2
        make_env = functools.partial(
            CountingChunkEnv, max_env_steps=4 * num_decisions, stop_on_success=False
        )
        kwargs.pop("track_policy_version", None)
        super().__init__(
            make_env,
            tiny_token_policy(2, 4),
            group=GroupConfig(2, groups_per_update=1, max_no_signal_groups=1, on_no_signal="keep"),
            workers=WorkerConfig(num_workers=1, max_decisions=num_decisions),
            replay_buffer=PooledReplayBuffer(timeout_s=60.0),
            **kwargs,
        )
        self.pre_collect_hook, self.post_collect_hook = hooks
        self.total_frames, self.requested_frames_per_batch = total_frames, frames_per_batch

    def iterator(self):
        for data in itertools.islice(super().iterator(), len(self)):
            yield data
            self.update_policy_weights_()


def token_policy(*, action_dim, chunk_size, action_head="continuous", vocab_size=256, **kwargs):
    """The transformers policy where a test wants action tokens."""
    if action_head != "tokens":
        return TinyVLA(action_dim=action_dim, chunk_size=chunk_size, **kwargs)
    # Tests of the loss name the mode of sampling; GRPOLoss needs one log-probability a token.
    kwargs.setdefault("log_probs_mode", "token" if kwargs.pop("mode", None) else "sequence")
    kwargs.setdefault("action_tokenizer", UniformActionTokenizer(vocab_size, low=-1.0, high=1.0))
    return TransformersVLA.tiny(
        ["task 0 1 2 3 4 5 6 7"],
        action_dim=action_dim,
        chunk_size=chunk_size,
        state_dim=5,
        backbone=TinyBackboneConfig(image_size=16, patch_size=8, text_layers=1, vision_layers=1),
        **{"output_mode": "tokens", **kwargs},
    )


class TokenLoss(GRPOLoss):
    """The loss under the arguments of ClipPPOLoss without a critic."""

    def __init__(self, actor, *, critic_network, entropy_bonus, reduction="mean", **kwargs):
        reductions = {"mean": "token_mean", "none": "none"}
        super().__init__(actor, reduction=reductions[reduction], **kwargs)


REPLACEMENTS = {
    "none": {},
    "rows": {"torchrl.data.ReplayBuffer": PooledReplayBuffer},
    "groups": {"torchrl.data.ReplayBuffer": GroupBuffer},
    "weights": {
        "torchrl.weight_update.MultiProcessWeightSyncScheme": Scheme,
        "torchrl.weight_update.SharedMemWeightSyncScheme": Scheme,
    },
    "collector": {"torchrl.collectors.Collector": ChunkCollector},
    "policy": {
        "torchrl.modules.vla.TinyVLA": token_policy,
        "torchrl.objectives.ClipPPOLoss": TokenLoss,
    },
}
RESULTS = {"passed": [], "failed": [], "skipped": []}


def pytest_configure(config):
    """Replace before a test module is imported; TorchRL's own modules keep what they imported."""
    for path, replacement in REPLACEMENTS[os.environ.get("ADAPTER", "none")].items():
        module, _, name = path.rpartition(".")
        setattr(importlib.import_module(module), name, replacement)


def pytest_runtest_logreport(report):
    if report.outcome == "failed" or report.when == "call" or report.skipped:
        RESULTS[report.outcome].append(report.nodeid)


@pytest.hookimpl
def pytest_sessionfinish(session):
    if "ADAPTER_REPORT" in os.environ:
        Path(os.environ["ADAPTER_REPORT"]).write_text(json.dumps(RESULTS))
