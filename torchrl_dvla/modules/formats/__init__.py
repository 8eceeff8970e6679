# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Checkpoints of other projects, by the format of their folder."""

from torchrl_dvla.modules.formats.export import export_policy, write_fingerprint
from torchrl_dvla.modules.formats.lerobot import read_lerobot
from torchrl_dvla.modules.formats.openpi import read_openpi
from torchrl_dvla.modules.formats.openvla import read_openvla
from torchrl_dvla.modules.formats.policy_folder import PolicyFolder, Stated
from torchrl_dvla.modules.formats.recognise import foreign_class, is_foreign, read_foreign

__all__ = [
    "PolicyFolder",
    "Stated",
    "export_policy",
    "foreign_class",
    "is_foreign",
    "read_foreign",
    "read_lerobot",
    "read_openpi",
    "read_openvla",
    "write_fingerprint",
]
