# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Low-rank adapters: which weights they adapt, and what the adapted weights are.

Adapters are recognised by the names that PEFT gives them (``layer.base_layer.weight``,
``layer.lora_A.default.weight``, ``layer.lora_B.default.weight``; the adapter's name may be missing)
and by the attributes of the layer that holds them (``scaling``, ``active_adapters``,
``fan_in_fan_out``). PEFT itself is not needed.

Reference: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021), arXiv 2106.09685.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence

import torch
from torch import nn

__all__ = ["LoraUpdate", "find_lora_updates", "is_adapter_name", "plain_name"]

_FACTOR_A = re.compile(r"^(?:(?P<layer>.+)\.)?lora_A(?:\.(?P<adapter>[^.]+))?\.weight$")


def is_adapter_name(name: str) -> bool:
    """Whether a weight belongs to an adapter.

    Examples:
        >>> [is_adapter_name(n) for n in ("q.lora_A.default.weight", "q.base_layer.weight")]
        [True, False]
    """
    return any(part.startswith("lora_") for part in name.split("."))


def plain_name(name: str) -> str:
    """What the weight is called in the same model without adapters.

    Examples:
        >>> plain_name("base_model.model.blocks.0.q_proj.base_layer.weight")
        'blocks.0.q_proj.weight'
    """
    name = f".{name}".replace(".base_model.model.", ".").replace(".base_layer.", ".")
    return name[1:]


@dataclasses.dataclass(frozen=True)
class LoraUpdate:
    """``base + sum(scaling * B @ A)``, by the entries of a layout.

    Args:
        base (int): entry of the frozen weight ``[O, I]``, or ``[I, O]`` if it is transposed.
        factors (tuple of (int, int, float)): entries of ``A`` ``[R, I]`` and ``B`` ``[O, R]``, and
            the scaling, of each active adapter.
        is_transposed (bool): the base stores its weight as ``[I, O]`` (PEFT's ``fan_in_fan_out``).
        obstacle (str): why this adapter cannot be merged; empty if it can.

    Examples:
        >>> views = [torch.eye(2), torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0], [0.0]])]
        >>> merged = torch.empty(2, 2)
        >>> LoraUpdate(0, ((1, 2, 0.5),)).merge(views, merged)
        >>> merged.tolist()
        [[1.5, 1.0], [0.0, 1.0]]
    """

    base: int
    factors: tuple[tuple[int, int, float], ...]
    is_transposed: bool = False
    obstacle: str = ""

    @torch.no_grad()
    def merge(self, views: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        """Write the adapted weight into ``out``, in at least single precision up to the last step.

        It begins at the base each time: however often weights are adopted, no error adds up.
        """
        dtype = torch.promote_types(views[self.base].dtype, torch.float32)

        def at(index: int) -> torch.Tensor:
            return views[index].to(out.device, dtype)

        total = at(self.base)
        if self.is_transposed:
            total = total.t()
        for a, b, scaling in self.factors:
            total = torch.addmm(total, at(b), at(a), alpha=scaling)
        out.copy_(total.t() if self.is_transposed else total)


def find_lora_updates(module: nn.Module, index_of: Mapping[str, int]) -> dict[str, LoraUpdate]:
    """The adapted weights of ``module`` by their plain names.

    Args:
        module (nn.Module): the model with its adapters.
        index_of (mapping): entry of each name.

    Returns:
        what a reader without adapters has to do for each of these weights; scaling and the choice
        of adapters are what they are now.
    """
    factors: dict[str, list[tuple[int, int, float]]] = {}
    obstacles: dict[str, str] = {}
    left = {name for name in index_of if is_adapter_name(name)}
    transposed: set[str] = set()
    for name, a in index_of.items():
        match = _FACTOR_A.match(name)
        if match is None:
            continue
        layer, adapter = match["layer"], match["adapter"]
        dot = f"{layer}." if layer else ""
        owner = module.get_submodule(layer or "")
        base = next((n for n in (f"{dot}base_layer.weight", f"{dot}weight") if n in index_of), None)
        name_b = f"{dot}lora_B.{adapter}.weight" if adapter else f"{dot}lora_B.weight"
        b = index_of.get(name_b)
        if base is None or b is None or not _is_active(owner, adapter):
            continue
        left -= {name, name_b}
        scaling = _of_adapter(getattr(owner, "scaling", None), adapter)
        obstacle = _obstacle(owner, adapter, scaling)
        if obstacle:
            obstacles[base] = obstacle
        if getattr(owner, "fan_in_fan_out", False):
            transposed.add(base)
        number = float(scaling) if isinstance(scaling, int | float) else 0.0
        factors.setdefault(base, []).append((a, b, number))
    updates = {
        plain_name(base): LoraUpdate(
            index_of[base], tuple(found), base in transposed, obstacles.get(base, "")
        )
        for base, found in factors.items()
    }
    for name in sorted(left):
        layer, _, rest = f".{name}".partition(".lora_")
        adapter = (rest.split(".") + [""])[1]
        if _is_active(module.get_submodule(layer[1:]), adapter):
            reason = "it is not of a lora_A and a lora_B beside the weight of a layer"
            updates.setdefault(plain_name(name), LoraUpdate(index_of[name], (), obstacle=reason))
    return updates


def _of_adapter(value: object, adapter: str | None) -> object:
    return value.get(adapter) if isinstance(value, Mapping) else value


def _is_active(owner: nn.Module, adapter: str | None) -> bool:
    active = getattr(owner, "active_adapters", None)
    return not adapter or active is None or adapter in active


def _obstacle(owner: nn.Module, adapter: str | None, scaling: object) -> str:
    if not isinstance(scaling, int | float):
        return "its layer has no number `scaling` for it"
    if getattr(owner, "merged", False):
        return "the learner has merged it already; unmerge it there"
    if _of_adapter(getattr(owner, "use_dora", False), adapter):
        return "it is a DoRA adapter, which rescales the weight"
    if _of_adapter(getattr(owner, "lora_bias", False), adapter):
        return "it has a bias"
    factor = getattr(owner, "lora_A", None)
    if adapter is not None and isinstance(factor, nn.ModuleDict):
        factor = factor[adapter]
    weight = getattr(factor, "weight", None)
    if isinstance(weight, torch.Tensor) and weight.ndim != 2:
        return f"its factors have {weight.ndim} dimensions instead of 2"
    return ""
