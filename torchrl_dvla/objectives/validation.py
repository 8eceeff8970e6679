# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Finite check of what a loss reads and writes: a range for each entry, all looked up at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from tensordict import TensorDictBase
from torch import distributions as d

from torchrl_dvla.data.schema import GROUP_ID_KEY, ROLLOUT_ID_KEY

__all__ = ["FINITE", "INTEGERS", "ValueRange", "can_check", "check_ranges", "log_prob_of"]

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
#: Largest magnitude that counts as finite, whatever the dtype.
FINITE = torch.finfo(torch.float32).max


class ValueRange(NamedTuple):
    """Values ``[*B, ...]``, or a scalar, with the range that all of them must be in."""

    name: str
    values: torch.Tensor
    low: float
    high: float
    remedy: str


def can_check() -> bool:
    """Whether values can be looked at: not while compiling, nor inside of a vmap."""
    return not torch.compiler.is_compiling() and torch._C._functorch.maybe_current_level() is None


@torch.no_grad()
def check_ranges(ranges: Sequence[ValueRange], tensordict: TensorDictBase, num_rows: int) -> None:
    """Refuse values outside of their range, where they can be read; one wait for an accelerator.

    Raises:
        ValueError: naming the first such entry, its rows and the remedy.
    """
    if not can_check():
        return
    extremes = [bound.float() for entry in ranges for bound in entry.values.aminmax()]
    found = torch.stack(extremes).tolist()  # NaN, if there is one, is both
    for (name, values, low, high, remedy), least, most in zip(ranges, found[::2], found[1::2]):
        if low <= least and most <= high:
            continue
        must = "finite" if low == -FINITE else f"finite, at least {low:g}"
        must += "" if high == FINITE else f", at most {high:g}"
        rows = values.float().reshape(num_rows if values.ndim else 1, -1)
        bad = ~((rows >= low) & (rows <= high))
        where = ""
        if values.ndim:
            index = bad.any(1).nonzero().flatten().tolist()
            ids = {key: tensordict.get(key, None) for key in (GROUP_ID_KEY, ROLLOUT_ID_KEY)}
            origin = [f", {k} {v.flatten()[index[0]]}" for k, v in ids.items() if v is not None]
            where = f" in {len(index)} of {num_rows} rows, first in row {index[0]}{''.join(origin)}"
        raise ValueError(f"{name} must be {must}, got {rows[bad][0]:g}{where}. {remedy}")


def log_prob_of(
    tokens: torch.Tensor, dist: d.Distribution, mask: torch.Tensor, *, check: bool
) -> tuple[torch.Tensor, list[ValueRange]]:
    """Log-probabilities ``[*B, chunk, A]``, zero where masked, and ranges to check, theirs last.

    Raises:
        ValueError: if there is not one distribution for each token, or one of another dtype.
    """
    if dist.batch_shape != tokens.shape:
        raise ValueError(
            "actor_network must give one distribution for each token, of shape "
            f"{list(tokens.shape)}, got {list(dist.batch_shape)}. Build the policy with "
            'log_probs_mode="token" and the chunk size of the batch.'
        )
    if (tokens.dtype in INTEGERS) != isinstance(dist, d.Categorical):
        wanted = "integers" if isinstance(dist, d.Categorical) else "real numbers"
        raise ValueError(
            f"action must hold {wanted} for a "
            f"{type(dist).__name__} distribution, got {tokens.dtype}. The policy must store what "
            "it has sampled, uncast."
        )
    ranges, tokens, highest = [], tokens.masked_fill(~mask, 0), FINITE  # a density may exceed one
    if isinstance(dist, d.Categorical):
        highest = 1e-3  # of rounding
        last = dist.param_shape[-1] - 1
        remedy = "Does the tokenizer that made them have the policy's vocabulary?"
        ranges.append(ValueRange("action tokens", tokens, 0, last, remedy))
        if check and can_check():  # later: an index error ends the process's use of CUDA
            tokens = tokens.clamp(0, last)
    log_prob = dist.log_prob(tokens).masked_fill(~mask, 0.0)
    remedy = "Does the policy forbid a token that was taken, or are its weights not finite?"
    ranges.append(ValueRange("log-probabilities of the policy", log_prob, -FINITE, highest, remedy))
    return log_prob, ranges
