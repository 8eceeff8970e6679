# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Inputs of a policy: reading an observation, normalising its pixels, projecting its state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from torchrl_dvla.modules.backbones import PixelStyle

__all__ = [
    "PixelNormalizer",
    "RangeScaler",
    "Standardizer",
    "StateProjector",
    "read_images",
    "read_instructions",
    "read_proprio",
]


def read_images(
    tensordict: TensorDictBase, keys: Sequence[NestedKey], image_size: tuple[int, int]
) -> list[torch.Tensor]:
    """Images of every camera, each ``[*B, 3, height, width]``.

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
    remedy = "Render at this size (camera_height, camera_width)."
    return [_read(tensordict, key, (3, *image_size), remedy) for key in keys]


def read_proprio(tensordict: TensorDictBase, key: NestedKey, state_dim: int) -> torch.Tensor:
    """Proprioception ``[*B, S]``.

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
    remedy = "Use the proprioception keys the policy was trained with."
    return _read(tensordict, key, (state_dim,), remedy)


def read_instructions(tensordict: TensorDictBase, key: NestedKey, num_rows: int) -> list[str]:
    """One instruction a row, in row-major order of the batch.

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
    data = _read(tensordict, key)
    data = data.tolist() if hasattr(data, "tolist") else data
    if isinstance(data, str):
        return [data] * num_rows
    instructions = tree_leaves(data)
    if len(instructions) != num_rows:
        raise ValueError(
            f"{key} must hold {num_rows} instructions as there are images, got "
            f"{len(instructions)}. Stack them with NonTensorStack."
        )
    return instructions


def _read(
    tensordict: TensorDictBase, key: NestedKey, shape: tuple[int, ...] = (), remedy: str = ""
) -> Any:
    value = tensordict.get(key, None)
    if value is None:
        raise KeyError(
            f"{key} is missing: an environment that speaks the VLA schema writes it, and a batch "
            f"from a replay buffer has it too. Found {sorted(map(str, tensordict.keys(True)))}."
        )
    if shape and tuple(value.shape[-len(shape) :]) != shape:
        raise ValueError(
            f"{key} must have shape [*B, {', '.join(map(str, shape))}], got {tuple(value.shape)}. "
            f"{remedy}"
        )
    return value


class PixelNormalizer(nn.Module):
    """Scaling, resizing and normalisation of images in a few tensor operations.

    Args:
        style (PixelStyle): mean, standard deviation, interpolation and padding.

    Keyword Args:
        image_size (tuple of int): height and width wanted.

    Examples:
        >>> import torch
        >>> from torchrl_dvla.modules.backbones import PixelStyle
        >>> from torchrl_dvla.modules.policy_inputs import PixelNormalizer
        >>> normalize = PixelNormalizer(PixelStyle(), image_size=(2, 2))
        >>> pixels = normalize(torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1)
        ...     .expand(2, 3, 2, 2))
        >>> pixels[:, 0, 0, 0]
        tensor([-1.,  1.])
    """

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self, style: PixelStyle, *, image_size: tuple[int, int]) -> None:
        super().__init__()
        self._image_size = image_size
        self._interpolation = style.interpolation
        self._antialias = style.antialias
        self._padding = style.padding
        self._crop = style.crop
        self._num_copies = len(style.mean) // 3
        mean = torch.tensor(style.mean).view(-1, 1, 1)
        std = torch.tensor(style.std).view(-1, 1, 1)
        # (x / 255 - mean) / std == x * scale + shift
        self.register_buffer("scale", 1.0 / (255.0 * std), persistent=False)
        self.register_buffer("shift", -mean / std, persistent=False)

    @torch.no_grad()
    def forward(self, images: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Normalised pixels of images ``[N, 3, h, w]``.

        Args:
            images (torch.Tensor): uint8 in [0, 255] or floating point in [0, 1].
            dtype (torch.dtype): dtype of the result.

        Returns:
            Normalised pixels ``[N, 3, height, width]``, or six channels for two towers.
        """
        # A copy in any case: it is changed in place below.
        pixels = images.to(torch.float32, copy=True)
        if images.dtype != torch.uint8:
            pixels.mul_(255.0)
        size = self._image_size
        if self._padding != "none":
            size = _largest_inside(pixels.shape[-2:], size)
        if pixels.shape[-2:] != size and self._interpolation == "lanczos":
            pixels = _resample(pixels, size, _lanczos_matrix).round_().clamp_(0.0, 255.0)
        elif pixels.shape[-2:] != size:
            pixels = F.interpolate(
                pixels,
                size=size,
                mode=self._interpolation,
                align_corners=False,
                antialias=self._antialias,
            ).clamp_(0.0, 255.0)
        if size != self._image_size:
            pixels = _pad(pixels, self._image_size, self._padding)
        if self._crop != 1.0:
            crop = partial(_crop_matrix, share=self._crop)
            pixels = _resample(pixels, self._image_size, crop)
            # TensorFlow's conversion to integers: 256 intervals of one width.
            pixels = pixels.mul_(255.5 / 255.0).floor_()
        if self._num_copies > 1:
            pixels = torch.cat([pixels] * self._num_copies, 1)
        # The product is a new tensor: in an ensemble the buffers have one dimension more.
        return (pixels * self.scale).add_(self.shift).to(dtype)


