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
``KINDS`` has the kinds; the last line of stdout is one JSON object.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import inspect
import json
import logging
import math
import multiprocessing
import os
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
import yaml
from _machine import arguments, log, report
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from tensordict import NonTensorData, NonTensorStack
from torchrl.checkpoint import GlobalRNGState
from torchrl.data import Binary, Bounded, Composite, NonTensor, Unbounded

import torchrl_dvla as dvla
from torchrl_dvla import recipes
from torchrl_dvla.data import InitStateSchedule, decision_layout
from torchrl_dvla.envs import ToyChunkEnv
from torchrl_dvla.memory import EnvironmentPool
from torchrl_dvla.modules import TinyBackboneConfig, tiny_token_policy
from torchrl_dvla.objectives import ActionTokenBCLoss
from torchrl_dvla.recording import RunCheckpoints
from torchrl_dvla.swimlane.env_worker import EnvWorker, describe_env
from torchrl_dvla.swimlane.messages import (
    Refused,
    RefusedError,
    Reset,
    ResetDone,
    Step,
    StepDone,
)
from torchrl_dvla.testing import CountingChunkEnv
from torchrl_dvla.weight_update import WeightStore

BAD = ("silent", "unclear", "hangs", "crashes", "valid_refused")
LIMIT_S = {"checkpoints": 60.0, "runs": 180.0}
DOCUMENTED = (ValueError, TypeError, KeyError, RuntimeError, FileNotFoundError)
NAN, INF, GONE = math.nan, math.inf, "<removed>"
TOKENS, LOG_PROBS, PAD = ("vla_action", "tokens"), ("vla_action", "log_probs"), "action_is_pad"
IMAGE, STATE = ("observation", "image"), ("observation", "state")


#: What looks wrong and is allowed, by the docstring named; of a batch, with what to add to it.
ALLOWED: dict[str, dict[Any, Any]] = {
    "GRPOLoss.normaliser: nothing executed": {PAD: torch.ones(4).bool()},
    "GRPOLoss: log-ratio out of bounds": {LOG_PROBS: torch.tensor(-1e4)},
    "GRPOLoss: garbage in the padding": {
        LOG_PROBS: torch.tensor([0, 0, 0, NAN])[:, None],
        TOKENS: torch.tensor([0, 0, 0, -100])[:, None],
    },
    "EnvWorker: action out of bounds": {},
}


class Case(NamedTuple):
    """An input, one of whose ``names`` a refusal must hold, and what takes it."""

    text: str
    names: tuple[Any, ...]
    call: Callable[[], Any]


def walk(node: Any, into: Any = dict, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, Any]]:
    """Path and value of what nested containers hold; of a sequence, the first three entries."""
    for name, value in node.items() if isinstance(node, dict) else enumerate(node[:3]):
        yield (*path, name), value
        if isinstance(value, into) and name != "env_kwargs":
            yield from walk(value, into, (*path, name))


