# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Network of a flow policy: a prefix that is computed once a decision, and an expert reading it."""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
from torch import nn

from torchrl_dvla.modules.backbones import PixelStyle

if TYPE_CHECKING:
    from typing import Self

    from transformers import DynamicCache

__all__ = ["FlowNetwork", "Prefix", "TimeWaves", "pad_text"]


class Prefix(NamedTuple):
    """What every pass of the expert reads: keys and values of images and instruction, and state."""

    cache: DynamicCache
    #: ``[B, L]``, 1 = a token, 0 = padding.
    mask: torch.Tensor
    #: Standardised, padded states ``[B, max_state_dim]``.
    state: torch.Tensor

    def fresh_cache(self) -> DynamicCache:
        """The cache for one pass, to whose layers the expert appends its own keys and values."""
        # To crop them off again would leave views behind that hold the graph of the pass.
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        return cache


class FlowNetwork(nn.Module):
    """Adapter of a vision-language model with an action expert.

    Families differ in how the prefix is laid out, where the state goes, and how the expert is told
    the time. :meth:`prefix` and :meth:`velocity` are all that :class:`FlowVLA` needs.
    """

    #: Prompt after the images, and after a ``<bos>`` where the tokenizer knows one.
    template: ClassVar[str] = "{instruction}\n"
    pixel_style: ClassVar[PixelStyle] = PixelStyle(interpolation="bilinear", padding="center")
    #: How states and actions are scaled, see :class:`FlowVLAConfig`.
    scaling: ClassVar[Literal["standard", "range"]] = "standard"

    @classmethod
    @abstractmethod
    def from_dict(cls, data: dict[str, Any], *, dtype: torch.dtype) -> Self:
        """Adapter of a network with random weights.

        Args:
            data (dict): ``to_dict()`` of a ``PI0Config``, for all families.

        Keyword Args:
            dtype (torch.dtype): of both transformers; projections of state, actions and velocities
                are float32.
        """

    @property
    @abstractmethod
    def config(self) -> Any:
        """A ``PI0Config``: ``chunk_size``, ``max_action_dim``, ``max_state_dim`` etc."""

    @property
    @abstractmethod
    def words(self) -> nn.Embedding:
        """Embeddings of the prompt's tokens."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of both transformers."""
        return self.words.weight.dtype

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images that the vision tower takes."""
        size = int(self.config.vlm_config.vision_config.image_size)
        return size, size

    @property
    def hidden_size(self) -> int:
        """Width ``W`` of the expert."""
        return int(self.config.dit_config.hidden_size)

    @abstractmethod
    def freeze_prefix(self) -> None:
        """Exclude what :meth:`prefix` reads from training."""

    @abstractmethod
    def prefix(
        self, pixels: torch.Tensor, text_ids: list[torch.Tensor], state: torch.Tensor
    ) -> Prefix:
        """One pass of the vision-language model over images and prompt.

        Args:
            pixels (torch.Tensor): normalised images ``[B, cameras, 3, height, width]``.
            text_ids (list of torch.Tensor): token ids of each row's prompt after the images.
            state (torch.Tensor): standardised, padded states ``[B, max_state_dim]``.

        Returns:
            The :class:`Prefix` of the batch.
        """

    @abstractmethod
    def velocity(
        self, prefix: Prefix, x: torch.Tensor, time: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One pass of the action expert.

        Args:
            prefix (Prefix): of the batch; it is the same afterwards.
            x (torch.Tensor): noisy action chunks ``[B, H, max_action_dim]``.
            time (torch.Tensor): of each row ``[B]``, 1 = noise.

        Returns:
            Velocities ``[B, H, max_action_dim]`` and the expert's last hidden states ``[B, H, W]``,
            float32.
        """


class TimeWaves(nn.Module):
    """Sines and cosines of a time, with periods that grow geometrically.

    They are computed in float64 as openpi and LeRobot do: the shortest period is 1 / 250 of the
    range, whose phase float32 knows to four digits only.

    Args:
        size (int): number ``W`` of sines and cosines together.
        periods (tuple of float): the shortest and the longest.

    Examples:
        >>> import torch
        >>> from torchrl_dvla.modules.flow_network import TimeWaves
        >>> TimeWaves(4, (1.0, 4.0))(torch.tensor([0.25])).abs()
        tensor([[1.0000e+00, 3.8268e-01, 6.1232e-17, 9.2388e-01]])
    """

    def __init__(self, size: int, periods: tuple[float, float]) -> None:
        super().__init__()
        self.size, self.periods = size, periods

    def forward(self, time: torch.Tensor) -> torch.Tensor:
        """Waves ``[B, W]`` of times ``[B]``, float32."""
        dtype = torch.float32 if time.device.type == "mps" else torch.float64
        shortest, longest = self.periods
        shares = torch.linspace(0.0, 1.0, self.size // 2, dtype=dtype, device=time.device)
        periods = shortest * (longest / shortest) ** shares
        phases = time[:, None].to(dtype) * (2 * math.pi / periods)
        return torch.cat([phases.sin(), phases.cos()], -1).float()


def pad_text(
    text_ids: list[torch.Tensor], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids ``[B, L]`` padded on the right, and their mask, 1 = a token.

    Args:
        text_ids (list of torch.Tensor): of each row.
        device (torch.device): where they are wanted.

    Examples:
        >>> import torch
        >>> from torchrl_dvla.modules.flow_network import pad_text
        >>> pad_text([torch.tensor([5]), torch.tensor([6, 7])], torch.device("cpu"))
        (tensor([[5, 0],
                [6, 7]]), tensor([[1, 0],
                [1, 1]]))
    """
    rows = (text_ids, [torch.ones_like(ids) for ids in text_ids])
    ids, mask = (nn.utils.rnn.pad_sequence(row, batch_first=True).to(device) for row in rows)
    return ids, mask
