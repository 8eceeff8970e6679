# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""A policy from a folder, whatever kind it is of."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torchrl_dvla.modules.adapters import LoraConfig
from torchrl_dvla.modules.flow_vla import FlowVLA
from torchrl_dvla.modules.formats import Stated, foreign_class, is_foreign, read_foreign
from torchrl_dvla.modules.origin import Origin
from torchrl_dvla.modules.regression_vla import RegressionVLA
from torchrl_dvla.modules.transformers_vla import TransformersVLA

__all__ = ["load_policy", "policy_class"]


_CLASSES: dict[str, type[TransformersVLA] | type[FlowVLA]] = {
    each.__name__: each for each in (FlowVLA, RegressionVLA)
}


def policy_class(folder: str | os.PathLike[str]) -> type[TransformersVLA] | type[FlowVLA]:
    """Class of the policy in a folder, of this project or another.

    Args:
        folder (path): the folder. What is none is left to ``TransformersVLA.from_pretrained``,
            which says what is wrong with it.
    """
    folder = Path(folder)
    try:
        data = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        name = data["architecture"]
    except (OSError, ValueError, KeyError, TypeError):
        if is_foreign(folder):
            return foreign_class(folder)
        name = None
    return _CLASSES.get(name, TransformersVLA)


def load_policy(
    folder: str | os.PathLike[str],
    *,
    stated: Stated | None = None,
    lora: LoraConfig | None = None,
    **kwargs: Any,
) -> TransformersVLA | FlowVLA:
    """Policy of action tokens or of flow matching from a folder, of this project or another.

    Of this project is what ``save_pretrained`` wrote; of others are pi0, pi0.5 and SmolVLA as
    LeRobot saves them, pi0 and pi0.5 of openpi's PyTorch code, and OpenVLA-OFT, whose head that
    regresses actions makes a :class:`RegressionVLA`. Settings, prompt, statistics,
    cameras and the preparation of images are read from the files. What is missing, not known here
    or would be left out is refused by name. A folder of adapters is loaded on the checkpoint that
    they were trained on, which must be where it was, with the same weights.

    Args:
        folder (path): the folder.

    Keyword Args:
        stated (Stated, optional): what the files of another project do not say.
        lora (LoraConfig, optional): adapters to put on it. A folder of adapters has those.
        **kwargs: as for ``from_pretrained`` of the policy's class, e.g. ``dtype``, ``device``.

    Raises:
        FileNotFoundError: if the folder or one of its files is missing.
        ValueError: if a file is truncated or corrupt, or holds another architecture, or something
            that would not be read.

    Examples:
        >>> import tempfile
        >>> from torchrl_dvla.modules import FlowVLA, load_policy
        >>> policy = FlowVLA.tiny(["lift the cup"], action_dim=7, chunk_size=4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     policy.save_pretrained(folder)
        ...     type(load_policy(folder)).__name__
        'FlowVLA'
    """
    if is_foreign(Path(folder)):
        found = read_foreign(Path(folder), stated)
        policy = found.load(**kwargs)
        policy.origin = Origin.of(found.file.path, asdict(stated) if stated else None)
        if lora is not None:
            policy.add_adapters(lora, path=folder, stated=asdict(stated) if stated else None)
        return policy
    if stated is not None and stated != Stated():
        raise ValueError(
            f"stated must be None for {str(folder)!r}, which holds all that is needed, got "
            f"{stated}. It is for checkpoints of other projects."
        )
    kind = policy_class(folder)
    if (adapters := kind.read_base(folder)) is not None:
        config, base = adapters
        saved = {name: getattr(config, name) for name in config.changeable}
        given = {name: value for name, value in kwargs.items() if value is not None}
        frozen = {n: saved[n] for n in given if n.startswith("freeze_") and given[n] != saved[n]}
        if frozen:
            raise ValueError(
                f"{', '.join(frozen)} must be {list(frozen.values())} or None for {str(folder)!r}, "
                f"whose adapters were trained so, got {[given[name] for name in frozen]}. It says "
                "which layers have one; everything else is frozen."
            )
        below = Stated(**base.stated) if base.stated else None
        loaded = load_policy(base.path, stated=below, **{**saved, **given})
        if not isinstance(loaded, kind):
            raise ValueError(
                f"the adapters in {str(folder)!r} must be loaded on a {kind.__name__}, got "
                f"{base.path!r}, a {type(loaded).__name__}. Another checkpoint is there now."
            )
        loaded.load_adapters(folder)
    else:
        loaded = kind.from_pretrained(folder, **kwargs)
    if lora is not None and lora != loaded.config.lora:
        loaded.add_adapters(lora, path=folder)
    return loaded
