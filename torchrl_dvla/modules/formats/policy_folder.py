# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Folder of a policy of another project: what was found in it, and the policy made of it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from torchrl_dvla.differences import differences, join_some
from torchrl_dvla.modules.config import PolicyConfig
from torchrl_dvla.modules.fingerprint import check_fingerprint
from torchrl_dvla.modules.flow_vla import FlowVLA
from torchrl_dvla.modules.formats.flow_weights import NameTable
from torchrl_dvla.modules.formats.tensor_file import TensorFile
from torchrl_dvla.modules.transformers_vla import TransformersVLA
from torchrl_dvla.validation import Count, check_fields

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "FINGERPRINT",
    "PolicyFolder",
    "Stated",
    "load_tokenizer",
    "read_json",
    "settle",
    "statistics_of",
]

#: File that export writes beside those of the project.
FINGERPRINT = "torchrl_dvla_fingerprint.json"


@dataclass(frozen=True, kw_only=True)
class Stated:
    """What a user says about a checkpoint of another project, where its files do not.

    What the files do say must agree. Each format asks for what it lacks, by name.

    Args:
        tokenizer (str, optional): folder or hub name of the instruction tokenizer.
        image_size (tuple of int, optional): height and width of the camera images that the policy
            is given. They are resized as the checkpoint's project does.
        cameras (tuple of str, optional): names in the checkpoint of the one or two cameras that it
            is given, the second from the wrist.
        chunk_size (int, optional): env steps of a decision.
        action_dim (int, optional): action dimension without padding.
        state_dim (int, optional): size of the state without padding.
        state_in_prompt (bool, optional): whether a pi0.5 was trained with its state in the prompt.
        padded_state (bool, optional): whether that state was padded to the network's size first.
        unnorm_key (str, optional): the data set of an OpenVLA whose statistics are taken.

    Raises:
        ValueError: if a number is out of range.
    """

    tokenizer: str | None = None
    image_size: tuple[Count, Count] | None = None
    cameras: tuple[str, ...] | None = None
    chunk_size: Count | None = None
    action_dim: Count | None = None
    state_dim: Count | None = None
    state_in_prompt: bool | None = None
    padded_state: bool | None = None
    unnorm_key: str | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.cameras is not None and not 1 <= len(self.cameras) <= 2:
            raise ValueError(
                f"cameras must be one or two names, got {list(self.cameras)}. Policies are given a "
                "camera of the scene and, perhaps, one at the wrist."
            )


def settle(name: str, said: Any, stated: Any, folder: Path) -> Any:
    """The value of what files say or a user states, and both if so the same.

    Args:
        name (str): field of :class:`Stated`.
        said (Any): the value in the files, ``None`` for none.
        stated (Any): the user's, ``None`` for none.
        folder (Path): for the error.

    Raises:
        ValueError: if neither is there, or they differ.

    Examples:
        >>> settle("chunk_size", None, 50, Path("pi0")), settle("chunk_size", 50, None, Path("pi0"))
        (50, 50)
    """
    if said is None and stated is None:
        raise ValueError(
            f"stated.{name} must be given for {str(folder)!r}, whose files do not say it, got "
            f"nothing. Pass policy.stated.{name}=... as the policy was trained."
        )
    if said is not None and stated is not None and said != stated:
        raise ValueError(
            f"stated.{name} must be {said}, as the files in {str(folder)!r} say, got {stated}. "
            "Leave it out."
        )
    return said if stated is None else stated


