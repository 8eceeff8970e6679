# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The environment worker: a process whose environments read chunks and write observations."""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import cloudpickle
import numpy as np
import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, is_non_tensor
from torchrl.data import Composite, NonTensor
from torchrl.data.tensor_specs import ContinuousBox
from torchrl.envs import EnvBase, MultiAction

from torchrl_dvla.data.schema import (
    ACTION_CHUNK_KEY,
    ACTION_IS_PAD_KEY,
    ACTION_MASK,
    DONE_KEY,
    INIT_STATE_ID_KEY,
    INSTRUCTION_KEY,
    OBSERVATION_KEY,
    REWARD_KEY,
    SUCCESS_KEY,
    TERMINATED_KEY,
    TRUNCATED_KEY,
    decision_layout,
)
from torchrl_dvla.memory import RowLayout, RowWriter, WorkerView
from torchrl_dvla.swimlane.messages import (
    EnvSpecs,
    Failed,
    Refused,
    RefusedError,
    Reset,
    ResetDone,
    Step,
    StepDone,
    Stop,
    UsePool,
    WorkerCommands,
    WorkerEvents,
)
from torchrl_dvla.validation import describe_error

__all__ = ["EnvWorker", "describe_env", "require_init_states", "run_env_worker"]

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

#: Of what a row holds. An action spec without bounds has this one, or infinity.
_LARGEST = float(np.finfo(np.float32).max)
_CPU = torch.device("cpu")

EnvFactories = Mapping[str, Callable[[], EnvBase]]


def describe_env(env: EnvBase) -> EnvSpecs:
    """Shapes of what ``env`` observes and executes, which a row has to hold.

    Args:
        env (EnvBase): an environment without batch dimensions that speaks the decision-level
            schema: its action is ``("vla_action", "chunk")`` ``[chunk, A]`` and one step of it is
            one decision.

    Raises:
        TypeError: if it is no TorchRL environment, or observes what no row can hold.
        ValueError: if it does not; the message names what is missing and what adds it.
    """
    if not isinstance(env, EnvBase):
        raise TypeError(
            f"create_env_fn must return a TorchRL environment, got {type(env).__name__}. Wrap "
            "one of gymnasium in torchrl_dvla.envs.ChunkEnv."
        )
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
    spec = env.full_action_spec[ACTION_CHUNK_KEY]
    if not 1 <= len(spec.shape) <= 2 or not spec.shape[-1] > 0 or not spec.dtype.is_floating_point:
        raise ValueError(
            f"{ACTION_CHUNK_KEY} must be floating point [chunk_size, action_dim], got "
            f"{list(spec.shape)} {spec.dtype}. Change the environment's action_spec."
        )
    _action_bounds(env)
    # MultiAction leaves the length of the chunk open in its spec; only the policy knows it then.
    chunk_size, action_dim = (-1, *spec.shape)[-2:]
    for name, spec in (("reward", env.full_reward_spec), ("done", env.full_done_spec)):
        if name not in set(spec.keys()) or (name == "done" and spec[name].shape.numel() != 1):
            raise ValueError(
                f"The environment must have one {name!r} at the root, got {spec}. Rename or reduce "
                "it by a transform: a rollout is that of one agent."
            )
    observed = env.observation_spec
    roots = set(observed.keys())
    paths = [_path(key) for key in observed.keys(True, True)]
    if masks := [p for p in paths if p[-1] == ACTION_MASK and p[0] != OBSERVATION_KEY]:
        raise ValueError(
            f"Action masks must lie under {OBSERVATION_KEY!r}, got {masks}. Append RenameTransform("
            "['action_mask'], [('observation', 'action_mask')]) and let the policy read them there."
        )
    for key, leaf in observed.items(True, True):
        if not isinstance(leaf, NonTensor) and (leaf.device or _CPU).type != "cpu":
            raise ValueError(
                f"create_env_fn must return an environment that observes on the CPU, where rows "
                f"are, got {key!r} on {leaf.device}. Append DeviceCastTransform('cpu')."
            )
    leaves = []
    node = observed[OBSERVATION_KEY] if OBSERVATION_KEY in roots else None
    for key, leaf in node.items(True, True) if isinstance(node, Composite) else ():
        nested = (OBSERVATION_KEY, *_path(key))
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
            "create_env_fn must return an environment with a group of tensors under "
            f"{OBSERVATION_KEY!r}, got {sorted(roots)}. See torchrl.data.vla for the schema."
        )
    RowLayout({key: (shape, dtype) for key, shape, dtype in leaves})  # refuses what no row holds
    _check_chunking(env)
    has_success = "success" in {*roots, *env.full_done_spec.keys()}
    return EnvSpecs(
        tuple(leaves),
        chunk_size,
        action_dim,
        has_success,
        has_instruction=INSTRUCTION_KEY in roots,
        has_init_states=INIT_STATE_ID_KEY in set(env.state_spec.keys()),
    )


