# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The sampling lane's child: environments that read chunks and write observations."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection

import cloudpickle
import numpy as np
import torch
from tensordict import NonTensorData, TensorDictBase
from tensordict.utils import is_non_tensor
from torchrl.data import NonTensor
from torchrl.envs import EnvBase

from torchrl_dvla.data.schema import (
    ACTION_CHUNK_KEY,
    ACTION_IS_PAD_KEY,
    DONE_KEY,
    INSTRUCTION_KEY,
    OBSERVATION_KEY,
    REWARD_KEY,
    SUCCESS_KEY,
    TERMINATED_KEY,
    TRUNCATED_KEY,
)
from torchrl_dvla.memory import RowWriter, WorkerView
from torchrl_dvla.swimlane.child import prepare_child
from torchrl_dvla.swimlane.messages import (
    Columns,
    EnvSpecs,
    Failed,
    Orders,
    Ready,
    Report,
    Reset,
    Step,
    Stop,
    UsePool,
    pack,
    unpack,
)
from torchrl_dvla.swimlane.root import Root

__all__ = ["EnvWorker", "describe_env", "run_env_worker"]

#: What a decision has led to, in the order in which :meth:`EnvWorker.settle` writes it.
_OUTCOME_KEYS = (
    REWARD_KEY,
    DONE_KEY,
    TERMINATED_KEY,
    TRUNCATED_KEY,
    SUCCESS_KEY,
    ACTION_IS_PAD_KEY,
)

#: A report waits this long for more to join it. An environment that takes longer is reported at
#: once, so that the policy can decide for it while the worker steps the next; cheap ones share the
#: price of a message. How it was found: decision 31.
_REPORT_AFTER_S = 1e-2

EnvFactories = Mapping[str, Callable[[], EnvBase]]


def describe_env(env: EnvBase) -> EnvSpecs:
    """What a row needs to hold for ``env``.

    Args:
        env (EnvBase): an environment without batch dimensions that speaks the decision-level
            schema: its action is ``("vla_action", "chunk")`` ``[chunk, A]`` and one step of it is
            one decision.

    Raises:
        ValueError: if it does not; the message names what is missing and the transform that adds
        it.
    """
    if env.batch_size:
        raise ValueError(
            f"create_env_fn must return environments without batch dimensions, got batch_size "
            f"{tuple(env.batch_size)}. Ask for more workers or envs_per_worker instead."
        )
    if ACTION_CHUNK_KEY not in env.action_keys:
        raise ValueError(
            f"create_env_fn must return an environment whose action is {ACTION_CHUNK_KEY} "
            f"[chunk_size, action_dim], got actions {list(env.action_keys)}. Append "
            "MultiAction.from_vla(stack_rewards=False) to a single-step environment."
        )
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
    return EnvSpecs(tuple(leaves), chunk_size, int(spec.shape[-1]))


