# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The version, in one place: pyproject.toml reads it from here."""

__version__ = "0.1.0"
