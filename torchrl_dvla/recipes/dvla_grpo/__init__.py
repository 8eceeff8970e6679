# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Asynchronous GRPO: the recipe behind ``python -m torchrl_dvla train``."""
