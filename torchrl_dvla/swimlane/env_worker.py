# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The environment worker: a process whose environments read chunks and write observations."""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, TypeVar

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
    INIT_STATE_HASH_KEY,
    INIT_STATE_ID_KEY,
    INSTRUCTION_KEY,
    NO_HASH,
    OBSERVATION_KEY,
    REWARD_KEY,
    SEED_KEY,
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
#: Remedy for an environment that is chunked by other means than ours.
_SINGLE_STEPS = (
    "Return the single-step environment, which the collector wraps in torchrl_dvla.envs.ChunkEnv, "
    "without MultiAction."
)

EnvFactories = Mapping[str, Callable[[], EnvBase]]
_Command = TypeVar("_Command", Step, Reset)


def describe_env(env: EnvBase) -> EnvSpecs:
    """Shapes of what ``env`` observes and executes, which a row has to hold.

    Args:
        env (EnvBase): an environment that speaks the decision-level schema: its action is
            ``("vla_action", "chunk")`` ``[chunk, A]`` and one step of it is one decision; or one of
            batch size ``[N]``, whose step is a decision of ``N`` rollouts.

    Raises:
        TypeError: if it is no TorchRL environment, or observes what no row can hold.
        ValueError: if it does not; the message names what is missing and what adds it.
    """
    if not isinstance(env, EnvBase):
        raise TypeError(
            f"create_env_fn must return a TorchRL environment, got {type(env).__name__}. Wrap "
            "one of gymnasium in torchrl_dvla.envs.ChunkEnv."
        )
    batch, num_dims = env.batch_size, len(env.batch_size)
    if num_dims > 1 or not batch.numel():
        raise ValueError(
            "create_env_fn must return environments with at most one batch dimension, got "
            f"batch_size {list(batch)}. Flatten it to [N]."
        )
    if ACTION_CHUNK_KEY not in env.action_keys:
        raise ValueError(
            f"create_env_fn must return an environment whose action is {ACTION_CHUNK_KEY} "
            f"[chunk_size, action_dim], got actions {list(env.action_keys)}. Wrap a single-step "
            "environment in torchrl_dvla.envs.ChunkEnv."
        )
    spec = env.full_action_spec[ACTION_CHUNK_KEY]
    shape = spec.shape[num_dims:]
    if not 1 <= len(shape) <= 2 or not shape[-1] > 0 or not spec.dtype.is_floating_point:
        raise ValueError(
            f"{ACTION_CHUNK_KEY} must be floating point [chunk_size, action_dim], got "
            f"{list(shape)} {spec.dtype}. Change the environment's action_spec."
        )
    bounds = _action_bounds(env)
    # MultiAction leaves the length of the chunk open in its spec; only the policy knows it then.
    chunk_size, action_dim = (-1, *shape)[-2:]
    for name, spec in (("reward", env.full_reward_spec), ("done", env.full_done_spec)):
        is_there = name in set(spec.keys())
        if not is_there or (name == "done" and spec[name].shape[num_dims:].numel() != 1):
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
        # The frames of a batch go to the rows in one copy from wherever they are.
        if not batch and not isinstance(leaf, NonTensor) and (leaf.device or _CPU).type != "cpu":
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
        leaves.append((nested, tuple(leaf.shape[num_dims:]), leaf.dtype))
    if not leaves:
        raise ValueError(
            "create_env_fn must return an environment with a group of tensors under "
            f"{OBSERVATION_KEY!r}, got {sorted(roots)}. {_SINGLE_STEPS}"
        )
    RowLayout({key: (shape, dtype) for key, shape, dtype in leaves})  # refuses what no row holds
    _check_chunking(env)
    states = set(env.state_spec.keys())
    if batch and SEED_KEY not in states:
        raise ValueError(
            f"An environment of batch size {list(batch)} must declare {SEED_KEY!r} in its "
            "state_spec, got none: the rollouts of a group start in one scene, wherever in a batch "
            f"they are played. Set self.state_spec = Composite({SEED_KEY}=Unbounded(({batch[0]}, "
            "1), dtype=torch.int64), shape=self.batch_size), and in _reset begin each episode that "
            "is reset from its seed in the tensordict; of a SerialEnv, make "
            "torchrl_dvla.envs.ChunkEnv(SerialEnv(...)), or ask for more envs_per_worker instead."
        )
    has_success = "success" in {*roots, *env.full_done_spec.keys()}
    return EnvSpecs(
        tuple(leaves),
        chunk_size,
        action_dim,
        has_success,
        has_instruction=INSTRUCTION_KEY in roots,
        has_init_states=INIT_STATE_ID_KEY in states,
        num_rollouts=batch.numel(),
        action_bounds=bounds and (float(bounds[0].min()), float(bounds[1].max())),
    )


