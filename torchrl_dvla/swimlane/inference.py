# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The inference lane: one policy call for all rows that wait, in a process of its own."""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection

import cloudpickle
import torch
from tensordict import NestedKey, NonTensorData, NonTensorStack, TensorDictBase, unravel_key
from tensordict.nn import TensorDictModuleBase
from torchrl.envs.utils import ExplorationType, set_exploration_type

from torchrl_dvla.data.schema import (
    ACTION_MASK,
    ACTION_TOKENS_KEY,
    INSTRUCTION_KEY,
    OBSERVATION_KEY,
    POLICY_VERSION_KEY,
    VLA_ACTION_KEY,
)
from torchrl_dvla.memory.row_access import RowFields
from torchrl_dvla.objectives.validation import FINITE, INTEGERS, ValueRange, check_ranges
from torchrl_dvla.swimlane.managed_process import ManagedProcess, pickled
from torchrl_dvla.swimlane.messages import Failed, Infer, Inferred, Snapshot, Stop, UsePool
from torchrl_dvla.weight_update import WeightReader

__all__ = [
    "InferenceEngine",
    "InferenceProcess",
    "batch_seed",
    "check_decisions",
    "seeded",
]

#: Combinations of instructions that are kept: with one task there is one for each batch size.
_MAX_STACKS = 256


def batch_seed(seed: int, number: int, *, evaluation: bool = False) -> int:
    """Seed of the tokens that the policy samples in one call.

    Training and evaluation count their calls apart, so an evaluation in between changes no training
    decision.

    Args:
        seed (int): the run's seed.
        number (int): of the call, from 0.

    Keyword Args:
        evaluation (bool): whether it serves an evaluation.

    Examples:
        >>> batch_seed(0, 0), batch_seed(0, 1), batch_seed(0, 0, evaluation=True)
        (0, 2, 1)
    """
    # An odd multiplier keeps (seed, number) apart for all counts that a run can reach.
    return (seed * 0x9E3779B97F4A7C15 + 2 * number + evaluation) % 2**63


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draw from a generator seeded with ``seed`` inside the block, and as before afterwards.

    Args:
        seed (int): of the generator.
        device (torch.device): where the policy draws.

    Examples:
        >>> with seeded(7, torch.device("cpu")):
        ...     first = torch.rand(3)
        >>> with seeded(7, torch.device("cpu")):
        ...     second = torch.rand(3)
        >>> bool((first == second).all())
        True
    """
    # Not torch.manual_seed: it formats a stack trace for CUDA, which costs more than the call.
    generators = [torch.default_generator]
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        generators.append(torch.cuda.default_generators[index])
    states = [generator.get_state() for generator in generators]
    try:
        for generator in generators:
            generator.manual_seed(seed)
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


class InferenceEngine:
    """The policy on rows, always under one whole version of the weights.

    The latest version is adopted between two batches and never inside one (invariant 3), by pinning
    a slot of the weight store: no weight is copied and nobody is waited for (invariant 4).

    Args:
        policy (TensorDictModuleBase): reads the canonical VLA observation, writes what rows have
            below ``"vla_action"``. Its parameters are pointed at the store's memory.
        reader (WeightReader): the lane's reader slot in the weight store.
    """

    def __init__(self, policy: TensorDictModuleBase, reader: WeightReader) -> None:
        self._policy = policy.requires_grad_(False).eval()
        self._device = next((tensor.device for tensor in policy.parameters()), torch.device("cpu"))
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # else page-locking takes memory of the first one
        self._reader = reader
        self._snapshot: TensorDictModuleBase | None = None
        self._snapshot_version = -1
        self._observations: RowFields | None = None
        self._decisions: RowFields | None = None
        self._written: list[NestedKey] = []
        self._instructions: dict[int, NonTensorData] = {}
        self._stacks: dict[tuple[int, ...], NonTensorStack] = {}

    def use_pool(self, rows: TensorDictBase) -> None:
        """Take the rows that observations are read from and decisions written to."""
        keys = rows.get(OBSERVATION_KEY).keys(True, True)
        observed = [unravel_key((OBSERVATION_KEY, key)) for key in keys]
        # What the policy says it does not read is not gathered, but for what forbids actions: the
        # loss sees the whole row.
        in_keys = {unravel_key(key) for key in self._policy.in_keys}
        if OBSERVATION_KEY not in in_keys:
            observed = [key for key in observed if key in in_keys or key[-1] == ACTION_MASK]
        self._observations = RowFields(rows, observed)
        keys = rows.get(VLA_ACTION_KEY).keys(True, True)
        self._written = [unravel_key((VLA_ACTION_KEY, key)) for key in keys]
        self._decisions = RowFields(rows, [*self._written, POLICY_VERSION_KEY])

    def snapshot(self) -> int:
        """Copy the latest weights aside, so that an evaluation sees one version; returns it."""
        self._snapshot = None  # its memory, before that of the next
        self._snapshot_version = self._reader.adopt_into(self._policy)
        self._snapshot = self._reader.copy_of(self._policy)
        return self._snapshot_version

    def drop_snapshot(self) -> None:
        """Free the copy that :meth:`snapshot` has made."""
        self._snapshot = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # a learner on the same device may need it

    @torch.no_grad()
    def infer(self, message: Infer) -> int:
        """Write what the policy decides, and the version, into every row; returns the version.

        Raises:
            RuntimeError: if a snapshot is asked for and none was taken.
            ValueError: if the policy writes a number that is not finite, or a token that is no
                index of its vocabulary; nothing reaches a row.
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
        check_decisions(tensordict, policy, self._written)
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