def _path(key: NestedKey) -> tuple[str, ...]:
    return (key,) if isinstance(key, str) else key


def _action_bounds(env: EnvBase) -> tuple[np.ndarray, np.ndarray] | None:
    """Lower and upper bound of the actions; ``None`` without a finite one."""
    space = getattr(env.full_action_spec[ACTION_CHUNK_KEY], "space", None)
    if not isinstance(space, ContinuousBox):
        return None
    low, high = (bound.cpu().float().numpy() for bound in (space.low, space.high))
    if not (low <= high).all():
        raise ValueError(
            f"The bounds of action_spec must be low <= high, got {low.ravel()[:8].tolist()} and "
            f"{high.ravel()[:8].tolist()}. Correct them."
        )
    return (low, high) if low.max() > -_LARGEST or high.min() < _LARGEST else None


def _clip(chunk: torch.Tensor, bounds: tuple[np.ndarray, np.ndarray] | None) -> np.ndarray | None:
    """Clip a chunk in place; returns which of its actions were outside, if there is one."""
    if bounds is None:
        return None
    actions = chunk.numpy()
    clipped = actions.clip(*bounds)
    if (clipped == actions).all():
        return None
    outside: np.ndarray = (clipped != actions).any(-1)
    actions[:] = clipped
    return outside


def require_init_states(task: str, init_state_ids: Iterable[int], declared: bool) -> None:
    """Refuse numbered initial states of an environment that would never hear of them.

    A transform passes on at a reset what the environment's ``state_spec`` declares and nothing
    else: an id that is not ``declared`` is lost, and a sampled scene played in its place.

    Raises:
        ValueError: naming the task and the remedy.
    """
    asked = next((index for index in init_state_ids if index >= 0), None)
    if asked is not None and not declared:
        raise ValueError(
            f"The environment of task {task!r} must declare {INIT_STATE_ID_KEY!r} in its "
            f"state_spec to start from init state {asked}. Set self.state_spec = "
            "Composite(init_state_id=Unbounded((1,), dtype=torch.int64)) in it and return the id "
            "from _reset, or ask for sampled initial states (-1)."
        )