def _path(key: NestedKey) -> tuple[str, ...]:
    return (key,) if isinstance(key, str) else key


def _action_bounds(env: EnvBase) -> tuple[np.ndarray, np.ndarray] | None:
    """Lower and upper bound of the actions; ``None`` without a finite one."""
    spec = env.full_action_spec[ACTION_CHUNK_KEY]
    space = getattr(spec, "space", None)
    if not isinstance(space, ContinuousBox):
        return None
    shape = (*env.batch_size, -1, spec.shape[-1])  # a chunk of open length has one bound for all
    low, high = (bound.cpu().float().reshape(shape).numpy() for bound in (space.low, space.high))
    if not (low <= high).all():
        raise ValueError(
            f"The bounds of action_spec must be low <= high, got {low.ravel()[:8].tolist()} and "
            f"{high.ravel()[:8].tolist()}. Correct them."
        )
    return (low, high) if low.max() > -_LARGEST or high.min() < _LARGEST else None


def _clip(chunk: torch.Tensor, bounds: tuple[np.ndarray, np.ndarray] | None) -> np.ndarray | None:
    """Clip chunks in place; returns which of their actions were outside, if there is one."""
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
class _BuiltEnv:
    """An environment, between two of its steps."""

    env: EnvBase
    specs: EnvSpecs
    #: Lower and upper bound of its actions, if they are finite.
    bounds: tuple[np.ndarray, np.ndarray] | None
    #: What its next step starts from.
    tensordict: TensorDictBase | None = None


@dataclass(eq=False)
class _OpenRollout:
    """A rollout under way."""

    task: str
    built: _BuiltEnv
    instruction: str = ""
    num_decisions: int = 0
    #: Which actions of the chunk under way were out of bounds ``[chunk]``, if any was.
    clipped: np.ndarray | None = None


def _check_chunking(env: EnvBase) -> None:
    """Require that env steps which were not executed are marked, and all others rewarded."""
    if ACTION_IS_PAD_KEY not in env.observation_spec:
        raise ValueError(
            f"create_env_fn must return an environment that observes {ACTION_IS_PAD_KEY!r} "
            "[chunk_size], True for env steps of the chunk that were not executed, got none: "
            f"actions after the end of an episode would be learned from. {_SINGLE_STEPS}"
        )
    if any(isinstance(part, MultiAction) and not part.stack_rewards for part in env.modules()):
        raise ValueError(
            "stack_rewards of MultiAction must be True, got False: of a chunk it keeps the last "
            f"env step's reward alone. {_SINGLE_STEPS}"
        )


