# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Averages over the executed steps of action chunks."""

from __future__ import annotations

from typing import Literal, get_args

import torch

__all__ = [
    "Reduction",
    "executed_mask",
    "masked_mean",
    "masked_quantile",
    "reduction_normaliser",
    "reduction_weights",
    "rollout_sum",
]

#: How a loss over ``[*B, chunk, A]`` becomes a scalar; see :func:`reduction_weights`.
Reduction = Literal["token_mean", "sequence_mean", "trajectory_mean", "fixed_length", "sum", "none"]


def executed_mask(action_is_pad: torch.Tensor, action_dim: int) -> torch.Tensor:
    """Mask of the action tokens whose env step was executed.

    An episode may end inside a chunk. What the policy chose for the steps after that had no effect,
    so these tokens carry no information about the return and must not be learned from.

    Args:
        action_is_pad (torch.Tensor): boolean ``[*B, chunk]``, ``True`` = never executed.
        action_dim (int): number of tokens per env step, ``A``.

    Returns:
        torch.Tensor: boolean ``[*B, chunk, A]``, ``True`` = executed.

    Raises:
        ValueError: if *action_is_pad* is not boolean.

    Examples:
        >>> import torch
        >>> executed_mask(torch.tensor([[False, True]]), action_dim=3)
        tensor([[[ True,  True,  True],
                 [False, False, False]]])
    """
    if action_is_pad.dtype != torch.bool:
        raise ValueError(
            f"action_is_pad must be boolean, got {action_is_pad.dtype}. Its negation would be "
            "bitwise: convert it with .bool()."
        )
    return (~action_is_pad).unsqueeze(-1).expand(*action_is_pad.shape, action_dim)


def masked_mean(
    values: torch.Tensor, mask: torch.Tensor, dim: tuple[int, ...] | None = None
) -> torch.Tensor:
    """Mean of the selected values; zero where nothing is selected.

    Masked values are replaced rather than multiplied by zero, so what a padded position holds, NaN
    included, has no part in the result or its gradient.

    Args:
        values (torch.Tensor): values ``[*B]``.
        mask (torch.Tensor): boolean of the same shape, ``True`` = counts.
        dim (tuple of int, optional): dimensions to average over; all by default.

    Returns:
        torch.Tensor: the mean over *dim*.

    Examples:
        >>> import torch
        >>> mask = torch.tensor([[True, True], [True, False], [False, False]])
        >>> masked_mean(torch.tensor([[1.0, 3.0], [4.0, 9.0], [9.0, 9.0]]), mask, dim=(-1,))
        tensor([2., 4., 0.])
    """
    selected = torch.where(mask, values, torch.zeros_like(values))
    total, count = (x.sum() if dim is None else x.sum(dim) for x in (selected, mask))
    return total / count.clamp_min(1)


def masked_quantile(
    values: torch.Tensor, mask: torch.Tensor, quantiles: torch.Tensor
) -> torch.Tensor:
    """Quantiles of the selected values, interpolated; zero where nothing is selected.

    Nothing is selected by shape, so an accelerator is not waited for.

    Args:
        values (torch.Tensor): values ``[*B]``.
        mask (torch.Tensor): boolean of the same shape, ``True`` = counts.
        quantiles (torch.Tensor): shares ``[Q]`` in ``[0, 1]``, of the dtype of *values*.

    Returns:
        torch.Tensor: quantiles ``[Q]``.

    Examples:
        >>> import torch
        >>> mask = torch.tensor([True, True, True, False])
        >>> masked_quantile(torch.tensor([4.0, 1.0, 2.0, 9.0]), mask, torch.tensor([0.5, 0.75]))
        tensor([2., 3.])
    """
    in_order = values.masked_fill(~mask, torch.inf).flatten().sort().values
    last = mask.sum() - 1
    position = quantiles * last.clamp_min(0)
    below = position.long()
    above = torch.minimum(below + 1, last.clamp_min(0))
    low, high = in_order.gather(0, below), in_order.gather(0, above)
    found = low + (high - low) * (position - below)
    return torch.where(last < 0, torch.zeros_like(found), found)


def rollout_sum(values: torch.Tensor, rollout_id: torch.Tensor) -> torch.Tensor:
    """Sum over all decisions of the same rollout, for each of them.

    By the matrix ``[B, B]`` that says which decisions belong together: shapes do not depend on the
    ids, so an accelerator is not waited for.

    Args:
        values (torch.Tensor): values of decisions ``[B]``.
        rollout_id (torch.Tensor): integers ``[B]``, in any order.

    Returns:
        torch.Tensor: sums ``[B]``, the same for all decisions of a rollout.

    Examples:
        >>> import torch
        >>> rollout_sum(torch.tensor([1.0, 10.0, 2.0]), torch.tensor([7, 5, 7]))
        tensor([ 3., 10.,  3.])
    """
    together = rollout_id.unsqueeze(-1) == rollout_id
    return torch.where(together, values, torch.zeros_like(values)).sum(-1)


