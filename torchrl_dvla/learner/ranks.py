# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The ranks of a learner, as the process that owns the run sees them."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import tempfile
import time
import traceback
from collections import deque
from collections.abc import Generator, Iterator, Mapping
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import cloudpickle
import torch
import torch.distributed as dist
from tensordict import TensorDict
from tensordict.nn import TensorDictModuleBase
from torch.optim import Optimizer

from torchrl_dvla.data import PooledReplayBuffer
from torchrl_dvla.data.instructions import InstructionTable, InstructionTransform
from torchrl_dvla.data.schema import NUM_DECISIONS_KEY
from torchrl_dvla.learner.rank import LearnerFactory, LearnerRank, Minibatch, PartLosses, Strategy
from torchrl_dvla.memory import EnvironmentPool
from torchrl_dvla.memory.row_access import RowFields
from torchrl_dvla.swimlane.managed_process import ManagedProcess, pickled

__all__ = ["LearnerRanks", "launched_rank", "serve_launched_rank"]

#: A rank waits for a command as long as the learner waits for groups; it ends with rank 0.
_FOR_EVER = timedelta(days=3650)
#: Seconds that a rank which has failed may take to say why, and one that is to end to end.
_LAST_WORDS_S = 2.0
_GRACE_S = 10.0


class LearnerRanks:
    """Rank 0 of a learner, and the way down of the others.

    Rank 0 lives in the process that owns collector, buffer, weight store and recorder. The others
    own a replica or shard of the policy and an optimizer, and nothing else. They map the same pages
    of the environment pool, so rank 0 deals row numbers, never rows; what goes through
    ``torch.distributed`` is commands, gradients and parameters: Gloo on CPU, NCCL on GPUs.

    - *consumes* the minibatches of an update, by row number;
    - *produces* one optimizer step on all ranks, and the weights, parameter by parameter;
    - *waits for* the slowest rank, at most ``timeout_s``;
    - *unblocked by* the collectives, or by the end of a rank, whose connections close.

    A rank that dies is a loss of the learner: the call under way raises, every later one does, and
    the run goes on from its last checkpoint. Nothing is left behind: the kernel ends the other
    ranks with rank 0.

    Args:
        factory (LearnerFactory): how each rank makes policy, loss and optimizer.
        policy (TensorDictModuleBase): that of rank 0, with the weights to begin with, on its
            device. The strategy ``"fsdp"`` shards it in place: build the collector before.

    Keyword Args:
        num_ranks (int): ranks, this process included.
        strategy (str): ``"fsdp"`` or ``"ddp"``, see :class:`LearnerRank`.
        timeout_s (float): how long the ranks wait for each other.

    Raises:
        RuntimeError: if a rank does not come up, with its traceback.
        ValueError: if the policies of the ranks differ, or cannot be learned by several.
    """

    def __init__(
        self,
        factory: LearnerFactory,
        policy: TensorDictModuleBase,
        *,
        num_ranks: int,
        strategy: Strategy = "fsdp",
        timeout_s: float = 300.0,
    ) -> None:
        self.num_ranks, self.strategy, self.timeout_s = num_ranks, strategy, timeout_s
        self.policy = policy
        self._processes: list[ManagedProcess] = []
        self._failure = ""
        self._num_minibatches = 0
        self._num_known = 0
        self._buffer: PooledReplayBuffer | None = None
        # Where the ranks find each other; gone once they have, so that a kill leaves nothing.
        with contextlib.ExitStack() as on_error, tempfile.TemporaryDirectory() as folder:
            on_error.callback(self.close)
            with self._explained("start"):
                store = None
                if launched_rank() is None:
                    path = f"{folder}/ranks"
                    self._start_processes(factory, path)
                    store = dist.FileStore(path, num_ranks)
                _join(store, 0, num_ranks, factory, timeout_s)
                self._control = _control_group(timeout_s)
                _broadcast(strategy, self._control)
                self.own = LearnerRank(
                    factory, policy, rank=0, num_ranks=num_ranks, strategy=strategy
                )
            on_error.pop_all()

    def _start_processes(self, factory: LearnerFactory, path: str) -> None:
        payload = pickled(factory, "factory")
        for rank in range(1, self.num_ranks):
            self._processes.append(
                ManagedProcess(
                    _serve_started_rank,
                    (payload, path, rank, self.num_ranks, self.timeout_s),
                    name=f"learner rank {rank}",
                    num_threads=factory.num_threads,
                )
            )
        # Asked before the ranks meet, which would be waited for as long as they may take.
        for process in self._processes:
            words = "sent nothing, see its log"
            if process.connection.poll(self.timeout_s):
                try:
                    words = process.connection.recv()
                except EOFError:
                    words = process.describe_end()
            if words is not None:
                raise ValueError(
                    f"the factory must be made for a process that imports it anew, got one with "
                    f"which {process.name} failed: {words}"
                )

    @property
    def optimizer(self) -> Optimizer:
        """That of rank 0; its learning rates are those of all."""
        return self.own.optimizer

    @property
    def has_failed(self) -> bool:
        """Whether a rank was lost: no weights can be gathered any more."""
        return bool(self._failure)

    @property
    def processes(self) -> list[ManagedProcess]:
        """The other ranks, where this process has started them."""
        return self._processes

    # -- learning --------------------------------------------------------------------------------

    def bind(self, buffer: PooledReplayBuffer) -> None:
        """Learn from a buffer that is bound to a collector: every rank maps its pages.

        Raises:
            ValueError: if the loss needs whole rollouts and the buffer splits them.
        """
        if self.own.loss.needs_whole_rollouts and not buffer.whole_rollouts:
            raise ValueError(
                "whole_rollouts must be True for a loss with one ratio per rollout, got False. "
                "Make the PooledReplayBuffer with it."
            )
        self._buffer = buffer
        tables = [t.table for t in buffer._transform if isinstance(t, InstructionTransform)]
        self.attach(buffer.pool, tables[0] if tables else None)

    def attach(self, pool: EnvironmentPool, instructions: InstructionTable | None = None) -> None:
        """Have every rank map the pages of a pool, for :meth:`step`."""
        loss, self._instructions = self.own.loss, instructions
        # The normaliser is of the whole minibatch, and reads no observation.
        keys = [
            key
            for key in loss.in_keys
            if key in pool.layout and key not in loss.actor_network.in_keys
        ]
        self._judged = RowFields(pool.rows, keys)
        self._call("attach", pool.worker_view())

    def steps(
        self, *, max_grad_norm: float | None, micro_batch_size: int | None, version: int
    ) -> Generator[tuple[PartLosses, float], None, None]:
        """One optimizer step for each minibatch of an update, as iterating the buffer.

        Keyword Args:
            max_grad_norm (float, optional): bound on the norm of all gradients together.
            micro_batch_size (int, optional): most rows of a pass of a rank.
            version (int): the learner's.

        Yields:
            What the loss returned for the micro-batches of all ranks, and the norm of the gradients
            before they were clipped.
        """
        if self._buffer is None:
            raise RuntimeError("bind() must be called before steps(), with the collector's buffer.")
        with contextlib.closing(self._buffer.row_minibatches()) as minibatches:
            for rows, num_decisions in minibatches:
                yield self.step(
                    rows,
                    num_decisions,
                    max_grad_norm=max_grad_norm,
                    micro_batch_size=micro_batch_size,
                    version=version,
                )

    def step(
        self,
        rows: torch.Tensor,
        num_decisions: torch.Tensor,
        *,
        max_grad_norm: float | None,
        micro_batch_size: int | None,
        version: int,
    ) -> tuple[PartLosses, float]:
        """One optimizer step on rows of the pool; see :meth:`steps`."""
        judged = self._judged.gather(rows).set(NUM_DECISIONS_KEY, num_decisions.unsqueeze(-1))
        new = {} if self._instructions is None else self._instructions.since(self._num_known)
        self._num_known += len(new)
        self._num_minibatches += 1
        minibatch = Minibatch(
            rows=rows,
            num_decisions=num_decisions,
            normaliser=float(self.own.loss.normaliser(judged)),
            learning_rates=tuple(group["lr"] for group in self.optimizer.param_groups),
            max_grad_norm=math.inf if max_grad_norm is None else max_grad_norm,
            micro_batch_size=micro_batch_size,
            version=version,
            instructions=tuple(new.values()),
            number=version * 1_000_003 + self._num_minibatches,
        )
        found = self._call("learn", minibatch)
        norm = float(found[0][1])
        if not math.isfinite(norm):
            raise RuntimeError(
                f"The norm of the gradients must be finite, got {norm}: no rank has stepped. Lower "
                "optim.lr, or look for what is not finite in the rows of this update."
            )
        return [part for parts, _ in found for part in parts], norm

    # -- weights and checkpoints -------------------------------------------------------------------

    @contextlib.contextmanager
    def weights(self) -> Iterator[Iterator[tuple[str, torch.Tensor]]]:
        """The weights by name, one gathered at a time, for :meth:`AsyncWeightUpdater.publish`.

        All ranks gather to the end, also where the ``with`` block has left before.
        """
        if self.strategy == "ddp":
            yield self.own.weights()
            return
        with self._explained("gather_weights"):
            _broadcast(("gather_weights", ()), self._control)
        weights = self._gathered()
        try:
            yield weights
        finally:
            deque(weights, maxlen=0)

    def _gathered(self) -> Iterator[tuple[str, torch.Tensor]]:
        with self._explained("gather_weights"):
            yield from self.own.weights()

    def gathered_policy(self) -> GatheredPolicy:
        """The policy as a component of checkpoints."""
        kind = GatheredPretrained if hasattr(self.policy, "save_pretrained") else GatheredPolicy
        return kind(self)

    def save_distributed(self, path: Path) -> None:
        """Write the optimizer's state, each rank its part; see ``recording.distributed_state``.

        Raises:
            OSError: if it cannot be written. The ranks go on.
        """
        if problems := [text for text in self._call("save_optimizer", str(path)) if text]:
            raise OSError(errno.EIO, problems[0])

    def load_distributed(self, path: Path) -> None:
        """Read the optimizer's state that any number of ranks, or a single process, has written."""
        self._call("load_optimizer", str(path))

    # -- commands --------------------------------------------------------------------------------

    def _call(self, method: str, *args: Any) -> list[Any]:
        """Have every rank call a method of :class:`LearnerRank`; what each returned."""
        with self._explained(method):
            _broadcast((method, args), self._control)
            if method == "attach":
                args = (args[0].rows,)
            own = getattr(self.own, method)(*args)
            results: list[Any] = [None] * self.num_ranks
            dist.gather_object(own, results)
            return results

    @contextlib.contextmanager
    def _explained(self, method: str) -> Generator[None, None, None]:
        """Say which rank is lost, and why, instead of which connection was closed."""
        if self._failure:
            raise RuntimeError(self._failure)
        try:
            yield
        except Exception as error:
            if not _is_of_peers(error):  # the other ranks wait for this one, and are ended
                self._failure = (
                    "The ranks of the learner must take each step together, got an error of rank 0 "
                    f"in {method!r}: {error!r}. Go on from the last checkpoint: "
                    "checkpoint.resume=auto."
                )
                raise
            cause = self._last_words() or (
                f"one that does not answer within {self.timeout_s:g} s ({error}). See what it "
                "printed, or raise learner.timeout_s."
            )
            self._failure = (
                f"All ranks of the learner must take part in {method!r}, got {cause} The update is "
                "lost with it. Go on from the last checkpoint: checkpoint.resume=auto."
            )
            raise RuntimeError(self._failure) from error

    def _last_words(self) -> str:
        """Of the ranks that have ended or failed: how, and their tracebacks."""
        deadline_s = time.monotonic() + _LAST_WORDS_S
        found: list[str] = []
        while self._processes and not found and time.monotonic() < deadline_s:
            for process in self._processes:
                with contextlib.suppress(OSError):
                    if not process.connection.poll(0.05):
                        continue
                    try:
                        found.append(f"{process.name} failed:\n{process.connection.recv()}")
                    except EOFError:
                        found.append(process.describe_end())
        return " ".join(found)

    def close(self) -> None:
        """End the other ranks and the process group; safe to call twice."""
        if dist.is_initialized():
            if not self._failure and hasattr(self, "own"):
                with contextlib.suppress(Exception):
                    _broadcast(("stop", ()), self._control)
            with contextlib.suppress(Exception):
                dist.destroy_process_group()
        for process in self._processes:
            # What waits for a rank that is lost, or is that rank, has nothing left to do.
            process.stop(0.0 if self._failure else _GRACE_S)
        self._failure = self._failure or "The learner's ranks were closed."
        self._processes.clear()

    def __enter__(self) -> LearnerRanks:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class GatheredPolicy:
    """The policy of all ranks as one component of checkpoints, which a single process can load.

    Saving gathers it, parameter by parameter, into the memory of the host.

    Args:
        ranks (LearnerRanks): that have it.
    """

    def __init__(self, ranks: LearnerRanks) -> None:
        self._ranks = ranks

    def state_dict(self) -> Mapping[str, Any]:
        """The whole weights, on the host."""
        policy = self._ranks.policy
        names = policy.state_dict().keys()
        with self._whole():
            return {key: value for key, value in policy.state_dict().items() if key in names}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Refused: every rank begins with what rank 0 has loaded."""
        raise RuntimeError(
            "The policy must be loaded before the ranks of the learner start, got a sharded one. "
            "Load it into the plain policy of rank 0."
        )

    @contextlib.contextmanager
    def _whole(self) -> Iterator[None]:
        with self._ranks.weights() as weights:
            found = {name: tensor.to("cpu", copy=True) for name, tensor in weights}
        whole = TensorDict(found, batch_size=[]).unflatten_keys(".")
        with whole.to_module(self._ranks.policy):
            yield


class GatheredPretrained(GatheredPolicy):
    """A :class:`GatheredPolicy` that is saved by the policy's own ``save_pretrained``."""

    def save_pretrained(self, folder: Any) -> None:
        """Write the policy's checkpoint folder, without a fingerprint: all ranks would decide."""
        with self._whole():
            self._ranks.policy.save_pretrained(folder, fingerprint=False)

    def read_weights(self, folder: Any) -> Any:
        """Read and check what such a folder holds."""
        return self._ranks.policy.read_weights(folder)


