# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""A policy from a folder, whatever kind it is of."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torchrl_dvla.modules.flow_vla import FlowVLA
from torchrl_dvla.modules.transformers_vla import TransformersVLA

__all__ = ["load_policy", "policy_class"]


def policy_class(folder: str | os.PathLike[str]) -> type[TransformersVLA] | type[FlowVLA]:
    """Class of the policy in a folder that ``save_pretrained`` wrote.

    Args:
        folder (path): the folder. What is none is left to ``TransformersVLA.from_pretrained``,
            which says what is wrong with it.
    """
    try:
        data = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        name = data["architecture"]
    except (OSError, ValueError, KeyError, TypeError):
        name = None
    return FlowVLA if name == FlowVLA.__name__ else TransformersVLA


def load_policy(folder: str | os.PathLike[str], **kwargs: Any) -> TransformersVLA | FlowVLA:
    """Policy of action tokens or of flow matching from a folder that ``save_pretrained`` wrote.

    Args:
        folder (path): the folder.

    Keyword Args:
        **kwargs: as for ``from_pretrained`` of the policy's class, e.g. ``dtype``, ``device``.

    Raises:
        FileNotFoundError: if the folder or one of its files is missing.
        ValueError: if a file is truncated or corrupt, or holds another architecture.

    Examples:
        >>> import tempfile
        >>> from torchrl_dvla.modules import FlowVLA, load_policy
        >>> policy = FlowVLA.tiny(["lift the cup"], action_dim=7, chunk_size=4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     policy.save_pretrained(folder)
        ...     type(load_policy(folder)).__name__
        'FlowVLA'
    """
    return policy_class(folder).from_pretrained(folder, **kwargs)
