# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Gradient checkpointing of transformers' layers, with a cache and under TorchRL's losses.

Transformers' own switches a cache off, which flow policies read their prefix from; and at the
backward pass it finds the parameters that the module has then, which are none while a TorchRL loss
holds them.

Reference: Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016, arXiv 1604.06174.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDict
from torch import nn
from torch.utils.checkpoint import checkpoint

__all__ = ["call_layer", "checkpoint_layers_"]


def checkpoint_layers_(module: nn.Module) -> None:
    """Have every transformer layer of ``module`` keep its input alone for the backward pass.

    Args:
        module (nn.Module): changed in place; what it computes stays the same.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    for layer in module.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.forward = _CheckpointedForward(layer)


def call_layer(layer: nn.Module, body: Callable[..., Any], *inputs: torch.Tensor) -> Any:
    """``body(*inputs)``, of which only the inputs are kept if ``layer`` is one to checkpoint.

    Args:
        layer (nn.Module): owns the parameters that ``body`` reads.
        body (Callable): what is run, a second time in the backward pass; it changes nothing.
        *inputs (torch.Tensor): what gradients are needed of.
    """
    if not (isinstance(layer.forward, _CheckpointedForward) and torch.is_grad_enabled()):
        return body(*inputs)
    parameters = TensorDict.from_module(layer)

    def run(*inputs: torch.Tensor) -> Any:
        with parameters.to_module(layer):
            return body(*inputs)

    return checkpoint(run, *inputs, use_reentrant=False)


class _CheckpointedForward:
    """Forward pass of a layer, as an attribute that is copied and pickled with it."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def __call__(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        forward = type(self.layer).forward
        cache = kwargs.pop("past_key_values", None)
        before, is_first = _copy_of(cache), True

        def body(hidden: torch.Tensor) -> Any:
            nonlocal is_first
            # The first time it is filled, for who reads it; then it is as it was before that.
            given = {} if cache is None else {"past_key_values": cache if is_first else before}
            is_first = False
            return forward(self.layer, hidden, *args, **given, **kwargs)

        return call_layer(self.layer, body, hidden)


def _copy_of(cache: Any) -> Any:
    if cache is None:
        return None
    cache = copy.copy(cache)
    cache.layers = [copy.copy(layer) for layer in cache.layers]
    return cache
