# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Initial states of groups, from their new place."""

from torchrl_dvla.data.schedule import EpisodeSpec, InitStateSchedule

__all__ = ["EpisodeSpec", "InitStateSchedule"]