class EnvWorker:
    """Environments of one worker, each in the middle of at most one rollout.

    It writes the rows it is told to, by :class:`~torchrl_dvla.memory.RowWriter`: a row whose page
    is not leased under the generation that the message names is refused, and the worker fails.

    Args:
        factories (Mapping): environment factory by task name. An environment is built when its task
            is first asked for, and kept.
        num_envs (int): rollouts that may be open at once.
    """

    def __init__(self, factories: EnvFactories, num_envs: int) -> None:
        self._factories = factories
        self._roots: dict[tuple[int, str], Root] = {}
        self._active: list[Root | None] = [None] * num_envs
        self._chunks = np.empty(0, np.float32)
        self._no_pad = np.empty(0, np.bool_)
        self._observations: RowWriter | None = None
        self._outcomes: RowWriter | None = None
        #: Steps that :meth:`settle` has not written to their rows yet.
        self._unsettled: list[tuple[Step, Root]] = []

    def build(self, env_index: int, task: str) -> EnvBase:
        """The environment of ``env_index`` for ``task``, built at most once."""
        key = (env_index, task)
        if key not in self._roots:
            self._roots[key] = Root(self._factories[task]())
        return self._roots[key].env

    def use_pool(self, view: WorkerView) -> None:
        """Take the rows that chunks are read from and observations and outcomes written to."""
        self._chunks = view.rows.get(ACTION_CHUNK_KEY).numpy()
        self._no_pad = np.zeros(view.layout[ACTION_IS_PAD_KEY][0], np.bool_)
        keys = [key for key in view.layout if isinstance(key, tuple) and key[0] == OBSERVATION_KEY]
        self._observations = RowWriter(view, keys)
        self._outcomes = RowWriter(view, _OUTCOME_KEYS)

    def reset(self, message: Reset) -> str:
        """Start a rollout; returns its instruction.

        Seeding before every reset is what lets all rollouts of a group share one scene.
        """
        if self._observations is None:
            raise RuntimeError("use_pool must be called before reset: there is no row to write to.")
        self.build(message.env_index, message.task)
        root = self._roots[message.env_index, message.task]
        tensordict = root.reset(message.seed, message.init_state_id)
        self._active[message.env_index] = root
        self._observations.write_from(message.row, message.generation, tensordict)
        return _instruction(tensordict)

    def steps(self, messages: Sequence[Step]) -> Iterator[None]:
        """Execute one chunk after the other; :meth:`settle` says how it went.

        Chunks are handed out for all of them first, and results read for all of them by
        :meth:`settle`: in between two steps the same calls cost up to twice as much
        (:doc:`/decisions/0033-what-a-decision-costs`).

        Yields:
            None: after each step.
        """
        roots = [self._active_root(message.env_index) for message in messages]
        chunks = torch.from_numpy(self._chunks[[message.row for message in messages]]).unbind()
        for root, chunk in zip(roots, chunks):
            root.take(chunk)
        for message, root in zip(messages, roots):
            root.step()
            self._unsettled.append((message, root))
            yield

    def settle(self) -> Columns:
        """Write what the steps since the last call have led to into their rows, field by field.

        Until then nobody may touch what an environment has returned. Its own next step comes
        later, so it may use a buffer again; a buffer that two of them share loses the first one's.

        Returns:
            Columns: of :class:`~torchrl_dvla.swimlane.messages.Stepped`.
        """
        if not self._unsettled:
            return ()
        stepped = self._write(self._unsettled)
        for (message, root), is_over in zip(self._unsettled, stepped[1]):
            if is_over:
                self._active[message.env_index] = None
            else:
                root.advance()
        self._unsettled = []
        return stepped

    def drop_failed(self) -> None:
        """After a failure: keep the unsettled steps before the first that cannot be settled."""
        steps, self._unsettled = self._unsettled, []
        for step in steps:
            try:
                self._write([step])
            except Exception:
                return
            self._unsettled.append(step)

    def _write(self, steps: Sequence[tuple[Step, Root]]) -> Columns:
        observations, outcomes = self._observations, self._outcomes
        assert observations is not None and outcomes is not None, "a reset comes first"
        messages, roots = pack(steps)
        env_indices, rows, generations, next_rows, next_generations = pack(messages)
        # One look for all entries: get() has a price of its own.
        found = [dict(root.next_tensordict.items()) for root in roots]
        done = [bool(entries["done"]) for entries in found]
        terminated = [bool(entries.get("terminated", flag)) for entries, flag in zip(found, done)]
        success = [bool(entries.get("success", flag)) for entries, flag in zip(found, terminated)]
        rewards = [_total(entries["reward"]) for entries in found]
        is_pad = np.array([self._is_pad(entries) for entries in found])
        # A rollout that may take no further decision ends here, whether the environment agrees or
        # not: for the learner that is a truncation.
        over = [flag or next_row < 0 for flag, next_row in zip(done, next_rows)]
        truncated = [is_over and not flag for is_over, flag in zip(over, terminated)]
        outcome = (rewards, over, terminated, truncated, success, is_pad)
        outcomes.write_rows(rows, generations, outcome)
        goes_on = [index for index, is_over in enumerate(over) if not is_over]
        observations.write_rows_from(
            [next_rows[index] for index in goes_on],
            [next_generations[index] for index in goes_on],
            [roots[index].next_tensordict for index in goes_on],
        )
        num_env_steps = np.logical_not(is_pad).sum(1).tolist()
        return env_indices, over, success, rewards, num_env_steps

    def _is_pad(self, entries: Mapping[str, torch.Tensor]) -> np.ndarray:
        found = entries.get(ACTION_IS_PAD_KEY)
        return self._no_pad if found is None else found.numpy()

    def _active_root(self, env_index: int) -> Root:
        root = self._active[env_index]
        if root is None:
            raise RuntimeError(f"Environment {env_index} must be reset before it is stepped.")
        return root

    def close(self) -> None:
        """Close every environment."""
        for root in self._roots.values():
            if not root.env.is_closed:
                root.env.close()
        self._roots.clear()


