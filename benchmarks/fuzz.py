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
Every eleventh case is valid and must be accepted. Cases run in a process of their own:

settings
    of the recipes and of classes of the package; only what checks them.
checkpoints
    of a toy run: changed, missing or foreign files and, with digests made anew, foreign entries,
    or pickles that would run code.
batches
    for both losses.
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
import yaml
from _machine import arguments, log, report
from tensordict import NonTensorData, NonTensorStack
from torchrl.checkpoint import GlobalRNGState
from torchrl.data import Binary, Bounded, Composite, NonTensor, Unbounded

import torchrl_dvla as dvla
from torchrl_dvla.data import InitStateSchedule, decision_layout
from torchrl_dvla.envs import ToyChunkEnv
from torchrl_dvla.memory import EnvironmentPool
from torchrl_dvla.modules import TinyBackboneConfig, tiny_token_policy
from torchrl_dvla.objectives import ActionTokenBCLoss
from torchrl_dvla.recording import RunCheckpoints
from torchrl_dvla.swimlane.env_worker import EnvWorker, describe_env
from torchrl_dvla.swimlane.messages import Reset, Step
from torchrl_dvla.testing import CountingChunkEnv
from torchrl_dvla.weight_update import WeightStore

#: Malformed cases of 1,000; seconds that one may take, start of its process not counted.
SHARES = {"settings": 340, "checkpoints": 200, "batches": 200, "specs": 50, "rewards": 70}
SHARES |= {"observations": 70, "instructions": 60, "runs": 10}
LIMIT_S = {"checkpoints": 60, "runs": 180}
BAD = {"silent": "silent", "unclear": "unclear", "hang": "hangs", "crash": "crashes"}
BAD |= {"valid_refused": "valid_refused"}
DOCUMENTED = (ValueError, TypeError, KeyError, RuntimeError, FileNotFoundError)
#: What looks wrong and is allowed, with the docstring that says so.
ALLOWED = {
    "nothing executed": "GRPOLoss.normaliser: zero, which forward takes for one",
    "log-ratio out of bounds": "GRPOLoss: log-ratios are clamped",
    "garbage in the padding": "GRPOLoss: action_is_pad masks what was never executed",
    "action out of bounds": "EnvWorker: actions beyond the bounds are clipped",
}
NAN, INF, GONE = math.nan, math.inf, "<removed>"
TOKENS, LOG_PROBS, STATE = ("vla_action", "tokens"), ("vla_action", "log_probs"), "state"
IMAGE, STATE = ("observation", "image"), ("observation", "state")


class Case(NamedTuple):
    """An input and what takes it; a refusal must hold one of ``names``."""

    text: str
    names: tuple[Any, ...]
    call: Callable[[], Any]


class PayloadRanError(BaseException):
    """Code of a file that was loaded has run."""