def _resample(
    images: torch.Tensor, size: tuple[int, int], matrix: Callable[[int, int], torch.Tensor]
) -> torch.Tensor:
    """Images of another size: each pixel a weighted sum of pixels, by rows and then by columns."""
    rows, columns = (matrix(images.shape[i - 2], size[i]).to(images.device) for i in (0, 1))
    return rows @ images @ columns.T


@lru_cache(maxsize=8)
def _lanczos_matrix(size: int, new_size: int) -> torch.Tensor:
    """Weights ``[new_size, size]`` of Lanczos' filter of radius 3, wider where pixels get fewer."""
    scale = size / new_size
    centers = (torch.arange(new_size, dtype=torch.float64) + 0.5) * scale - 0.5
    distances = (torch.arange(size) - centers[:, None]) / max(scale, 1.0)
    weights = torch.sinc(distances) * torch.sinc(distances / 3) * (distances.abs() < 3)
    return (weights / weights.sum(-1, keepdim=True)).float()


@lru_cache(maxsize=8)
def _crop_matrix(size: int, new_size: int, *, share: float) -> torch.Tensor:
    """Weights ``[new_size, size]`` of the middle, bilinearly; its corners are pixels' centres."""
    side = share**0.5
    places = torch.linspace((1 - side) / 2, (1 + side) / 2, new_size, dtype=torch.float64)
    distances = (torch.arange(size) - places[:, None] * (size - 1)).abs()
    return (1.0 - distances).clamp(min=0.0).float()


