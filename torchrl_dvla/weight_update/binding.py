# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Pointing a module's parameters and buffers at memory that somebody else writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from torchrl_dvla.weight_update import device_copy
from torchrl_dvla.weight_update.layout import WeightLayout, named_weights, weight_places
from torchrl_dvla.weight_update.lora import LoraUpdate

__all__ = ["ModuleBinding"]


class ModuleBinding:
    """Which entry of the store each parameter and buffer of one module reads.

    A tensor of the store's dtype on the CPU is pointed at the slot: the :class:`torch.nn.Parameter`
    object stays the same, its memory is the slot's. Parameters on the meta device are replaced by
    frozen ones that are pointed. A tensor on another device or of another precision is copied into;
    on CUDA by a side stream, which :meth:`apply` waits for.

    A module without the low-rank adapters of the published one gets the adapted weights *merged*,
    in private memory of those layers alone; see :mod:`~torchrl_dvla.weight_update.lora`.

    Args:
        module (nn.Module): the module to bind. Nothing of it is changed before :meth:`apply`.
        layout (WeightLayout): the store's layout.

    Keyword Args:
        copy (bool): copy into every tensor. Default: ``False``.

    Raises:
        ValueError: listing the differences, if the module does not fit the layout, or naming the
            adapters that cannot be merged.

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
        merges = layout.is_without_adapters(named_weights(module))
        index_of = layout.plain_index_of if merges else layout.index_of
        updates = layout.lora_updates if merges else {}
        _refuse_obstacles(updates)
        pointed: dict[int, tuple[torch.Tensor, int]] = {}
        copied: dict[int, tuple[torch.Tensor, int]] = {}
        merged: dict[int, tuple[torch.Tensor, int]] = {}
        self._updates = {update.base: update for update in updates.values()}
        self._entries = layout.entries
        self._placed: list[tuple[dict[str, torch.Tensor | None], str, int]] = []
        for name, tensor, places, key in weight_places(module):
            index = index_of[name]
            if tensor.device.type == "meta":
                self._placed.append((places, key, index))
                continue
            same_kind = tensor.device.type == "cpu" and tensor.dtype == layout.entries[index].dtype
            group = pointed if same_kind and not copy else copied
            if name in updates:
                group = merged
            if group.setdefault(id(tensor), (tensor, index))[1] != index:
                raise ValueError(
                    f"module must not tie {name!r} to {layout.entries[group[id(tensor)][1]].name!r}"
                    ", got one tensor for two weights of the store. Build both from one "
                    "configuration."
                )
        self._pointed = list(pointed.values())
        self._copied: list[tuple[torch.Tensor, int]] = []
        self._uploaded: dict[device_copy.SideStream, list[tuple[torch.Tensor, int]]] = {}
        for tensor, index in copied.values():
            side = device_copy.side_stream([tensor])
            pairs = self._copied if side is None else self._uploaded.setdefault(side, [])
            pairs.append((tensor, index))
        self._merged = list(merged.values())
        self._is_applied = False
        self.applied_offer = -1

    @property
    def holds_memory(self) -> bool:
        """Whether the module reads the slot itself, so that the slot must stay pinned."""
        if self._placed:
            return True
        return any(not self._entries[index].is_frozen for _, index in self._pointed)

    @property
    def is_uploaded(self) -> bool:
        """Whether the module is on a device that the slot is copied up to."""
        return bool(self._uploaded)

    def apply(self, views: Sequence[torch.Tensor]) -> None:
        """Make the module read ``views``, which are in the order of the layout's entries."""
        if not self._is_applied:
            self._apply_first(views)
        for tensor, index in self._pointed:
            tensor.data = views[index]
        with torch.no_grad():
            for tensor, index in self._copied:
                tensor.data.copy_(views[index])
        for side, uploaded in self._uploaded.items():
            _upload(side, [(tensor.data, views[index]) for tensor, index in uploaded])
        for tensor, index in self._merged:
            self._updates[index].merge(views, tensor.data)

    def detach(self) -> None:
        """Give the module memory of its own again, with the values it has now."""
        for tensor, _ in self._pointed:
            tensor.data = tensor.data.clone()

    def _apply_first(self, views: Sequence[torch.Tensor]) -> None:
        self._materialise(views)
        for tensor, _ in self._merged:
            # What the module came with may be the learner's memory, or shared among workers.
            tensor.data = torch.empty_like(tensor.data)
        self._is_applied = True

    def _materialise(self, views: Sequence[torch.Tensor]) -> None:
        made: dict[tuple[int, bool], torch.Tensor] = {}
        for places, key, index in self._placed:
            is_parameter = isinstance(places[key], nn.Parameter)
            if (index, is_parameter) not in made:
                view = views[index]
                tensor = nn.Parameter(view, requires_grad=False) if is_parameter else view.detach()
                made[index, is_parameter] = tensor
                group = self._merged if index in self._updates else self._pointed
                group.append((tensor, index))
            places[key] = made[index, is_parameter]
        self._placed = []


def _upload(
    side: device_copy.SideStream, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]
) -> None:
    """Copy to the device and wait: when this returns the slot may be let go."""

    @torch.no_grad()
    def start() -> None:
        for tensor, view in pairs:
            tensor.copy_(view, non_blocking=True)

    # After what the caller has started: forward passes there still read the old weights.
    before = side.on_current(lambda: None)
    side.wait(side.on_side(start, after=before))


def _refuse_obstacles(updates: Mapping[str, LoraUpdate]) -> None:
    lines = [f"{name}: {update.obstacle}" for name, update in updates.items() if update.obstacle]
    if lines:
        listed = "\n  ".join(lines[:20])
        raise ValueError(
            f"module must have the adapters of the published one where they cannot be merged, got "
            f"a module without adapters, and {len(lines)} weights whose adapter cannot:\n  "
            f"{listed}\nBuild the reader's module with the adapters."
        )


def memory_of(module: nn.Module) -> set[int]:
    """Addresses of the module's parameters and buffers."""
    return {tensor.data_ptr() for tensor in named_weights(module).values() if tensor.numel()}