# -- the other ranks -------------------------------------------------------------------------------


def launched_rank() -> int | None:
    """The rank that a launcher such as ``torchrun`` gave this process; ``None`` without one."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    return int(os.environ["RANK"])


def serve_launched_rank(factory: LearnerFactory, timeout_s: float) -> None:
    """What a rank above 0 does that ``torchrun`` has started, until rank 0 ends it."""
    torch.set_num_threads(factory.num_threads)
    rank, num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    _join(None, rank, num_ranks, factory, timeout_s)
    _serve(factory, rank, num_ranks)


def _serve_started_rank(
    connection: Connection,
    payload: bytes,
    path: str,
    rank: int,
    num_ranks: int,
    timeout_s: float,
) -> None:
    try:
        factory: LearnerFactory = cloudpickle.loads(payload)
        connection.send(None)
        _join(dist.FileStore(path, num_ranks), rank, num_ranks, factory, timeout_s)
        _serve(factory, rank, num_ranks)
    except BaseException:
        # An error that follows from another rank's comes after that one, and is not read.
        with contextlib.suppress(OSError):
            connection.send(traceback.format_exc())
        raise SystemExit(1) from None


def _serve(factory: LearnerFactory, rank: int, num_ranks: int) -> None:
    control = _control_group(None)
    strategy = _broadcast(None, control)
    policy = factory.policy(str(factory.device_of(rank)))
    own = LearnerRank(factory, policy, rank=rank, num_ranks=num_ranks, strategy=strategy)
    while True:
        method, args = _broadcast(None, control)
        if method == "stop":
            break
        if method == "attach":
            args = (args[0].rows,)
        result = getattr(own, method)(*args)
        if method != "gather_weights":
            dist.gather_object(result)
    dist.destroy_process_group()


def _join(
    store: dist.Store | None,
    rank: int,
    num_ranks: int,
    factory: LearnerFactory,
    timeout_s: float,
) -> None:
    """Form the process group, on the loopback interface unless another one was named."""
    device = factory.device_of(rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    is_cuda = device.type == "cuda"
    with _on_loopback():
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if is_cuda else "gloo",
            timeout=timedelta(seconds=timeout_s),
            store=store,  # none: torchrun's, by its environment variables
            rank=-1 if store is None else rank,
            world_size=-1 if store is None else num_ranks,
            device_id=device if is_cuda else None,
        )


@contextlib.contextmanager
def _on_loopback() -> Iterator[None]:
    names = [
        name for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if name not in os.environ
    ]
    os.environ.update(dict.fromkeys(names, "lo"))
    try:
        yield
    finally:
        for name in names:
            os.environ.pop(name, None)


def _control_group(timeout_s: float | None) -> dist.ProcessGroup:
    limit = _FOR_EVER if timeout_s is None else timedelta(seconds=timeout_s)
    with _on_loopback():
        return dist.new_group(backend="gloo", timeout=limit)


def _broadcast(value: Any, group: dist.ProcessGroup) -> Any:
    """Rank 0's value, on every rank."""
    values = [value]
    dist.broadcast_object_list(values, 0, group=group)
    return values[0]


def _is_of_peers(error: Exception) -> bool:
    """Whether an error is that of a collective: another rank is gone, or does not answer."""
    words = ("gloo", "nccl", "peer", "timed out", "timeout", "connection", "socket", "store")
    kinds = (RuntimeError, OSError)  # torch.distributed.DistError is one of them
    return isinstance(error, kinds) and any(word in str(error).lower() for word in words)
