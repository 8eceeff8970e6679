# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""One rank of a learner: its replica or shard of the policy, and its part of the work."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
import torch.distributed as dist
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from torchrl_dvla.data.instructions import InstructionTable, InstructionTransform
from torchrl_dvla.data.schema import NUM_DECISIONS_KEY
from torchrl_dvla.learner.dealing import deal, deal_rollouts
from torchrl_dvla.memory.row_access import RowFields
from torchrl_dvla.modules import TransformersVLA
from torchrl_dvla.objectives import GRPOLoss
from torchrl_dvla.recording.distributed_state import load_distributed, save_distributed
from torchrl_dvla.weight_update.weight_layout import iter_weights

__all__ = [
    "LearnerFactory",
    "LearnerRank",
    "Minibatch",
    "PartLosses",
    "Strategy",
    "check_same_on_all_ranks",
]

Strategy = Literal["fsdp", "ddp"]
#: Of each micro-batch its rows, those of its minibatch, and what the loss returned.
PartLosses: TypeAlias = "list[tuple[int, int, TensorDictBase]]"

#: Bytes of gradients that are summed in one call.
_BUCKET_BYTES = 32 << 20


@dataclass(frozen=True)
class LearnerFactory:
    """How each rank makes what it learns with; all are sent to other processes.

    Args:
        policy (Callable): makes the policy on the device that it is given. Weights and buffers are
            then overwritten by those of rank 0.
        loss (Callable): makes the :class:`~torchrl_dvla.GRPOLoss` of a policy, and is called before
            that is sharded. It must be one with ``functional=False``.
        optimizer (Callable): makes the optimizer of a list of parameters.
        device (str): of rank 0; of CUDA devices rank ``k`` takes the ``k``-th from there on.
        num_threads (int): intra-op threads of a rank.
        seed (int): of what ranks draw, such as a sample of the entropy.
    """

    policy: Callable[[str], TensorDictModuleBase]
    loss: Callable[[TensorDictModuleBase], GRPOLoss]
    optimizer: Callable[[list[nn.Parameter]], Optimizer]
    device: str = "cpu"
    num_threads: int = 1
    seed: int = 0

    def device_of(self, rank: int) -> torch.device:
        """The device of a rank."""
        device = torch.device(self.device)
        return (
            device
            if device.type == "cpu"
            else torch.device(device.type, (device.index or 0) + rank)
        )


@dataclass(frozen=True)
class Minibatch:
    """What every rank is told about a minibatch: numbers, no rows.

    Args:
        rows (torch.Tensor): row numbers of the environment pool, int64 ``[B]``.
        num_decisions (torch.Tensor): decisions of each row's rollout ``[B]``.
        normaliser (float): that of the whole minibatch.
        learning_rates (tuple of float): of each parameter group.
        max_grad_norm (float): bound on the norm of all gradients together.
        micro_batch_size (int, optional): most rows of a pass of a rank.
        version (int): the learner's.
        instructions (tuple of str): strings that ranks do not know yet.
        number (int): counts the minibatches of the run; seeds what a rank draws.
    """

    rows: torch.Tensor
    num_decisions: torch.Tensor
    normaliser: float
    learning_rates: tuple[float, ...]
    max_grad_norm: float
    micro_batch_size: int | None
    version: int
    instructions: tuple[str, ...]
    number: int