@dataclass(frozen=True, kw_only=True)
class PolicyFolder:
    """A policy in the format of another project, before its weights are read.

    Args:
        format (str): project and kind, for messages.
        file (TensorFile): the weights.
        table (NameTable): entries of the policy and the tensors that they are read from.
        config (PolicyConfig): architecture; its prompt lacks what the tokenizer puts first.
        statistics (Mapping): entries of the policy's state dict that no weight is read into.
        tokenizer (str): folder or hub name.
        cameras (tuple of str): the file's names of what becomes ``"image"`` and ``"wrist_image"``.
        replan_interval (int, optional): env steps executed per decision, if the files say so.
        policy_class (type): class of the policy.
        first_entry (str): entry of the prompt style that begins with what the tokenizer puts first.
    """

    format: str
    file: TensorFile
    table: NameTable
    config: PolicyConfig
    statistics: Mapping[str, torch.Tensor] = field(repr=False)
    tokenizer: str
    cameras: tuple[str, ...]
    replan_interval: int | None = None
    policy_class: Callable[..., FlowVLA | TransformersVLA] = FlowVLA
    first_entry: str = "instruction"

    @property
    def folder(self) -> Path:
        """The folder."""
        return self.file.path.parent

    def load(self, **kwargs: Any) -> Any:
        """The policy.

        Keyword Args:
            **kwargs: fields of the config that are ``changeable``, e.g. ``dtype``; ``None`` leaves
                them. The others are passed on to the constructor, e.g. ``device``.

        Raises:
            OSError: if the tokenizer cannot be loaded.
            ValueError: if a tensor is missing, of another shape, or holds NaN, by its name in the
                file; or if the policy does not do what the fingerprint of an export says.
        """
        from transformers.initialization import no_init_weights

        given = {name: kwargs.pop(name, None) for name in self.config.changeable}
        given = {name: value for name, value in given.items() if value is not None}
        tokenizer = load_tokenizer(self.tokenizer, self.folder)
        style = self.config.prompt_style
        first = _first_ids(tokenizer) + getattr(style, self.first_entry)
        given["prompt_style"] = dataclasses.replace(style, **{self.first_entry: first})
        with torch.random.fork_rng(devices=[]), no_init_weights():
            config = dataclasses.replace(self.config, **given)
            policy = self.policy_class(config, tokenizer=tokenizer, **kwargs)
        policy.load_state_dict(self._weights(policy))
        path = self.folder / FINGERPRINT
        prompt = dataclasses.replace(self.config, prompt_style=policy.config.prompt_style)
        if path.is_file() and policy.config == prompt:
            check_fingerprint(policy, read_json(path), repr(str(self.folder)))
        return policy

    def _weights(self, policy: FlowVLA | TransformersVLA) -> dict[str, torch.Tensor]:
        """State dict of the policy."""
        table, own = self.table.own, policy.state_dict()
        # Exploration by a learned deviation needs a head that no other project has; what decodes
        # tokens is described in the config.
        made_here = ("noise_head.", "action_tokenizer.")
        added = {name: own[name] for name in own if name.startswith(made_here)}
        added.update(self.statistics)
        expected = {
            self.table.name_in_file(name): list(tensor.shape)
            for name, tensor in own.items()
            if name not in added
        }
        problems = differences(expected, {k: list(self.file.shapes[k]) for k in table.values()})
        read = {} if problems else self.file.read(table.values())
        problems += [
            f"{name!r} holds NaN or infinity"
            for name, tensor in read.items()
            if not tensor.isfinite().all()
        ]
        if problems:
            raise ValueError(
                f"{self.file.path} must hold the weights of {self.format}, got "
                f"{len(problems)} difference(s): {join_some(problems)}. It is incomplete, of "
                "another version, or another model's."
            )
        return {name: read[table[name]] for name in table} | added


