# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Recipes: whole training programs, assembled from the other packages.

``python -m torchrl_dvla train`` runs :mod:`~torchrl_dvla.recipes.dvla_grpo`, ``... sft`` runs
:mod:`~torchrl_dvla.recipes.dvla_sft`. No other package imports this one, and hydra is imported here
only.
"""

__all__: list[str] = []
