# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The environment worker: a process whose environments read chunks and write observations."""

from __future__ import annotations

import contextlib
import math
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

import cloudpickle
import torch
from tensordict import TensorDict, TensorDictBase, is_non_tensor
from torchrl.data import NonTensor
from torchrl.envs import EnvBase, MultiAction

from torchrl_dvla.data.schema import (
    ACTION_CHUNK_KEY,
    ACTION_IS_PAD_KEY,
    DONE_KEY,
    INIT_STATE_ID_KEY,
    INSTRUCTION_KEY,
    OBSERVATION_KEY,
    REWARD_KEY,
    SUCCESS_KEY,
    TERMINATED_KEY,
    TRUNCATED_KEY,
)
from torchrl_dvla.memory import RowWriter, WorkerView
from torchrl_dvla.swimlane.messages import (
    EnvSpecs,
    Failed,
    Reset,
    ResetDone,
    Step,
    StepDone,
    Stop,
    UsePool,
    WorkerCommands,
    WorkerEvents,
)

__all__ = ["EnvWorker", "describe_env", "run_env_worker"]

#: Outcome of a decision, in the order in which :meth:`EnvWorker.step` writes it.
_OUTCOME_KEYS = (
    REWARD_KEY,
    DONE_KEY,
    TERMINATED_KEY,
    TRUNCATED_KEY,
    SUCCESS_KEY,
    ACTION_IS_PAD_KEY,
)

#: Events wait this long for more to join them. An environment that takes longer is reported at
#: once, so that the policy can decide for it while the worker steps the next; cheap ones share the
#: price of a message. How it was found: decision 31.
_SEND_AFTER_S = 1e-2

EnvFactories = Mapping[str, Callable[[], EnvBase]]


def describe_env(env: EnvBase) -> EnvSpecs:
    """Shapes of what ``env`` observes and executes, which a row has to hold.

    Args:
        env (EnvBase): an environment without batch dimensions that speaks the decision-level
            schema: its action is ``("vla_action", "chunk")`` ``[chunk, A]`` and one step of it is
            one decision.

    Raises:
        ValueError: if it does not; the message names what is missing and what adds it.
    """
    if env.batch_size:
        raise ValueError(
            f"create_env_fn must return environments without batch dimensions, got batch_size "
            f"{tuple(env.batch_size)}. Ask for more workers or envs_per_worker instead."
        )
    if ACTION_CHUNK_KEY not in env.action_keys:
        raise ValueError(
            f"create_env_fn must return an environment whose action is {ACTION_CHUNK_KEY} "
            f"[chunk_size, action_dim], got actions {list(env.action_keys)}. Wrap a single-step "
            "environment in torchrl_dvla.envs.ChunkEnv."
        )
    _check_chunking(env)
    spec = env.full_action_spec[ACTION_CHUNK_KEY]
    # MultiAction leaves the length of the chunk open in its spec; only the policy knows it then.
    chunk_size = int(spec.shape[-2]) if len(spec.shape) >= 2 else -1
    leaves = []
    for key, leaf in env.observation_spec[OBSERVATION_KEY].items(True, True):
        nested = (OBSERVATION_KEY, key) if isinstance(key, str) else (OBSERVATION_KEY, *key)
        if isinstance(leaf, NonTensor):
            raise ValueError(
                f"create_env_fn must return tensors under {OBSERVATION_KEY!r}, got {nested} of "
                f"{type(leaf).__name__}: rows hold no strings or objects. Leave it out with "
                f"ExcludeTransform, or rename an instruction to {INSTRUCTION_KEY!r}, which travels "
                "by its id in a table."
            )
        leaves.append((nested, tuple(leaf.shape), leaf.dtype))
    if not leaves:
        raise ValueError(
            f"create_env_fn must return an environment with tensors under {OBSERVATION_KEY!r}, got "
            "none. See torchrl.data.vla for the schema."
        )
    has_success = "success" in {*env.observation_spec.keys(), *env.full_done_spec.keys()}
    return EnvSpecs(tuple(leaves), chunk_size, int(spec.shape[-1]), has_success)