def reduction_weights(mask: torch.Tensor, reduction: Reduction) -> torch.Tensor:
    """Weight of each token in the reduced loss, before the normaliser.

    ======================  ==================================  =================================
    *reduction*             weight of an executed token         normaliser
    ======================  ==================================  =================================
    ``"token_mean"``        1                                   executed tokens
    ``"sequence_mean"``     1 / executed tokens of its chunk    chunks with an executed token
    ``"trajectory_mean"``   the same                            the same
    ``"fixed_length"``      1                                   chunks x ``chunk`` x ``A``
    ``"sum"``, ``"none"``   1                                   1
    ======================  ==================================  =================================

    ``"token_mean"`` (DAPO) gives every executed token the same say, ``"sequence_mean"`` (GRPO)
    every decision. ``"fixed_length"`` (Dr. GRPO) divides by what a chunk could hold, a constant, so
    the size of a token's gradient does not depend on how much of which chunk was executed. With
    ``"trajectory_mean"`` both are to be multiplied by a row weight of ``1 / decisions of its
    rollout``: then every rollout has the same say, however many decisions it took, and the
    normaliser counts rollouts.

    Args:
        mask (torch.Tensor): boolean ``[*B, chunk, A]``, ``True`` = executed.
        reduction (str): one of the above.

    Returns:
        torch.Tensor: weights ``[*B, chunk, A]``, zero where masked.

    Raises:
        ValueError: if *reduction* is unknown.

    Examples:
        >>> import torch
        >>> mask = torch.tensor([[[True], [True]], [[True], [False]]])
        >>> reduction_weights(mask, "sequence_mean").flatten(1)
        tensor([[0.5000, 0.5000],
                [1.0000, 0.0000]])

    Reference:
        Yu et al., "DAPO", 2025, https://arxiv.org/abs/2503.14476; Shao et al., "DeepSeekMath",
        2024, https://arxiv.org/abs/2402.03300; Liu et al., "Understanding R1-Zero-Like Training",
        2025, https://arxiv.org/abs/2503.20783.
    """
    _check_reduction(reduction)
    weights = mask.to(torch.get_default_dtype())
    if reduction in ("sequence_mean", "trajectory_mean"):
        weights = weights / weights.sum((-2, -1), keepdim=True).clamp_min(1)
    return weights


def reduction_normaliser(
    mask: torch.Tensor, reduction: Reduction, row_weight: torch.Tensor | None = None
) -> torch.Tensor:
    """What the weighted sum of a batch is divided by; see :func:`reduction_weights`.

    The mean reductions' normalisers are additive: those of the parts of a batch sum to that of the
    batch. Losses of micro-batches, each divided by the *whole* batch's normaliser, therefore sum to
    the loss of the whole batch. ``"sum"`` and ``"none"`` divide by one.

    Args:
        mask (torch.Tensor): boolean ``[*B, chunk, A]``, ``True`` = executed.
        reduction (str): one of :data:`Reduction`.
        row_weight (torch.Tensor, optional): weight of each decision, broadcastable to
            ``[*B, 1, 1]``.

    Returns:
        torch.Tensor: scalar, zero if nothing was executed.

    Raises:
        ValueError: if *reduction* is unknown.

    Examples:
        >>> import torch
        >>> mask = torch.tensor([[[True], [True]], [[True], [False]], [[False], [False]]])
        >>> [float(reduction_normaliser(mask, name)) for name in
        ...  ("token_mean", "sequence_mean", "fixed_length")]
        [3.0, 2.0, 6.0]
    """
    _check_reduction(reduction)
    if reduction in ("sum", "none"):
        return torch.ones((), device=mask.device)
    if reduction == "fixed_length":
        counted = torch.ones_like(mask)
    elif reduction in ("sequence_mean", "trajectory_mean"):
        counted = mask.flatten(-2).any(-1)[..., None, None]
    else:
        counted = mask
    weights = counted.to(torch.get_default_dtype())
    return weights.sum() if row_weight is None else (weights * row_weight).sum()


def _check_reduction(reduction: str) -> None:
    if reduction not in get_args(Reduction):
        raise ValueError(
            f"reduction must be one of {list(get_args(Reduction))}, got {reduction!r}. "
            "'token_mean' is the usual choice."
        )
