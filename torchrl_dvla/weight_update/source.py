# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Finding a module's weights again, publish after publish."""

from __future__ import annotations

import weakref

import torch
from tensordict import TensorDictBase
from torch import nn

from torchrl_dvla.weight_update.layout import WeightLayout, WeightSource, weight_places

__all__ = ["ModuleTensors", "SourceTensors"]


class ModuleTensors:
    """The weights of one module in the order of a layout's entries.

    Walking a module, naming what it holds and comparing it with the layout takes as long as copying
    a small policy. It is done once; later calls only make sure that the same tensors are still in
    the same places and that none was added.

    Args:
        module (nn.Module): the module; it is not kept alive by this.
        layout (WeightLayout): the order.

    Raises:
        ValueError: listing the differences, if the module does not fit the layout.

    Examples:
        >>> module = nn.Linear(2, 1)
        >>> tensors = ModuleTensors(module, WeightLayout(module))
        >>> [tuple(t.shape) for t in tensors.get()]
        [(1, 2), (1,)]
        >>> module.extra = nn.Parameter(torch.zeros(3))
        >>> tensors.get() is None
        True
    """

    def __init__(self, module: nn.Module, layout: WeightLayout) -> None:
        self._entries = layout.entries
        self._tensors = layout.tensors_of(module)
        self._places = [
            (places, key, layout.index_of[name]) for name, _, places, key in weight_places(module)
        ]
        self._sizes = [
            (contents, len(contents))
            for owner in module.modules()
            for contents in (owner._parameters, owner._buffers, owner._modules)
        ]

    def get(self) -> list[torch.Tensor] | None:
        """The tensors, or None if the module is no longer what it was."""
        for contents, size in self._sizes:
            if len(contents) != size:
                return None
        tensors = self._tensors
        for places, key, index in self._places:
            if places.get(key) is not tensors[index]:
                return None
        for entry, tensor in zip(self._entries, tensors, strict=True):
            if tensor.shape != entry.shape or (entry.is_frozen and tensor.requires_grad):
                return None
        return tensors


class SourceTensors:
    """The weights of any source in the order of a layout's entries; modules are remembered.

    Args:
        layout (WeightLayout): the order.

    Examples:
        >>> module = nn.Linear(2, 1)
        >>> tensors = SourceTensors(WeightLayout(module))
        >>> [tuple(t.shape) for t in tensors.of({"weight": module.weight, "bias": module.bias})]
        [(1, 2), (1,)]
    """

    def __init__(self, layout: WeightLayout) -> None:
        self._layout = layout
        self._known: weakref.WeakKeyDictionary[nn.Module, ModuleTensors] = (
            weakref.WeakKeyDictionary()
        )

    def of(self, source: WeightSource | WeightLayout) -> list[torch.Tensor]:
        """The live tensors of ``source``.

        Raises:
            ValueError: listing the differences, if it does not fit the layout, or if it is none.
        """
        if isinstance(source, WeightLayout):
            raise ValueError(
                "source must be given to a store that was made empty, got none. Weights of other "
                "nodes come in through receive()."
            )
        if not isinstance(source, nn.Module) or isinstance(source, TensorDictBase):
            return self._layout.tensors_of(source)
        known = self._known.get(source)
        tensors = known.get() if known is not None else None
        if tensors is None:
            known = self._known[source] = ModuleTensors(source, self._layout)
            tensors = known.get()
        assert tensors is not None
        return tensors