class LearnerRank:
    """Replica (``"ddp"``) or shard (``"fsdp"``) of a policy, with its optimizer.

    Every method but the constructor's checks is a collective: all ranks call it with the same
    arguments, in the same order. Normalisers are those of whole minibatches, so gradients of ranks
    are summed, not averaged, and the step is the one that a single process takes on the same rows.

    Args:
        factory (LearnerFactory): makes loss and optimizer.
        policy (TensorDictModuleBase): whole, on the device of this rank. It is sharded in place.

    Keyword Args:
        rank (int): which one this is.
        num_ranks (int): how many there are.
        strategy (str): ``"fsdp"`` shards parameters, gradients and the optimizer's state
            (``torch.distributed.fsdp.fully_shard``); ``"ddp"`` keeps all of them on each rank.

    Raises:
        ValueError: if the policies of the ranks differ in names, shapes or types, or a module
            updates running statistics from the rows that it sees.
    """

    def __init__(
        self,
        factory: LearnerFactory,
        policy: TensorDictModuleBase,
        *,
        rank: int,
        num_ranks: int,
        strategy: Strategy,
    ) -> None:
        self.rank, self.num_ranks, self.strategy = rank, num_ranks, strategy
        self.policy = policy
        self.device = factory.device_of(rank)
        self._seed = factory.seed
        check_same_on_all_ranks(policy)
        self._take_weights_of_rank_0()
        self.loss = factory.loss(policy)
        self._root = _Root(policy)
        if strategy == "fsdp":
            _shard(self._root, num_ranks, self.device)
        trained = [p for p in policy.parameters() if p.requires_grad]
        self.optimizer = factory.optimizer(trained)
        for group in self.optimizer.param_groups:  # as a schedule does, which only rank 0 has
            group.setdefault("initial_lr", group["lr"])
        if rank:
            self.loss.compared_version = None  # rank 0 compares
        self._parameters = trained
        self._instructions = InstructionTable()
        self._fields: RowFields | None = None

    def _take_weights_of_rank_0(self) -> None:
        named = {name: tensor.detach() for name, tensor, _, _ in iter_weights(self.policy)}
        form = [(name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in named.items()]
        forms: list[Any] = [None] * self.num_ranks
        dist.all_gather_object(forms, form)
        for rank, other in enumerate(forms):
            if other != forms[0]:
                differing = sorted({name for name, *_ in set(other) ^ set(forms[0])})
                raise ValueError(
                    "the policy must have the same parameters and buffers on all ranks, got others "
                    f"on rank {rank} than on rank 0: {', '.join(differing[:5])}. Have its factory "
                    "depend on nothing but its arguments."
                )
        for tensor in {tensor.data_ptr(): tensor for tensor in named.values()}.values():
            whole = tensor.contiguous()
            dist.broadcast(whole, 0)
            if self.rank and whole is not tensor:
                tensor.copy_(whole)

    # -- learning --------------------------------------------------------------------------------

    def attach(self, rows: TensorDictBase) -> None:
        """Read rows from here on: views on the pages of the environment pool."""
        self._fields = RowFields(rows)

    def know(self, instructions: Sequence[str]) -> None:
        """Add instructions, in the order of their ids."""
        for text in instructions:
            self._instructions.id(text)

    def learn(self, minibatch: Minibatch) -> tuple[PartLosses, float]:
        """One optimizer step.

        Returns:
            What the loss returned on this rank, and the norm of all gradients. If that is not
            finite, no rank has stepped.

        Raises:
            ValueError: as the loss.
        """
        assert self._fields is not None
        self.know(minibatch.instructions)
        self.loss.version = minibatch.version
        if self.rank:  # the generator of rank 0 is part of the run's checkpoint
            torch.manual_seed((self._seed * 1_000_003 + minibatch.number) * 8191 + self.rank)
        for group, rate in zip(self.optimizer.param_groups, minibatch.learning_rates, strict=True):
            group["lr"] = rate
        num_rows = len(minibatch.rows)
        parts: PartLosses = []
        if self.loss.needs_whole_rollouts:
            dealt = deal_rollouts(
                minibatch.num_decisions.tolist(),
                self.num_ranks,
                self.rank,
                minibatch.micro_batch_size,
            )
        else:
            dealt = deal(num_rows, self.num_ranks, self.rank, minibatch.micro_batch_size)
        for part in dealt:
            batch = self._gather(minibatch, part.start, part.stop)
            losses = self._root(functools.partial(self._losses, batch, minibatch.normaliser))
            total = sum(value for key, value in losses.items() if key.startswith("loss_"))
            (total if part.counts else 0.0 * total).backward()
            if part.counts:
                found = {key: value.detach().cpu() for key, value in losses.items()}
                parts.append((part.stop - part.start, num_rows, TensorDict(found)))
        norm = self._sum_and_clip(minibatch.max_grad_norm)
        if math.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad()
        return parts, norm

    def _losses(self, batch: TensorDictBase, normaliser: float) -> dict[str, torch.Tensor]:
        return dict(self.loss(batch, normaliser=normaliser).items())

    def _gather(self, minibatch: Minibatch, start: int, stop: int) -> TensorDictBase:
        assert self._fields is not None
        batch = self._fields.gather(minibatch.rows[start:stop])
        batch.set(NUM_DECISIONS_KEY, minibatch.num_decisions[start:stop].unsqueeze(-1))
        return InstructionTransform(self._instructions).forward(batch).to(self.device)

    @torch.no_grad()
    def _sum_and_clip(self, max_norm: float) -> float:
        """Sum what the strategy has not summed; scale all gradients down to ``max_norm``."""
        for parameter in self._parameters:  # one that a rank's rows did not reach counts as zero
            if parameter.grad is None and not isinstance(parameter, DTensor):
                parameter.grad = torch.zeros_like(parameter)
        _sum_over_ranks(
            [p.grad for p in self._parameters if p.grad is not None and not isinstance(p, DTensor)]
        )
        grads = [p.grad for p in self._parameters if p.grad is not None]
        sharded = [grad for grad in grads if isinstance(grad, DTensor)]
        norms = []
        if sharded:
            norm = get_total_norm(sharded)
            norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        if whole := [grad for grad in grads if not isinstance(grad, DTensor)]:
            norms.append(get_total_norm(whole))
        total = torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())
        if math.isfinite(max_norm) and bool(total.isfinite()):
            for is_sharded in (True, False):  # they do not mix in one call
                chosen = [p for p in self._parameters if isinstance(p, DTensor) == is_sharded]
                clip_grads_with_norm_(chosen, max_norm, total)
        return float(total)

    # -- weights ---------------------------------------------------------------------------------

    @torch.no_grad()
    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Each parameter and buffer by name, whole; one is gathered when it is asked for.

        Tied weights come under their first name. Nothing holds on to what was yielded.
        """
        seen: set[int] = set()
        for name, tensor, _, _ in iter_weights(self.policy):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                yield name, _whole(tensor)

    def gather_weights(self) -> None:
        """Take part in the gathering of all weights, and keep none."""
        for _ in self.weights():
            pass

    # -- checkpoints -----------------------------------------------------------------------------

    def save_optimizer(self, path: str) -> str:
        """Write this rank's part of the optimizer's state into the folder that all write into.

        Returns:
            What the disk said, if it was not written: the same for all ranks, which go on.
        """
        try:
            save_distributed(self.policy, self.optimizer, Path(path))
        except (OSError, CheckpointException) as error:
            return str(error) or type(error).__name__
        return ""

    def load_optimizer(self, path: str) -> None:
        """Read what this rank is to have of an optimizer's state, from any number of ranks.

        Hyper-parameters but the learning rate stay those that the optimizer was made with.
        """
        own = [
            {key: value for key, value in group.items() if key in ("betas", "weight_decay")}
            for group in self.optimizer.param_groups
        ]
        load_distributed(self.policy, self.optimizer, Path(path))
        for group, settings in zip(self.optimizer.param_groups, own, strict=True):
            group.update(settings)


class _Root(nn.Module):
    """What the collectives of a whole pass hang on, whichever method of the policy is called."""

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, compute: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        return compute()


def _shard(root: _Root, num_ranks: int, device: torch.device) -> None:
    """Shard each layer of the policy by itself, and the rest of it as one."""
    reduced = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    # What has no dimension to shard is kept whole, and its gradients are summed as under "ddp".
    scalars = {p for p in root.parameters() if p.dim() == 0}
    mesh = init_device_mesh(device.type, (num_ranks,))
    common: dict[str, Any] = {"mesh": mesh, "mp_policy": reduced, "ignored_params": scalars}
    # A layer is gathered again for its backward pass when that reaches its output. Where gradients
    # go around it, through a cache of keys and values as in flow policies, it stays gathered.
    common["reshard_after_forward"] = isinstance(root.policy, TransformersVLA)
    lists = [module for module in root.modules() if isinstance(module, nn.ModuleList)]
    for layer in {id(layer): layer for one in lists for layer in one}.values():
        has_forward = not isinstance(layer, (nn.ModuleList, nn.ModuleDict, nn.ParameterList))
        if has_forward and list(layer.parameters()):
            fully_shard(layer, **common)
    fully_shard(root, **common)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _sum_over_ranks(grads: Sequence[torch.Tensor]) -> None:
    """Sum dense tensors over all ranks, some together."""
    bucket: list[torch.Tensor] = []

    def flush() -> None:
        if bucket:
            flat = torch.cat([grad.reshape(-1) for grad in bucket])
            dist.all_reduce(flat)
            sizes = [grad.numel() for grad in bucket]
            for grad, part in zip(bucket, flat.split(sizes)):
                grad.copy_(part.view_as(grad))
            bucket.clear()

    for grad in grads:
        if bucket and (
            bucket[0].dtype != grad.dtype
            or sum(one.nbytes for one in bucket) + grad.nbytes > _BUCKET_BYTES
        ):
            flush()
        bucket.append(grad)
    flush()


def check_same_on_all_ranks(policy: nn.Module) -> None:
    """Refuse a policy whose weights or buffers would not stay the same on all ranks.

    Raises:
        ValueError: if it is lazy, or updates running statistics from the rows that it sees.
    """
    if lazy := [name for name, p in policy.named_parameters() if is_lazy(p)]:
        raise ValueError(
            f"a policy that several ranks learn must know its shapes, got the lazy {lazy[0]!r}. "
            "Call it on one batch in its factory."
        )
    for name, module in policy.named_modules():
        is_tracking = getattr(module, "track_running_stats", False) and module.training
        if is_tracking and getattr(module, "running_mean", None) is not None:
            raise ValueError(
                "buffers of a policy that several ranks learn must not depend on the rows that "
                f"each has seen, got running statistics in {name!r} in training mode. Call "
                "policy.eval(), or normalise without them (LayerNorm, GroupNorm)."
            )
