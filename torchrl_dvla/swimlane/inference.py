# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The inference lane: one policy call for all rows that wait."""

from __future__ import annotations

import copy
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing import Pipe
from multiprocessing.connection import Connection

import cloudpickle
import torch
from tensordict import NonTensorData, NonTensorStack, TensorDictBase, unravel_key
from tensordict.nn import TensorDictModuleBase
from torch import nn
from torchrl.envs.utils import ExplorationType, set_exploration_type

from torchrl_dvla.data.row_fields import RowFields
from torchrl_dvla.data.schema import (
    ACTION_CHUNK_KEY,
    ACTION_TOKENS_KEY,
    INSTRUCTION_KEY,
    OBSERVATION_KEY,
    POLICY_VERSION_KEY,
    SAMPLE_LOG_PROB_KEY,
)
from torchrl_dvla.swimlane.child import Child, prepare_child
from torchrl_dvla.swimlane.device_wait import take_device_wait
from torchrl_dvla.swimlane.exploration import own_exploration_type
from torchrl_dvla.swimlane.messages import (
    Failed,
    Infer,
    Inferred,
    Snapshot,
    Stop,
    UsePool,
    UseThreads,
)
from torchrl_dvla.swimlane.seeding import seeded
from torchrl_dvla.weight_update import WeightReader

__all__ = ["POLICY_OUTPUTS", "InferenceEngine", "InferenceProcess", "InferenceThread"]

#: Combinations of instructions that are kept: with one task there is one for each batch size.
_MAX_STACKS = 256

#: What the policy has to write for every decision.
POLICY_OUTPUTS = (ACTION_CHUNK_KEY, ACTION_TOKENS_KEY, SAMPLE_LOG_PROB_KEY)


class InferenceEngine:
    """Takes decisions for rows, always under one whole version of the weights.

    The newest version is adopted between two batches and never inside one (invariant 3), by pinning
    a slot of the weight store: no weight is copied and nobody is waited for (invariant 4).

    Args:
        policy (TensorDictModuleBase): reads the canonical VLA observation, writes
            :data:`POLICY_OUTPUTS`. Its parameters are pointed at the store's memory.
        reader (WeightReader): the lane's place in the weight store.
    """

    def __init__(self, policy: TensorDictModuleBase, reader: WeightReader) -> None:
        self._policy = policy.requires_grad_(False).eval()
        self._device = next((tensor.device for tensor in policy.parameters()), torch.device("cpu"))
        self._reader = reader
        self._snapshot: TensorDictModuleBase | None = None
        self._snapshot_version = -1
        self._observations: RowFields | None = None
        self._decisions: RowFields | None = None
        self._instructions: dict[int, NonTensorData] = {}
        self._stacks: dict[tuple[int, ...], NonTensorStack] = {}

    def use_pool(self, rows: TensorDictBase) -> None:
        """Take the rows that observations are read from and decisions written to."""
        keys = rows.get(OBSERVATION_KEY).keys(True, True)
        observed = [unravel_key((OBSERVATION_KEY, key)) for key in keys]
        # What the policy says it does not read is not gathered.
        in_keys = {unravel_key(key) for key in self._policy.in_keys}
        if OBSERVATION_KEY not in in_keys:
            observed = [key for key in observed if key in in_keys]
        self._observations = RowFields(rows, observed)
        self._decisions = RowFields(rows, [*POLICY_OUTPUTS, POLICY_VERSION_KEY])

    def snapshot(self) -> int:
        """Copy the newest weights aside, so that an evaluation sees one version; returns it."""
        version = self._reader.adopt_into(self._policy)
        if self._snapshot is None:
            # Parameters of the deep copy own their memory: they no longer follow the store.
            self._snapshot = copy.deepcopy(self._policy)
        else:
            _copy_weights(self._policy, self._snapshot)
        self._snapshot_version = version
        return version

    @torch.no_grad()
    def infer(self, message: Infer) -> int:
        """Write tokens, log-probs, chunk and version of every row; returns the version.

        Raises:
            RuntimeError: if a snapshot is asked for and none was taken.
        """
        for number, text in message.new_instructions.items():
            self._instructions[number] = NonTensorData(text)
        if message.use_snapshot:
            if self._snapshot is None:
                raise RuntimeError("use_snapshot needs a Snapshot message first, got none.")
            policy, version = self._snapshot, self._snapshot_version
        else:
            policy, version = self._policy, self._reader.adopt_into(self._policy)
        if self._observations is None or self._decisions is None:
            raise RuntimeError("Rows must be known before a decision: send UsePool first.")
        index = torch.tensor(message.rows)
        tensordict = self._observations.gather(index)
        tensordict.set(INSTRUCTION_KEY, self._stack_instructions(tuple(message.instruction_ids)))
        if self._device.type != "cpu":
            tensordict = tensordict.to(self._device)
        mode = ExplorationType.DETERMINISTIC if message.greedy else ExplorationType.RANDOM
        with set_exploration_type(mode), seeded(message.seed, self._device):
            tensordict = policy(tensordict)
        tensordict.set(POLICY_VERSION_KEY, torch.full((len(index), 1), version))
        self._decisions.scatter(index, tensordict)
        return version

    def _stack_instructions(self, ids: tuple[int, ...]) -> NonTensorStack:
        """The strings of a batch. Building the stack of 32 strings anew costs 320 us."""
        if ids not in self._stacks:
            if len(self._stacks) >= _MAX_STACKS:
                self._stacks.clear()
            self._stacks[ids] = NonTensorStack(*[self._instructions[number] for number in ids])
        return self._stacks[ids]

    def close(self) -> None:
        """Give the pinned slot of the weight store back."""
        self._reader.close()


