# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Float32 masters of weights that a policy has in a narrower dtype."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
from torch import nn

__all__ = ["MasterWeights"]


class MasterWeights(nn.Module):
    """Float32 masters of trained weights, for an optimizer to step.

    bfloat16 has 8 significant bits: of a weight of 1, a step below 0.002 is rounded away. So the
    optimizer steps masters, and the policy gets them rounded. Gradients are added up in float32 as
    well, over the micro-batches of a step, and exist once.

    Its state dict, the masters, belongs into a checkpoint beside the policy's.

    Args:
        parameters (iterable of nn.Parameter): what is trained. Those in float32 are their own
            masters.

    Examples:
        >>> import torch
        >>> from torchrl_dvla.modules.master_weights import MasterWeights
        >>> layer = torch.nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
        >>> _ = layer.weight.data.fill_(1.0)
        >>> masters = MasterWeights(layer.parameters())
        >>> optimizer = torch.optim.SGD(masters.stepped, lr=0.001)
        >>> masters.follow(optimizer)
        >>> for _ in range(3):
        ...     layer(torch.ones(1, 1, dtype=torch.bfloat16)).sum().backward()
        ...     optimizer.step(); optimizer.zero_grad()
        >>> [round(p.item(), 4) for p in (masters.stepped[0], layer.weight)]  # 8 bits: 255 / 256
        [0.997, 0.9961]

    Reference:
        Micikevicius et al., "Mixed Precision Training", 2017, https://arxiv.org/abs/1710.03740.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__()
        self.masters = nn.ParameterList()
        self._narrow: list[nn.Parameter] = []
        #: What the optimizer is made of, in the order of the parameters.
        self.stepped: list[nn.Parameter] = []
        for parameter in parameters:
            if parameter.dtype.itemsize >= torch.float32.itemsize:
                self.stepped.append(parameter)
                continue
            master = nn.Parameter(parameter.detach().float())
            parameter.register_post_accumulate_grad_hook(functools.partial(_hand_over, master))
            self._narrow.append(parameter)
            self.masters.append(master)
            self.stepped.append(master)

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """Round the masters into the policy after each step of ``optimizer``."""
        optimizer.register_step_post_hook(lambda *_: self._round())

    @torch.no_grad()
    def _round(self) -> None:
        for parameter, master in zip(self._narrow, self.masters, strict=True):
            parameter.copy_(master)


def _hand_over(master: nn.Parameter, parameter: torch.Tensor) -> None:
    """Add a gradient to the master's, where the optimizer finds it."""
    assert parameter.grad is not None
    if master.grad is None:
        master.grad = parameter.grad.float()
    else:
        master.grad += parameter.grad
    parameter.grad = None