class EnvWorker:
    """Environments of one worker, each in the middle of at most one rollout; batched ones of ``N``.

    It executes one command after the other and writes the rows that the command names, by
    :class:`~torchrl_dvla.memory.RowWriter`: a row whose page is not leased under the command's
    generation is refused, and the worker fails. Commands for one batched environment are executed
    at once. Its other rollouts take no step (TorchRL's ``"_step"`` says so); if it cannot leave
    them out, they execute zeros within the bounds, and what becomes of it is ignored.

    What no learner may see ends its rollout alone: its event is a
    :class:`~torchrl_dvla.swimlane.messages.Refused`. Actions beyond the bounds of the action spec
    are clipped to them, as the controllers of robots do, and counted.

    Args:
        factories (Mapping): environment factory by task name. An environment is built when its task
            is first asked for, and kept.
        num_envs (int): environments of one task.
        max_tasks (int, optional): tasks of which each of these environments is kept; that of the
            task played last is closed before another's is built, since tasks come in turn.
            Defaults to all.
    """

    def __init__(
        self, factories: EnvFactories, num_envs: int, max_tasks: int | None = None
    ) -> None:
        self._factories = factories
        self._num_envs, self._num_rollouts = num_envs, 1
        self._max_tasks = max_tasks or len(factories)
        #: Those used last come last.
        self._envs: dict[tuple[int, str], _BuiltEnv] = {}
        self._open: list[_OpenRollout | None] = [None] * num_envs
        self._chunks = torch.empty(0)
        self._layout: Mapping[NestedKey, Any] = {}
        #: Specs that are known to fit the rows.
        self._fitting: set[EnvSpecs] = set()
        self._observations: RowWriter | None = None
        self._outcomes: RowWriter | None = None

    def build(self, index: int, task: str) -> _BuiltEnv:
        """Environment ``index`` for ``task``, built if it is not there."""
        key = (index, task)
        built = self._envs.pop(key, None)
        if built is None:
            self._make_room(index)
            env = self._factories[task]()
            specs = describe_env(env)  # that of every task is checked
            built = _BuiltEnv(env, specs, _action_bounds(env))
        self._envs[key] = built
        return built

    def _make_room(self, index: int) -> None:
        """Close what is more than ``max_tasks`` allow, but for what a rollout is open in."""
        in_use = {id(rollout.built) for rollout in self._open if rollout is not None}
        kept = [key for key in self._envs if key[0] == index]
        idle = [key for key in kept if id(self._envs[key]) not in in_use]
        # in turn, the one just played is asked for last
        for key in idle[::-1][: max(0, len(kept) + 1 - self._max_tasks)]:
            self._close(key)

    def use_pool(self, view: WorkerView, num_rollouts: int = 1) -> None:
        """Take the rows that chunks are read from and observations and outcomes written to.

        Args:
            view (WorkerView): the rows.
            num_rollouts (int): rollouts of each environment.
        """
        self._layout, self._chunks = view.layout, view.rows.get(ACTION_CHUNK_KEY)
        self._fitting.clear()
        self._num_rollouts = num_rollouts
        self._open = [None] * (self._num_envs * num_rollouts)
        keys = [key for key in view.layout if isinstance(key, tuple) and key[0] == OBSERVATION_KEY]
        self._observations = RowWriter(view, keys)
        self._outcomes = RowWriter(view, _OUTCOME_KEYS)

    def together(self, commands: Iterable[_Command]) -> Iterable[list[_Command]]:
        """Commands by environment: those that one call of it executes."""
        found: dict[tuple[int, str], list[_Command]] = {}
        for command in commands:
            task = command.task if isinstance(command, Reset) else self._rollout(command).task
            found.setdefault((command.env_index // self._num_rollouts, task), []).append(command)
        return found.values()

    def reset(self, commands: Sequence[Reset]) -> list[ResetDone | Refused]:
        """Start rollouts in one environment and write their first observations.

        Seeding before every reset is what lets all rollouts of a group share one scene. It is
        refused if the environment starts from another initial state than the one it was asked for,
        if its specs are not those that rows were made for, or as :meth:`step`.
        """
        if self._observations is None:
            raise RuntimeError("use_pool must be called before reset: there is no row to write to.")
        first = commands[0]
        built = self.build(first.env_index // self._num_rollouts, first.task)
        env, specs = built.env, built.specs
        for command in commands:
            self._open[command.env_index] = _OpenRollout(command.task, built)
        try:
            if specs not in self._fitting:
                _require_fit(specs, self._layout, self._num_rollouts)
                self._fitting.add(specs)
            if not specs.has_init_states:
                ids = [command.init_state_id for command in commands]
                require_init_states(first.task, ids, declared=False)
        except ValueError as error:
            return [self._refuse(error, command) for command in commands]
        index = self._index(built, commands)
        if index is None:
            # Not static, it would make a generator to draw a next seed that nobody asks for.
            env.set_seed(first.seed, static_seed=True)
            request = TensorDict({INIT_STATE_ID_KEY: torch.tensor([first.init_state_id])})
        else:
            request = _partial_reset(built, commands, index)
        built.tensordict = env.reset(request)
        if not specs.has_init_states:
            built.tensordict.pop(INIT_STATE_ID_KEY)  # a request is no state: it ends here
        return self._events(self._record_reset, commands, built.tensordict, index)

    def step(self, commands: Sequence[Step]) -> list[StepDone | Refused]:
        """Execute a chunk each of rollouts in one environment.

        Its outcome is written and, if the rollout goes on, the next observation. Refused is a
        reward or an observation that is not finite, an observation of another shape or type than
        its spec's, no ``"success"`` although its specs have one, or an instruction that is no
        string; the rollout is over then.

        Raises:
            RuntimeError: if a rollout was not reset, or a row's page is not leased under its
                generation.
        """
        rollouts = [self._rollout(command) for command in commands]
        for rollout in rollouts:
            rollout.num_decisions += 1
        built = rollouts[0].built
        index = self._index(built, commands)
        tensordict = built.tensordict
        assert tensordict is not None, "an open rollout was reset"
        if index is None:
            chunk = self._chunks[commands[0].row].clone()
        else:
            chunk = torch.zeros(self._num_rollouts, *self._chunks.shape[1:])
            chunk[index] = self._chunks[[command.row for command in commands]]
            if len(index) < self._num_rollouts:
                mask = torch.zeros(self._num_rollouts, dtype=torch.bool)
                mask[index] = True
                tensordict = tensordict.copy().set("_step", mask)
        outside = _clip(chunk, built.bounds)
        for number, rollout in enumerate(rollouts):
            at = ... if index is None else index[number]
            rollout.clipped = None if outside is None else outside[at]
        try:
            tensordict = built.env.step(tensordict.set(ACTION_CHUNK_KEY, chunk))
        except (AttributeError, RuntimeError) as error:
            frames = {frame.name for frame in traceback.extract_tb(error.__traceback__)}
            if frames.isdisjoint({"_step_proc_data", "_complete_done"}):
                raise  # the environment's own; there, TorchRL looks at what it returned
            message = (
                "'reward', 'done', 'terminated' and 'truncated' must have the shape of their "
                f"specs, got another, or none: {error}."
            )
            return [self._refuse(ValueError(message), command) for command in commands]
        events = self._events(self._record_step, commands, tensordict.get("next"), index)
        if index is not None or self._open[commands[0].env_index] is not None:
            tensordict.pop("_step", None)
            built.tensordict = built.env.step_mdp(tensordict)
        return events

    def _rollout(self, command: Step | Reset) -> _OpenRollout:
        rollout = self._open[command.env_index]
        if rollout is None:
            raise RuntimeError(
                f"Environment {command.env_index} must be reset before it is stepped."
            )
        return rollout

    def _index(self, built: _BuiltEnv, commands: Sequence[Step | Reset]) -> list[int] | None:
        """Entries of the batch that commands are for; none of an environment without a batch."""
        if not built.env.batch_size:
            return None
        return [command.env_index % self._num_rollouts for command in commands]

    # -- what it returned -----------------------------------------------------------------------

    def _events(
        self,
        record: Callable[[Sequence[Any], TensorDictBase, list[int] | None], list[Any]],
        commands: Sequence[Step | Reset],
        tensordict: TensorDictBase,
        index: list[int] | None,
    ) -> list[Any]:
        """Events of what was recorded: of all commands at once, or one by one if any is refused."""
        try:
            return record(commands, tensordict, index)
        except (KeyError, TypeError, ValueError) as error:
            if index is None:
                return [self._refuse(error, commands[0])]
        events = []
        for command, at in zip(commands, index, strict=True):
            events += self._events(record, [command], tensordict[at], None)
        return events

    def _record_reset(
        self, commands: Sequence[Reset], tensordict: TensorDictBase, index: list[int] | None
    ) -> list[ResetDone]:
        """Write first observations, unless no learner may see them."""
        assert self._observations is not None, "reset() checks it"
        rollouts = [self._rollout(command) for command in commands]
        specs = rollouts[0].built.specs
        if specs.has_init_states:
            played = tensordict[INIT_STATE_ID_KEY].flatten().tolist()
            for command, at in zip(commands, index or [0], strict=True):
                _require_init_state(played[at], command.init_state_id)
        rows = _rows(((command.row, command.generation) for command in commands), index)
        self._observations.write_from(*rows, tensordict, index)
        texts = _instructions(tensordict, rollouts, index)
        for rollout, text in zip(rollouts, texts, strict=True):
            rollout.instruction = text
        hashes = _hashes(tensordict, index)
        return [
            ResetDone(command.env_index, text, specs.has_success, number)
            for command, text, number in zip(commands, texts, hashes, strict=True)
        ]

    def _record_step(
        self, commands: Sequence[Step], following: TensorDictBase, index: list[int] | None
    ) -> list[StepDone]:
        """Write what a step returned, unless no learner may see it."""
        assert self._observations is not None and self._outcomes is not None, "reset() checks it"
        rollouts = [self._rollout(command) for command in commands]
        entries = dict(following.items())  # once for all: get() has a price of its own
        rewards = _rewards(entries["reward"], index)
        texts = _instructions(entries, rollouts, index)
        done = self._flags(entries, "done", index)
        terminated = self._flags(entries, "terminated", index) if "terminated" in entries else done
        has_success = rollouts[0].built.specs.has_success or "success" in entries
        success = self._flags(entries, "success", index) if has_success else terminated
        is_pad = self._padding(entries[ACTION_IS_PAD_KEY], index)
        num_env_steps = (~is_pad).sum(-1).tolist()
        # A rollout that may take no further decision ends here, whether the environment agrees or
        # not: for the learner that is a truncation.
        is_over = [ends or command.next_row < 0 for ends, command in zip(done, commands)]
        truncated = [ends and not by_itself for ends, by_itself in zip(is_over, terminated)]
        columns = (rewards, is_over, terminated, truncated, success, is_pad)
        values = columns if index is not None else [column[0] for column in columns]
        rows = _rows(((command.row, command.generation) for command in commands), index)
        self._outcomes.write(*rows, values)
        going_on = [number for number, ends in enumerate(is_over) if not ends]
        if going_on:
            following_rows = (commands[number][-2:] for number in going_on)
            of_them = None if index is None else [index[number] for number in going_on]
            self._observations.write_from(*_rows(following_rows, index), following, of_them)
        events = []
        for number, (command, rollout) in enumerate(zip(commands, rollouts, strict=True)):
            text, env_index = texts[number], command.env_index
            clipped = rollout.clipped
            events.append(
                StepDone(
                    env_index,
                    is_over[number],
                    success[number],
                    rewards[number],
                    num_env_steps[number],
                    None if text == rollout.instruction else text,
                    0 if clipped is None else int((clipped & ~is_pad[number]).sum()),
                )
            )
            rollout.instruction = text
            if is_over[number]:
                self._open[env_index] = None
        return events

    def _flags(self, entries: Mapping[str, Any], name: str, index: list[int] | None) -> list[bool]:
        flag = entries.get(name)
        size = 1 if index is None else self._num_rollouts
        if not isinstance(flag, torch.Tensor) or (flag.dtype, flag.numel()) != (torch.bool, size):
            raise ValueError(
                f"{name!r} must be one torch.bool, got {flag!r:.99}. Return [True] or [False]."
            )
        flags: list[bool] = flag.flatten().tolist()
        return flags if index is None else [flags[at] for at in index]

    def _padding(self, is_pad: torch.Tensor, index: list[int] | None) -> np.ndarray:
        """Env steps of each chunk that were not executed ``[n, chunk]``."""
        chunk_size = self._chunks.shape[1]
        size = 1 if index is None else self._num_rollouts
        if is_pad.dtype is not torch.bool or is_pad.numel() != size * chunk_size:
            raise ValueError(
                f"{ACTION_IS_PAD_KEY!r} must be {[chunk_size]} torch.bool, got "
                f"{list(is_pad.shape)} {is_pad.dtype}. Mark each env step of the chunk."
            )
        flags: np.ndarray = is_pad.cpu().numpy().reshape(size, chunk_size)
        return flags if index is None else flags[index]

    def _refuse(self, error: Exception, command: Step | Reset) -> Refused:
        """End a rollout for what its environment returned."""
        rollout = self._rollout(command)
        self._open[command.env_index] = None
        when = f"step {rollout.num_decisions}" if rollout.num_decisions else "the reset"
        number, at = divmod(command.env_index, self._num_rollouts)
        where = f"rollout {at} of environment" if self._num_rollouts > 1 else "environment"
        reason = (
            f"{error.args[0]} It came from {where} {number} of task {rollout.task!r}, at {when} of "
            "the rollout."
        )
        return Refused(command.env_index, reason)

    def close(self) -> None:
        """Close every environment."""
        for key in list(self._envs):
            self._close(key)

    def _close(self, key: tuple[int, str]) -> None:
        # TorchRL's is_closed is no guide: it is True of many that are open.
        self._envs.pop(key).env.close(raise_if_closed=False)


def _partial_reset(built: _BuiltEnv, commands: Sequence[Reset], index: list[int]) -> TensorDictBase:
    """What resets these rollouts of a batched environment alone.

    The first time it resets all, into a scene that it was asked for.
    """
    size = (*built.env.batch_size, 1)
    seeds = torch.full(size, commands[0].seed)
    seeds[index, 0] = torch.tensor([command.seed for command in commands])
    ids = torch.full(size, commands[0].init_state_id)
    ids[index, 0] = torch.tensor([command.init_state_id for command in commands])
    request = TensorDict(
        {SEED_KEY: seeds, INIT_STATE_ID_KEY: ids}, built.env.batch_size, device=built.env.device
    )
    if built.tensordict is None:
        return request
    is_reset = torch.zeros(size, dtype=torch.bool)
    is_reset[index] = True
    return built.tensordict.update(request).set("_reset", is_reset)


def _rows(rows: Iterable[tuple[int, int]], index: list[int] | None) -> tuple[Any, Any]:
    """Row and generation; of a batch two lists."""
    if index is None:
        return next(iter(rows))
    numbers, generations = zip(*rows, strict=True)
    return list(numbers), list(generations)


def _rewards(paid: Any, index: list[int] | None) -> list[float]:
    rewards = [float("nan")]
    if isinstance(paid, torch.Tensor) and not paid.is_complex():
        rewards = paid.reshape(1 if index is None else len(paid), -1).sum(-1).tolist()
    rewards = rewards if index is None or len(rewards) == 1 else [rewards[at] for at in index]
    if not all(abs(reward) < _LARGEST for reward in rewards):
        raise ValueError(
            f"reward must be finite, got {paid!r:.99}. The simulator may have become unstable: "
            "end such an episode as a failure."
        )
    return rewards


def _instructions(
    entries: Any, rollouts: Sequence[_OpenRollout], index: list[int] | None
) -> list[str]:
    """What each rollout is asked to do.

    Raises:
        TypeError: if it is not a string.
    """
    text = entries.get(INSTRUCTION_KEY, None)
    if text is None and not rollouts[0].built.specs.has_instruction:
        return [rollout.instruction for rollout in rollouts]
    if is_non_tensor(text):
        text = getattr(text, "data", text)  # a stack of several has none
    if index is not None and is_non_tensor(text):
        texts = text.tolist()
        texts = [texts[at] for at in index]
    else:
        texts = [text] * len(rollouts)
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(
                f"{INSTRUCTION_KEY!r} must be a string, got {type(text).__name__}. Join or decode "
                "it in the environment."
            )
    return texts


def _hashes(entries: Any, index: list[int] | None) -> list[int]:
    """What each rollout starts from, as far as the environment says it."""
    found = entries.get(INIT_STATE_HASH_KEY, None)
    if found is None:
        return [NO_HASH] * len(index or [0])
    numbers = found.flatten().tolist()
    return [int(numbers[at]) for at in index or [0]]


def _require_fit(specs: EnvSpecs, layout: Mapping[NestedKey, Any], num_rollouts: int) -> None:
    """Require an environment to observe and execute what rows hold, whatever its task."""
    if specs.num_rollouts != num_rollouts:
        raise ValueError(
            f"All environments must have the first one's batch size, {num_rollouts}, got "
            f"{specs.num_rollouts}. Make create_env_fn deterministic; give those of all tasks one "
            "size."
        )
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

    def add(self, name: str, events: Sequence[ResetDone | StepDone | Refused]) -> None:
        """Commands are done; ``name`` is that of the work in the timeline."""
        start_s, self._until_s = self._until_s, time.monotonic()
        self._events += events
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
    for steps in worker.together(commands.steps):
        sender.add("step", worker.step(steps))
    for resets in worker.together(commands.resets):
        sender.add("reset", worker.reset(resets))
    sender.send()


def run_env_worker(
    connection: Connection,
    pickled_factories: bytes,
    first_task: str,
    num_envs: int,
    max_tasks: int | None = None,
) -> None:
    """Entry point of the worker process: build, describe, then serve until told to stop."""
    worker, sender = None, _EventSender(connection)
    try:
        worker = EnvWorker(cloudpickle.loads(pickled_factories), num_envs, max_tasks)
        connection.send(worker.build(0, first_task).specs)
        while True:
            message = connection.recv()
            if isinstance(message, WorkerCommands):
                _execute(message, worker, sender)
            elif isinstance(message, UsePool):
                worker.use_pool(message.pool_view, message.num_rollouts)
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
