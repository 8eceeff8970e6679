# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Is a malformed input ever accepted without a word, refused without its name, a hang or a crash?

    python benchmarks/fuzz.py [--quick] [--cases 1000] [--seed 0] [--kind settings,rewards]
    python benchmarks/fuzz.py --case settings:17 [--seed 0]

A case is a valid input with one thing made wrong that the documentation rules out. It is *refused*
by an exception of a documented class that names the wrong thing and says what it must be and what
it got; else it is *unclear*, *silent* (accepted), a *hang* (over the case's limit) or a *crash*
(the process died). *Accepted* is what looks wrong and the documentation allows (``ALLOWED``).
Every eleventh case is valid and must be accepted. Cases run in a process of their own.

settings
    one setting of a recipe, or of a class of the package, of another type or range, with another
    name, missing, or contradicting others; nothing is started.
checkpoints
    a checkpoint of a toy run with changed, missing or foreign files, and, with digests made anew,
    with foreign entries, or pickles that would run code.
batches
    entries of another type or shape, missing or out of range, for both losses.
specs, rewards, observations, instructions
    an environment that declares or returns something else, in a worker's code in this process.
runs
    such environments in a collector with its processes: the learner has to hear of it in time.

The last line of stdout is one JSON object.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import inspect
import json
import logging
import math
import multiprocessing
import pickle
import random
import re
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import cloudpickle
import torch
from _machine import arguments, log, report
from tensordict import NonTensorData, NonTensorStack, TensorDict
from torchrl.checkpoint import GlobalRNGState
from torchrl.data import Binary, Bounded, Composite, NonTensor, Unbounded

import torchrl_dvla
from torchrl_dvla import (
    AsyncWeightUpdater,
    DVLACollector,
    GroupConfig,
    GRPOLoss,
    InferenceConfig,
    PooledReplayBuffer,
    WorkerConfig,
)
from torchrl_dvla.data import InitStateSchedule, decision_layout
from torchrl_dvla.envs import ToyChunkEnv
from torchrl_dvla.memory import DualPool, EnvironmentPool
from torchrl_dvla.modules import TinyBackboneConfig, tiny_token_policy
from torchrl_dvla.objectives import ActionTokenBCLoss
from torchrl_dvla.recording import RunCheckpoints
from torchrl_dvla.swimlane.env_worker import EnvWorker, describe_env
from torchrl_dvla.swimlane.messages import Reset, Step
from torchrl_dvla.testing import CountingChunkEnv

#: Malformed cases of 1,000, and the seconds that one may take.
KINDS = {
    "settings": (340, 30),
    "checkpoints": (200, 60),
    "batches": (200, 30),
    "specs": (50, 30),
    "rewards": (70, 30),
    "observations": (70, 30),
    "instructions": (60, 30),
    "runs": (10, 180),
}
BAD = ("silent", "unclear", "hang", "crash", "valid_refused")
DOCUMENTED = (ValueError, TypeError, KeyError, RuntimeError, FileNotFoundError)
#: What looks wrong and is allowed, with the text that says so.
ALLOWED = {
    "nothing executed": "GRPOLoss.normaliser: zero, which forward takes for one",
    "log-ratio beyond the bound": "GRPOLoss: log-ratios are clamped",
    "garbage in the padding": "GRPOLoss: action_is_pad masks what was never executed",
    "action out of bounds": "EnvWorker: actions beyond the bounds are clipped",
}
NAN, INF, GONE = math.nan, math.inf, "<removed>"
RECIPES = Path(torchrl_dvla.__file__).parents[1] / "sota-implementations"


class Case(NamedTuple):
    """An input and what takes it; a refusal must hold one of ``names``."""

    text: str
    names: tuple[str, ...]
    call: Callable[[], Any]


class PayloadRan(BaseException):
    """Code of a file that was loaded has run."""


# -- settings --------------------------------------------------------------------------------------
NAMES = {
    "count": "groups_per_update max_no_signal_groups group_size num_workers envs_per_worker keep "
    "max_decisions max_failures max_rollout_failures max_task_failures num_threads minibatch_size "
    "num_epochs num_updates every_updates rows_per_page action_dim chunk_size image_size num_steps "
    "success_steps camera_height camera_width max_episode_steps patch_size vision_size text_layers "
    "vision_layers text_size head_size num_per_task label_interval num_processes push_steps "
    "tokens_per_step decay_steps batch_size validate_every num_validation_demonstrations num_bins "
    "num_staging max_size num_slots max_readers vocab_size scale_factor",
    "count?": "max_batch_size micro_batch_size replan_interval candidate_group_size",
    "index": "max_policy_lag settle_steps warmup_steps subset_episodes num_videos state_dim "
    "num_warmup_steps max_shift num_episodes",
    "seed": "seed first_seed",
    "positive": "step_timeout_s reset_timeout_s start_timeout_s stop_timeout_s timeout_s lr "
    "max_grad_norm temperature success_tol mlp_ratio video_fps",
    "positive?": "max_minutes",
    "weight": "weight_decay every_minutes line_every_s max_wait_s push jitter state_noise",
    "weight?": "kl_to_ref_coeff",
    "share": "final_lr_share",
    "real": "entropy_coeff",
    "switch": "normalise_std shadows msaa shuffle check_finite",
    "switch?": "freeze_vision freeze_language deterministic",
    "choice": "on_no_signal ratio_level reduction kl_estimator importance kind backend task_suite "
    "start_method",
    "choice?": "dtype",
    "text": "name device dir folder",
    "text?": "resume checkpoint inference_device",
    "pair": "clip_epsilon betas",
    "pair?": "return_bounds state_std",
    "bytes?": "env_bytes model_bytes max_rss_bytes",
    "list": "task_ids cameras",
    "steps": "snapshot_steps",
    "ratio?": "dual_clip behavior_weight_cap",
    "mapping?": "env_kwargs",
}
KIND_OF = {name: kind for kind, names in NAMES.items() for name in names.split()}
NO_NUMBER = (NAN, INF, True, "abc", [], {"a": 1})
WRONG: dict[str, tuple[Any, ...]] = {
    "count": (0, -1, 1.5, 2**70, *NO_NUMBER),
    "index": (-1, 1.5, 2**70, *NO_NUMBER),
    "seed": (1.5, 2**70, *NO_NUMBER),
    "positive": (0, -1.5, 10**400, *NO_NUMBER),
    "weight": (-0.5, -1, 10**400, *NO_NUMBER),
    "share": (-0.1, 1.1, *NO_NUMBER),
    "real": NO_NUMBER,
    "ratio": (0.5, -3, *NO_NUMBER),
    "switch": (1.5, 2, "maybe", NAN, [], {"a": 1}),
    "choice": ("none of these", 3, True, NAN, [], {"a": 1}),
    "text": ("", True, NAN, [], {"a": 1}, "a\0b"),
    "pair": ([0.1], [NAN, 0.5], [0.1, 0.2, 0.3], "ab", True, INF, {"a": 1}, ["a", "b"]),
    "bytes": (-1, 1.5, True, NAN, "many", "infGB", "-1GB", [], {"a": 1}),
    "list": ([], 3, "abc", [0, 0], [NAN], {"a": 1}, True),
    "steps": ([0], [1.5], ["x"], 3, "abc", {"a": 1}),
    "mapping": (3, "abc", [1], True),
    "section": (3, "abc", [1], True, NAN),
}
RIGHT = {"weight": (0, 0.5, 2), "share": (0, 0.5, 1), "real": (-0.5, 0, 1), "switch": (True, False)}
RIGHT |= {"positive": (0.5, 3, 1e3), "bytes": (None, "4GB", 10**9), "seed": (0, 7, 2**31 - 1)}
CONTRADICTIONS = [
    ("toy", "optim.micro_batch_size", 65),
    ("toy", "policy.action_dim", 3),
    ("toy", "policy.state_dim", 3),
    ("libero", "policy.checkpoint", None),
    ("toy", "eval.num_episodes", 8),
    ("toy", "inference.deterministic", True),
    ("toy", "group.candidate_group_size", 7),
    ("toy", "group.return_bounds", [0.9, 0.1]),
    ("toy", "loss.dual_clip", 1.1),
    ("toy", "loss.clip_epsilon", [-0.5, 0.1]),
    ("toy", "loss.reduction", "none"),
    ("toy", "name", "../../escaped"),
    ("toy", "env.backend", "libero"),
    ("libero", "env.max_episode_steps", 512),
    ("libero", "env.replan_interval", 9),
    ("libero", "policy.kind", "tiny_vla"),
    ("libero_object", "demonstrations.label_interval", 9),
    ("libero_object", "training.decay_steps", 599),
    ("libero_object", "policy.tokens_per_step", 2),
    ("libero_object", "training.num_validation_demonstrations", 96),
]
REQUIRED = "seed env policy.kind optim.lr optim.minibatch_size train.num_updates eval.num_episodes"
REQUIRED += " name device demonstrations.folder training.lr training.num_steps policy.num_bins"
CLASSES = (
    *(GroupConfig, WorkerConfig, InferenceConfig, PooledReplayBuffer, DualPool, GRPOLoss),
    *(AsyncWeightUpdater, InitStateSchedule, ToyChunkEnv, TinyBackboneConfig),
)


def edit(node: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy of nested containers with another ``value`` at ``path``, or nothing there."""
    head, *rest = path
    if not rest and value is GONE:
        return {key: item for key, item in node.items() if key != head}
    if isinstance(node, dict):
        old = node.get(head, {}) if rest else None
        return {**node, head: edit(old, tuple(rest), value) if rest else value}
    new = edit(node[head], tuple(rest), value) if rest else value
    return type(node)([*node[:head], new, *node[head + 1 :]])


def leaves(node: dict[str, Any], before: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Paths of sections and settings."""
    for name, value in node.items():
        yield (*before, name)
        if isinstance(value, dict) and name != "env_kwargs":
            yield from leaves(value, (*before, name))


@functools.cache
def recipe(config: str) -> tuple[Callable[[Any], Any], dict[str, Any]]:
    """What checks the settings of a recipe, and those of one of its files."""
    from omegaconf import OmegaConf

    (file,) = RECIPES.glob(f"*/config/{config}.yaml")
    spec = importlib.util.spec_from_file_location(config, file.parents[1] / "settings.py")
    assert spec is not None and spec.loader is not None
    sys.modules[config] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    cfg: Any = OmegaConf.load(file)
    data = {key: cfg[key] for key in cfg if key not in ("hydra", "defaults")}
    plain: Any = OmegaConf.to_container(OmegaConf.create(data))
    if config.endswith("openvla_oft"):
        plain["policy"]["checkpoint"] = "x"
    return module.settings_from, plain


def settings(rng: random.Random, is_wrong: bool) -> Case:
    config = rng.choice(["toy", "libero", "libero_openvla_oft", "libero_object"])
    way = rng.choice(["value"] * 6 + ["class"] * 4 + ["name", "gone", "fit"]) if is_wrong else ""
    if way == "class":
        cls = rng.choice(CLASSES)
        known = [name for name in inspect.signature(cls.__init__).parameters if name in KIND_OF]
        name = rng.choice(known)
        value = rng.choice(WRONG[KIND_OF[name].strip("?")])
        first = (token_policy(),) if cls is GRPOLoss else ()
        text = f"{cls.__name__}({name}={value!r:.40})"
        return Case(text, (name,), lambda: cls(*first, **{name: value}))
    if way == "fit":
        config, dotted, value = rng.choice(CONTRADICTIONS)
        path = tuple(dotted.split("."))
    check, plain = recipe(config)
    if way == "gone":
        known = [path for path in leaves(plain) if ".".join(path) in REQUIRED.split()]
        path, value = rng.choice(known), GONE
    elif way == "name":
        *section, name = rng.choice([p for p in leaves(plain) if p[-1] != "initialization_noise"])
        at = rng.randrange(len(name))
        value, path = 1, (*section, name[:at] + "x" + name[at:])
    elif way != "fit":
        known = []
        for path in leaves(plain):
            kind = KIND_OF.get(path[-1], "section").strip("?")
            if not is_wrong and not (kind in RIGHT and path[-1] != "state_dim"):
                continue
            known.append((path, kind))
        path, kind = rng.choice(known)
        value = rng.choice((WRONG if is_wrong else RIGHT)[kind])
    data = edit(plain, path, value)
    text = f"{config}: {'.'.join(path)}={value!r:.40}"
    return Case(text, (path[-1],), lambda: check(data))


# -- batches ---------------------------------------------------------------------------------------
TOKENS, LOG_PROBS = ("vla_action", "tokens"), ("vla_action", "log_probs")


@functools.cache
def token_policy() -> Any:
    """A policy of 2 action dimensions, 4 env steps and 8 tokens."""
    torch.manual_seed(0)
    policy = tiny_token_policy(2, 4, vocab_size=8, hidden_dim=16)
    policy(CountingChunkEnv().reset().unsqueeze(0))
    return policy


def batch_of(loss: GRPOLoss, num_rows: int = 6) -> TensorDict:
    """Decisions with every entry that the losses can read."""
    env = CountingChunkEnv()
    observed = torch.stack([env.reset() for _ in range(num_rows)])
    with torch.no_grad():
        batch = token_policy()(observed)
    batch["advantage"] = torch.randn(num_rows, 1)
    batch["action_is_pad"] = torch.arange(4).expand(num_rows, 4) >= 3
    batch["policy_version"] = torch.zeros(num_rows, 1, dtype=torch.int64)
    batch = loss.write_proximal_log_prob(batch)
    batch["ref_log_prob"] = batch["proximal_log_prob"].clone()
    batch["weight"] = torch.ones(num_rows, 1)
    return batch


def batches(rng: random.Random, is_wrong: bool) -> Case:
    is_grpo = rng.random() < 0.8
    policy = token_policy()
    torch.manual_seed(rng.randrange(2**31))
    loss = GRPOLoss(policy, importance="decoupled", kl_to_ref_coeff=0.1)
    loss.set_keys(weight="weight")
    batch = batch_of(loss)
    keys: dict[Any, Any] = {TOKENS: ("action", "token"), "action_is_pad": ("action_is_pad",)}
    keys |= {("observation", "state"): ("state",), ("observation", "image"): ("image",)}
    if is_grpo:
        names = ("advantage", "weight", "proximal_log_prob", "ref_log_prob", "policy_version")
        keys |= {name: (name,) for name in names} | {LOG_PROBS: ("sample_log_prob",)}
    key = rng.choice(list(keys))
    value, text = batch[key], ""
    if not is_wrong:
        text = rng.choice(["as it is", *ALLOWED][: 4 if is_grpo else 1])
        if text == "nothing executed":
            batch["action_is_pad"] = torch.ones_like(batch["action_is_pad"])
        elif text == "log-ratio beyond the bound":
            batch[LOG_PROBS] = torch.full_like(batch[LOG_PROBS], -1e4)
        elif text == "garbage in the padding":
            batch[LOG_PROBS][:, 3], batch[TOKENS][:, 3] = NAN, -100
    else:
        is_observation = key[0] == "observation"
        ways = ["complex", "one row less", "one size more", "no dimension"]
        ways += ["missing"] * (key not in ("action_is_pad", "policy_version"))
        if value.is_floating_point():
            ways += ["nan", "inf"] + ["int64", "bool", "huge"] * (not is_observation)
        elif not is_observation:
            ways += ["float"] + ["8", "-1", str(2**40), "bool"] * (key == TOKENS)
        way, row = rng.choice(ways), rng.randrange(len(value))
        text = f"{'GRPOLoss' if is_grpo else 'ActionTokenBCLoss'} {key}: {way}"
        if way == "missing":
            del batch[key]
        elif way in ("one row less", "no dimension"):
            batch.batch_size = []  # checks no size
            for name in ("observation", "vla_action"):
                batch[name].batch_size = []
            batch[key] = value[1:] if way == "one row less" else value[:, 0]
        elif way == "one size more":
            batch[key] = torch.cat([value, value[..., :1]], -1)
        elif way in ("complex", "float", "int64", "bool"):
            kinds = {"complex": torch.complex64, "float": torch.float32}
            batch[key] = value.to(kinds.get(way) or getattr(torch, way))
        else:
            number = {"huge": 1e30}.get(way) or float(way)
            number = number if value.is_floating_point() else int(number)
            batch[key] = value.index_fill(0, torch.tensor([row]), number)

    def call() -> None:
        if is_grpo:
            out = loss(batch)
            total = sum(value for name, value in out.items() if name.startswith("loss_"))
        else:
            total = ActionTokenBCLoss(policy)(batch)["loss_bc"]
        total.backward()
        grads = [p.grad for p in loss.parameters() if p.grad is not None]
        policy.zero_grad()
        if not all(bool(grad.isfinite().all()) for grad in (total, *grads)):
            raise ArithmeticError("the loss or a gradient is not finite")

    shown = (*keys[key], str(key), *["observation"] * (key[0] == "observation"))
    return Case(text, shown, call)


# -- environments ----------------------------------------------------------------------------------
class OddEnv(CountingChunkEnv):
    """Returns something else than it declares, at its resets or its steps."""

    def __init__(self, key: Any = None, value: Any = None, at: str = "step", spec: Any = None):
        super().__init__(chunk_size=4, max_env_steps=12)
        self.odd, self.at = (key, value), at
        if spec is not None:
            self.set_spec_lock_(False)
            spec(self)

    def _change(self, out: TensorDict, at: str) -> TensorDict:
        key, value = self.odd
        if key is None or at != self.at:
            return out
        if isinstance(value, str) and value == GONE:
            del out[key]
            return out
        return out.set(key, value)

    def _reset(self, tensordict: Any = None, **kwargs: Any) -> Any:
        return self._change(super()._reset(tensordict, **kwargs), "reset")

    def _step(self, tensordict: Any) -> Any:
        return self._change(super()._step(tensordict), "step")


def of(value: Any, shape: tuple[int, ...] = (1,), dtype: Any = None) -> torch.Tensor:
    return torch.full(shape, value, dtype=dtype)


ODD_SIZES = ((0,), (2,), (3, 2))
ODD: dict[str, list[tuple[Any, Any]]] = {
    "rewards": [
        *(("reward", of(value)) for value in (NAN, INF, -INF, 1j)),
        *(("reward", of(value, dtype=torch.float64)) for value in (1e39, -1e300, NAN)),
        *(("reward", of(1.0, shape)) for shape in ODD_SIZES),
        *(("reward", value) for value in (GONE, NonTensorData("one"), NonTensorData(None))),
        *(("success", of(value)) for value in (NAN, 0.5, 2.0, 1j)),
        *(("success", of(True, shape)) for shape in ODD_SIZES),
        *(("success", NonTensorData(value)) for value in ("yes", None)),
        *(("done", of(value)) for value in (NAN, 0.5)),
        *(("terminated", of(value)) for value in (NAN, 0.5)),
        *(("done", of(False, shape)) for shape in ODD_SIZES),
        *(("terminated", of(True, shape)) for shape in ODD_SIZES),
        *(("action_is_pad", of(False, shape)) for shape in ((3,), (9,), (0,), (4, 4))),
        *(("action_is_pad", of(value, (4,))) for value in (NAN, 0.5, 7)),
        *(("action_is_pad", NonTensorData(value)) for value in ("none", None)),
    ],
    "observations": [
        *((("observation", "state"), of(value, (4,))) for value in (NAN, INF, -INF, 1j)),
        *((("observation", "state"), of(1e39, (4,), torch.float64)),),
        *((("observation", "state"), of(0.0, shape)) for shape in ((9,), (), (0,), (3,), (1, 4))),
        *((("observation", "state"), of(1, (4,), dtype)) for dtype in (torch.int64, torch.bool)),
        *((("observation", "image"), of(0, shape, torch.uint8)) for shape in ((16, 16, 3), (3, 8))),
        *((("observation", "image"), of(value, (3, 16, 16))) for value in (NAN, 0.5, 300.0, -1)),
        *((("observation", "image"), of(300, (3, 16, 16))),),
        *((("observation", name), GONE) for name in ("state", "image")),
        *((("observation", "state"), NonTensorData(value)) for value in ("text", None, [0.0] * 4)),
        *(("observation", value) for value in (GONE, of(0.0, (4,)), NonTensorData("text"))),
    ],
    "instructions": [
        *(
            ("language_instruction", NonTensorData(value))
            for value in (["a"], b"bytes", None, 7, NAN, {"a": 1}, ("a", "b"), True, object(), [])
        ),
        *(("language_instruction", of(value, shape)) for value in (0.5, 7) for shape in ODD_SIZES),
        *(("language_instruction", value) for value in (GONE, NonTensorStack("a", "b"))),
        *(("language_instruction", NonTensorStack(NonTensorData(value))) for value in (b"", 3)),
    ],
}


def observe(key: Any, spec: Any) -> Callable[[Any], None]:
    return lambda env: env.observation_spec.__setitem__(key, spec)


def declare(name: str, spec: Any) -> Callable[[Any], None]:
    return lambda env: setattr(env, name, spec)


def act(spec: Any) -> Callable[[Any], None]:
    return declare("full_action_spec", Composite(vla_action=Composite(chunk=spec)))


STATE = ("observation", "state")
#: What an error must name, and what is declared.
SPECS: list[tuple[str, Callable[[Any], None]]] = [
    ("state", observe(STATE, Unbounded(4, dtype=torch.bfloat16))),
    *(("state", observe(STATE, Unbounded(shape))) for shape in ((0, 3), (-1, 3), (0,))),
    *(("state", observe(STATE, Binary(4, dtype=d))) for d in (torch.complex64, torch.quint8)),
    ("note", observe(("observation", "note"), NonTensor(shape=()))),
    ("observation", declare("observation_spec", Composite(observation=Unbounded(4)))),
    ("observation", declare("observation_spec", Composite(pixels=Unbounded(4)))),
    ("observation", observe("observation", Composite())),
    *(("vla_action", act(Unbounded(shape))) for shape in ((), (4, 0), (2, 4, 2))),
    *(("vla_action", act(Binary(shape=(4, 2), dtype=d))) for d in (torch.int64, torch.complex64)),
    *(("action", act(Bounded(1.0, high, (4, 2)))) for high in (NAN, -1.0)),
    ("vla_action", declare("full_action_spec", Composite(action=Unbounded((4, 2))))),
    ("reward", declare("full_reward_spec", Composite(pay=Unbounded(1)))),
    ("reward", declare("full_reward_spec", Composite(agents=Composite(reward=Unbounded(1))))),
    ("done", declare("full_done_spec", Composite(done=Binary(3)))),
    ("ask", observe("action_mask", Binary(8, dtype=torch.bool))),
]


def play(env: Any, chunk: float = 0.5) -> None:
    """A rollout of ``env`` in the worker's code."""
    specs = describe_env(env)
    observation = {key: (shape, dtype) for key, shape, dtype in specs.observation}
    layout = decision_layout(observation, chunk_size=specs.chunk_size, action_dim=specs.action_dim)
    with EnvironmentPool(layout, num_pages=1, rows_per_page=4) as pool:
        pool.lease("w")
        pool.rows["vla_action", "chunk"].fill_(chunk)
        worker = EnvWorker({"task": lambda: env}, num_envs=1)
        worker.use_pool(pool.worker_view())
        worker.reset(Reset(0, "task", 3, 1, 0, 0))
        for row in range(3):
            if worker.step(Step(0, row, 0, row + 1, 0)).done:
                break


def specs(rng: random.Random, is_wrong: bool) -> Case:
    if not is_wrong:
        chunk = rng.choice([0.5, INF, -INF, 1e30])
        text = "as it is" if chunk == 0.5 else "action out of bounds"
        return Case(text, (), lambda: play(OddEnv(), chunk))
    number = rng.randrange(len(SPECS))
    name, change = SPECS[number]
    return Case(f"spec {number}", (name,), lambda: play(OddEnv(spec=change)))


def returned(kind: str, rng: random.Random, is_wrong: bool) -> Case:
    """What an environment returns against its own spec."""
    key, value = rng.choice(ODD[kind])
    at = "step" if kind == "rewards" else rng.choice(["reset", "step"])
    if not is_wrong:
        key, value = {
            "rewards": ("reward", of(rng.choice([-1e30, -1.0, 0.5, 3e38]))),
            "observations": (STATE, of(rng.choice([-3e38, 0.0, 1e-45]), (4,))),
            "instructions": ("language_instruction", NonTensorData(rng.choice(["", "á\n" * 9999]))),
        }[kind]
    name = key if isinstance(key, str) else key[-1]
    shown = f"{value.dtype} {list(value.shape)}" if torch.is_tensor(value) else repr(value)
    return Case(f"{key} at {at}: {shown:.60}", (name,), lambda: play(OddEnv(key, value, at)))


def runs(rng: random.Random, is_wrong: bool) -> Case:
    kind = rng.choice(list(ODD))
    key, value = rng.choice(ODD[kind])
    at = "step" if kind == "rewards" else rng.choice(["reset", "step"])
    make = functools.partial(OddEnv, key, value, at) if is_wrong else OddEnv
    names = (key if isinstance(key, str) else key[-1],)

    def call() -> None:
        cloudpickle.register_pickle_by_value(sys.modules[__name__])
        collector = DVLACollector(make, token_policy(), **toy_settings(1))
        try:
            collector.start()
            next(iter(collector.replay_buffer))
        except Exception as error:  # the user sees the whole chain; what it says, not its source
            lines = "".join(traceback.format_exception(error)).splitlines()
            said = [line for line in lines if any(n in line for n in names) and line[:1] != " "]
            raise RuntimeError("\n".join(said)) from None
        finally:
            collector.shutdown()

    return Case(f"{key} at {at}: {value!r:.60}" if is_wrong else "as it is", names, call)


def toy_settings(num_tries: int) -> dict[str, Any]:
    workers = WorkerConfig(
        num_workers=1,
        max_decisions=4,
        max_failures=num_tries,
        max_rollout_failures=num_tries,
        max_task_failures=num_tries,
    )
    group = GroupConfig(group_size=2, groups_per_update=1, on_no_signal="keep")
    buffer = PooledReplayBuffer(batch_size=4, timeout_s=60.0)
    return {"replay_buffer": buffer, "group": group, "workers": workers}


# -- checkpoints -----------------------------------------------------------------------------------
class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


class SavedRun:
    """A checkpoint of a toy run, and what loads one into objects of the same settings."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.renew()
        parts = self.loader._checkpoint.components
        self.collector.start()
        loss = GRPOLoss(token_policy())
        for _ in range(2):
            for batch in self.collector.replay_buffer:
                loss(batch)["loss_objective"].backward()
                parts["optimizer"].step()
            parts["scheduler"].step()
            self.collector.update_policy_weights_()
        time.sleep(1.0)  # another group
        with self.collector.pause():
            self.path = self.loader.save(5)
        self.renew()

    def renew(self) -> None:
        """Another collector, for one loads no second time."""
        with contextlib.suppress(AttributeError):
            self.collector.shutdown()
        policy = token_policy()
        optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
        self.collector = DVLACollector(CountingChunkEnv, policy, **toy_settings(3))
        parts = {"policy": policy, "optimizer": optimizer, "rng": GlobalRNGState()}
        parts["scheduler"] = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        self.loader = RunCheckpoints(self.folder, **parts, collector=self.collector)

    def load(self, path: Path) -> None:
        self.loader._verified = None
        self.loader.load(path)
        self.renew()


saved_run = functools.cache(SavedRun)


def descend(rng: random.Random, node: Any) -> tuple[tuple[Any, ...], Any]:
    """Path and value of an entry of a saved state."""
    path: list[Any] = []
    while isinstance(node, dict | list | tuple) and node and (not path or rng.random() < 0.9):
        path.append(rng.choice(list(node) if isinstance(node, dict) else range(len(node))))
        node = node[path[-1]]
    return tuple(path), node


def foreign_values(path: tuple[Any, ...], value: Any) -> list[Any]:
    """Values that an entry like ``value`` must not have."""
    if isinstance(value, torch.Tensor):
        values = ["text", None, value.unsqueeze(0), value.to(torch.complex64)]
        return values + [value * NAN] * value.is_floating_point()
    if isinstance(value, bool):
        return ["text", 7]
    if isinstance(value, int | float):
        is_count = isinstance(value, int) and value >= 0 and path[-1] != "seed"
        return ["text", NAN, [1], True, *[-7] * is_count]
    if isinstance(value, str) and value:
        return [3, NAN, [value], None]
    if isinstance(value, dict) and value:
        return [[1], "text", None, 3]
    return ["text", 3, {"a": 1}] if isinstance(value, list | tuple) and value else []


def checkpoints(rng: random.Random, is_wrong: bool, folder: str = "") -> Case:
    run = saved_run(folder)
    whole = run.path
    path = Path(folder) / "copy" / whole.name
    shutil.rmtree(path.parent, ignore_errors=True)
    shutil.copytree(whole, path)
    manifest = path / "manifest.json"
    files = sorted(file for file in path.rglob("*") if file.is_file())
    way = rng.choice(["entry"] * 6 + ["metadata", "bytes", "pickle", "file"]) if is_wrong else ""
    file = rng.choice([f for f in files if way == "file" or f != manifest])
    component, text, names = file.parent.name.split("-", 1)[-1], "as it is", (file.name,)
    marker = path / "ran"
    content = file.read_bytes()
    if way == "file":
        damage = rng.choice(["truncated", "flipped", "gone", "empty", "more"])
        at = rng.randrange(len(content))
        parts = content[:at], bytes([content[at] ^ 0x80]), content[at + 1 :]
        new = {"truncated": parts[0], "flipped": b"".join(parts), "empty": b""}
        new["more"] = content + b"\0"
        file.unlink() if damage == "gone" else file.write_bytes(new[damage])
        text = f"{file.name} of {component} {damage} at {at}"
        names = (file.name, "manifest")
    elif way:
        record = json.loads(manifest.read_text())
        names = (component,)
        if way == "metadata":
            name = rng.choice(list(record["components"]))
            keys: list[Any] = [("metadata", key) for key in record["metadata"]]
            keys += [("components",), ("components", name), ("format_version",)]
            keys += [("components", name, key) for key in ("adapter", "path")]
            key = rng.choice(keys)
            new = rng.choice([GONE, -7, None, NAN, -3, [1], "../../escaped"])
            while new == "../../escaped" and key == ("metadata", "torchrl_dvla"):
                new = -7
            names = (key[-1], name) if key[0] == "components" else (key[-1], "format")
            record, key = edit(record, key, new), ".".join(key)
            text = f"{key} = {new!r}"
        elif way == "bytes":
            size = rng.randrange(len(content))
            file.write_bytes(rng.choice([content[:size], b"", rng.randbytes(99), b"PK\3\4"]))
            text = f"other bytes in {component}"
        elif way == "pickle":
            payload = {"state": Payload(marker)}
            if rng.random() < 0.5:
                torch.save(payload, file)
            else:
                file.write_bytes(pickle.dumps(payload))
            text = f"a payload in {component}"
        else:
            state = torch.load(file, weights_only=False)
            options: list[Any] = []
            while not options:
                entry, value = descend(rng, state)
                options = foreign_values(entry, value)
                options += [GONE] * isinstance(entry[-1], str)
            new = rng.choice(options)
            torch.save(edit(state, entry, new), file)
            dotted = ".".join(map(str, entry))
            text = f"{component}: {dotted} = {new!r:.60}".replace("\n", " ")
            strings = [str(key) for key in entry if isinstance(key, str)]
            names = (strings[-1],) if strings else (component,)
            names += ("generator",) * (component == "rng")
        digests = record.get("metadata", {}).get("sha256")
        if isinstance(digests, dict):
            digests[file.relative_to(path).as_posix()] = hashlib.sha256(
                file.read_bytes()
            ).hexdigest()
        manifest.write_text(json.dumps(record))

    def call() -> None:
        try:
            run.load(path)
        finally:
            if marker.exists():
                raise PayloadRan(text)

    return Case(text, names, call)


# -- running cases ---------------------------------------------------------------------------------
def build(kind: str, number: int, seed: int, folder: str) -> tuple[Case, bool]:
    """A case, and whether it must be refused."""
    rng, is_wrong = random.Random(f"{seed}/{kind}/{number}"), number % 11 != 10
    if kind == "checkpoints":
        return checkpoints(rng, is_wrong, folder), is_wrong
    if kind in ODD:
        return returned(kind, rng, is_wrong), is_wrong
    makers = {"settings": settings, "batches": batches, "specs": specs, "runs": runs}
    return makers[kind](rng, is_wrong), is_wrong


def judge(case: Case, is_wrong: bool) -> tuple[str, str]:
    """The outcome of a case, and what was said."""
    try:
        case.call()
    except PayloadRan as error:
        return "silent", repr(error)
    except Exception as error:
        text = str(error)
        if not is_wrong:
            return "valid_refused", repr(error)
        says = re.search(r"(?s)\bmust\b.*\bgot\b|' is (missing|unknown)", text) is not None
        is_named = any(name in text for name in case.names)
        says |= isinstance(error, FileNotFoundError)  # by the file's name
        is_clear = isinstance(error, DOCUMENTED) and says and is_named
        return "refused" if is_clear else "unclear", repr(error)
    if is_wrong:
        return "silent", ""
    return ("accepted" if case.text in ALLOWED else "valid"), ""


def serve(connection: Any, kind: str, numbers: list[int], seed: int, folder: str) -> None:
    """Play cases; each is announced before, so that its death is known."""
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    for number in numbers:
        with contextlib.suppress(BrokenPipeError):
            connection.send((number, "built", ""))
        case, is_wrong = build(kind, number, seed, folder)
        connection.send((number, "begun", case.text))
        connection.send((number, *judge(case, is_wrong)))
    connection.close()


def play_kind(
    kind: str, numbers: list[int], seed: int, folder: str
) -> Iterator[tuple[int, str, str, str]]:
    """Number, text, outcome and error of each case, in processes that may hang or die."""
    context = multiprocessing.get_context("spawn")
    while numbers:
        ours, theirs = context.Pipe()
        child = context.Process(target=serve, args=(theirs, kind, numbers, seed, folder))
        child.start()
        theirs.close()
        number, text, outcome = numbers[0], "", ""
        try:
            while numbers:
                limit_s = KINDS[kind][1] if outcome == "begun" else 240  # imports, a toy run
                if not ours.poll(limit_s):
                    outcome = "hang"
                    break
                number, outcome, said = ours.recv()
                if outcome == "begun":
                    text = said
                elif outcome != "built":
                    numbers = numbers[numbers.index(number) + 1 :]
                    yield number, text, outcome, said
        except EOFError:
            child.join(10.0)
            outcome = "crash"
        if outcome in ("hang", "crash"):
            numbers = numbers[numbers.index(number) + 1 :]
            yield number, text, outcome, f"exit code {child.exitcode}"
            child.kill()
        child.join()


def main() -> None:
    options = {"cases": 1000, "seed": 0, "kind": ",".join(KINDS), "case": ""}
    args = arguments(__doc__, "60 cases", **options)
    kinds = args.kind.split(",")
    shares = {kind: KINDS[kind][0] * (60 if args.quick else args.cases) / 1000 for kind in kinds}
    wanted = {kind: list(range(round(share * 1.1))) for kind, share in shares.items()}
    if args.case:
        kind, _, number = args.case.partition(":")
        wanted = {kind: [int(number)]}
    table, bad = {}, []
    for kind, numbers in wanted.items():
        counts: Counter[str] = Counter()
        with tempfile.TemporaryDirectory() as folder:
            for number, text, outcome, said in play_kind(kind, numbers, args.seed, folder):
                counts[outcome] += 1
                if outcome in BAD or args.case:
                    bad.append(f"{outcome} --case {kind}:{number} --seed {args.seed}  {text}")
                    log(f"{bad[-1]}  {said if args.case else said[:300]}")
        table[kind] = dict(counts)
        log(f"{kind}: {table[kind]}")
    totals = {outcome: sum(counts.get(outcome, 0) for counts in table.values()) for outcome in BAD}
    plural = {"hang": "hangs", "crash": "crashes"}
    result = {f"num_{plural.get(outcome, outcome)}": totals[outcome] for outcome in BAD}
    report("fuzz", {**result, "outcomes": table, "seed": args.seed, "bad": bad}, args.quick)


if __name__ == "__main__":
    main()
