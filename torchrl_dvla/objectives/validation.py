# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What losses read: a policy's distribution and log-probabilities, and a range for each entry."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from tensordict import NestedKey, TensorDictBase, TensorDictParams, unravel_key
from tensordict.nn import CompositeDistribution, TensorDictModuleBase
from torch import distributions as d
from torch import nn
from torchrl.modules.vla import VLAWrapperBase
from torchrl.objectives.utils import RANDOM_MODULE_LIST

from torchrl_dvla.data.schema import (
    ACTION_CHUNK_KEY,
    ACTION_TOKENS_KEY,
    GROUP_ID_KEY,
    ROLLOUT_ID_KEY,
    SAMPLE_LOG_PROB_KEY,
    recorded_keys,
)
from torchrl_dvla.functional import executed_mask

__all__ = [
    "FINITE",
    "INTEGERS",
    "ValueRange",
    "agreement_of",
    "can_check",
    "check_actor",
    "check_ranges",
    "depends_on_mode",
    "executed_tokens",
    "fit_to",
    "leaves_of",
    "log_prob_of",
    "of_single_actions",
    "run_policy",
]

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
#: Largest magnitude that counts as finite, whatever the dtype.
FINITE = torch.finfo(torch.float32).max
#: See :func:`agreement_of`; 1e-3 in float32.
_AGREEMENT = {torch.bfloat16: 3e-2, torch.float16: 1e-2}


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
    pad: torch.Tensor | None, values: torch.Tensor, key: NestedKey | None
) -> torch.Tensor:
    """Boolean ``[*B, chunk, A]`` as ``values``, ``True`` = executed; all of them without ``pad``.

    Raises:
        ValueError: if ``pad``, found under ``key``, is not one boolean for each env step.
    """
    if pad is None:
        return torch.ones_like(values, dtype=torch.bool)
    if pad.shape != values.shape[:-1]:
        raise ValueError(
            f"{key!r} must have shape {list(values.shape[:-1])} (one flag per env step of tokens "
            f"or log-probs {list(values.shape)}), got {list(pad.shape)}. Is the environment's "
            "chunk size that of the policy?"
        )
    return executed_mask(pad, values.shape[-1])


def run_policy(
    tensordict: TensorDictBase,
    network: TensorDictModuleBase,
    params: TensorDictParams | None,
    key: NestedKey,
) -> d.Distribution:
    """The distribution of ``key`` that ``get_dist`` returns for what *network* reads and records.

    Its own parameters serve where there are no *params*. TorchRL's sequences of modules put
    distributions together, by the entry that each is of.

    Raises:
        KeyError: if the batch lacks what it reads.
        ValueError: if the policy does not take it, or has no distribution of ``key``.
    """
    # Only what the policy declares to read, its token mask, and what it records beside the decision
    # itself: the distribution of a path is conditional on it. Logits that were stored while
    # collecting must not get through: get_dist would take them for its own, and the loss would
    # have no gradient.
    recorded = set(recorded_keys(getattr(network, "out_keys", ())))
    optional = [*(recorded - {ACTION_TOKENS_KEY, ACTION_CHUNK_KEY, SAMPLE_LOG_PROB_KEY})]
    optional.append(getattr(getattr(network, "tensor_keys", None), "action_mask", None))
    found = [key for key in optional if key and tensordict.get(key, None) is not None]
    try:
        inputs = tensordict.select(*network.in_keys, *found)
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
        own: Any = contextlib.nullcontext()
        with params.to_module(network, preserve_module_state=False) if params is not None else own:
            dist = network.get_dist(inputs)
    except (torch.OutOfMemoryError, torch.AcceleratorError):  # says nothing about the batch
        raise
    except (RuntimeError, IndexError, TypeError, ValueError) as error:
        shapes = {key: (list(value.shape), value.dtype) for key, value in layout.items()}
        raise ValueError(
            f"the batch must hold inputs that the policy takes, got {shapes} and "
            f"{type(error).__name__}: {error}. Compare them with those it was built for."
        ) from error
    if not isinstance(dist, CompositeDistribution):
        return dist
    if unravel_key(key) not in dist.dists:
        raise ValueError(
            f"get_dist must return the distribution of {key}, got those of {list(dist.dists)}. Let "
            "the policy draw there what its log-probabilities are of."
        )
    return dist.dists[unravel_key(key)]


def of_single_actions(dist: d.Distribution) -> d.Distribution:
    """The distribution without sums over action dimensions, env steps or both."""
    while isinstance(dist, d.Independent):
        dist = dist.base_dist
    return dist


