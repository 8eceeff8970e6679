# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""A learner of several processes under ``torch.distributed``."""

from torchrl_dvla.learner.dealing import MicroBatch, deal, deal_rollouts
from torchrl_dvla.learner.rank import (
    LearnerFactory,
    LearnerRank,
    Minibatch,
    Strategy,
    check_same_on_all_ranks,
)
from torchrl_dvla.learner.ranks import LearnerRanks, launched_rank, serve_launched_rank

__all__ = [
    "LearnerFactory",
    "LearnerRank",
    "LearnerRanks",
    "MicroBatch",
    "Minibatch",
    "Strategy",
    "check_same_on_all_ranks",
    "deal",
    "deal_rollouts",
    "launched_rank",
    "serve_launched_rank",
]
