# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The sampling lane's child: environments that read chunks and write observations."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection

import cloudpickle
import numpy as np
import torch
from tensordict import NonTensorData, TensorDict, TensorDictBase
from tensordict.utils import is_non_tensor
from torchrl.data import NonTensor
from torchrl.envs import EnvBase

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
from torchrl_dvla.swimlane.child import prepare_child
from torchrl_dvla.swimlane.messages import (
    EnvSpecs,
    Failed,
    Ready,
    Reset,
    Step,
    Stepped,
    Stop,
    UsePool,
)

__all__ = ["EnvWorker", "describe_env", "run_env_worker"]

#: What a decision has led to, in the order in which :meth:`EnvWorker.step` writes it.
_OUTCOME_KEYS = (
    REWARD_KEY,
    DONE_KEY,
    TERMINATED_KEY,
    TRUNCATED_KEY,
    SUCCESS_KEY,
    ACTION_IS_PAD_KEY,
)

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
        self._envs: dict[tuple[int, str], EnvBase] = {}
        self._active: list[EnvBase | None] = [None] * num_envs
        self._tensordicts: list[TensorDictBase | None] = [None] * num_envs
        self._chunks = np.empty(0, np.float32)
        self._observations: RowWriter | None = None
        self._outcomes: RowWriter | None = None

    def build(self, env_index: int, task: str) -> EnvBase:
        """The environment of ``env_index`` for ``task``, built at most once."""
        key = (env_index, task)
        if key not in self._envs:
            self._envs[key] = self._factories[task]()
        return self._envs[key]

    def use_pool(self, view: WorkerView) -> None:
        """Take the rows that chunks are read from and observations and outcomes written to."""
        self._chunks = view.rows.get(ACTION_CHUNK_KEY).numpy()
        keys = [key for key in view.layout if isinstance(key, tuple) and key[0] == OBSERVATION_KEY]
        self._observations = RowWriter(view, keys)
        self._outcomes = RowWriter(view, _OUTCOME_KEYS)

    def reset(self, message: Reset) -> str:
        """Start a rollout; returns its instruction.

        Seeding before every reset is what lets all rollouts of a group share one scene.
        """
        env = self.build(message.env_index, message.task)
        env.set_seed(message.seed)
        request = TensorDict({INIT_STATE_ID_KEY: torch.tensor([message.init_state_id])})
        tensordict = env.reset(request)
        self._active[message.env_index] = env
        self._tensordicts[message.env_index] = tensordict
        if self._observations is None:
            raise RuntimeError("use_pool must be called before reset: there is no row to write to.")
        self._observations.write_from(message.row, message.generation, tensordict)
        return _instruction(tensordict)

    def step(self, message: Step) -> tuple[bool, bool, float, int]:
        """Execute one chunk; returns done, success, reward, executed env steps."""
        env, tensordict = self._active[message.env_index], self._tensordicts[message.env_index]
        observations, outcomes = self._observations, self._outcomes
        if env is None or tensordict is None or observations is None or outcomes is None:
            raise RuntimeError(
                f"Environment {message.env_index} must be reset before it is stepped."
            )
        chunk = torch.from_numpy(self._chunks[message.row].copy())
        tensordict.set(ACTION_CHUNK_KEY, chunk)
        tensordict = env.step(tensordict)
        next_tensordict = tensordict.get("next")
        done = bool(next_tensordict.get("done"))
        terminated = bool(next_tensordict.get("terminated", default=torch.tensor(done)))
        success = bool(next_tensordict.get("success", default=torch.tensor(terminated)))
        reward = float(next_tensordict.get("reward").sum())
        is_pad = next_tensordict.get(ACTION_IS_PAD_KEY, default=None)
        # A rollout that may take no further decision ends here, whether the environment agrees or
        # not: for the learner that is a truncation.
        out_of_decisions = message.next_row < 0 and not done
        outcome = (
            reward,
            done or out_of_decisions,
            terminated,
            (done and not terminated) or out_of_decisions,
            success,
            False if is_pad is None else is_pad.numpy(),
        )
        outcomes.write(message.row, message.generation, outcome)
        num_env_steps = chunk.shape[0] if is_pad is None else int((~is_pad).sum())
        if not done and message.next_row >= 0:
            observations.write_from(message.next_row, message.next_generation, next_tensordict)
            self._tensordicts[message.env_index] = env.step_mdp(tensordict)
        else:
            self._tensordicts[message.env_index] = None
        return done or out_of_decisions, success, reward, num_env_steps

    def close(self) -> None:
        """Close every environment."""
        for env in self._envs.values():
            if not env.is_closed:
                env.close()
        self._envs.clear()


def _instruction(tensordict: TensorDictBase) -> str:
    value = tensordict.get(INSTRUCTION_KEY, default="")
    if isinstance(value, NonTensorData) or is_non_tensor(value):
        value = value.data
    return str(value)


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
    worker = None
    try:
        worker = EnvWorker(cloudpickle.loads(pickled_factories), num_envs)
        connection.send(describe_env(worker.build(0, first_task)))
        while True:
            message = connection.recv()
            start_s = time.monotonic()
            if isinstance(message, Step):
                outcome = worker.step(message)
                connection.send(Stepped(message.env_index, *outcome, start_s, time.monotonic()))
            elif isinstance(message, Reset):
                instruction = worker.reset(message)
                connection.send(Ready(message.env_index, instruction, start_s, time.monotonic()))
            elif isinstance(message, UsePool):
                worker.use_pool(message.pool_view)
            elif isinstance(message, Stop):
                break
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the coordinator is gone
    except BaseException:
        try:
            connection.send(Failed(traceback.format_exc()))
        except OSError:
            pass
        raise SystemExit(1) from None
    finally:
        if worker is not None:
            worker.close()
