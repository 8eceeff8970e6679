# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Reading a decision's observation, with errors that name the key and the remedy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase

__all__ = ["read_images", "read_instructions", "read_state"]


def read_images(
    tensordict: TensorDictBase, keys: Sequence[NestedKey], image_size: tuple[int, int]
) -> list[torch.Tensor]:
    """Return the images of every camera, each ``[*B, 3, height, width]``.

    Args:
        tensordict (TensorDictBase): the observation.
        keys (sequence of NestedKey): one a camera.
        image_size (tuple of int): height and width.

    Returns:
        One tensor a camera.

    Raises:
        KeyError: if one is missing.
        ValueError: if one has another size.
    """
    expected = (3, *image_size)
    images = []
    for key in keys:
        image = _required(tensordict, key)
        if tuple(image.shape[-3:]) != expected:
            raise ValueError(
                f"{key} must have shape [*B, {', '.join(map(str, expected))}], got "
                f"{tuple(image.shape)}. Render at this size (camera_height, camera_width)."
            )
        images.append(image)
    return images


def read_state(tensordict: TensorDictBase, key: NestedKey, state_dim: int) -> torch.Tensor:
    """Return the proprioception ``[*B, S]``.

    Args:
        tensordict (TensorDictBase): the observation.
        key (NestedKey): its key.
        state_dim (int): ``S``.

    Returns:
        The tensor.

    Raises:
        KeyError: if it is missing.
        ValueError: if it has another size.
    """
    state = _required(tensordict, key)
    if state.shape[-1] != state_dim:
        raise ValueError(
            f"{key} must have shape [*B, {state_dim}], got {tuple(state.shape)}. Use the "
            "proprioception keys the policy was trained with."
        )
    return state


def read_instructions(tensordict: TensorDictBase, key: NestedKey, num_rows: int) -> list[str]:
    """Return one instruction a row, in row-major order of the batch.

    Args:
        tensordict (TensorDictBase): the observation.
        key (NestedKey): its key; a single string stands for all rows.
        num_rows (int): the number of rows.

    Returns:
        The strings.

    Raises:
        KeyError: if they are missing.
        ValueError: if there are too few or too many.
    """
    data = _required(tensordict, key)
    data = data.tolist() if hasattr(data, "tolist") else data
    if isinstance(data, str):
        return [data] * num_rows
    instructions = _flatten(data)
    if len(instructions) != num_rows:
        raise ValueError(
            f"{key} must hold {num_rows} instructions as there are images, got "
            f"{len(instructions)}. Stack them with NonTensorStack."
        )
    return instructions


def _required(tensordict: TensorDictBase, key: NestedKey) -> Any:
    value = tensordict.get(key, None)
    if value is None:
        raise KeyError(
            f"{key} is missing: an environment that speaks the VLA schema writes it, and a batch "
            f"from a replay buffer has it too. Found {sorted(map(str, tensordict.keys(True)))}."
        )
    return value


def _flatten(data: Any) -> list[str]:
    if isinstance(data, str):
        return [data]
    return [string for item in data for string in _flatten(item)]