def _largest_inside(shape: tuple[int, ...], size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of an image of ``shape``, shrunk or enlarged until it just fits ``size``."""
    ratio = max(shape[1] / size[1], shape[0] / size[0])
    return int(shape[0] / ratio), int(shape[1] / ratio)


def _pad(images: torch.Tensor, size: tuple[int, int], where: str) -> torch.Tensor:
    """Images with black borders, of ``size``."""
    missing_height, missing_width = (size[i] - images.shape[i - 2] for i in (0, 1))
    parts = 1 if where == "top_left" else 2
    left, top = missing_width // parts, missing_height // parts
    return F.pad(images, (left, missing_width - left, top, missing_height - top))


class Standardizer(nn.Module):
    """Standardisation of vectors, and back; mean and standard deviation travel with the weights.

    Args:
        size (int): size ``S`` of the vectors.

    Examples:
        >>> import torch
        >>> from torchrl_dvla.modules.policy_inputs import Standardizer
        >>> standardizer = Standardizer(2)
        >>> standardizer.set_statistics(torch.tensor([1.0, 0.0]), torch.tensor([2.0, 0.5]))
        >>> standardizer.standardize(torch.tensor([3.0, 1.0]))
        tensor([1., 2.])
        >>> standardizer.restore(torch.tensor([1.0, 2.0]))
        tensor([3., 1.])
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("std", torch.ones(size))

    @torch.no_grad()
    def set_statistics(self, mean: torch.Tensor, std: torch.Tensor) -> None:
        """Set mean and standard deviation, usually those of demonstrations.

        Args:
            mean (torch.Tensor): ``[S]``.
            std (torch.Tensor): ``[S]``, positive.

        Raises:
            ValueError: if a shape is wrong, an entry is not finite, or one of ``std`` not positive.
        """
        _check_statistics(mean, std, self.mean.shape)
        self.mean.copy_(mean)
        self.std.copy_(std)

    def standardize(self, values: torch.Tensor) -> torch.Tensor:
        """Values ``[*B, S]`` in standard deviations from the mean."""
        return (values.to(self.mean.dtype) - self.mean) / self.std

    def restore(self, values: torch.Tensor) -> torch.Tensor:
        """Inverse of :meth:`standardize`."""
        return values * self.std + self.mean

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        mean, std = (state_dict.get(prefix + name) for name in ("mean", "std"))
        if mean is not None and std is not None:
            _check_statistics(mean, std, self.mean.shape, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class RangeScaler(nn.Module):
    """Scaling of vectors from a range to [-1, 1], and back; its ends travel with the weights.

    pi0.5 takes the quantiles of 1 % and 99 % for them. Values beyond are not clipped.

    Args:
        size (int): size ``S`` of the vectors.

    Examples:
        >>> import torch
        >>> from torchrl_dvla.modules.policy_inputs import RangeScaler
        >>> scaler = RangeScaler(2)
        >>> scaler.set_range(torch.tensor([0.0, -1.0]), torch.tensor([4.0, 1.0]))
        >>> scaler.standardize(torch.tensor([1.0, 1.0]))
        tensor([-0.5000,  1.0000])
        >>> scaler.restore(torch.tensor([-0.5, 1.0]))
        tensor([1., 1.])
    """

    low: torch.Tensor
    high: torch.Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("low", -torch.ones(size))
        self.register_buffer("high", torch.ones(size))

    @torch.no_grad()
    def set_range(self, low: torch.Tensor, high: torch.Tensor) -> None:
        """Set the ends of the range.

        Args:
            low (torch.Tensor): what becomes -1, ``[S]``.
            high (torch.Tensor): what becomes 1, ``[S]``, larger.

        Raises:
            ValueError: if a shape is wrong, an entry is not finite, or a range is empty.
        """
        _check_range(low, high, self.low.shape)
        self.low.copy_(low)
        self.high.copy_(high)

    # The formulas of openpi and LeRobot, operation by operation: a state at an end of its range
    # must come out as exactly -1, or it falls into another bin of the prompt.
    def standardize(self, values: torch.Tensor) -> torch.Tensor:
        """Values ``[*B, S]`` in [-1, 1], where they are inside the range."""
        return 2.0 * (values.to(self.low.dtype) - self.low) / (self.high - self.low) - 1.0

    def restore(self, values: torch.Tensor) -> torch.Tensor:
        """Inverse of :meth:`standardize`."""
        return (values + 1.0) * (self.high - self.low) / 2.0 + self.low

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        low, high = (state_dict.get(prefix + name) for name in ("low", "high"))
        if low is not None and high is not None:
            _check_range(low, high, self.low.shape, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class StateProjector(Standardizer):
    """Standardisation of a proprioception vector and its projection into the token stream.

    Args:
        state_dim (int): size ``S`` of the vector.
        hidden_size (int): width ``D`` of the token stream.

    Keyword Args:
        clip (bool): whether a standardised state is cut off at -1 and 1.

    Examples:
        >>> import torch
        >>> from torchrl_dvla.modules.policy_inputs import StateProjector
        >>> projector = StateProjector(8, 32)
        >>> projector.set_statistics(torch.zeros(8), torch.full((8,), 2.0))
        >>> projector(torch.ones(5, 8)).shape
        torch.Size([5, 1, 32])
    """

    def __init__(self, state_dim: int, hidden_size: int, *, clip: bool = False) -> None:
        super().__init__(state_dim)
        self._clip = clip
        self.layers = nn.Sequential(
            nn.Linear(state_dim, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        """Tokens ``[B, 1, D]`` of states ``[B, S]``."""
        state = self.standardize(state)
        return self.layers(state.clamp(-1.0, 1.0) if self._clip else state).unsqueeze(1)


def _check_statistics(
    mean: torch.Tensor, std: torch.Tensor, shape: torch.Size, prefix: str = ""
) -> None:
    is_right = mean.shape == std.shape == shape
    if not is_right or not (mean.isfinite() & std.isfinite() & (std > 0)).all():
        raise ValueError(
            f"{prefix}mean and {prefix}std must have shape {tuple(shape)} and be finite, and std "
            f"must be positive, got {mean.tolist()} and {std.tolist()}. Clamp the std of entries "
            "that never change."
        )


def _check_range(
    low: torch.Tensor, high: torch.Tensor, shape: torch.Size, prefix: str = ""
) -> None:
    is_right = low.shape == high.shape == shape
    if not is_right or not (low.isfinite() & high.isfinite() & (low < high)).all():
        raise ValueError(
            f"{prefix}low and {prefix}high must have shape {tuple(shape)} and be finite, and high "
            f"must be above low, got {low.tolist()} and {high.tolist()}. Widen the range of "
            "entries that never change."
        )
