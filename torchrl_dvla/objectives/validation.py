# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Checks of losses: of their options, and of what they read, with a range for each entry."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from tensordict import NestedKey, TensorDictBase
from torch import nn
from torchrl.modules.vla import VLAWrapperBase
from torchrl.objectives.utils import RANDOM_MODULE_LIST

from torchrl_dvla.data.schema import GROUP_ID_KEY, ROLLOUT_ID_KEY
from torchrl_dvla.functional import executed_mask, rollout_sum
from torchrl_dvla.validation import Positive, Range, check

__all__ = [
    "FINITE",
    "INTEGERS",
    "ValueRange",
    "agreement_of",
    "can_check",
    "check_actor",
    "check_ranges",
    "check_reference",
    "check_rows",
    "check_trust_region",
    "check_whole_rollouts",
    "depends_on_mode",
    "executed_tokens",
    "leaves_of",
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
    head = getattr(actor_network, "action_head", "tokens")
    inherited = getattr(get_dist, "__func__", None) is VLAWrapperBase.get_dist
    if head == "continuous" and (inherited or get_dist is None):
        raise ValueError(
            f"actor_network must have action_head='tokens', got {head!r}. Its head regresses one "
            "action and has no log-probabilities to form ratios of: override get_dist, or use "
            "another policy."
        )
    if not callable(get_dist):
        raise ValueError(
            "actor_network must have a get_dist method that returns the distribution of its "
            f"actions, got {type(actor_network).__name__}. Pass a torchrl VLAWrapperBase with "
            "action_head='tokens', a ProbabilisticTensorDictSequential (a TensorDictSequential has "
            "none), or a module of yours with the method."
        )


def check_trust_region(
    clip_epsilon: float | Sequence[float],
    *,
    dual_clip: float | None = None,
    trust_std: float | None = None,
    cap: float | None = None,
    mask: bool = False,
) -> tuple[float, float]:
    """Return the clip range ``(low, high)``, or refuse what has no meaning or no effect.

    Raises:
        ValueError: for a range, dual clip, trust weight, or cap and mask of the behaviour weight
            that is out of range, or that another one leaves without an effect.
    """
    pair = Range(remedy="Pass a number or (low, high), for instance (0.2, 0.28).")
    clip = check("clip_epsilon", clip_epsilon, float | tuple[float, float], pair)
    low, high = clip if isinstance(clip, tuple) else (clip, clip)
    dual_clip = check("dual_clip", dual_clip, float | None)
    trust_std = check("trust_std", trust_std, Positive | None)
    cap = check("behavior_weight_cap", cap, float | None)
    if not 0 <= low < 1 or not high >= 0:
        raise ValueError(
            f"clip_epsilon must satisfy 0 <= low < 1 and high >= 0, got ({low}, {high}). Ratios "
            "are clipped to [1 - low, 1 + high] and are never negative."
        )
    if dual_clip is not None and not 1 + high < dual_clip < math.inf:
        raise ValueError(
            f"dual_clip must be greater than 1 + high = {1 + high}, got {dual_clip}. A bound "
            "inside of the clip range would silence fresh samples; 3.0 is usual."
        )
    if dual_clip is not None and trust_std is not None:
        raise ValueError(
            f"dual_clip must be None with trust_std={trust_std}, got {dual_clip}. A Gaussian "
            "weight bounds the gain of every ratio: leave one of the two out."
        )
    if check("mask_behavior_weight", mask, bool) and cap is None:
        raise ValueError(
            "behavior_weight_cap must be a number with mask_behavior_weight, got None. It is the "
            "weight above which decisions are left out; 5.0 is the default."
        )
    if cap is not None and not cap >= 1:
        raise ValueError(
            f"behavior_weight_cap must be at least 1, got {cap}. A lower cap would scale fresh "
            "samples down; None removes it."
        )
    return low, high


def check_reference(
    actor_network: nn.Module,
    reference_network: nn.Module | None,
    kl_to_ref_coeff: float | None,
    kl_estimator: str,
) -> None:
    """Refuse a reference that is unused, missing, or the trained policy itself."""
    remedy = "A negative weight would drive the policy away from its reference."
    check("kl_to_ref_coeff", kl_to_ref_coeff, float | None, Range(0, remedy=remedy))
    if reference_network is None:
        if kl_estimator == "exact":
            raise ValueError(
                "kl_estimator must be 'k2' or 'k3' without a reference_network, got 'exact'. The "
                "log-probabilities of the sampled tokens do not hold the whole distribution."
            )
        return
    if kl_to_ref_coeff is None:
        raise ValueError(
            "reference_network must come with kl_to_ref_coeff, got None. Without a weight the "
            "reference would be run for nothing; 0.0 keeps it for a schedule."
        )
    check_actor(reference_network)
    trained = {p.data_ptr() for p in actor_network.parameters() if p.numel() and p.requires_grad}
    if any(p.data_ptr() in trained for p in reference_network.parameters() if p.numel()):
        raise ValueError(
            "reference_network must not share parameters with actor_network, got shared storage. "
            "It would follow the training and the divergence would stay zero: pass "
            "copy.deepcopy(policy)."
        )


@torch.no_grad()
def check_whole_rollouts(rollout_id: torch.Tensor, num_decisions: torch.Tensor) -> None:
    """Refuse decisions ``[B]`` of which others of the same rollout are missing, or there twice.

    Raises:
        ValueError: naming the first such rollout.
    """
    found = rollout_sum(torch.ones_like(num_decisions), rollout_id)
    if not can_check() or bool((found == num_decisions).all()):
        return
    index = int((found != num_decisions).nonzero()[0])
    split = int(rollout_id[found != num_decisions].unique().numel())
    raise ValueError(
        "the batch must hold each decision of its rollouts once for one ratio per rollout, got "
        f"{found[index]} of the {num_decisions[index]} of rollout {rollout_id[index]} ({split} of "
        f"{rollout_id.unique().numel()} rollouts are split). Make the buffer with "
        "PooledReplayBuffer(whole_rollouts=True), and cut micro-batches by "
        "torchrl_dvla.learner.deal_rollouts; or use a ratio_level up to 'sequence_mean'."
    )


def check_rows(
    log_prob: torch.Tensor, advantage: torch.Tensor, version: torch.Tensor | None
) -> None:
    """Refuse advantages or versions that are not one a row of log-probs ``[*B, chunk, A]``."""
    if advantage.shape != (*log_prob.shape[:-2], 1):
        raise ValueError(
            f"advantage must have shape {[*log_prob.shape[:-2], 1]}, one value per decision, got "
            f"{list(advantage.shape)}. A missing last dimension would pair every decision with "
            "every advantage: use advantage.unsqueeze(-1)."
        )
    if version is not None and (version.shape != advantage.shape or version.dtype not in INTEGERS):
        raise ValueError(
            f"policy_version must hold integers of shape {list(advantage.shape)}, got "
            f"{version.dtype} {list(version.shape)}. The inference lane writes it."
        )
