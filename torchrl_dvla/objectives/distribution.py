# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What losses ask a policy for: its distribution, log-probabilities, entropy and divergence."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase, TensorDictParams, unravel_key
from tensordict.nn import CompositeDistribution, TensorDictModuleBase
from torch import distributions as d

from torchrl_dvla.data.schema import (
    ACTION_CHUNK_KEY,
    ACTION_TOKENS_KEY,
    SAMPLE_LOG_PROB_KEY,
    recorded_keys,
)
from torchrl_dvla.functional import log_ratio
from torchrl_dvla.objectives.validation import FINITE, INTEGERS, ValueRange, can_check, leaves_of

__all__ = ["entropy_of", "exact_kl", "fit_to", "log_prob_of", "of_single_actions", "run_policy"]

#: Logits below it count as it, so that the product with a probability of zero is zero.
_LEAST_LOGIT = -200.0
#: Logits of one block of an entropy: 4 MB in float32.
_BLOCK = 2**20


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


def entropy_of(
    dist: d.Distribution, log_prob: torch.Tensor, mask: torch.Tensor, *, is_wanted: bool
) -> torch.Tensor:
    """Entropy as ``mask``, or an estimate where there is no closed form.

    Raises:
        ValueError: if its gradient is wanted, and the distribution can give none.
    """
    if isinstance(dist, d.Categorical):  # torch clamps at -3e38, which can overflow the gradient
        if not is_wanted:
            return fit_to(_entropy_in_blocks(dist.logits), mask)
        return fit_to(-(dist.probs * dist.logits.clamp_min(_LEAST_LOGIT)).sum(-1), mask)
    try:
        return fit_to(dist.entropy(), mask)
    except NotImplementedError:
        if not is_wanted:
            return -log_prob.detach()
        if dist.has_rsample:
            return fit_to(-dist.log_prob(dist.rsample()), mask)
    raise ValueError(
        f"entropy_coeff must be 0.0 for a {type(dist).__name__}, which has neither entropy() nor "
        "rsample(). Set it, or add one of them."
    )


def _entropy_in_blocks(logits: torch.Tensor) -> torch.Tensor:
    """Entropy ``[*B]`` of normalised logits ``[*B, V]``, without a gradient.

    Temporaries of ``[*B, V]`` are what an entropy costs; these fit into a cache.
    """
    rows = logits.reshape(-1, logits.shape[-1])
    found = []
    for block in rows.split(max(1, _BLOCK // rows.shape[-1])):
        block = block.clamp_min(_LEAST_LOGIT)
        found.append(block.exp().mul_(block).sum(-1))
    return -torch.cat(found).reshape(logits.shape[:-1])


def exact_kl(dist: d.Distribution, ref: d.Distribution) -> torch.Tensor:
    """Divergence ``[*B, chunk, A]``, with clamped log-ratios: no category makes it infinite."""
    if not isinstance(dist, d.Categorical) or not isinstance(ref, d.Categorical):
        try:
            return d.kl_divergence(dist, ref)
        except NotImplementedError:
            raise ValueError(
                f"kl_estimator must be 'k2' or 'k3' for {type(dist).__name__} and "
                f"{type(ref).__name__}, whose divergence torch does not know, got 'exact'."
            ) from None
    ours, theirs = (x.logits.clamp_min(_LEAST_LOGIT) for x in (dist, ref))
    return (dist.probs * log_ratio(ours, theirs)).sum(-1)
