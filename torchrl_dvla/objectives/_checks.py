# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Refusals of the losses' arguments, so that a bad one ends a run before it starts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

__all__ = ["check_actor", "check_choice", "check_clip", "check_reference", "check_shapes"]


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Refuse a *value* that is none of the *choices*."""
    if value not in choices:
        raise ValueError(
            f"{name} must be one of {list(choices)}, got {value!r}. Leave it out for the default."
        )


def check_actor(actor_network: nn.Module) -> None:
    """Refuse a policy that has no distribution over action tokens."""
    if not callable(getattr(actor_network, "get_dist", None)):
        raise ValueError(
            "actor_network must have a get_dist method that returns a distribution over action "
            f"tokens, got {type(actor_network).__name__}. Pass a torchrl VLAWrapperBase with "
            "action_head='tokens'."
        )
    head = getattr(actor_network, "action_head", "tokens")
    if head != "tokens":
        raise ValueError(
            f"actor_network must have action_head='tokens', got {head!r}. A {head} head has no "
            "log-probabilities to form ratios of."
        )


def check_clip(
    clip_epsilon: float | Sequence[float], dual_clip: float | None, cap: float | None
) -> tuple[float, float]:
    """Return ``(low, high)``, or refuse a clip range, dual clip or cap without meaning."""
    if isinstance(clip_epsilon, Sequence):
        if len(clip_epsilon) != 2:
            raise ValueError(
                f"clip_epsilon must be a number or a pair, got {clip_epsilon!r}. "
                "Pass (low, high), for instance (0.2, 0.28)."
            )
        low, high = (float(value) for value in clip_epsilon)
    else:
        low = high = float(clip_epsilon)
    if not 0 <= low < 1 or not high >= 0:
        raise ValueError(
            f"clip_epsilon must satisfy 0 <= low < 1 and high >= 0, got ({low}, {high}). Ratios "
            "are clipped to [1 - low, 1 + high] and are never negative."
        )
    if dual_clip is not None and not dual_clip > 1 + high:
        raise ValueError(
            f"dual_clip must be greater than 1 + high = {1 + high}, got {dual_clip}. A bound "
            "inside of the clip range would silence fresh samples; 3.0 is usual."
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
    if kl_to_ref_coeff is not None and not kl_to_ref_coeff >= 0:
        raise ValueError(
            f"kl_to_ref_coeff must not be negative, got {kl_to_ref_coeff}. A negative weight would "
            "drive the policy away from its reference."
        )
    if reference_network is None:
        if kl_to_ref_coeff is not None and kl_estimator == "exact":
            raise ValueError(
                "kl_estimator must be 'k2' or 'k3' without a reference_network, got 'exact'. The "
                "log-probabilities of the sampled tokens do not hold the whole distribution."
            )
        return
    if kl_to_ref_coeff is None:
        raise ValueError(
            "reference_network must come with kl_to_ref_coeff, got None. Without a weight the "
            "reference would be run for nothing."
        )
    check_actor(reference_network)
    trained = {p.data_ptr() for p in actor_network.parameters() if p.numel()}
    if any(p.data_ptr() in trained for p in reference_network.parameters() if p.numel()):
        raise ValueError(
            "reference_network must not share parameters with actor_network, got shared storage. "
            "It would follow the training and the divergence would stay zero: pass "
            "copy.deepcopy(policy)."
        )


def check_shapes(tokens: torch.Tensor, log_prob: torch.Tensor, advantage: torch.Tensor) -> None:
    """Refuse tokens ``[*B, chunk, A]`` with log-probabilities or advantages of another shape."""
    if tokens.ndim < 2 or log_prob.shape != tokens.shape:
        raise ValueError(
            "sample_log_prob must have the shape of the tokens [*B, chunk, A], got "
            f"{list(log_prob.shape)} for tokens {list(tokens.shape)}. Build the policy with "
            "log_probs_mode='token': a sum over the chunk cannot leave unexecuted steps out."
        )
    if advantage.shape != (*tokens.shape[:-2], 1):
        raise ValueError(
            f"advantage must have shape {[*tokens.shape[:-2], 1]}, one value per decision, got "
            f"{list(advantage.shape)}. A missing last dimension would pair every decision with "
            "every advantage: use advantage.unsqueeze(-1)."
        )
