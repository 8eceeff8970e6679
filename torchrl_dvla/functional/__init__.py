# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Pure tensor maths of the training loop; imports torch only."""

from torchrl_dvla.functional.advantage import (
    group_advantage,
    has_contrast,
    leave_one_out_advantage,
)
from torchrl_dvla.functional.chunk import (
    Reduction,
    executed_mask,
    masked_mean,
    masked_sum,
    reduction_normaliser,
    reduction_weights,
)
from torchrl_dvla.functional.importance import (
    LOG_RATIO_BOUND,
    behavior_weight,
    clipped_surrogate,
    effective_sample_size,
    log_ratio,
    outside_clip,
)
from torchrl_dvla.functional.kl import kl_k1, kl_k2, kl_k3

__all__ = [
    "LOG_RATIO_BOUND",
    "Reduction",
    "behavior_weight",
    "clipped_surrogate",
    "effective_sample_size",
    "executed_mask",
    "group_advantage",
    "has_contrast",
    "kl_k1",
    "kl_k2",
    "kl_k3",
    "leave_one_out_advantage",
    "log_ratio",
    "masked_mean",
    "masked_sum",
    "outside_clip",
    "reduction_normaliser",
    "reduction_weights",
]
