# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Action tokenizers as data, so that a checkpoint can carry one."""

from __future__ import annotations

from typing import Any

import torch
from torchrl.data.vla import (
    ActionTokenizerBase,
    UniformActionTokenizer,
    VocabTailActionTokenizer,
)

__all__ = ["action_tokenizer_from_dict", "action_tokenizer_to_dict"]


def action_tokenizer_to_dict(tokenizer: ActionTokenizerBase) -> dict[str, Any]:
    """Describe an action tokenizer in plain JSON types.

    Args:
        tokenizer (ActionTokenizerBase): a ``UniformActionTokenizer`` or
            ``VocabTailActionTokenizer``.

    Returns:
        A dict for :func:`action_tokenizer_from_dict`.

    Raises:
        ValueError: if the class is another one.

    Examples:
        >>> from torchrl.data.vla import UniformActionTokenizer
        >>> from torchrl_dvla.modules import action_tokenizer_to_dict
        >>> action_tokenizer_to_dict(UniformActionTokenizer(64, low=-1.0, high=1.0))
        {'kind': 'uniform', 'num_bins': 64, 'low': -1.0, 'high': 1.0}
    """
    if type(tokenizer) is UniformActionTokenizer:
        return {
            "kind": "uniform",
            "num_bins": tokenizer.num_bins,
            "low": tokenizer.low.tolist(),
            "high": tokenizer.high.tolist(),
        }
    if type(tokenizer) is VocabTailActionTokenizer:
        stats = (tokenizer.norm_low, tokenizer.norm_high, tokenizer.norm_mask)
        low, high, mask = (None if value is None else value.tolist() for value in stats)
        return {
            "kind": "vocab_tail",
            "num_bins": tokenizer.num_bins,
            "full_vocab_size": tokenizer.full_vocab_size,
            "norm_low": low,
            "norm_high": high,
            "norm_mask": mask,
            "gripper_binarize": tokenizer.gripper_binarize,
            "gripper_binarize_threshold": tokenizer.gripper_binarize_threshold,
            "gripper_invert": tokenizer.gripper_invert,
        }
    raise ValueError(
        "action_tokenizer must be a UniformActionTokenizer or a VocabTailActionTokenizer, got "
        f"{type(tokenizer).__name__}. Other tokenizers cannot be stored in a checkpoint yet."
    )


def action_tokenizer_from_dict(data: dict[str, Any]) -> ActionTokenizerBase:
    """Rebuild what :func:`action_tokenizer_to_dict` described.

    Args:
        data (dict): the description.

    Returns:
        The tokenizer.

    Raises:
        ValueError: if the kind is unknown.
    """
    data = dict(data)
    kind = data.pop("kind", None)
    if kind == "uniform":
        low, high = torch.tensor(data["low"]), torch.tensor(data["high"])
        return UniformActionTokenizer(int(data["num_bins"]), low=low, high=high)
    if kind == "vocab_tail":
        for name, dtype in (
            ("norm_low", torch.float64),
            ("norm_high", torch.float64),
            ("norm_mask", torch.bool),
        ):
            if data.get(name) is not None:
                data[name] = torch.tensor(data[name], dtype=dtype)
        return VocabTailActionTokenizer(**data)
    raise ValueError(
        f"kind must be 'uniform' or 'vocab_tail', got {kind!r}. The checkpoint was written by "
        "another version of torchrl_dvla."
    )
