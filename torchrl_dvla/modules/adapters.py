# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Low-rank adapters of a policy (LoRA), by PEFT; and the checkpoint below them, by its checksum.

What the adapters' weights are called, and what they add up to, is said by
:mod:`torchrl_dvla.weight_update.lora`, which needs no PEFT.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from torchrl_dvla.differences import join_some
from torchrl_dvla.validation import Count, Positive, check_fields
from torchrl_dvla.weight_update.lora import find_lora_updates, is_adapter_name, plain_name

__all__ = [
    "BaseCheckpoint",
    "LoraConfig",
    "add_adapters_",
    "import_peft",
    "merged_weights",
    "weights_checksum",
]

#: Attention and MLP of every transformer that policies are built of.
_TARGETS = (
    "q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "gate_proj", "up_proj", "down_proj", "fc1",
    "fc2",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters ``alpha / rank * B @ A`` beside the weights of linear layers.

    ``B`` starts at zero, so a policy does at first what it did without them.

    Args:
        rank (int): rank ``R`` of ``A`` ``[R, I]`` and ``B`` ``[O, R]``.
        alpha (float, optional): ``alpha / rank`` is their scale. Defaults to ``2 * rank``.
        targets (tuple of str): last parts of the names of layers that get one. Defaults to
            attention and MLP of all transformers. A layer that is frozen anyway gets none.

    Raises:
        ValueError: if a number is not positive, or there is no target.

    Examples:
        >>> from torchrl_dvla.modules.adapters import LoraConfig
        >>> LoraConfig(rank=4, targets=("q_proj", "v_proj"))
        LoraConfig(rank=4, alpha=8.0, targets=('q_proj', 'v_proj'))

    Reference:
        Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021,
        https://arxiv.org/abs/2106.09685.
    """

    rank: Count
    alpha: Positive | None = None
    targets: tuple[str, ...] = _TARGETS

    def __post_init__(self) -> None:
        check_fields(self)
        if self.alpha is None:
            object.__setattr__(self, "alpha", 2.0 * self.rank)
        if not self.targets:
            raise ValueError(
                "targets must name at least one kind of layer, got none. Leave them out for "
                "attention and MLP."
            )


@dataclass(frozen=True, kw_only=True)
class BaseCheckpoint:
    """The checkpoint that adapters were put on.

    Args:
        path (str): its folder.
        checksum (str): of the policy that was loaded from it, see :func:`weights_checksum`.
        stated (Mapping): what was stated about it, see
            :class:`~torchrl_dvla.modules.formats.Stated`.
    """

    path: str
    checksum: str
    stated: Mapping[str, Any] = field(default_factory=dict)


def import_peft() -> Any:
    """PEFT.

    Raises:
        ImportError: without it, with the line that installs it.
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError(
            f"LoRA needs PEFT, got an error: {error}. Install it: "
            "pip install 'torchrl-dvla[lora]' (or peft)."
        ) from error
    return peft


def add_adapters_(policy: nn.Module, lora: LoraConfig) -> None:
    """Put adapters into a policy in place, and freeze everything else.

    Their weights are drawn by a generator of their own, and have device and dtype of the layers'.

    Args:
        policy (nn.Module): the policy; layers that are frozen get no adapter.
        lora (LoraConfig): which layers get one, and how large.

    Raises:
        ImportError: without PEFT.
        ValueError: if no layer that is trained is a target.

    Examples:
        >>> import torch
        >>> from torchrl_dvla.modules.adapters import LoraConfig, add_adapters_
        >>> model = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(3, 2)})
        >>> add_adapters_(model, LoraConfig(rank=1))  # doctest: +SKIP
        >>> [n for n, p in model.named_parameters() if p.requires_grad]  # doctest: +SKIP
        ['q_proj.lora_A.default.weight', 'q_proj.lora_B.default.weight']
    """
    peft = import_peft()
    linear = {
        name: module.weight.requires_grad
        for name, module in policy.named_modules()
        if isinstance(module, nn.Linear)
    }
    named = {name for name in linear if name.rpartition(".")[2] in lora.targets}
    chosen = sorted(name for name in named if linear[name])
    if not chosen:
        kinds = join_some(sorted({name.rpartition(".")[2] for name in linear}), limit=20)
        what = "only layers that are frozen anyway" if named else "no layer"
        raise ValueError(
            f"targets must name linear layers of the policy that can be trained, got "
            f"{list(lora.targets)}, which name {what}. The policy has {kinds}; freeze_prefix, "
            "freeze_vision and freeze_language freeze some of them."
        )
    config = peft.LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, target_modules=chosen, lora_dropout=0.0, bias="none"
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        peft.inject_adapter_in_model(config, policy)
    for name in chosen:
        layer: Any = policy.get_submodule(name)
        layer.to(layer.base_layer.weight.dtype)
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_(is_adapter_name(name))


@torch.no_grad()
def merged_weights(module: nn.Module) -> dict[str, torch.Tensor]:
    """State dict of a policy as it is without adapters: they are merged, in float32.

    Args:
        module (nn.Module): the policy; one without adapters gives its own state dict.
    """
    state = module.state_dict()
    names = list(state)
    updates = find_lora_updates(module, {name: index for index, name in enumerate(names)})
    views = list(state.values())
    merged = {}
    for name in names:
        if is_adapter_name(name):
            continue
        plain = plain_name(name)
        merged[plain] = state[name]
        if plain in updates:
            if updates[plain].obstacle:
                raise ValueError(
                    f"the adapter of {plain!r} must be one that can be merged, got one that cannot:"
                    f" {updates[plain].obstacle}."
                )
            merged[plain] = torch.empty_like(state[name], dtype=torch.float32)
            updates[plain].merge(views, merged[plain])
    return merged


@torch.no_grad()
def weights_checksum(module: nn.Module) -> str:
    """CRC-32 of a policy's weights and statistics without adapters, as they are in bfloat16.

    It is the same for float32 and bfloat16 that was rounded from it.

    Examples:
        >>> import torch
        >>> from torchrl_dvla.modules.adapters import weights_checksum
        >>> layer = torch.nn.Linear(3, 2)
        >>> weights_checksum(layer) == weights_checksum(layer.to(torch.bfloat16))
        True
    """
    value = 0
    state = {plain_name(k): v for k, v in module.state_dict().items() if not is_adapter_name(k)}
    for name in sorted(state):
        tensor = state[name].detach()
        if tensor.is_floating_point():
            tensor = tensor.to(torch.bfloat16)
        data = tensor.cpu().contiguous().flatten().view(torch.uint8).numpy()
        value = zlib.crc32(data, zlib.crc32(name.encode(), value))
    return f"{value:08x}"