def fit_to(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Values of a distribution as ``mask``: ``[*B, chunk, A]``, or ``[*B, chunk, 1]`` of env steps.

    Those of the action dimensions of an env step are summed for the latter.
    """
    if mask.shape[-1] == 1 and values.shape == mask.shape[:-1]:
        return values.unsqueeze(-1)
    if mask.shape[-1] == 1 and values.ndim == mask.ndim:
        return values.sum(-1, keepdim=True)
    return values


def log_prob_of(
    action: torch.Tensor, dist: d.Distribution, mask: torch.Tensor, *, check: bool
) -> tuple[torch.Tensor, list[ValueRange]]:
    """Log-probabilities as ``mask``, zero where masked, and ranges to check, theirs last.

    Args:
        action (torch.Tensor): tokens or chunk ``[*B, chunk, A]``, or a path.
        dist (Distribution): of ``action``.
        mask (torch.Tensor): boolean ``[*B, chunk, A]``, or ``[*B, chunk, 1]`` for one
            log-probability an env step; ``True`` = executed.

    Raises:
        ValueError: if the distribution is of other actions, or of another dtype.
    """
    name = type(dist).__name__
    is_path = action.shape[:-1] != mask.shape[:-1]
    # Independent may be of this shape, but has one log-probability for several actions.
    is_summed = isinstance(dist, d.Independent)
    if is_summed or (not is_path and dist.batch_shape + dist.event_shape != action.shape):
        raise ValueError(
            "actor_network must give one distribution for each token, of shape "
            f"{list(action.shape)}, got {list(dist.batch_shape)} of events "
            f"{list(dist.event_shape)} by {name}; likewise for each action dimension. Build the "
            "policy for the chunk size and action dimension of the batch, a token policy with "
            'log_probs_mode="token".'
        )
    if (action.dtype in INTEGERS) != isinstance(dist, d.Categorical):
        wanted = "integers" if isinstance(dist, d.Categorical) else "real numbers"
        raise ValueError(
            f"action must hold {wanted} for a {name} distribution, got {action.dtype}. The policy "
            "must store what it has sampled, uncast: indices as tokens, samples of a Gaussian as "
            "the chunk."
        )
    ranges: list[ValueRange] = []
    highest = FINITE  # a density may exceed one
    if isinstance(dist, d.Categorical):
        highest = 1e-3  # of rounding
        action = action.masked_fill(~mask, 0)
        last = dist.param_shape[-1] - 1
        remedy = "Does the tokenizer that made them have the policy's vocabulary?"
        ranges.append(ValueRange("action tokens", action, 0, last, remedy))
        if check and can_check():  # later: an index error ends the process's use of CUDA
            action = action.clamp(0, last)
    elif not is_path:  # zero may lie outside of the support: what was sampled stays
        action = action.masked_fill(~mask & ~action.isfinite(), 0.0)
    log_prob = fit_to(dist.log_prob(action), mask)
    if log_prob.shape != mask.shape:
        raise ValueError(
            "actor_network must give log-probabilities of the shape of the recorded ones, "
            f"{list(mask.shape)}, got {list(log_prob.shape)} by {name}. Record "
            "get_dist(...).log_prob(...), with one distribution for collecting and learning."
        )
    log_prob = log_prob.masked_fill(~mask, 0.0)
    remedy = "Does it forbid what was taken, or is an observation or weight not finite?"
    ranges.append(ValueRange("log-probabilities of the policy", log_prob, -FINITE, highest, remedy))
    return log_prob, ranges


def depends_on_mode(module: nn.Module) -> bool:
    """Whether a module is in training mode and computes something else in it."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return module.training
    name = "p" if isinstance(module, RANDOM_MODULE_LIST) else "dropout"  # of recurrent layers, too
    share = getattr(module, name, 0.0)
    return module.training and isinstance(share, float) and share > 0


def agreement_of(dtypes: Iterable[torch.dtype]) -> float:
    """Mean difference of log-probabilities up to which two runs of one policy agree."""
    return max((_AGREEMENT.get(dtype, 1e-3) for dtype in dtypes), default=1e-3)


def check_actor(actor_network: nn.Module) -> None:
    """Refuse a policy that has no distribution of its actions."""
    get_dist = getattr(actor_network, "get_dist", None)
    if not callable(get_dist):
        raise ValueError(
            "actor_network must have a get_dist method that returns the distribution of its "
            f"actions, got {type(actor_network).__name__}. Pass a torchrl VLAWrapperBase with "
            "action_head='tokens', a ProbabilisticTensorDictSequential (a TensorDictSequential has "
            "none), or a module of yours with the method."
        )
    head = getattr(actor_network, "action_head", "tokens")
    if head == "continuous" and getattr(get_dist, "__func__", None) is VLAWrapperBase.get_dist:
        raise ValueError(
            f"actor_network must have action_head='tokens', got {head!r}. Its head regresses one "
            "action and has no log-probabilities to form ratios of: override get_dist, or use "
            "another policy."
        )
