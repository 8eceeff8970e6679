# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Finite check of what a loss reads and writes: a range for each entry, all looked up at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from tensordict import NestedKey, TensorDictBase, TensorDictParams
from tensordict.nn import TensorDictModuleBase
from torch import distributions as d

from torchrl_dvla.data.schema import GROUP_ID_KEY, ROLLOUT_ID_KEY
from torchrl_dvla.functional import executed_mask

__all__ = [
    "FINITE",
    "INTEGERS",
    "ValueRange",
    "can_check",
    "check_ranges",
    "executed_tokens",
    "leaves_of",
    "log_prob_of",
    "run_policy",
]

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
    """Whether values can be read: not while compiling, nor inside of a vmap."""
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


def leaves_of(tensordict: TensorDictBase) -> list[NestedKey]:
    """Keys of all entries, for errors."""
    return list(tensordict.keys(include_nested=True, leaves_only=True))


def executed_tokens(
    pad: torch.Tensor | None, tokens: torch.Tensor, key: NestedKey | None
) -> torch.Tensor:
    """Boolean ``[*B, chunk, A]``, ``True`` = executed; all of them without ``pad``.

    Raises:
        ValueError: if ``pad``, found under ``key``, is not one boolean for each env step.
    """
    if pad is None:
        return torch.ones_like(tokens, dtype=torch.bool)
    if pad.shape != tokens.shape[:-1]:
        raise ValueError(
            f"{key!r} must have shape {list(tokens.shape[:-1])} (one flag per env step of tokens "
            f"{list(tokens.shape)}), got {list(pad.shape)}. Is the environment's chunk size that "
            "of the policy?"
        )
    return executed_mask(pad, tokens.shape[-1])


def run_policy(
    tensordict: TensorDictBase, network: TensorDictModuleBase, params: TensorDictParams
) -> d.Distribution:
    """What ``get_dist`` of *network* returns for what it declares to read.

    Raises:
        KeyError: if the batch lacks it.
        ValueError: if the policy does not take it.
    """
    # Only what the policy declares to read, and its token mask. Logits that were stored while
    # collecting must not get through: get_dist would take them for its own, and the loss would
    # have no gradient.
    keys = list(network.in_keys)
    mask_key = getattr(getattr(network, "tensor_keys", None), "action_mask", None)
    if mask_key is not None and tensordict.get(mask_key, None) is not None:
        keys.append(mask_key)
    try:
        inputs = tensordict.select(*keys)
    except KeyError as error:
        raise KeyError(
            f"the batch must hold the policy's inputs {network.in_keys}, got "
            f"{leaves_of(tensordict)}. Environment workers write observations; sampling the "
            "buffer rebuilds the instruction from its id."
        ) from error
    layout = {key: value for key, value in inputs.items(True, True) if torch.is_tensor(value)}
    if is_complex := [key for key, value in layout.items() if value.is_complex()]:
        raise ValueError(
            f"the policy's inputs must be real, got complex numbers under {is_complex}. A network "
            "drops their imaginary part: store what it is to read."
        )
    try:
        with params.to_module(network, preserve_module_state=False):
            return network.get_dist(inputs)
    except (torch.OutOfMemoryError, torch.AcceleratorError):  # says nothing about the batch
        raise
    except (RuntimeError, IndexError, TypeError, ValueError) as error:
        shapes = {key: (list(value.shape), value.dtype) for key, value in layout.items()}
        raise ValueError(
            f"the batch must hold inputs that the policy takes, got {shapes} and "
            f"{type(error).__name__}: {error}. Compare them with those it was built for."
        ) from error


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
    remedy = "Does it forbid a token that was taken, or is an observation or weight not finite?"
    ranges.append(ValueRange("log-probabilities of the policy", log_prob, -FINITE, highest, remedy))
    return log_prob, ranges