def _check_chunking(env: EnvBase) -> None:
    """Require that env steps which were not executed are marked, and all others rewarded."""
    remedy = "Wrap the single-step environment in torchrl_dvla.envs.ChunkEnv, without MultiAction."
    if ACTION_IS_PAD_KEY not in env.observation_spec:
        raise ValueError(
            f"create_env_fn must return an environment that observes {ACTION_IS_PAD_KEY!r} "
            "[chunk_size], True for env steps of the chunk that were not executed, got none: "
            f"actions after the end of an episode would be learned from. {remedy}"
        )
    if any(isinstance(part, MultiAction) and not part.stack_rewards for part in env.modules()):
        raise ValueError(
            "stack_rewards of MultiAction must be True, got False: of a chunk it keeps the last "
            f"env step's reward alone. {remedy}"
        )


class EnvWorker:
    """Environments of one worker, each in the middle of at most one rollout.

    It executes one command after the other and writes the rows that the command names, by
    :class:`~torchrl_dvla.memory.RowWriter`: a row whose page is not leased under the command's
    generation is refused, and the worker fails.

    Args:
        factories (Mapping): environment factory by task name. An environment is built when its task
            is first asked for, and kept.
        num_envs (int): rollouts that may be open at once.
    """

    def __init__(self, factories: EnvFactories, num_envs: int) -> None:
        self._factories = factories
        self._envs: dict[tuple[int, str], EnvBase] = {}
        #: Of each open rollout: its task, the tensordict that its next step starts from, and what
        #: it is asked to do.
        self._open: list[tuple[str, TensorDictBase, str] | None] = [None] * num_envs
        self._chunks = torch.empty(0)
        self._observations: RowWriter | None = None
        self._outcomes: RowWriter | None = None

    def build(self, env_index: int, task: str) -> EnvBase:
        """The environment of ``env_index`` for ``task``, built at most once."""
        key = (env_index, task)
        if key not in self._envs:
            env = self._factories[task]()
            describe_env(env)  # for its errors: the environment of every task is checked
            self._envs[key] = env
        return self._envs[key]

    def use_pool(self, view: WorkerView) -> None:
        """Take the rows that chunks are read from and observations and outcomes written to."""
        self._chunks = view.rows.get(ACTION_CHUNK_KEY)
        keys = [key for key in view.layout if isinstance(key, tuple) and key[0] == OBSERVATION_KEY]
        self._observations = RowWriter(view, keys)
        self._outcomes = RowWriter(view, _OUTCOME_KEYS)

    def reset(self, command: Reset) -> ResetDone:
        """Start a rollout and write its first observation.

        Seeding before every reset is what lets all rollouts of a group share one scene.
        """
        if self._observations is None:
            raise RuntimeError("use_pool must be called before reset: there is no row to write to.")
        env = self.build(command.env_index, command.task)
        # Not static, it would make a generator to draw a next seed that nobody asks for.
        env.set_seed(command.seed, static_seed=True)
        request = TensorDict({INIT_STATE_ID_KEY: torch.tensor([command.init_state_id])})
        tensordict = env.reset(request)
        if INIT_STATE_ID_KEY not in set(env.observation_spec.keys()):
            tensordict.pop(INIT_STATE_ID_KEY, None)  # a request is no state: it ends here
        self._observations.write_from(command.row, command.generation, tensordict)
        instruction = _instruction(tensordict.get(INSTRUCTION_KEY, ""), command.task)
        self._open[command.env_index] = command.task, tensordict, instruction
        return ResetDone(command.env_index, instruction)

    def step(self, command: Step) -> StepDone:
        """Execute one chunk; write its outcome and, if the rollout goes on, the next observation.

        Raises:
            RuntimeError: if the environment was not reset, or a row's page is not leased under its
                generation.
            ValueError: if it returns a reward or an observation that is not finite, or an
                observation of another shape or type than its spec's.
            TypeError: if its instruction is not a string.
        """
        rollout = self._open[command.env_index]
        if rollout is None:
            raise RuntimeError(
                f"Environment {command.env_index} must be reset before it is stepped."
            )
        task, tensordict, instruction = rollout
        env = self._envs[command.env_index, task]
        assert self._observations is not None and self._outcomes is not None, "reset() checks it"
        tensordict = env.step(tensordict.set(ACTION_CHUNK_KEY, self._chunks[command.row].clone()))
        following = tensordict.get("next")
        entries = dict(following.items())  # once for all: get() has a price of its own
        reward = float(entries["reward"].sum())
        if not math.isfinite(reward):
            raise ValueError(
                f"reward must be finite, got {reward} from a step of task {task!r}. Its simulator "
                "may have become unstable: end such an episode as a failure."
            )
        changed = _instruction(entries.get(INSTRUCTION_KEY, instruction), task)
        done = bool(entries["done"])
        terminated = bool(entries.get("terminated", done))
        success = bool(entries.get("success", terminated))
        is_pad = following[ACTION_IS_PAD_KEY].flatten()
        # A rollout that may take no further decision ends here, whether the environment agrees or
        # not: for the learner that is a truncation.
        is_over = done or command.next_row < 0
        truncated = is_over and not terminated
        outcome = (reward, is_over, terminated, truncated, success, is_pad.numpy())
        self._outcomes.write(command.row, command.generation, outcome)
        if is_over:
            self._open[command.env_index] = None
        else:
            self._observations.write_from(command.next_row, command.next_generation, following)
            self._open[command.env_index] = task, env.step_mdp(tensordict), changed
        num_env_steps = is_pad.numel() - int(is_pad.sum())
        new_instruction = None if changed == instruction else changed
        return StepDone(command.env_index, is_over, success, reward, num_env_steps, new_instruction)

    def close(self) -> None:
        """Close every environment."""
        for env in self._envs.values():
            if not env.is_closed:
                env.close()
        self._envs.clear()


