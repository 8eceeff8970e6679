# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""State as data that loading cannot turn into code."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from tensordict import NonTensorData, NonTensorStack, TensorDict, TensorDictBase

__all__ = ["from_plain", "rng_state", "set_rng_state", "to_plain"]

_TENSORDICT = "__tensordict__"
_ATOMS = (str, int, float, bool, bytes, type(None))


def to_plain(value: Any, *, path: str = "state") -> Any:
    """Reduce ``value`` to tensors, numbers, strings and containers of them.

    The result survives ``torch.load(..., weights_only=True)``, which executes nothing that a
    checkpoint says, so a checkpoint from a stranger can be resumed without trusting it. Tensors
    come to the CPU. A view is copied: saving one would write the whole storage behind it, which for
    a row of the environment pool is the whole pool.

    Args:
        value (Any): nested mappings and sequences of tensors, tensordicts, arrays and scalars.

    Keyword Args:
        path (str): where ``value`` sits, for error messages.

    Returns:
        The same structure; sets and unknown types are refused, deques become lists.

    Raises:
        TypeError: naming the path of a leaf that is no data.

    Examples:
        >>> import numpy as np
        >>> to_plain({"a": np.float32(0.5), "b": (1, deque([2]))})
        {'a': 0.5, 'b': (1, [2])}
    """
    if isinstance(value, np.generic):  # first: np.float64 is a float
        return value.item()
    if isinstance(value, _ATOMS):
        return value
    if isinstance(value, torch.Tensor):
        tensor = value.detach().cpu()
        is_view = tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size()
        return tensor.clone() if is_view or tensor.is_shared() else tensor
    if isinstance(value, TensorDictBase):
        if isinstance(value, NonTensorStack):
            return {_TENSORDICT: "stack", "data": to_plain(value.tolist(), path=path)}
        return {
            _TENSORDICT: "dict",
            "batch_size": list(value.batch_size),
            "data": {
                key: to_plain(leaf, path=f"{path}.{key}") for key, leaf in value.items(is_leaf=None)
            },
        }
    if isinstance(value, NonTensorData):
        return {
            _TENSORDICT: "data",
            "batch_size": list(value.batch_size),
            "data": to_plain(value.data, path=path),
        }
    if isinstance(value, np.ndarray):
        return {"__numpy__": value.dtype.str, "data": torch.from_numpy(value.copy())}
    if isinstance(value, Mapping):
        return {key: to_plain(item, path=f"{path}.{key}") for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(to_plain(item, path=f"{path}[{i}]") for i, item in enumerate(value))
    if isinstance(value, (list, deque)):
        return [to_plain(item, path=f"{path}[{i}]") for i, item in enumerate(value)]
    raise TypeError(
        f"{path} must be tensors, tensordicts, numbers, strings or containers of them, got "
        f"{type(value).__name__}. Let the component's state_dict() return data, not objects."
    )


def from_plain(value: Any) -> Any:
    """Rebuild what :func:`to_plain` reduced.

    Examples:
        >>> from tensordict import TensorDict
        >>> td = TensorDict({"a": torch.ones(3, 2)}, batch_size=[3])
        >>> from_plain(to_plain(td))["a"].shape
        torch.Size([3, 2])
    """
    if isinstance(value, Mapping):
        kind = value.get(_TENSORDICT)
        if kind == "stack":
            return NonTensorStack(*value["data"])
        if kind == "data":
            return NonTensorData(from_plain(value["data"]), batch_size=value["batch_size"])
        if kind == "dict":
            data = {key: from_plain(item) for key, item in value["data"].items()}
            return TensorDict(data, batch_size=value["batch_size"])
        if "__numpy__" in value:
            return value["data"].numpy().astype(value["__numpy__"], copy=False)
        return {key: from_plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(from_plain(item) for item in value)
    if isinstance(value, list):
        return [from_plain(item) for item in value]
    return value


def rng_state() -> dict[str, Any]:
    """State of every random generator of this process: Python, NumPy, torch, CUDA."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Continue from a state that :func:`rng_state` returned.

    Generators of CUDA devices that this machine does not have are left alone.

    Examples:
        >>> state = rng_state()
        >>> first = torch.rand(2)
        >>> set_rng_state(state)
        >>> bool((torch.rand(2) == first).all())
        True
    """
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(state["torch"])
    for device, cuda_state in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(cuda_state, device)