def _total(reward: torch.Tensor) -> float:
    return float(reward.sum() if reward.numel() > 1 else reward)


def _instruction(tensordict: TensorDictBase) -> str:
    value = tensordict.get(INSTRUCTION_KEY, default="")
    if isinstance(value, NonTensorData) or is_non_tensor(value):
        value = value.data
    return str(value)


class _Reporter:
    """Gathers what the worker has done, and sends it when it is worth a message."""

    def __init__(self, connection: Connection, worker: EnvWorker) -> None:
        self._connection = connection
        self._worker = worker
        self._ready: list[Ready] = []
        self._spans: list[tuple[str, float, float]] = []
        self._until_s = 0.0

    def begin(self) -> None:
        """The worker works from now on."""
        self._until_s = time.monotonic()

    def add(self, name: str, ready: Ready | None = None) -> None:
        """One order was carried out; ``name`` is what it was for the timeline."""
        start_s, self._until_s = self._until_s, time.monotonic()
        if ready is not None:
            self._ready.append(ready)
        if self._spans and self._spans[-1][0] == name:
            start_s = self._spans.pop()[1]
        self._spans.append((name, start_s, self._until_s))
        if self._until_s - self._spans[0][1] > _REPORT_AFTER_S:
            self.send()

    def send(self) -> None:
        """Report now, if there is anything to report."""
        if self._spans:
            report = Report(self._worker.settle(), pack(self._ready), self._spans)
            self._connection.send(report)
            self._ready, self._spans = [], []


def _carry_out(orders: Orders, worker: EnvWorker, reporter: _Reporter) -> None:
    reporter.begin()
    for _ in worker.steps(list(unpack(Step, orders.steps))):
        reporter.add("step")
    for reset in unpack(Reset, orders.resets):
        reporter.add("reset", Ready(reset.env_index, worker.reset(reset)))
    reporter.send()


def run_env_worker(
    connection: Connection,
    pickled_factories: bytes,
    first_task: str,
    num_envs: int,
    num_threads: int,
    env_vars: Mapping[str, str],
) -> None:
    """Entry point of the worker process: build, describe, then serve until told to stop."""
    prepare_child(num_threads, env_vars)
    worker = reporter = None
    try:
        worker = EnvWorker(cloudpickle.loads(pickled_factories), num_envs)
        connection.send(describe_env(worker.build(0, first_task)))
        reporter = _Reporter(connection, worker)
        while True:
            message = connection.recv()
            if isinstance(message, Orders):
                _carry_out(message, worker, reporter)
            elif isinstance(message, UsePool):
                worker.use_pool(message.pool_view)
            elif isinstance(message, Stop):
                break
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the coordinator is gone
    except BaseException:
        try:
            if worker is not None and reporter is not None:
                worker.drop_failed()
                reporter.send()  # what went well, so that the failure is not put down to it
            connection.send(Failed(traceback.format_exc()))
        except OSError:
            pass
        raise SystemExit(1) from None
    finally:
        if worker is not None:
            worker.close()