def statistics_of(
    entry: str,
    mode: str,
    found: Mapping[str, torch.Tensor],
    size: int,
    source: str,
    *,
    added: float = 0.0,
) -> dict[str, torch.Tensor]:
    """Entries of a policy's state dict, from statistics as the projects keep them.

    Args:
        entry (str): ``"state"`` or ``"action"``.
        mode (str): LeRobot's ``MEAN_STD``, ``QUANTILES``, ``MIN_MAX`` or ``IDENTITY``.
        found (Mapping): ``mean``, ``std``, ``q01`` etc., ``[S]`` or longer.
        size (int): ``S``, without padding.
        source (str): where they were found, for errors.

    Keyword Args:
        added (float): what the project adds to deviations or ranges, so that it divides by no zero.

    Raises:
        ValueError: if one is missing, short or not finite.

    Examples:
        >>> import torch
        >>> found = {"q01": torch.zeros(3), "q99": torch.ones(3)}
        >>> statistics_of("state", "QUANTILES", found, 2, "norm_stats.json")
        {'state_statistics.low': tensor([0., 0.]), 'state_statistics.high': tensor([1., 1.])}
    """
    kinds = {"MEAN_STD": ("mean", "std"), "QUANTILES": ("q01", "q99"), "MIN_MAX": ("min", "max")}
    own = {"MEAN_STD": ("mean", "std"), "IDENTITY": ("mean", "std")}.get(mode, ("low", "high"))
    first, second = (f"{entry}_statistics.{name}" for name in own)
    if mode == "IDENTITY":
        return {first: torch.zeros(size), second: torch.ones(size)}
    names = kinds[mode]
    missing = [name for name in names if name not in found]
    if missing:
        raise ValueError(
            f"{source} must hold {' and '.join(names)} of the {entry}, got {sorted(found)}. "
            "Without them values would be left as they are: take the statistics that the policy "
            "was trained with."
        )
    for name in names:
        if found[name].numel() < size or not found[name].isfinite().all():
            raise ValueError(
                f"{source} must hold {size} finite numbers for {name} of the {entry}, got "
                f"{found[name].tolist()}. They are damaged, or another robot's."
            )
    one, other = (found[name].flatten()[:size].float() for name in names)
    other = other + added
    least = torch.full_like(other, 1e-8)  # of an entry that never changes
    if mode == "MEAN_STD":
        other = other.maximum(least)
    else:
        least = torch.maximum(one + 1e-6, torch.nextafter(one, torch.full_like(one, torch.inf)))
        other = torch.where(other == one, least, other)
    return {first: one, second: other}


def load_tokenizer(name: str, folder: Path) -> PreTrainedTokenizerBase:
    """The instruction tokenizer of a checkpoint.

    Args:
        name (str): its folder, relative to the checkpoint's or the working directory, or hub name.
        folder (Path): the checkpoint's.

    Raises:
        OSError: if it can be had from neither.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    beside = folder / name
    # One in the checkpoint's own folder is read as it is: transformers knows the family of none.
    kind: Any = PreTrainedTokenizerFast if beside == folder else AutoTokenizer
    try:
        return kind.from_pretrained(
            str(beside) if beside.is_dir() else name, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise OSError(
            f"the tokenizer must be a folder or a name on the hub that can be read, got {name!r}: "
            f"{str(error).splitlines()[0]} Pass policy.stated.tokenizer=<folder of its files>."
        ) from error


def _first_ids(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the tokenizer puts before a text by itself, as text: ``"<bos>"`` of Gemma's."""
    own, plain = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    if own == plain:
        return ""
    first = tokenizer.bos_token or ""
    again = tokenizer(f"{first}a", add_special_tokens=False)["input_ids"]
    if again != own:
        raise ValueError(
            f"the tokenizer must put at most its first token, {first!r}, before a text and nothing "
            f"after it, got {own} for {plain}. It is another model's: pass policy.stated.tokenizer."
        )
    return first


def read_json(path: Path) -> dict[str, Any]:
    """Mapping in a JSON file.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it holds something else.
    """
    if not path.is_file():
        found = sorted(entry.name for entry in path.parent.glob("*"))[:8]
        raise FileNotFoundError(
            f"{str(path.parent)!r} must contain {path.name}, got {found or 'nothing'}. Copy the "
            "checkpoint again, with all its files."
        )
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} must be valid JSON, got an error: {error}. Copy the checkpoint again."
        ) from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold a mapping, got a {type(data).__name__}.")
    return data
