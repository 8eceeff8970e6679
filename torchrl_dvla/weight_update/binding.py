# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Pointing a module's parameters and buffers at memory that somebody else writes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from torchrl_dvla.weight_update.layout import WeightLayout, named_weights, weight_places

__all__ = ["ModuleBinding"]


class ModuleBinding:
    """Which entry of the store each parameter and buffer of one module reads.

    A tensor of the store's dtype on the CPU is pointed at the slot: the :class:`torch.nn.Parameter`
    object stays the same, its memory is the slot's. Parameters on the meta device are replaced by
    frozen ones that are pointed. A tensor on another device or of another precision is copied into.

    Args:
        module (nn.Module): the module to bind. Nothing of it is changed before :meth:`apply`.
        layout (WeightLayout): the store's layout.

    Keyword Args:
        copy (bool): copy into every tensor. Default: ``False``.

    Raises:
        ValueError: listing the differences, if the module does not fit the layout.

    Examples:
        >>> source, reader = nn.Linear(2, 1), nn.Linear(2, 1)
        >>> binding = ModuleBinding(reader, WeightLayout(source))
        >>> binding.apply([torch.ones(1, 2), torch.zeros(1)])
        >>> reader(torch.tensor([3.0, 4.0])).item()
        7.0
    """

    def __init__(self, module: nn.Module, layout: WeightLayout, *, copy: bool = False) -> None:
        if layout.differences(module, as_reader=True):
            raise layout.mismatch("module", module, as_reader=True)
        pointed: dict[int, tuple[torch.Tensor, int]] = {}
        copied: dict[int, tuple[torch.Tensor, int]] = {}
        self._placed: list[tuple[dict[str, torch.Tensor | None], str, int]] = []
        for name, tensor, places, key in weight_places(module):
            index = layout.index_of[name]
            if tensor.device.type == "meta":
                self._placed.append((places, key, index))
                continue
            same_kind = tensor.device.type == "cpu" and tensor.dtype == layout.entries[index].dtype
            group = pointed if same_kind and not copy else copied
            if group.setdefault(id(tensor), (tensor, index))[1] != index:
                raise ValueError(
                    f"module must not tie {name!r} to {layout.entries[group[id(tensor)][1]].name!r}"
                    ", got one tensor for two weights of the store. Build both from one "
                    "configuration."
                )
        self._pointed = list(pointed.values())
        self._copied = list(copied.values())
        self.applied_offer = -1

    @property
    def holds_memory(self) -> bool:
        """Whether the module reads the slot itself, so that the slot must stay pinned."""
        return bool(self._pointed or self._placed)

    def apply(self, views: Sequence[torch.Tensor]) -> None:
        """Make the module read ``views``, which are in the order of the layout's entries."""
        self._materialise(views)
        for tensor, index in self._pointed:
            tensor.data = views[index]
        with torch.no_grad():
            for tensor, index in self._copied:
                tensor.data.copy_(views[index])

    def detach(self) -> None:
        """Give the module memory of its own again, with the values it has now."""
        for tensor, _ in self._pointed:
            tensor.data = tensor.data.clone()

    def _materialise(self, views: Sequence[torch.Tensor]) -> None:
        made: dict[tuple[int, bool], torch.Tensor] = {}
        for places, key, index in self._placed:
            is_parameter = isinstance(places[key], nn.Parameter)
            if (index, is_parameter) not in made:
                view = views[index]
                tensor = nn.Parameter(view, requires_grad=False) if is_parameter else view.detach()
                made[index, is_parameter] = tensor
                self._pointed.append((tensor, index))
            places[key] = made[index, is_parameter]
        self._placed = []


def memory_of(module: nn.Module) -> set[int]:
    """Addresses of the module's parameters and buffers."""
    return {tensor.data_ptr() for tensor in named_weights(module).values() if tensor.numel()}