def check_decisions(
    tensordict: TensorDictBase, policy: TensorDictModuleBase, keys: Sequence[NestedKey]
) -> None:
    """Refuse decisions that no environment may execute and no learner may see.

    Args:
        tensordict (TensorDictBase): ``[n]`` decisions.
        policy (TensorDictModuleBase): has written them; its ``vocab_size``, if any, bounds tokens.
        keys (sequence of NestedKey): what rows have of them.

    Raises:
        ValueError: naming the policy and what it wrote.
    """
    name = type(policy).__name__
    size = getattr(policy, "vocab_size", None)
    ranges = []
    for key in keys:
        values, what = tensordict.get(key), f"{key} of {name}"
        if key == ACTION_TOKENS_KEY:
            if values.dtype not in INTEGERS:
                raise ValueError(
                    f"policy must write integers as {key}, got {values.dtype} of {name}: rows hold "
                    "int64. Samples of a Gaussian are no tokens: leave the entry out of out_keys, "
                    "and log-probs are those of the chunk. A token policy writes the indices that "
                    "it drew, and as the chunk what they decode to."
                )
            remedy = "Write what its distribution has drawn."
            ranges.append(ValueRange(what, values, 0, size - 1 if size else FINITE, remedy))
        elif values.is_floating_point():
            remedy = "Its weights may have become too large."
            ranges.append(ValueRange(what, values, -FINITE, FINITE, remedy))
    check_ranges(ranges, tensordict, len(tensordict))  # the one wait for an accelerator


def _serve(connection: Connection, engine: InferenceEngine) -> None:
    while True:
        message = connection.recv()
        start_s = time.monotonic()
        if isinstance(message, Infer):
            version = engine.infer(message)
            connection.send(Inferred(version, start_s, time.monotonic()))
        elif isinstance(message, Snapshot):
            engine.drop_snapshot() if message.is_over else engine.snapshot()
        elif isinstance(message, UsePool):
            engine.use_pool(message.pool_view.rows)
        elif isinstance(message, Stop):
            return


def run_inference(
    connection: Connection, pickled_policy_factory: bytes, reader: WeightReader, seed: int
) -> None:
    """Entry point of the inference process: build the policy, then serve until told to stop."""
    torch.manual_seed(seed)
    engine = None
    try:
        engine = InferenceEngine(cloudpickle.loads(pickled_policy_factory)(), reader)
        _serve(connection, engine)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the collector is gone
    except BaseException:
        with contextlib.suppress(OSError):
            connection.send(Failed(traceback.format_exc()))
        raise SystemExit(1) from None
    finally:
        if engine is not None:
            engine.close()


class InferenceProcess(ManagedProcess):
    """The inference lane: it shares no interpreter lock with the learner.

    Args:
        policy_factory (Callable): builds the policy, in the process.
        reader (WeightReader): the lane's reader slot in the weight store.

    Keyword Args:
        without (iterable of torch.Tensor): the policy's weights that the reader provides; they are
            not sent.
        num_threads (int): intra-op threads.
        seed (int): seed of the sampled tokens.
        start_method (str): how the process is started.
    """

    def __init__(
        self,
        policy_factory: Callable[[], TensorDictModuleBase],
        reader: WeightReader,
        *,
        without: Iterable[torch.Tensor] = (),
        num_threads: int = 1,
        seed: int = 0,
        start_method: str = "forkserver",
    ) -> None:
        sent = pickled(policy_factory, "policy, or policy_factory,", without=without)
        super().__init__(
            run_inference,
            (sent, reader, seed),
            name="dvla-inference",
            num_threads=num_threads,
            start_method=start_method,
        )