@dataclass(eq=False)
class _OpenRollout:
    """A rollout under way."""

    task: str
    env: EnvBase
    #: What its next step starts from.
    tensordict: TensorDictBase
    instruction: str
    #: What they have, every step returns.
    specs: EnvSpecs
    num_decisions: int = 0


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

    What no learner may see ends its rollout alone, by a
    :class:`~torchrl_dvla.swimlane.messages.RefusedError`. Actions beyond the bounds of the action
    spec are clipped to them, as the controllers of robots do, and counted.

    Args:
        factories (Mapping): environment factory by task name. An environment is built when its task
            is first asked for, and kept.
        num_envs (int): rollouts that may be open at once.
    """

    def __init__(self, factories: EnvFactories, num_envs: int) -> None:
        self._factories = factories
        self._envs: dict[tuple[int, str], tuple[EnvBase, EnvSpecs]] = {}
        self._bounds: dict[str, tuple[np.ndarray, np.ndarray] | None] = {}
        self._open: list[_OpenRollout | None] = [None] * num_envs
        self._chunks = torch.empty(0)
        self._layout: Mapping[NestedKey, Any] = {}
        #: Specs that are known to fit the rows.
        self._fitting: set[EnvSpecs] = set()
        self._observations: RowWriter | None = None
        self._outcomes: RowWriter | None = None

    def build(self, env_index: int, task: str) -> tuple[EnvBase, EnvSpecs]:
        """The environment of ``env_index`` for ``task`` and its specs, built at most once."""
        key = (env_index, task)
        if key not in self._envs:
            env = self._factories[task]()
            self._envs[key] = env, describe_env(env)  # that of every task is checked
        return self._envs[key]

    def use_pool(self, view: WorkerView) -> None:
        """Take the rows that chunks are read from and observations and outcomes written to."""
        self._layout, self._chunks = view.layout, view.rows.get(ACTION_CHUNK_KEY)
        self._fitting.clear()
        keys = [key for key in view.layout if isinstance(key, tuple) and key[0] == OBSERVATION_KEY]
        self._observations = RowWriter(view, keys)
        self._outcomes = RowWriter(view, _OUTCOME_KEYS)

    def reset(self, command: Reset) -> ResetDone:
        """Start a rollout and write its first observation.

        Seeding before every reset is what lets all rollouts of a group share one scene.

        Raises:
            RefusedError: if the environment starts from another initial state than the one it was
                asked for, if its specs are not those that rows were made for, or as :meth:`step`.
        """
        if self._observations is None:
            raise RuntimeError("use_pool must be called before reset: there is no row to write to.")
        env, specs = self.build(command.env_index, command.task)
        if command.task not in self._bounds:
            self._bounds[command.task] = _action_bounds(env)
        # Not static, it would make a generator to draw a next seed that nobody asks for.
        env.set_seed(command.seed, static_seed=True)
        request = TensorDict({INIT_STATE_ID_KEY: torch.tensor([command.init_state_id])})
        tensordict = env.reset(request)
        rollout = _OpenRollout(command.task, env, tensordict, "", specs)
        try:
            if specs not in self._fitting:
                _require_fit(specs, self._layout)
                self._fitting.add(specs)
            if specs.has_init_states:
                _require_init_state(int(tensordict[INIT_STATE_ID_KEY]), command.init_state_id)
            else:
                require_init_states(command.task, [command.init_state_id], declared=False)
                tensordict.pop(INIT_STATE_ID_KEY)  # a request is no state: it ends here
            self._observations.write_from(command.row, command.generation, tensordict)
            rollout.instruction = _instruction(tensordict, rollout)
        except (KeyError, TypeError, ValueError) as error:
            raise self._refuse(error, command.env_index, rollout) from error
        self._open[command.env_index] = rollout
        return ResetDone(command.env_index, rollout.instruction, specs.has_success)

    def step(self, command: Step) -> StepDone:
        """Execute one chunk; write its outcome and, if the rollout goes on, the next observation.

        Raises:
            RuntimeError: if the environment was not reset, or a row's page is not leased under its
                generation.
            RefusedError: if it returns a reward or an observation that is not finite, an
                observation of another shape or type than its spec's, no ``"success"`` although its
                specs have one, or an instruction that is no string; the rollout is over then.
        """
        rollout = self._open[command.env_index]
        if rollout is None:
            raise RuntimeError(
                f"Environment {command.env_index} must be reset before it is stepped."
            )
        rollout.num_decisions += 1
        chunk = self._chunks[command.row].clone()
        outside = _clip(chunk, self._bounds[rollout.task])
        try:
            tensordict = rollout.env.step(rollout.tensordict.set(ACTION_CHUNK_KEY, chunk))
        except (AttributeError, RuntimeError) as error:
            frames = {frame.name for frame in traceback.extract_tb(error.__traceback__)}
            if frames.isdisjoint({"_step_proc_data", "_complete_done"}):
                raise  # the environment's own; there, TorchRL looks at what it returned
            message = (
                "'reward', 'done', 'terminated' and 'truncated' must have the shape of their "
                f"specs, got another, or none: {error}."
            )
            raise self._refuse(ValueError(message), command.env_index, rollout) from error
        try:
            event = self._record(command, rollout, tensordict)
        except (KeyError, TypeError, ValueError) as error:
            raise self._refuse(error, command.env_index, rollout) from error
        if outside is not None:
            event = event._replace(num_clipped=int(outside[: event.num_env_steps].sum()))
        if event.done:
            self._open[command.env_index] = None
        else:
            rollout.tensordict = rollout.env.step_mdp(tensordict)
        return event

    def _record(self, command: Step, rollout: _OpenRollout, tensordict: TensorDictBase) -> StepDone:
        """Write what a step returned, unless no learner may see it."""
        assert self._observations is not None and self._outcomes is not None, "reset() checks it"
        following = tensordict.get("next")
        entries = dict(following.items())  # once for all: get() has a price of its own
        paid = entries["reward"]
        is_real = isinstance(paid, torch.Tensor) and not paid.is_complex()
        reward = float(paid.sum()) if is_real else float("nan")
        if not abs(reward) < _LARGEST:
            raise ValueError(
                f"reward must be finite, got {paid!r:.99}. The simulator may have become unstable: "
                "end such an episode as a failure."
            )
        changed = _instruction(entries, rollout)
        done = _flag(entries, "done")
        terminated = _flag(entries, "terminated") if "terminated" in entries else done
        has_success = rollout.specs.has_success or "success" in entries
        success = _flag(entries, "success") if has_success else terminated
        is_pad = entries[ACTION_IS_PAD_KEY].flatten()
        if is_pad.dtype is not torch.bool or is_pad.shape != self._chunks.shape[1:2]:
            raise ValueError(
                f"{ACTION_IS_PAD_KEY!r} must be {[*self._chunks.shape[1:2]]} torch.bool, got "
                f"{list(is_pad.shape)} {is_pad.dtype}. Mark each env step of the chunk."
            )
        # A rollout that may take no further decision ends here, whether the environment agrees or
        # not: for the learner that is a truncation.
        is_over = done or command.next_row < 0
        truncated = is_over and not terminated
        outcome = (reward, is_over, terminated, truncated, success, is_pad.numpy())
        self._outcomes.write(command.row, command.generation, outcome)
        if not is_over:
            self._observations.write_from(command.next_row, command.next_generation, following)
        num_env_steps = is_pad.numel() - int(is_pad.sum())
        new_instruction = None if changed == rollout.instruction else changed
        rollout.instruction = changed
        return StepDone(command.env_index, is_over, success, reward, num_env_steps, new_instruction)

    def _refuse(self, error: Exception, env_index: int, rollout: _OpenRollout) -> RefusedError:
        """End a rollout for what its environment returned."""
        self._open[env_index] = None
        when = f"step {rollout.num_decisions}" if rollout.num_decisions else "the reset"
        return RefusedError(
            f"{error.args[0]} It came from environment {env_index} of task {rollout.task!r}, at "
            f"{when} of the rollout."
        )

    def close(self) -> None:
        """Close every environment."""
        for env, _ in self._envs.values():
            if not env.is_closed:
                env.close()
        self._envs.clear()


def _instruction(entries: Any, rollout: _OpenRollout) -> str:
    """What a rollout is asked to do.

    Raises:
        TypeError: if it is not a string.
    """
    text = entries.get(
        INSTRUCTION_KEY, None if rollout.specs.has_instruction else rollout.instruction
    )
    if is_non_tensor(text):
        text = getattr(text, "data", text)  # a stack of several has none
    if not isinstance(text, str):
        raise TypeError(
            f"{INSTRUCTION_KEY!r} must be a string, got {type(text).__name__}. Join or decode "
            "it in the environment."
        )
    return str(text)


def _flag(entries: Mapping[str, Any], name: str) -> bool:
    flag = entries.get(name)
    if not isinstance(flag, torch.Tensor) or flag.dtype is not torch.bool or flag.numel() != 1:
        raise ValueError(
            f"{name!r} must be one torch.bool, got {flag!r:.99}. Return [True] or [False]."
        )
    return bool(flag)


def _require_fit(specs: EnvSpecs, layout: Mapping[NestedKey, Any]) -> None:
    """Require an environment to observe and execute what rows hold, whatever its task."""
    chunk_size = layout[ACTION_CHUNK_KEY][0][0] if specs.chunk_size == -1 else specs.chunk_size
    observed = {key: (shape, dtype) for key, shape, dtype in specs.observation}
    row = decision_layout(observed, chunk_size=chunk_size, action_dim=specs.action_dim)
    expected = [key for key in layout if key[0] == OBSERVATION_KEY]
    for key in (*observed, ACTION_CHUNK_KEY, ACTION_IS_PAD_KEY, *expected):
        if row.get(key) != layout.get(key):
            raise ValueError(
                f"All environments must have the first one's specs, {key} {layout.get(key)}, got "
                f"{row.get(key)}. Make create_env_fn deterministic; make those of all tasks "
                "alike, or train tasks apart."
            )


def _require_init_state(played: int, wanted: int) -> None:
    if 0 <= wanted != played:
        raise ValueError(
            f"{INIT_STATE_ID_KEY!r} must be the {wanted} that was asked for, got {played} from the "
            "reset. What is around the environment must pass the tensordict of a reset on."
        )


class _EventSender:
    """Events of a worker, sent together when they are cheap."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._events: list[ResetDone | StepDone | Refused] = []
        self._spans: list[tuple[str, float, float]] = []
        self._until_s = 0.0

    def start(self) -> None:
        """The worker is busy from now on."""
        self._until_s = time.monotonic()

    def add(self, name: str, event: ResetDone | StepDone | Refused) -> None:
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


def _answer(execute: Callable[[Any], Any], command: Step | Reset) -> Any:
    """The event of a command; what is refused ends its rollout, not the worker."""
    try:
        return execute(command)
    except RefusedError as error:
        return Refused(command.env_index, str(error))


def _execute(commands: WorkerCommands, worker: EnvWorker, sender: _EventSender) -> None:
    sender.start()
    for step in commands.steps:
        sender.add("step", _answer(worker.step, step))
    for reset in commands.resets:
        sender.add("reset", _answer(worker.reset, reset))
    sender.send()


def run_env_worker(
    connection: Connection, pickled_factories: bytes, first_task: str, num_envs: int
) -> None:
    """Entry point of the worker process: build, describe, then serve until told to stop."""
    worker, sender = None, _EventSender(connection)
    try:
        worker = EnvWorker(cloudpickle.loads(pickled_factories), num_envs)
        connection.send(worker.build(0, first_task)[1])
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
    except BaseException as error:
        with contextlib.suppress(OSError):
            sender.send()  # what went well, so that the failure is not put down to it
            connection.send(Failed(describe_error(error)))
        raise SystemExit(1) from None
    finally:
        if worker is not None:
            worker.close()