def edit(node: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy of nested containers with another ``value`` at ``path``, or nothing there."""
    head, *rest = path
    if not rest and value is GONE:
        return {key: item for key, item in node.items() if key != head}
    new = edit(node[head], tuple(rest), value) if rest else value
    if isinstance(node, dict):
        return {**node, head: new}
    return type(node)([*node[:head], new, *node[head + 1 :]])


def wrong_values(value: Any) -> list[Any]:
    """What is no value like this one, be it of a tensor, a setting or a saved state."""
    if isinstance(value, torch.Tensor):
        number, half = value.to(torch.complex64), value.to(torch.float32) + 0.5
        wrong = [number, number * NAN, torch.zeros(0).to(value), torch.zeros(3, 7).to(value)]
        is_real = value.is_floating_point()
        return wrong + ([value * NAN, value + INF] if is_real else [half, half * NAN])
    if isinstance(value, bool):
        return [1.5, 2, "maybe", NAN, [], {"a": 1}]
    if isinstance(value, int | float):
        return [NAN, INF, True, "abc", [], {"a": 1}, 10**400]
    return [NAN, True] + ([[value], {"a": 1}] if isinstance(value, str) else [3, "ab"])


def show(path: tuple[Any, ...], value: Any) -> str:
    """What is put where, in one short line."""
    return f"{'.'.join(map(str, path))} = {value!r:.70}".replace("\n", " ")


# -- settings --------------------------------------------------------------------------------------
#: Numbers that may be 0, of any sign, not whole; texts with a few values. Not taken from the types
#: that the package declares: a bound that is missing there is a fault.
ZERO = "max_policy_lag settle_steps warmup_steps subset_episodes num_videos state_dim num_episodes "
ZERO += "num_warmup_steps max_shift weight_decay every_minutes line_every_s max_wait_s push jitter "
ZERO += "state_noise final_lr_share"
SIGNED = "entropy_coeff seed first_seed"
REAL = ("timeout_s", "max_minutes", "every_minutes", "line_every_s", "video_fps")
CHOICE = "on_no_signal ratio_level reduction kl_estimator importance kind backend task_suite dtype "
CHOICE += "start_method"
#: What must be there, and values that do not fit to the others of the file.
GRPO = "seed env policy.kind optim.lr optim.minibatch_size train.num_updates eval.num_episodes name"
UNFIT = {
    "toy": f"{GRPO} optim.micro_batch_size=65 policy.action_dim=3 policy.state_dim=3 device "
    "inference.deterministic=true group.candidate_group_size=7 group.return_bounds=[0.9,0.1] "
    "loss.dual_clip=1.1 loss.clip_epsilon=[-0.5,0.1] loss.reduction=none name=../../escaped "
    "env.backend=libero",
    "libero": f"{GRPO} env.max_episode_steps=512 env.replan_interval=9 policy.kind=tiny_vla "
    "policy.path=null",
    "libero_openvla_oft": GRPO,
    "libero_object": "seed env demonstrations.folder training.lr training.num_steps policy.num_bins"
    " demonstrations.label_interval=9 training.decay_steps=799 policy.tokens_per_step=2 "
    "training.num_validation_demonstrations=320",
}
OF_A_POLICY = [dvla.GRPOLoss, ActionTokenBCLoss, WeightStore]
CLASSES = [dvla.GroupConfig, dvla.WorkerConfig, dvla.InferenceConfig, dvla.PooledReplayBuffer]
CLASSES += [*OF_A_POLICY, InitStateSchedule, ToyChunkEnv, TinyBackboneConfig]


def wrong_settings(name: str, value: Any) -> list[Any]:
    """What a setting like ``value`` must not be."""
    wrong = wrong_values(value)
    if isinstance(value, str):
        wrong += ["none of these" if name in CHOICE else "a\0b"]
    elif isinstance(value, list | tuple):
        wrong += [[NAN], [0, 0, 0.5], {"a": 1}]
    elif isinstance(value, int | float) and not isinstance(value, bool):
        wrong += [-1, -0.5] * (name not in SIGNED) + [0] * (name not in f"{SIGNED} {ZERO}")
        wrong += [1.5, 2**70] * (isinstance(value, int) and not name.endswith(REAL))
    return wrong


@functools.cache
def recipe(config: str) -> tuple[Callable[[Any], Any], dict[str, Any]]:
    """What checks a recipe's settings, and those of one of its files."""
    (file,) = Path(recipes.__file__).parent.glob(f"*/config/{config}.yaml")
    module = importlib.import_module(f"{recipes.__name__}.{file.parents[1].name}.settings")
    overrides = ["policy.path=x"] if "openvla" in config else []
    with initialize_config_dir(str(file.parent), version_base="1.3"):
        plain: Any = OmegaConf.to_container(compose(config, overrides))
    return module.settings_from, plain


def settings(rng: random.Random, is_wrong: bool) -> Case:
    """Of the recipes and of classes of the package; only what checks them."""
    way = rng.choice(["value"] * 6 + ["class"] * 4 + ["name"] + ["unfit"] * 2) if is_wrong else ""
    if way == "class":
        cls = rng.choice(CLASSES)
        parameters, kinds = inspect.signature(cls.__init__).parameters, int | float | str | tuple
        known = [x for x in parameters.values() if isinstance(x.default, kinds)]
        chosen, policy = rng.choice(known), [token_policy()] * (cls in OF_A_POLICY)
        name, value = chosen.name, rng.choice(wrong_settings(chosen.name, chosen.default))
        call = functools.partial(cls, *policy, **{name: value})
        return Case(show((cls.__name__, name), value), (name,), call)
    config = rng.choice([*UNFIT])
    check, plain = recipe(config)
    # Of a valid case, a flag or a float that is another.
    kinds = object if is_wrong else bool | float
    known = [item for item in walk(plain) if item[1] is not None and isinstance(item[1], kinds)]
    path, at = rng.choice(known)
    value = (not at) if isinstance(at, bool) else 0.5
    if way == "value":
        value = rng.choice(wrong_settings(path[-1], at))
    elif way == "name":
        cut = rng.randrange(len(path[-1]))
        path, value = (*path[:-1], f"{path[-1][:cut]}x{path[-1][cut:]}"), 1
    elif way == "unfit":
        dotted, has_value, text = rng.choice(UNFIT[config].split()).partition("=")
        path, value = tuple(dotted.split(".")), yaml.safe_load(text) if has_value else GONE
    data = edit(plain, path, value)
    return Case(show((config, *path), value), path[-1:], lambda: check(data))


# -- batches ---------------------------------------------------------------------------------------
@functools.cache
def token_policy() -> Any:
    """A policy of 2 action dimensions, 4 env steps and 8 tokens."""
    torch.manual_seed(0)
    policy = tiny_token_policy(2, 4, vocab_size=8, hidden_dim=16)
    policy(CountingChunkEnv().reset().unsqueeze(0))
    return policy


def batches(rng: random.Random, is_wrong: bool) -> Case:
    """For both losses."""
    loss: Any = dvla.GRPOLoss(token_policy(), importance="decoupled", kl_to_ref_coeff=0.1)
    loss.set_keys(weight="weight")
    env = CountingChunkEnv()
    with torch.no_grad():
        batch = token_policy()(torch.stack([env.reset() for _ in range(6)]))
    batch["advantage"], batch["weight"] = torch.linspace(-1, 1, 6)[:, None], torch.ones(6, 1)
    batch["policy_version"] = torch.zeros(6, 1, dtype=torch.int64)
    batch[PAD] = torch.arange(4).expand(6, 4) >= 3
    batch = loss.write_proximal_log_prob(batch)
    batch["ref_log_prob"] = batch["proximal_log_prob"].clone()
    keys: list[Any] = [TOKENS, PAD, STATE, IMAGE, LOG_PROBS, "advantage", "weight"]
    keys += ["proximal_log_prob", "ref_log_prob", "policy_version"]
    if not (is_grpo := rng.random() < 0.8):
        loss, keys = ActionTokenBCLoss(token_policy()), keys[:4]
    text = rng.choice(["as it is", *ALLOWED][: 4 if is_grpo and not is_wrong else 1])
    key: Any = rng.choice(keys)
    if is_wrong:
        batch.batch_size = batch["observation"].batch_size = batch["vla_action"].batch_size = []
        value = batch[key]
        # Images may be of any real dtype.
        wrong = [x for x in wrong_values(value) if key != IMAGE or x.shape != value.shape]
        wrong += [value.to(torch.complex64), value[1:]]
        wrong += [GONE] * (key not in (PAD, "policy_version"))
        if key == TOKENS:
            wrong += [torch.full_like(value, number) for number in (8, -1, 2**40)]
        elif value.is_floating_point() and key != STATE:
            wrong += [value.to(torch.int64), value > 0, torch.full_like(value, 1e30)]
        other = rng.choice(wrong)
        batch = batch.exclude(key) if other is GONE else batch.set(key, other)
        text = show((type(loss).__name__, key), other)
    for name, odd in ALLOWED.get(text, {}).items():
        batch[name] = batch[name] + odd

    def call() -> None:
        total = sum(value for name, value in loss(batch).items() if name.startswith("loss_"))
        total.backward()
        found = [total, *(p.grad for p in loss.parameters() if p.grad is not None)]
        token_policy().zero_grad()
        if not all(bool(value.isfinite().all()) for value in found):
            raise ArithmeticError("the loss or a gradient is not finite")

    names = {TOKENS: ("token", "action "), LOG_PROBS: ("sample_log_prob",)}
    return Case(text, names.get(key, (key,) if isinstance(key, str) else key), call)


# -- environments ----------------------------------------------------------------------------------
NO_TEXTS = (["a"], b"bytes", NAN, {"a": 1}, ("a", "b"), True, object(), [])
FLAGS = ("success", "done", "terminated", PAD)
KEYS = {"rewards": ("reward", *FLAGS), "observations": (STATE, IMAGE)}
KEYS |= {"instructions": ("language_instruction",)}


def odd_env(key: Any, value: Any, at: str) -> CountingChunkEnv:
    """An environment that returns another ``value`` than it declares, from ``at``."""
    env = CountingChunkEnv(chunk_size=4, max_env_steps=12)
    plain = getattr(env, at)

    def odd(*args: Any, **kwargs: Any) -> Any:
        out = plain(*args, **kwargs)
        return out.exclude(key) if value is GONE else out.set(key, value)

    setattr(env, at, odd)
    return env


def returned(kind: str, rng: random.Random, is_wrong: bool) -> Case:
    """An environment that returns something else, in a worker's code or in a collector."""
    some = rng.choice([*KEYS]) if kind == "runs" else kind
    at = "_step" if some == "rewards" else rng.choice(["_reset", "_step"])
    key: Any = rng.choice(KEYS[some] if is_wrong else KEYS[some][:1])
    wrong = [GONE] * (key not in FLAGS) + [NonTensorData(None), NonTensorData(7)]
    if some == "instructions":
        right: list[Any] = [NonTensorData(""), NonTensorData("á\n" * 9999)]
        wrong += [*map(NonTensorData, NO_TEXTS), torch.zeros(2), NonTensorStack("a", "b")]
    else:
        example = torch.zeros(1) if key == "reward" else CountingChunkEnv().reset()[key]
        right = [example + number for number in (-1e30, -1.0, 0.5, 3e38)]
        wrong += [NonTensorData("text"), *wrong_values(example)]
        if key in ("reward", STATE):
            wrong += [example.double() + number for number in (1e39, -1e39)]
            wrong += [example > 0] * (key == STATE)
    value = rng.choice(wrong if is_wrong else right)
    names = (key if isinstance(key, str) else key[-1],)
    make = functools.partial(odd_env, key, value, at)
    call = functools.partial(run, make, names) if kind == "runs" else lambda: play(make())
    return Case(show((at, key), value), names, call)


def specs(rng: random.Random, is_wrong: bool) -> Case:
    """An environment that declares something else, in a worker's code."""
    states = [Unbounded(shape) for shape in ((0, 3), (-1, 3), (0,))]
    states += [Binary(4, dtype=dtype) for dtype in (torch.complex64, torch.quint8)]
    chunks = [Unbounded(shape) for shape in ((), (4, 0), (2, 4, 2))]
    chunks += [Binary(shape=(4, 2), dtype=dtype) for dtype in (torch.int64, torch.bool)]
    chunks += [Bounded(1.0, high, (4, 2)) for high in (NAN, -1.0)]
    rewards = [Composite(pay=Unbounded(1)), Composite(agents=Composite(reward=Unbounded(1)))]
    odd: dict[Any, list[Any]] = {
        STATE: [*states, Unbounded(4, dtype=torch.bfloat16)],
        ("observation", "note"): [NonTensor(shape=())],
        ("observation",): [Composite()],
        ("action_mask",): [Binary(8, dtype=torch.bool)],
        "observation_spec": [Composite(observation=Unbounded(4)), Composite(pixels=Unbounded(4))],
        "full_action_spec": [Composite(vla_action=Composite(chunk=chunk)) for chunk in chunks]
        + [Composite(action=Unbounded((4, 2)))],
        "full_reward_spec": rewards,
        "full_done_spec": [Composite(done=Binary(3))],
    }
    env = CountingChunkEnv(max_env_steps=12)
    if not is_wrong:
        chunk = rng.choice([0.5, INF, -INF, 1e30])
        text = ["EnvWorker: action out of bounds", "as it is"][chunk == 0.5]
        return Case(text, (), lambda: play(env, chunk))
    key, spec = rng.choice([(key, spec) for key in odd for spec in odd[key]])

    def call() -> None:
        env.set_spec_lock_(False)
        if isinstance(key, str):
            setattr(env, key, spec)
        else:
            env.observation_spec[key] = spec
        play(env)

    name = key[-1] if isinstance(key, tuple) else key.split("_")[-2]
    names = ("vla_action", "action_spec") if name == "action" else (name.removeprefix("action_"),)
    return Case(show((key,), spec), names, call)


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
        [event] = worker.reset([Reset(0, "task", 3, 1, 0, 0)])
        for row in range(3):
            if isinstance(event, StepDone) and event.done:
                break
            if isinstance(event, ResetDone | StepDone):
                [event] = worker.step([Step(0, row, 0, row + 1, 0)])
        if isinstance(event, Refused):
            raise RefusedError(event.reason)


def toy_collector(make: Any) -> dvla.DVLACollector:
    failures = ("max_failures", "max_rollout_failures", "max_task_failures")
    return dvla.DVLACollector(
        make,
        token_policy(),
        replay_buffer=dvla.PooledReplayBuffer(batch_size=4, timeout_s=60.0),
        group=dvla.GroupConfig(group_size=2, groups_per_update=1, on_no_signal="keep"),
        workers=dvla.WorkerConfig(1, max_decisions=4, **dict.fromkeys(failures, 1)),
    )


def run(make: Any, names: tuple[str, ...]) -> None:
    """Until the first batch, or what the learner is told instead."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    collector = toy_collector(make)
    try:
        collector.start()
        next(iter(collector.replay_buffer))
    except Exception as error:  # what the whole chain says, without lines of source
        lines = "".join(traceback.format_exception(error)).splitlines()
        said = [line for line in lines if line[:1] != " " and any(name in line for name in names)]
        raise RuntimeError("\n".join(said)) from None
    finally:
        collector.shutdown()


# -- checkpoints -----------------------------------------------------------------------------------
class Payload:
    """Ends the process that unpickles it, which is then a crash."""

    def __reduce__(self) -> Any:
        return os._exit, (77,)


@contextlib.contextmanager
def toy_run() -> Iterator[tuple[RunCheckpoints, dict[str, Any]]]:
    """What saves and loads a run, and its parts."""
    optimizer = torch.optim.AdamW(token_policy().parameters(), lr=1e-3)
    parts: dict[str, Any] = {"policy": token_policy(), "optimizer": optimizer}
    parts["scheduler"] = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    parts["collector"] = collector = toy_collector(CountingChunkEnv)
    try:
        loader = RunCheckpoints(Path(tempfile.gettempdir()), rng=GlobalRNGState(), **parts)
        yield loader, parts
    finally:
        collector.shutdown()


@functools.cache
def saved_run() -> Path:
    """A checkpoint of a toy run after two updates."""
    loss = dvla.GRPOLoss(token_policy())
    with toy_run() as (saver, parts):
        collector = parts["collector"]
        collector.start()
        for _ in range(2):
            for batch in collector.replay_buffer:
                loss(batch)["loss_objective"].backward()
                parts["optimizer"].step()
            parts["scheduler"].step()
            collector.update_policy_weights_()
        time.sleep(1.0)  # another group
        with collector.pause():
            return saver.save(5)


def foreign(path: tuple[Any, ...], value: Any) -> list[Any]:
    """What an entry of a saved state must not be."""
    is_count = isinstance(value, int) and value >= 0 and path[-1] != "seed"
    # Counters that have counted nothing are not there, nor switches that came with a later PyTorch.
    optional = {"totals", "drops", "amsgrad", "maximize", "foreach", "capturable"}
    optional |= {"differentiable", "fused", "decoupled_weight_decay"}
    is_needed = isinstance(path[-1], str) and not optional.intersection(path)
    is_empty = value is None or (isinstance(value, str | dict | list | tuple) and not value)
    wrong = [] if is_empty else wrong_values(value) + ["text"] * (not isinstance(value, str))
    wrong += [None] * isinstance(value, torch.Tensor)
    return wrong + [GONE] * is_needed + [-7] * is_count


def checkpoints(rng: random.Random, is_wrong: bool) -> Case:
    """Of a toy run: other files and, with digests made anew, other entries or code to run."""
    path = saved_run().parent / "copy" / saved_run().name
    shutil.rmtree(path.parent, ignore_errors=True)
    shutil.copytree(saved_run(), path)
    manifest, new = path / "manifest.json", None
    record = json.loads(manifest.read_text())
    way = rng.choice(["entry"] * 6 + ["manifest", "bytes", "pickle", "file"]) if is_wrong else ""
    file = rng.choice(sorted(path.glob("components/*/*")) + [manifest] * (way == "file"))
    component, content = file.parent.name.split("-", 1)[-1], file.read_bytes()
    key: tuple[Any, ...] = (component,)
    names = key
    cut = content[: rng.randrange(len(content))]
    flipped = cut + bytes([content[len(cut)] ^ 0x80]) + content[len(cut) + 1 :]
    if way == "file":
        names, new = (file.name,), rng.choice([cut, b"", flipped, content + b"\0", None])
        file.unlink() if new is None else file.write_bytes(new)
    elif way == "bytes":
        file.write_bytes(new := rng.choice([cut, b"", rng.randbytes(99), b"PK\3\4"]))
    elif way == "pickle":
        new = {"state": Payload()}
        torch.save(new, file) if rng.random() < 0.5 else file.write_bytes(pickle.dumps(new))
    elif way == "entry":
        state = torch.load(file, weights_only=True)
        wrong = {key: foreign(key, old) for key, old in walk(state, dict | list | tuple)}
        key = rng.choice([key for key in wrong if wrong[key]])
        torch.save(edit(state, key, new := rng.choice(wrong[key])), file)
        inner = [name.lstrip("_") for name in key if isinstance(name, str)]
        # An entry of a list is named by the list, or by what holds the list.
        names = (*inner[-1 - isinstance(key[-1], int) :], *["generator"] * (component == "rng"))
        names = names or (component,)
    if way not in ("", "file"):
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        record["metadata"]["sha256"][file.relative_to(path).as_posix()] = digest
        if way == "manifest":
            key = rng.choice([key for key, _ in walk(record) if key[0] != "versions"])
            record = edit(record, key, new := rng.choice([GONE, -7, None, NAN, [1]]))
            names = ("component", *key[1:2]) if key[0] == "components" else (key[-1], "format")
            names += ("manifest.json",) * (key == ("format",))  # which is of something else
        manifest.write_text(json.dumps(record))

    def call() -> None:
        with toy_run() as (loader, _):
            loader.load(path)

    return Case(show((way, component, *key), new), names, call)


# -- running cases ---------------------------------------------------------------------------------
#: What makes a case of a kind, and malformed cases of 1,000.
KINDS: dict[str, tuple[Callable[[random.Random, bool], Case], int]] = {
    "settings": (settings, 340),
    "checkpoints": (checkpoints, 200),
    "batches": (batches, 200),
    "specs": (specs, 50),
    "rewards": (functools.partial(returned, "rewards"), 70),
    "observations": (functools.partial(returned, "observations"), 70),
    "instructions": (functools.partial(returned, "instructions"), 60),
    "runs": (functools.partial(returned, "runs"), 10),
}


def judge(case: Case, is_wrong: bool) -> tuple[str, str]:
    """The outcome of a case, and what was said."""
    try:
        case.call()
    except Exception as error:
        if not is_wrong:
            return "valid_refused", repr(error)
        says = re.search(r"(?s)\bmust\b.*\bgot\b|' is (missing|unknown)", str(error))
        says = says or isinstance(error, FileNotFoundError)  # which says the file's name
        is_named = isinstance(error, DOCUMENTED) and any(x in str(error) for x in case.names)
        return "refused" if says and is_named else "unclear", repr(error)
    return "silent" if is_wrong else "accepted" if case.text in ALLOWED else "valid", ""


def serve(connection: Any, kind: str, numbers: list[int], seed: int, folder: str) -> None:
    """Play cases; the text of each is sent before, for it may be the end of the process."""
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    tempfile.tempdir = folder
    for number in numbers:
        is_wrong = number % 11 != 10
        case = KINDS[kind][0](random.Random(f"{seed}/{kind}/{number}"), is_wrong)
        connection.send(("begun", case.text))
        connection.send(judge(case, is_wrong))


def outcomes(kind: str, numbers: list[int], seed: int) -> Iterator[tuple[int, str, str, str]]:
    """Number, text, outcome and error of each case, in processes that may hang or die."""
    context = multiprocessing.get_context("spawn")
    while numbers:
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
            ours, theirs = context.Pipe()
            child = context.Process(target=serve, args=(theirs, kind, numbers, seed, folder))
            child.start()
            stack.callback(child.join)
            stack.callback(child.kill)
            theirs.close()
            text, outcome = "", ""
            while numbers and outcome not in ("hangs", "crashes"):
                limit_s = LIMIT_S.get(kind, 30.0) if outcome == "begun" else 240.0
                try:
                    outcome, said = ours.recv() if ours.poll(limit_s) else ("hangs", "")
                except EOFError:
                    child.join(10.0)
                    outcome, said = "crashes", f"exit code {child.exitcode}"
                if outcome == "begun":
                    text = said
                else:
                    yield numbers.pop(0), text, outcome, said
                    text = ""


def main() -> None:
    options = {"cases": 1000, "seed": 0, "kind": ",".join(KINDS), "case": ""}
    args = arguments(__doc__, "60 cases", **options)
    share = (60 if args.quick else args.cases) / 1000 * 1.1
    wanted = {x: list(range(round(KINDS[x][1] * share))) for x in args.kind.split(",")}
    if args.case:
        kind, _, number = args.case.partition(":")
        wanted = {kind: [int(number)]}
    table: dict[str, Counter[str]] = {}
    bad: list[str] = []
    for kind, numbers in wanted.items():
        table[kind] = counts = Counter[str]()
        for number, text, outcome, said in outcomes(kind, numbers, args.seed):
            counts[outcome] += 1
            if outcome in BAD or args.case:
                bad.append(f"{outcome} --case {kind}:{number} --seed {args.seed}  {text}")
                log(f"{bad[-1]}  {said if args.case else said[:300]}")
        log(f"{kind}: {dict(counts)}")
    totals = {f"num_{x}": sum(counts[x] for counts in table.values()) for x in BAD}
    report("fuzz", {**totals, "outcomes": table, "seed": args.seed, "bad": bad}, args.quick)


if __name__ == "__main__":
    main()
