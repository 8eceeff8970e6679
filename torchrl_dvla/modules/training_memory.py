# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What training a policy takes on a device, worked out on the meta device, without its weights.

Parameters are counted. Activations are what autograd keeps for the backward pass: the policy's own
forward pass is run on the meta device, where tensors have sizes and no memory, and the storages
that it saves are added up. Attention is taken to be a fused kernel, as it is on GPUs and CPUs: it
keeps queries, keys, values, mask, output and one number a query, not the scores.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from tensordict import NonTensorStack, TensorDict
from torch import nn

from torchrl_dvla.memory import format_bytes
from torchrl_dvla.modules import gradient_checkpointing
from torchrl_dvla.modules.adapters import LoraConfig
from torchrl_dvla.modules.config import FlowVLAConfig, PolicyConfig
from torchrl_dvla.modules.flow_vla import FlowVLA
from torchrl_dvla.modules.pretrained import backbone_from_dict
from torchrl_dvla.modules.transformers_vla import TransformersVLA

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TrainingMemory", "kept_bytes", "memory_table", "training_memory", "training_modes"]

#: Share of a GPU's memory that is planned with: the rest is its context, kernels' workspace, and
#: what the allocator cannot use.
USABLE_SHARE = 0.9
#: GPUs of the table.
GPU_GB = (24, 48, 80)


