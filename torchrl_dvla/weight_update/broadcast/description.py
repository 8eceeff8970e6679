# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""A weight layout as plain data, so that another node can build the same store."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from torchrl_dvla.weight_update.lora import LoraUpdate
from torchrl_dvla.weight_update.weight_layout import WeightLayout

__all__ = ["describe_layout", "restore_layout"]


def describe_layout(layout: WeightLayout) -> dict[str, Any]:
    """What :func:`restore_layout` needs, fit for JSON."""
    return {
        "entries": [
            {
                "names": entry.names,
                "shape": entry.shape,
                "stride": entry.stride,
                "dtype": str(entry.dtype).removeprefix("torch."),
                "is_frozen": entry.is_frozen,
                "offset_bytes": entry.offset_bytes,
            }
            for entry in layout.entries
        ],
        "slot_bytes": layout.slot_bytes,
        "frozen_bytes": layout.frozen_bytes,
        "lora": {name: dataclasses.asdict(u) for name, u in layout.lora_updates.items()},
    }


def restore_layout(description: Mapping[str, Any]) -> WeightLayout:
    """A layout whose stores hold the same bytes in the same places.

    Weights are stored there as they arrive: what ``transport_dtype`` narrowed is narrow from the
    start.

    Args:
        description (mapping): made by :func:`describe_layout`, possibly read back from JSON.

    Returns:
        the layout.

    Raises:
        RuntimeError: if this version of the package lays the same weights out differently.

    Examples:
        >>> layout = WeightLayout(nn.Linear(3, 2), transport_dtype=torch.bfloat16)
        >>> copy = restore_layout(describe_layout(layout))
        >>> copy.slot_bytes == layout.slot_bytes, copy.entries[0].dtype
        (True, torch.bfloat16)
    """
    weights: dict[str, torch.Tensor] = {}
    for entry in description["entries"]:
        shape, stride = tuple(entry["shape"]), tuple(entry["stride"])
        dtype = getattr(torch, entry["dtype"])
        tensor = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
        if entry["is_frozen"]:
            tensor = nn.Parameter(tensor, requires_grad=False)
        weights.update(dict.fromkeys(entry["names"], tensor))  # tied: one tensor, several names
    layout = WeightLayout(weights, trainable_only=True)
    found = [(list(entry.names), entry.offset_bytes) for entry in layout.entries]
    wanted = [(list(entry["names"]), entry["offset_bytes"]) for entry in description["entries"]]
    sizes = (description["slot_bytes"], description["frozen_bytes"])
    if found != wanted or sizes != (layout.slot_bytes, layout.frozen_bytes):
        raise RuntimeError(
            "The learner's node lays weights out differently than this one. Install the same "
            "version of torchrl_dvla on both."
        )
    layout.lora_updates = {
        name: LoraUpdate(
            update["base"],
            tuple((int(a), int(b), float(scaling)) for a, b, scaling in update["factors"]),
            update["is_transposed"],
            update["obstacle"],
        )
        for name, update in description["lora"].items()
    }
    return layout
