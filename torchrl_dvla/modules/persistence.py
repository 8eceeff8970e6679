# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Saving and loading, for every policy that is a config, weights and a tokenizer."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from torchrl_dvla.modules import checkpoint
from torchrl_dvla.modules.config import TransformersVLAConfig

if TYPE_CHECKING:
    from typing import Self

    from transformers import PreTrainedTokenizerBase

__all__ = ["PretrainedMixin"]


class PretrainedMixin(nn.Module):
    """Gives a policy ``save_pretrained``, ``from_pretrained`` and ``load_weights``.

    The class it is mixed into takes ``(config, *, tokenizer, **kwargs)``.
    """

    config: TransformersVLAConfig
    tokenizer: PreTrainedTokenizerBase

    def save_pretrained(
        self, folder: str | os.PathLike[str], *, dtype: torch.dtype | None = None
    ) -> None:
        """Write weights, config and instruction tokenizer; replaces what is there as one.

        Args:
            folder (path): the checkpoint folder.

        Keyword Args:
            dtype (torch.dtype, optional): storage dtype of float32 weights; ``torch.bfloat16``
                halves the file and rounds. Defaults to storing exactly what there is.

        Raises:
            RuntimeError: if the folder cannot be written.
        """
        checkpoint.write_checkpoint(
            folder,
            architecture=type(self).__name__,
            config=self.config.to_dict(),
            weights=self.state_dict(),
            tokenizer=self.tokenizer,
            dtype=dtype,
        )

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        *,
        freeze_vision: bool | None = None,
        freeze_language: bool | None = None,
        dtype: str | None = None,
        verify: bool = True,
        **kwargs: Any,
    ) -> Self:
        """Load a policy that :meth:`save_pretrained` wrote.

        Args:
            folder (path): the checkpoint folder.

        Keyword Args:
            freeze_vision (bool, optional): defaults to what the config says.
            freeze_language (bool, optional): defaults to what the config says.
            dtype (str, optional): dtype of the backbone; defaults to what the config says.
            verify (bool): whether to compare the checksum of the weights.
            **kwargs: passed on to the constructor, e.g. ``temperature``.

        Returns:
            The policy.

        Raises:
            FileNotFoundError: if the folder or one of its files is missing.
            ValueError: if a file is truncated or corrupt, or holds another architecture.
        """
        from transformers.initialization import no_init_weights

        data = checkpoint.read_config(folder, architecture=cls.__name__)
        config = TransformersVLAConfig.from_dict(data["config"])
        overrides: dict[str, Any] = {
            "freeze_vision": freeze_vision,
            "freeze_language": freeze_language,
            "dtype": dtype,
        }
        given = {name: value for name, value in overrides.items() if value is not None}
        config = dataclasses.replace(config, **given)
        weights = checkpoint.read_weights(folder, data["weights"], verify=verify)
        tokenizer = checkpoint.read_tokenizer(folder)
        with torch.random.fork_rng(devices=[]), no_init_weights():
            policy = cls(config, tokenizer=tokenizer, **kwargs)
        policy._load(weights, source=str(folder))
        return policy

    def load_weights(self, folder: str | os.PathLike[str], *, verify: bool = True) -> None:
        """Load a checkpoint's weights into this policy, in place.

        Args:
            folder (path): the checkpoint folder.

        Keyword Args:
            verify (bool): whether to compare the checksum of the weights.

        Raises:
            FileNotFoundError: if the folder or one of its files is missing.
            ValueError: if a file is damaged or the architecture differs; names what differs.
        """
        data = checkpoint.read_config(folder, architecture=type(self).__name__)
        differences = self.config.differences(TransformersVLAConfig.from_dict(data["config"]))
        if differences:
            raise ValueError(
                f"the checkpoint in {str(folder)!r} must have this policy's architecture, got "
                f"differences (policy != checkpoint): {'; '.join(differences[:12])}. Use "
                f"{type(self).__name__}.from_pretrained to build the policy it was saved from."
            )
        self._load(checkpoint.read_weights(folder, data["weights"], verify=verify), str(folder))

    def _load(self, weights: dict[str, torch.Tensor], source: str) -> None:
        own = self.state_dict()
        problems = [f"missing {name}" for name in sorted(own.keys() - weights.keys())]
        problems += [f"unexpected {name}" for name in sorted(weights.keys() - own.keys())]
        problems += [
            f"{name} is {tuple(weights[name].shape)} instead of {tuple(own[name].shape)}"
            for name in sorted(own.keys() & weights.keys())
            if own[name].shape != weights[name].shape
        ]
        if problems:
            raise ValueError(
                f"the weights in {source!r} must be those of the architecture in its config.json, "
                f"got {len(problems)} difference(s): {'; '.join(problems[:6])}. The checkpoint was "
                "put together from two, or written by another version."
            )
        self.load_state_dict(weights)