@dataclasses.dataclass(frozen=True)
class TrainingMemory:
    """Bytes on the learner's device, and on that of inference.

    Args:
        weights (int): of the policy, trained or not. Inference needs them once more.
        trained (int): those of them that are trained, which are what one version of the store has.
        gradients (int): of what is trained, in float32.
        optimizer (int): the two moments of AdamW.
        masters (int): float32 masters of what is trained in a narrower dtype.
        fixed (int): kept for the backward pass, whatever the number of decisions.
        decision (int): kept for each decision of a micro-batch.

    Examples:
        >>> from torchrl_dvla.modules.training_memory import TrainingMemory
        >>> memory = TrainingMemory(1000, 100, 200, 400, 200, 50, 100)
        >>> memory.learner(2), memory.largest_micro_batch(3300)
        (2050, 1)
    """

    weights: int
    trained: int
    gradients: int
    optimizer: int
    masters: int
    fixed: int
    decision: int

    @classmethod
    def of_parameters(
        cls,
        weights: int,
        trained: int,
        num_trained: int,
        num_narrow: int,
        fixed: int,
        decision: int,
    ) -> TrainingMemory:
        """What so many trained parameters take, *num_narrow* of them in less than float32.

        Gradients, the two moments of AdamW and masters of what is narrow are float32.
        """
        sizes = weights, trained, 4 * num_trained, 8 * num_trained, 4 * num_narrow
        return cls(*sizes, fixed, decision)

    @property
    def states(self) -> int:
        """What the learner holds between two passes."""
        return self.weights + self.gradients + self.optimizer + self.masters

    def learner(self, micro_batch_size: int) -> int:
        """Bytes of the learner at the end of a forward pass."""
        return self.states + self.fixed + micro_batch_size * self.decision

    def largest_micro_batch(self, device_bytes: int, batch_bytes: int = 0) -> int:
        """Decisions of the largest micro-batch with learner and inference on one device; 0: none.

        Args:
            device_bytes (int): memory of the device.
            batch_bytes (int): of the rows of a minibatch, which is there meanwhile.
        """
        usable = int(USABLE_SHARE * device_bytes)
        left = usable - self.learner(0) - self.weights - batch_bytes
        return max(0, left // self.decision)


def training_modes(config: PolicyConfig, rank: int = 16) -> dict[str, PolicyConfig]:
    """The ways to train a policy, by their names; each without and with gradient checkpointing.

    Args:
        config (PolicyConfig): of the policy.
        rank (int): of the adapters, if the policy has none.
    """
    whole: Any = {"lora": None}
    if isinstance(config, FlowVLAConfig):
        whole["freeze_prefix"] = False
        part, name = {"freeze_prefix": True}, "expert only"
    else:
        whole |= {"freeze_vision": False, "freeze_language": False}
        part, name = {"freeze_vision": True}, "vision frozen"
    lora = config.lora or LoraConfig(rank=rank)
    found = {}
    for label, changes in {
        "full": whole,
        name: whole | part,
        f"LoRA {lora.rank}": whole | {"lora": lora},
        f"LoRA {lora.rank}, {name}": whole | part | {"lora": lora},
    }.items():
        for is_checkpointed in (False, True):
            mode = dataclasses.replace(config, **changes, gradient_checkpointing=is_checkpointed)
            found[label + ", checkpointed" * is_checkpointed] = mode
    return found


def memory_table(
    config: PolicyConfig,
    tokenizer: PreTrainedTokenizerBase,
    instruction: str,
    *,
    rank: int = 16,
    batch_bytes: int = 0,
) -> list[str]:
    """Lines of a table: each way to train, and the largest micro-batch on one GPU of 24, 48, 80 GB.

    Args:
        config (PolicyConfig): of the policy; its size and dtype are those of all rows.
        tokenizer (PreTrainedTokenizerBase), instruction (str): see :func:`training_memory`.

    Keyword Args:
        rank (int): of the adapters, if the policy has none. Without PEFT there is no such row.
        batch_bytes (int): of the rows of a minibatch.
    """
    head = ["training", "trained", "weights", "all states", "a decision"]
    rows = [[*head, *(f"{size} GB" for size in GPU_GB)]]
    for name, mode in training_modes(config, rank).items():
        if mode.lora is not None and importlib.util.find_spec("peft") is None:
            continue
        memory = training_memory(mode, tokenizer, instruction)
        sizes = (memory.weights, memory.states, memory.decision)
        largest = (memory.largest_micro_batch(size * 2**30, batch_bytes) for size in GPU_GB)
        trained = f"{memory.gradients // 4 / 1e6:,.1f} M"
        rows.append([name, trained, *map(format_bytes, sizes), *(f"{n or '-'}" for n in largest)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]


def training_memory(
    config: PolicyConfig, tokenizer: PreTrainedTokenizerBase, instruction: str
) -> TrainingMemory:
    """What training a policy of ``config`` takes; no weight is allocated.

    Args:
        config (PolicyConfig): architecture and what is trained.
        tokenizer (PreTrainedTokenizerBase): counts the tokens of the instruction.
        instruction (str): the longest one.

    Raises:
        ImportError: for adapters without PEFT.
    """
    policy = _on_meta(config, tokenizer)
    parameters = list(policy.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    num_trained = sum(parameter.numel() for parameter in trained)
    narrow = sum(p.numel() for p in trained if p.dtype.itemsize < torch.float32.itemsize)
    with _fused_attention():
        few, many = (
            kept_bytes(
                policy, functools.partial(_log_prob, policy, _batch(policy, rows, instruction))
            )
            for rows in (2, 4)
        )
    decision = (many - few) // 2
    return TrainingMemory.of_parameters(
        weights=sum(parameter.nbytes for parameter in parameters),
        trained=sum(parameter.nbytes for parameter in trained),
        num_trained=num_trained,
        num_narrow=narrow,
        fixed=few - 2 * decision,
        decision=decision,
    )


def kept_bytes(policy: Any, forward: Callable[[], Any]) -> int:
    """Bytes that a forward pass keeps for its backward pass, the policy's own tensors left out.

    With gradient checkpointing, the layer that keeps most is added: the backward pass computes the
    layers anew one by one.

    Args:
        policy (nn.Module): the policy.
        forward (Callable): runs it, with gradients.
    """
    own = {t.untyped_storage()._cdata for t in (*policy.parameters(), *policy.buffers())}
    outside: dict[int, torch.UntypedStorage] = {}
    largest = 0

    def add(tensor: torch.Tensor, kept: dict[int, torch.UntypedStorage]) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # kept alive, so that its address stays its own
        return tensor

    def total(kept: dict[int, torch.UntypedStorage]) -> int:
        return sum(storage.nbytes() for storage in kept.values())

    def layer(run: Callable[..., Any], *inputs: torch.Tensor, use_reentrant: bool) -> Any:
        nonlocal largest
        for tensor in inputs:
            add(tensor, outside)
        inside: dict[int, torch.UntypedStorage] = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: add(t, inside), lambda t: t):
            outputs = run(*inputs)
        largest = max(largest, total({k: v for k, v in inside.items() if k not in outside}))
        return outputs

    network: Any = getattr(policy, "network", None)

    def prefix(*args: Any) -> Any:
        found = type(network).prefix(network, *args)
        if policy.config.gradient_checkpointing:  # layers that are computed anew read it
            for each in found.cache.layers:
                add(each.keys, outside)
                add(each.values, outside)
        return found

    with (
        mock.patch.object(gradient_checkpointing, "checkpoint", layer),
        mock.patch.object(network, "prefix", prefix) if network else contextlib.nullcontext(),
        torch.autograd.graph.saved_tensors_hooks(lambda t: add(t, outside), lambda t: t),
    ):
        outputs = forward()
    del outputs
    return total(outside) + largest


def _on_meta(config: PolicyConfig, tokenizer: PreTrainedTokenizerBase) -> nn.Module:
    """The policy, without memory."""
    if isinstance(config, FlowVLAConfig):
        with torch.device("meta"):
            return FlowVLA(config, tokenizer=tokenizer)
    with torch.device("meta"):
        model = backbone_from_dict(config.backbone, dtype=config.torch_dtype)
    policy: nn.Module = TransformersVLA(config, tokenizer=tokenizer, model=model)  # type: ignore[arg-type]
    return policy.to("meta")


def _batch(policy: Any, num_rows: int, instruction: str) -> TensorDict:
    """A micro-batch without numbers."""
    config, keys = policy.config, policy.tensor_keys
    td = TensorDict({"language_instruction": NonTensorStack(*[instruction] * num_rows)}, [num_rows])

    def write(key: Any, *shape: int, dtype: torch.dtype = torch.float32) -> None:
        td.set(key, torch.empty(num_rows, *shape, dtype=dtype, device="meta"))

    for key in (keys.image, keys.wrist_image)[: config.num_cameras]:
        write(key, 3, *config.image_size, dtype=torch.uint8)
    if config.state_dim:
        write(keys.state, config.state_dim)
    if isinstance(policy, FlowVLA):
        max_dim = policy.network.config.max_action_dim
        write(keys.path, policy.chunk_size, config.num_stochastic + 1, max_dim)
        write(keys.path_step, 1, dtype=torch.int64)
    else:
        write(keys.action_tokens, policy.chunk_size, config.action_dim, dtype=torch.int64)
    return td


def _log_prob(policy: Any, td: TensorDict) -> torch.Tensor:
    """What the loss needs of the policy."""
    keys = policy.tensor_keys
    sampled = td[keys.path if isinstance(policy, FlowVLA) else keys.action_tokens]
    log_prob: torch.Tensor = policy.get_dist(td).log_prob(sampled)
    return log_prob


class _FusedAttention(torch.autograd.Function):
    """What a fused kernel keeps."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        *batch, num_heads, num_queries, _ = query.shape
        # Head by head for each query: to join the heads again takes no copy.
        output = query.new_empty(*batch, num_queries, num_heads, value.shape[-1]).transpose(-3, -2)
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, sums, mask)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        raise AssertionError("there are no numbers")


@contextlib.contextmanager
def _fused_attention() -> Iterator[None]:
    """Meta tensors would be attended to by the formula, which keeps the scores."""

    def attend(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.empty_like(attn_mask, dtype=query.dtype)  # what is added to scores
        return _FusedAttention.apply(query, key, value, attn_mask)

    with mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", attend):
        yield
