# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Pure tensor maths of the training loop; imports torch only."""

from torchrl_dvla.functional.advantage import (
    ADVANTAGES,
    Advantage,
    group_advantage,
    has_contrast,
    leave_one_out_advantage,
)
from torchrl_dvla.functional.chunk import (
    Reduction,
    executed_mask,
    masked_mean,
    masked_quantile,
    reduction_normaliser,
    reduction_weights,
    rollout_sum,
)
from torchrl_dvla.functional.flow import (
    bounded_std,
    cps_step,
    flow_matching_pair,
    flow_time,
    ode_step,
    sde_step,
    transition_entropy,
    transition_log_prob,
)
from torchrl_dvla.functional.importance import (
    LOG_RATIO_BOUND,
    behavior_weight,
    clipped_surrogate,
    effective_sample_size,
    gaussian_surrogate,
    kl_k1,
    kl_k2,
    kl_k3,
    log_ratio,
    outside_clip,
)

__all__ = [
    "ADVANTAGES",
    "LOG_RATIO_BOUND",
    "Advantage",
    "Reduction",
    "behavior_weight",
    "bounded_std",
    "clipped_surrogate",
    "cps_step",
    "effective_sample_size",
    "executed_mask",
    "flow_matching_pair",
    "flow_time",
    "gaussian_surrogate",
    "group_advantage",
    "has_contrast",
    "kl_k1",
    "kl_k2",
    "kl_k3",
    "leave_one_out_advantage",
    "log_ratio",
    "masked_mean",
    "masked_quantile",
    "ode_step",
    "outside_clip",
    "reduction_normaliser",
    "reduction_weights",
    "rollout_sum",
    "sde_step",
    "transition_entropy",
    "transition_log_prob",
]