def _copy_weights(source: nn.Module, destination: nn.Module) -> None:
    ours = [*destination.parameters(), *destination.buffers()]
    theirs = [*source.parameters(), *source.buffers()]
    for mine, other in zip(ours, theirs, strict=True):
        mine.data.copy_(other.data)


def _serve(connection: Connection, engine: InferenceEngine) -> None:
    """Answer messages until told to stop or until the coordinator is gone."""
    try:
        while True:
            message = connection.recv()
            start_s = time.monotonic()
            if isinstance(message, Infer):
                version = engine.infer(message)
                end_s = time.monotonic()
                connection.send(Inferred(version, start_s, end_s, take_device_wait()))
            elif isinstance(message, Snapshot):
                engine.snapshot()
            elif isinstance(message, UsePool):
                engine.use_pool(message.pool_view.rows)
            elif isinstance(message, UseThreads):
                torch.set_num_threads(message.num_threads)
            elif isinstance(message, Stop):
                return
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except BaseException:
        try:
            connection.send(Failed(traceback.format_exc()))
        except OSError:
            pass
    finally:
        engine.close()
        connection.close()


def _run_inference_process(
    connection: Connection,
    pickled_policy_factory: bytes,
    reader: WeightReader,
    num_threads: int,
    seed: int,
    env_vars: Mapping[str, str],
) -> None:
    prepare_child(num_threads, env_vars)
    torch.manual_seed(seed)
    try:
        engine = InferenceEngine(cloudpickle.loads(pickled_policy_factory)(), reader)
    except BaseException:
        connection.send(Failed(traceback.format_exc()))
        raise SystemExit(1) from None
    _serve(connection, engine)


class InferenceProcess:
    """The inference lane in a process of its own: it shares no interpreter lock with the learner.

    Args:
        policy_factory (Callable): builds the policy, in the child.
        reader (WeightReader): the lane's place in the weight store.

    Keyword Args:
        num_threads (int): intra-op threads.
        seed (int): seed of the sampled tokens.
        start_method (str): how the process is started.
        env_vars (Mapping, optional): environment variables of the process.
    """

    def __init__(
        self,
        policy_factory: Callable[[], TensorDictModuleBase],
        reader: WeightReader,
        *,
        num_threads: int = 1,
        seed: int = 0,
        start_method: str = "forkserver",
        env_vars: Mapping[str, str] | None = None,
    ) -> None:
        payload = cloudpickle.dumps(policy_factory)
        self._child = Child(
            _run_inference_process,
            (payload, reader, num_threads, seed, dict(env_vars or {})),
            name="dvla-inference",
            start_method=start_method,
        )
        self.connection = self._child.connection

    #: Whether a lane that hangs can be ended, and another started.
    can_be_killed = True

    @property
    def pid(self) -> int:
        """Process id of the lane."""
        return self._child.pid

    @property
    def started_s(self) -> float:
        """When the lane was started, in seconds of ``time.monotonic``."""
        return self._child.started_s

    def stack(self) -> str:
        """What the lane is doing."""
        return self._child.stack()

    def describe_end(self) -> str:
        """How the lane ended, in words."""
        self._child.process.join(5.0)
        return f"The inference process {self._child.exit_description()}"

    def stop(self, grace_s: float = 5.0) -> None:
        """End the lane for certain."""
        self._child.stop(Stop(), grace_s)


def _serve_in_thread(connection: Connection, engine: InferenceEngine) -> None:
    own_exploration_type()  # the learner's loss sets the common one
    _serve(connection, engine)


class InferenceThread:
    """The inference lane as a thread of the learner's process, with the same life as the process.

    Args:
        policy_factory (Callable): builds the policy; it must not share parameters with the
            learner's.
        reader (WeightReader): the lane's place in the weight store.
    """

    def __init__(
        self, policy_factory: Callable[[], TensorDictModuleBase], reader: WeightReader
    ) -> None:
        self.connection, theirs = Pipe(duplex=True)
        self.started_s = time.monotonic()
        self._thread = threading.Thread(
            target=_serve_in_thread,
            args=(theirs, InferenceEngine(policy_factory(), reader)),
            name="dvla-inference",
            daemon=True,
        )
        self._thread.start()

    can_be_killed = False

    def stack(self) -> str:
        """What the lane is doing."""
        frame = sys._current_frames().get(self._thread.ident or 0)
        return "".join(traceback.format_stack(frame)) if frame else "The thread has ended."

    def describe_end(self) -> str:
        """How the lane ended, in words."""
        return "The inference thread ended"

    def stop(self, grace_s: float = 5.0) -> None:
        """End the lane; a policy call in progress is waited for up to ``grace_s`` seconds."""
        try:
            self.connection.send(Stop())
        except OSError:
            pass
        self._thread.join(grace_s)
        self.connection.close()