def edit(node: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy of nested containers with another ``value`` at ``path``, or nothing there."""
    head, *rest = path
    if not rest and value is GONE:
        return {key: item for key, item in node.items() if key != head}
    if isinstance(node, dict):
        return {**node, head: edit(node.get(head, {}), tuple(rest), value) if rest else value}
    new = edit(node[head], tuple(rest), value) if rest else value
    return type(node)([*node[:head], new, *node[head + 1 :]])


def wrong_tensors(value: torch.Tensor) -> list[torch.Tensor]:
    """Tensors of another dtype or size, or not finite."""
    half, number = value.to(torch.float32) + 0.5, value.to(torch.complex64)
    wrong = [
        number,
        number * complex(0, NAN),
        torch.zeros(0).to(value),
        torch.zeros(3, 7).to(value),
    ]
    return wrong + ([value * NAN, value + INF] if value.is_floating_point() else [half, half * NAN])


def show(value: Any) -> str:
    """A value in one short line."""
    return f"{value!r:.70}".replace("\n", " ")


# -- settings --------------------------------------------------------------------------------------
#: Numbers that may be 0, of any sign, not whole; texts with a few values.
ZERO = "max_policy_lag settle_steps warmup_steps subset_episodes num_videos state_dim num_episodes "
ZERO += "num_warmup_steps max_shift weight_decay every_minutes line_every_s max_wait_s push jitter "
ZERO += "state_noise final_lr_share"
SIGNED = "entropy_coeff seed first_seed"
REAL = "timeout_s max_minutes every_minutes line_every_s video_fps"
CHOICE = "on_no_signal ratio_level reduction kl_estimator importance kind backend task_suite dtype "
CHOICE += "start_method"


def wrong_settings(name: str, value: Any) -> list[Any]:
    """What a setting like ``value`` must not be."""
    if isinstance(value, bool):
        return [1.5, 2, "maybe", NAN, [], {"a": 1}]
    if isinstance(value, int | float):
        wrong = [NAN, INF, True, "abc", [], {"a": 1}, 10**400]
        wrong += [-1, -0.5] * (name not in SIGNED) + [0] * (name not in f"{SIGNED} {ZERO}")
        is_whole = isinstance(value, int) and not any(name.endswith(x) for x in REAL.split())
        return wrong + [1.5, 2**70] * is_whole
    if isinstance(value, str):
        return [True, NAN, [], {"a": 1}, "none of these" if name in CHOICE else "a\0b"]
    return [NAN, True, "ab", 3] + [[NAN], [0, 0, 0.5], {"a": 1}] * isinstance(value, list | tuple)


#: Values that do not fit to the others of the file.
CONTRADICTIONS = {
    "toy": "optim.micro_batch_size=65 policy.action_dim=3 policy.state_dim=3 eval.num_episodes=8 "
    "inference.deterministic=true group.candidate_group_size=7 group.return_bounds=[0.9,0.1] "
    "loss.dual_clip=1.1 loss.clip_epsilon=[-0.5,0.1] loss.reduction=none name=../../escaped "
    "env.backend=libero",
    "libero": "env.max_episode_steps=512 env.replan_interval=9 policy.kind=tiny_vla "
    "policy.checkpoint=null",
    "libero_object": "demonstrations.label_interval=9 training.decay_steps=599 "
    "policy.tokens_per_step=2 training.num_validation_demonstrations=96",
}
REQUIRED = "seed env policy.kind optim.lr optim.minibatch_size train.num_updates eval.num_episodes"
REQUIRED += " name device demonstrations.folder training.lr training.num_steps policy.num_bins"
OF_A_POLICY = [dvla.GRPOLoss, ActionTokenBCLoss, WeightStore]
CLASSES = [dvla.GroupConfig, dvla.WorkerConfig, dvla.InferenceConfig, dvla.PooledReplayBuffer]
CLASSES += [*OF_A_POLICY, InitStateSchedule, ToyChunkEnv, TinyBackboneConfig]


@functools.cache
def recipe(config: str) -> tuple[Callable[[Any], Any], dict[str, Any], list[tuple[str, ...]]]:
    """What checks a recipe's settings, those of one of its files, and their paths."""
    (file,) = (Path(__file__).parents[1] / "sota-implementations").glob(f"*/config/{config}.yaml")
    spec: Any = importlib.util.spec_from_file_location(config, file.parents[1] / "settings.py")
    sys.modules[config] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    plain = yaml.safe_load(file.read_text())
    plain = {key: value for key, value in plain.items() if key not in ("hydra", "defaults")}
    if config.endswith("openvla_oft"):
        plain["policy"]["checkpoint"] = "x"

    def paths(node: Any, before: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
        for name, value in node.items():
            yield (*before, name)
            if isinstance(value, dict) and name != "env_kwargs":
                yield from paths(value, (*before, name))

    return module.settings_from, plain, list(paths(plain))


def settings(rng: random.Random, is_wrong: bool) -> Case:
    way = rng.choice(["value"] * 6 + ["class"] * 4 + ["name", "gone", "fit"]) if is_wrong else ""
    if way == "class":
        cls = rng.choice(CLASSES)
        defaults = inspect.signature(cls.__init__).parameters.items()
        kinds = bool | int | float | str | tuple
        known = [(key, x.default) for key, x in defaults if isinstance(x.default, kinds)]
        name, default = rng.choice(known)
        value, first = rng.choice(wrong_settings(name, default)), [token_policy()]
        call = functools.partial(cls, *first * (cls in OF_A_POLICY), **{name: value})
        return Case(f"{cls.__name__}({name}={show(value)})", (name,), call)
    config = rng.choice(list(CONTRADICTIONS) + ["libero_openvla_oft"] * (way != "fit"))
    check, plain, paths = recipe(config)
    path, value = rng.choice(paths), GONE
    if way == "fit":
        dotted, _, text = rng.choice(CONTRADICTIONS[config].split()).partition("=")
        path, value = tuple(dotted.split(".")), yaml.safe_load(text)
    elif way == "gone":
        path = rng.choice([each for each in paths if ".".join(each) in REQUIRED.split()])
    elif way == "name":
        at = rng.randrange(len(path[-1]))
        path, value = (*path[:-1], f"{path[-1][:at]}x{path[-1][at:]}"), 1
    else:
        at = functools.reduce(lambda node, name: node[name], path, plain)
        while at is None or (not is_wrong and not isinstance(at, bool | float)):
            path = rng.choice(paths)
            at = functools.reduce(lambda node, name: node[name], path, plain)
        value = rng.choice(wrong_settings(path[-1], at) if is_wrong else [at, not at, 0.5])
        value = value if is_wrong or type(value) is type(at) else at
    data = edit(plain, path, value)
    return Case(f"{config}: {'.'.join(path)}={show(value)}", path[-1:], lambda: check(data))


# -- batches ---------------------------------------------------------------------------------------
@functools.cache
def token_policy() -> Any:
    """A policy of 2 action dimensions, 4 env steps and 8 tokens."""
    torch.manual_seed(0)
    policy = tiny_token_policy(2, 4, vocab_size=8, hidden_dim=16)
    policy(CountingChunkEnv().reset().unsqueeze(0))
    return policy


def batches(rng: random.Random, is_wrong: bool) -> Case:
    loss: Any = dvla.GRPOLoss(token_policy(), importance="decoupled", kl_to_ref_coeff=0.1)
    loss.set_keys(weight="weight")
    env = CountingChunkEnv()
    with torch.no_grad():
        batch = token_policy()(torch.stack([env.reset() for _ in range(6)]))
    batch["advantage"], batch["weight"] = torch.linspace(-1, 1, 6)[:, None], torch.ones(6, 1)
    batch["action_is_pad"] = torch.arange(4).expand(6, 4) >= 3
    batch["policy_version"] = torch.zeros(6, 1, dtype=torch.int64)
    batch = loss.write_proximal_log_prob(batch)
    batch["ref_log_prob"] = batch["proximal_log_prob"].clone()
    keys: list[Any] = [TOKENS, "action_is_pad", STATE, IMAGE]
    others = ["advantage", "weight", "proximal_log_prob", "ref_log_prob", "policy_version"]
    if is_grpo := rng.random() < 0.8:
        keys += [LOG_PROBS, *others]
    else:
        loss = ActionTokenBCLoss(token_policy())
    text = rng.choice(["as it is", *ALLOWED][: 4 if is_grpo else 1])
    key: Any = rng.choice(keys)
    if is_wrong:
        batch.batch_size = batch["observation"].batch_size = batch["vla_action"].batch_size = []
        value = batch[key]
        wrong: list[Any] = [*wrong_tensors(value)]
        wrong = [each for each in wrong if key != IMAGE or each.shape != value.shape]
        wrong += [value.to(torch.complex64), value[1:]]
        wrong += [GONE] * (key not in ("action_is_pad", "policy_version"))
        if key == TOKENS:
            wrong += [torch.full_like(value, number) for number in (8, -1, 2**40)]
        elif value.is_floating_point() and key != STATE:
            wrong += [value.to(torch.int64), value > 0, torch.full_like(value, 1e30)]
        other = rng.choice(wrong)
        batch = batch.exclude(key) if other is GONE else batch.set(key, other)
        text = f"{type(loss).__name__} {key} = {show(other)}"
    elif text == "nothing executed":
        batch["action_is_pad"] = torch.ones_like(batch["action_is_pad"])
    elif text == "log-ratio out of bounds":
        batch[LOG_PROBS] = torch.full_like(batch[LOG_PROBS], -1e4)
    elif text == "garbage in the padding":
        batch[LOG_PROBS][:, 3], batch[TOKENS][:, 3] = NAN, -100

    def call() -> None:
        total = sum(value for name, value in loss(batch).items() if name.startswith("loss_"))
        total.backward()
        found = [total, *(p.grad for p in loss.parameters() if p.grad is not None)]
        token_policy().zero_grad()
        if not all(bool(value.isfinite().all()) for value in found):
            raise ArithmeticError("the loss or a gradient is not finite")

    names = {TOKENS: ("token", "action "), LOG_PROBS: ("sample_log_prob",)}.get(key, (key,))
    return Case(text, names if isinstance(key, str) or key in (TOKENS, LOG_PROBS) else key, call)


# -- environments ----------------------------------------------------------------------------------
class OddEnv(CountingChunkEnv):
    """Returns something else than it declares, at its resets or its steps."""

    def __init__(self, key: Any = None, value: Any = None, at: str = "", spec: Any = None) -> None:
        super().__init__(chunk_size=4, max_env_steps=12)
        self.odd = (key, value, at)
        if spec is not None:
            self.set_spec_lock_(False)
            spec(self)

    def _change(self, out: Any, at: str) -> Any:
        key, value, when = self.odd
        if at != when:
            return out
        return out.exclude(key) if value is GONE else out.set(key, value)

    def _reset(self, tensordict: Any = None, **kwargs: Any) -> Any:
        return self._change(super()._reset(tensordict, **kwargs), "reset")

    def _step(self, tensordict: Any) -> Any:
        return self._change(super()._step(tensordict), "step")


NO_TEXTS = (["a"], b"bytes", None, 7, NAN, {"a": 1}, ("a", "b"), True, object(), [])
FLAGS = ("success", "done", "terminated", "action_is_pad")


def returned(kind: str, rng: random.Random, is_wrong: bool) -> tuple[str, Any, Any, str]:
    """Of an environment: text of the case, key, value, and whether at resets or steps."""
    at = "step" if kind == "rewards" else rng.choice(["reset", "step"])
    big = torch.full((1,), 1e39, dtype=torch.float64)
    key: Any = {"rewards": rng.choice(["reward", *FLAGS]), "instructions": "language_instruction"}
    key = key.get(kind) or rng.choice([STATE, IMAGE])
    if not is_wrong:
        key = STATE if key == IMAGE else "reward" if key in FLAGS else key
        size = 4 if key == STATE else 1
        value: Any = torch.full((size,), rng.choice([-1e30, -1.0, 0.5, 3e38]))
        value = NonTensorData(rng.choice(["", "á\n" * 9999])) if kind == "instructions" else value
        return "as it is", key, value, at
    wrong: list[Any] = [GONE] * (key not in FLAGS)
    if kind == "instructions":
        wrong += [*map(NonTensorData, NO_TEXTS), torch.zeros(2), NonTensorStack("a", "b")]
    else:
        whole = CountingChunkEnv().reset()
        example = torch.zeros(1) if key == "reward" else whole[key]
        wrong += [*wrong_tensors(example), NonTensorData("text"), NonTensorData(None)]
        wrong += {"reward": [big, -big], STATE: [big.expand(4), torch.ones(4).bool()]}.get(key, [])
    value = rng.choice(wrong)
    return f"{key} at {at} = {show(value)}", key, value, at


def act(spec: Any) -> tuple[str, Any]:
    return "full_action_spec", Composite(vla_action=Composite(chunk=spec))


def specs(rng: random.Random, is_wrong: bool) -> Case:
    whole = Composite
    odd: list[tuple[str, Any, Any]] = [
        *(("state", STATE, Binary(4, dtype=dtype)) for dtype in (torch.complex64, torch.quint8)),
        *(("state", STATE, Unbounded(shape)) for shape in ((0, 3), (-1, 3), (0,))),
        ("state", STATE, Unbounded(4, dtype=torch.bfloat16)),
        ("note", ("observation", "note"), NonTensor(shape=())),
        ("observation", "observation_spec", whole(observation=Unbounded(4))),
        ("observation", "observation_spec", whole(pixels=Unbounded(4))),
        ("observation", ("observation",), Composite()),
        *(("vla_action", *act(Unbounded(shape))) for shape in ((), (4, 0), (2, 4, 2))),
        *(("vla_action", *act(Binary(shape=(4, 2), dtype=d))) for d in (torch.int64, torch.bool)),
        *(("action_spec", *act(Bounded(1.0, high, (4, 2)))) for high in (NAN, -1.0)),
        ("vla_action", "full_action_spec", whole(action=Unbounded((4, 2)))),
        ("reward", "full_reward_spec", whole(pay=Unbounded(1))),
        ("reward", "full_reward_spec", whole(agents=whole(reward=Unbounded(1)))),
        ("done", "full_done_spec", whole(done=Binary(3))),
        ("mask", ("action_mask",), Binary(8, dtype=torch.bool)),
    ]
    if not is_wrong:
        chunk = rng.choice([0.5, INF, -INF, 1e30])
        text = "as it is" if chunk == 0.5 else "action out of bounds"
        return Case(text, (), lambda: play(OddEnv(), chunk))
    name, key, spec = rng.choice(odd)

    def declare(env: Any) -> None:
        if isinstance(key, str):
            setattr(env, key, spec)
        else:
            env.observation_spec[key] = spec

    return Case(f"{key} = {show(spec)}", (name,), lambda: play(OddEnv(spec=declare)))


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


def toy_collector(make: Any, num_tries: int) -> dvla.DVLACollector:
    failures = ("max_failures", "max_rollout_failures", "max_task_failures")
    return dvla.DVLACollector(
        make,
        token_policy(),
        replay_buffer=dvla.PooledReplayBuffer(batch_size=4, timeout_s=60.0),
        group=dvla.GroupConfig(group_size=2, groups_per_update=1, on_no_signal="keep"),
        workers=dvla.WorkerConfig(1, max_decisions=4, **dict.fromkeys(failures, num_tries)),
    )


def run(make: Any, names: tuple[str, ...]) -> None:
    """Until the first batch, or what the learner is told instead."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    collector = toy_collector(make, 1)
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
class Payload(NamedTuple):
    """Makes a file when it is unpickled."""

    path: str

    def __reduce__(self) -> Any:
        return open, (self.path, "w")


class SavedRun:
    """A checkpoint of a toy run, and what loads one into objects of the same settings."""

    def __init__(self, folder: str) -> None:
        self.folder, self.collector = folder, None
        self.renew()
        self.collector.start()
        loss = dvla.GRPOLoss(token_policy())
        for _ in range(2):
            for batch in self.collector.replay_buffer:
                loss(batch)["loss_objective"].backward()
                self.parts["optimizer"].step()
            self.parts["scheduler"].step()
            self.collector.update_policy_weights_()
        time.sleep(1.0)  # another group
        with self.collector.pause():
            self.path = self.loader.save(5)
        self.renew()

    def renew(self) -> None:
        """Another collector, for one loads no second time."""
        if self.collector is not None:
            self.collector.shutdown()
        self.collector: Any = toy_collector(CountingChunkEnv, 3)
        optimizer = torch.optim.AdamW(token_policy().parameters(), lr=1e-3)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        self.parts: Any = {"policy": token_policy(), "optimizer": optimizer}
        self.parts |= {"scheduler": scheduler, "rng": GlobalRNGState(), "collector": self.collector}
        self.loader: Any = RunCheckpoints(self.folder, **self.parts)


saved_run = functools.cache(SavedRun)


def foreign(rng: random.Random, state: Any) -> tuple[tuple[Any, ...], Any]:
    """Path of an entry of a saved state, and a value that it must not have."""
    path: list[Any] = []
    node = state
    while isinstance(node, dict | list | tuple) and node and (not path or rng.random() < 0.9):
        path.append(rng.choice(list(node) if isinstance(node, dict) else range(len(node))))
        node = node[path[-1]]
    # Counters that have counted nothing are not there.
    wrong = [GONE] * (isinstance(path[-1], str) and not {"totals", "drops"}.intersection(path))
    if isinstance(node, torch.Tensor):
        wrong += ["text", None, *wrong_tensors(node)]
    elif isinstance(node, bool):
        wrong += ["text", 7]
    elif isinstance(node, int | float):
        is_count = isinstance(node, int) and node >= 0 and path[-1] != "seed"
        wrong += ["text", NAN, [1], True, *[-7] * is_count]
    elif isinstance(node, str | dict | list | tuple) and node:
        wrong += [3, NAN, "text" if not isinstance(node, str) else [node]]
    return (tuple(path), rng.choice(wrong)) if wrong else foreign(rng, state)


def checkpoints(rng: random.Random, is_wrong: bool, folder: str) -> Case:
    saved = saved_run(folder)
    path = Path(folder) / "copy" / saved.path.name
    shutil.rmtree(path.parent, ignore_errors=True)
    shutil.copytree(saved.path, path)
    manifest, marker = path / "manifest.json", path / "ran"
    record, text = json.loads(manifest.read_text()), "as it is"
    way = rng.choice(["entry"] * 6 + ["manifest", "bytes", "pickle", "file"]) if is_wrong else ""
    file = rng.choice([file for file in sorted(path.rglob("*")) if file.is_file()])
    while file == manifest and way != "file":
        file = rng.choice(list(path.glob("components/*/*")))
    component, content = file.parent.name.split("-", 1)[-1], file.read_bytes()
    names: tuple[Any, ...] = (component,)
    at = rng.randrange(len(content))
    if way == "file":
        flipped = content[:at] + bytes([content[at] ^ 0x80]) + content[at + 1 :]
        new = rng.choice([content[:at], flipped, b"", content + b"\0", None])
        file.unlink() if new is None else file.write_bytes(new)
        text, names = f"{component}/{file.name} = {show(new)}", (file.name,)
    elif way == "bytes":
        file.write_bytes(rng.choice([content[:at], b"", rng.randbytes(99), b"PK\3\4"]))
        text = f"other bytes in {component}"
    elif way == "pickle":
        payload = {"state": Payload(str(marker))}
        write = rng.choice([torch.save, lambda data, file: file.write_bytes(pickle.dumps(data))])
        write(payload, file)
        text = f"a payload in {component}"
    elif way == "entry":
        entry, new = foreign(rng, state := torch.load(file, weights_only=True))
        torch.save(edit(state, entry, new), file)
        text = f"{component}.{'.'.join(map(str, entry))} = {show(new)}"
        inner = [key.lstrip("_") for key in entry if isinstance(key, str)]
        names = (inner[-1] if inner else component, *["generator"] * (component == "rng"))
    record["metadata"]["sha256"].pop(name := file.relative_to(path).as_posix(), None)
    if way != "file":
        record["metadata"]["sha256"][name] = hashlib.sha256(file.read_bytes()).hexdigest()
    if way == "manifest":
        keys: list[Any] = [("metadata", key) for key in record["metadata"]]
        keys += [("components", component, key) for key in ("adapter", "path")]
        key = rng.choice([*keys, ("components",), ("components", component), ("format_version",)])
        new = rng.choice([GONE, -7, None, NAN, [1]])
        record, text = edit(record, key, new), f"{'.'.join(key)} = {show(new)}"
        names = ("component", component) if key[0] == "components" else (key[-1], "format")
    if way not in ("", "file"):
        manifest.write_text(json.dumps(record))

    def call() -> None:
        saved.loader._verified = None
        try:
            saved.loader.load(path)
        finally:
            if marker.exists():
                raise PayloadRanError(text)
        saved.renew()

    return Case(text, names, call)


# -- running cases ---------------------------------------------------------------------------------
def build(kind: str, number: int, seed: int, folder: str) -> tuple[Case, bool]:
    """A case, and whether it must be refused."""
    rng, is_wrong = random.Random(f"{seed}/{kind}/{number}"), number % 11 != 10
    if kind == "checkpoints":
        return checkpoints(rng, is_wrong, folder), is_wrong
    if kind in ("settings", "batches", "specs"):
        return {"settings": settings, "batches": batches, "specs": specs}[kind](
            rng, is_wrong
        ), is_wrong
    some = rng.choice(["rewards", "observations", "instructions"]) if kind == "runs" else kind
    text, key, value, at = returned(some, rng, is_wrong)
    names = (key if isinstance(key, str) else key[-1],)
    make = functools.partial(OddEnv, key, value, at)
    call = functools.partial(run, make, names) if kind == "runs" else lambda: play(make())
    return Case(text, names, call), is_wrong


def judge(case: Case, is_wrong: bool) -> tuple[str, str]:
    """The outcome of a case, and what was said."""
    try:
        case.call()
    except PayloadRanError as error:
        return "silent", repr(error)
    except Exception as error:
        if not is_wrong:
            return "valid_refused", repr(error)
        says = re.search(r"(?s)\bmust\b.*\bgot\b|' is (missing|unknown)", str(error))
        is_clear = says or isinstance(error, FileNotFoundError)  # which says the file's name
        is_clear = is_clear and any(name in str(error) for name in case.names)
        is_clear = is_clear and isinstance(error, DOCUMENTED)
        return "refused" if is_clear else "unclear", repr(error)
    return "silent" if is_wrong else "accepted" if case.text in ALLOWED else "valid", ""


def serve(connection: Any, kind: str, numbers: list[int], seed: int, folder: str) -> None:
    """Play cases; each is announced before, so that its death is known."""
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    for number in numbers:
        connection.send((number, "built", ""))
        case, is_wrong = build(kind, number, seed, folder)
        connection.send((number, "begun", case.text))
        connection.send((number, *judge(case, is_wrong)))


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
            number, text, outcome = numbers[0], "", ""
            while numbers and outcome not in ("hang", "crash"):
                limit_s = LIMIT_S.get(kind, 30) if outcome == "begun" else 240
                try:
                    is_there = ours.poll(limit_s)
                    number, outcome, said = ours.recv() if is_there else (number, "hang", "")
                except EOFError:
                    child.join(10.0)
                    outcome, said = "crash", f"exit code {child.exitcode}"
                text = {"built": "", "begun": said}.get(outcome, text)
                if outcome not in ("built", "begun"):
                    numbers = numbers[numbers.index(number) + 1 :]
                    yield number, text, outcome, said


def main() -> None:
    options = {"cases": 1000, "seed": 0, "kind": ",".join(SHARES), "case": ""}
    args = arguments(__doc__, "60 cases", **options)
    num_cases, wanted = 60 if args.quick else args.cases, {}
    for kind in args.kind.split(","):
        wanted[kind] = list(range(round(SHARES[kind] * num_cases / 1000 * 1.1)))
    if args.case:
        kind, _, number = args.case.partition(":")
        wanted = {kind: [int(number)]}
    table, bad = {}, []
    for kind, numbers in wanted.items():
        counts: Counter[str] = Counter()
        for number, text, outcome, said in outcomes(kind, numbers, args.seed):
            counts[outcome] += 1
            if outcome in BAD or args.case:
                bad.append(f"{outcome} --case {kind}:{number} --seed {args.seed}  {text}")
                log(f"{bad[-1]}  {said if args.case else said[:300]}")
        table[kind] = dict(counts)
        log(f"{kind}: {table[kind]}")
    totals = {f"num_{BAD[x]}": sum(count.get(x, 0) for count in table.values()) for x in BAD}
    report("fuzz", {**totals, "outcomes": table, "seed": args.seed, "bad": bad}, args.quick)


if __name__ == "__main__":
    main()