def _instruction(text: Any, task: str) -> str:
    """What a rollout is asked to do.

    Raises:
        TypeError: if it is not a string.
    """
    if is_non_tensor(text):
        text = text.data
    if not isinstance(text, str):
        raise TypeError(
            f"{INSTRUCTION_KEY!r} must be a string, got {type(text).__name__} from the environment "
            f"of task {task!r}. Join or decode it there."
        )
    return text


class _EventSender:
    """Events of a worker, sent together when they are cheap."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._events: list[ResetDone | StepDone] = []
        self._spans: list[tuple[str, float, float]] = []
        self._until_s = 0.0

    def start(self) -> None:
        """The worker is busy from now on."""
        self._until_s = time.monotonic()

    def add(self, name: str, event: ResetDone | StepDone) -> None:
        """A command is done; ``name`` is that of the work in the timeline."""
        start_s, self._until_s = self._until_s, time.monotonic()
        self._events.append(event)
        if self._spans and self._spans[-1][0] == name:
            start_s = self._spans.pop()[1]
        self._spans.append((name, start_s, self._until_s))
        if self._until_s - self._spans[0][1] > _SEND_AFTER_S:
            self.send()

    def send(self) -> None:
        """Send what has not been sent, if there is any."""
        if self._events:
            self._connection.send(WorkerEvents(self._events, self._spans))
            self._events, self._spans = [], []


def _execute(commands: WorkerCommands, worker: EnvWorker, sender: _EventSender) -> None:
    sender.start()
    for step in commands.steps:
        sender.add("step", worker.step(step))
    for reset in commands.resets:
        sender.add("reset", worker.reset(reset))
    sender.send()


def run_env_worker(
    connection: Connection, pickled_factories: bytes, first_task: str, num_envs: int
) -> None:
    """Entry point of the worker process: build, describe, then serve until told to stop."""
    worker, sender = None, _EventSender(connection)
    try:
        worker = EnvWorker(cloudpickle.loads(pickled_factories), num_envs)
        connection.send(describe_env(worker.build(0, first_task)))
        while True:
            message = connection.recv()
            if isinstance(message, WorkerCommands):
                _execute(message, worker, sender)
            elif isinstance(message, UsePool):
                worker.use_pool(message.pool_view)
            elif isinstance(message, Stop):
                break
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the collector is gone
    except BaseException:
        with contextlib.suppress(OSError):
            sender.send()  # what went well, so that the failure is not put down to it
            connection.send(Failed(traceback.format_exc()))
        raise SystemExit(1) from None
    finally:
        if worker is not None:
            worker.close()
