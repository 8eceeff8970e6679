# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""A trained policy in the format of the checkpoint that it came from."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch

from torchrl_dvla.differences import differences, join_some
from torchrl_dvla.modules.adapters import merged_weights
from torchrl_dvla.modules.fingerprint import take_fingerprint
from torchrl_dvla.modules.flow_vla import FlowVLA
from torchrl_dvla.modules.formats.policy_folder import FINGERPRINT, PolicyFolder
from torchrl_dvla.modules.transformers_vla import TransformersVLA

__all__ = ["export_policy", "write_fingerprint"]


@torch.no_grad()
def export_policy(
    policy: FlowVLA | TransformersVLA, base: PolicyFolder, folder: str | os.PathLike[str]
) -> None:
    """Write a policy as a copy of the folder that it came from, with its own weights.

    What was not trained is copied bit for bit: other files, tensors that are not read here, and
    weights that are what they were. Others are cast to the dtype that they had. Adapters are merged
    into the weights that they are on.

    Args:
        policy (FlowVLA or TransformersVLA): the trained policy.
        base (PolicyFolder): the checkpoint that it came from.
        folder (path): where to; must be empty or not there.

    Raises:
        ValueError: if the policy is not one of that checkpoint, or ``folder`` is in use.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(
            f"the folder to export to must be empty or not there, got {str(folder)!r}, which is in "
            "use. Choose another one."
        )
    own, table = merged_weights(policy), base.table.own
    # Sizes are compared below. The tokenizer's first token is in the policy's prompt alone.
    ignored = ("'backbone.", "'prompt_style.", "'dtype'", "'lora.")
    problems = policy.config.differences(base.config)
    problems = [line for line in problems if not line.startswith(ignored)]
    problems += differences(
        {name: list(base.file.shapes[there]) for name, there in table.items()},
        {name: list(own[name].shape) for name in own if name in table},
    )
    problems += [
        f"{name!r} differs"
        for name, value in base.statistics.items()
        if name not in own or not torch.equal(own[name].cpu(), value)
    ]
    if problems:
        raise ValueError(
            f"the policy must be one that came from {str(base.folder)!r}, got differences: "
            f"{join_some(problems)}. Name the checkpoint that its training began with."
        )
    tensors = base.file.read(base.file.shapes)
    for name, there in table.items():
        trained, before = own[name].detach().cpu(), tensors[there]
        # A narrower dtype here must not touch what was not trained.
        if not torch.equal(before.to(trained.dtype), trained):
            tensors[there] = trained.to(before.dtype).contiguous()
    for copy, there in base.table.copies.items():
        tensors[copy] = tensors[there].clone()
    replaced = shutil.ignore_patterns(*(path.name for path in base.file.files), FINGERPRINT)
    shutil.copytree(base.folder, folder, ignore=replaced, dirs_exist_ok=True)
    base.file.write(tensors, folder)


def write_fingerprint(policy: FlowVLA | TransformersVLA, folder: str | os.PathLike[str]) -> None:
    """Write what a policy that was loaded from an exported folder does, for its next reader."""
    text = json.dumps(take_fingerprint(policy), indent=2) + "\n"
    (Path(folder) / FINGERPRINT).write_text(text, encoding="utf-8")
