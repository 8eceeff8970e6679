# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Pretrained weights: folders of whole policies, and backbones from a config, a folder or the hub.

The folder of a policy holds::

    config.json                 architecture; name, size and checksum of the weights; fingerprint
    weights-<crc32>.safetensors parameters and buffers; of adapters on a checkpoint these alone
    tokenizer/                  the instruction tokenizer's own files

``config.json`` names the weights and is replaced last, by one atomic rename. Whenever a writer
dies, and whenever a reader comes, the folder therefore holds the old policy or the new one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import re
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from torchrl_dvla.differences import differences, join_some
from torchrl_dvla.modules.adapters import (
    BaseCheckpoint,
    LoraConfig,
    add_adapters_,
    merged_weights,
    weights_checksum,
)
from torchrl_dvla.modules.backbones import PixelStyle, PromptStyle, backbone_class
from torchrl_dvla.modules.config import PolicyConfig
from torchrl_dvla.modules.fingerprint import check_fingerprint, take_fingerprint
from torchrl_dvla.modules.origin import Origin
from torchrl_dvla.modules.prompt import word_tokenizer
from torchrl_dvla.saved_state import COUNT, require_form

if TYPE_CHECKING:
    from typing import Self

    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "PretrainedMixin",
    "backbone_from_dict",
    "backbone_to_dict",
    "config_to_dict",
    "resolve_backbone",
]

_CONFIG = "config.json"
_TOKENIZER = "tokenizer"
_FORMAT_VERSION = 1
_WEIGHTS_FILE = re.compile(r"weights-[0-9a-f]{8}\.safetensors")
_COPY_AGAIN = "copy the checkpoint again, with all its files"


class PretrainedMixin(nn.Module):
    """Mixin with ``save_pretrained``, ``from_pretrained`` and ``read_weights``.

    The class it is mixed into takes ``(config, *, tokenizer, **kwargs)``.
    """

    config_class: ClassVar[type[PolicyConfig]]
    config: PolicyConfig
    tokenizer: PreTrainedTokenizerBase
    #: The checkpoint that the adapters are on; a folder of the policy then holds them alone.
    base: BaseCheckpoint | None = None
    #: The checkpoint of another project that it came from; ``export`` writes one like it.
    origin: Origin | None = None

    def add_adapters(
        self,
        lora: LoraConfig,
        *,
        path: str | os.PathLike[str] | None = None,
        stated: Mapping[str, Any] | None = None,
    ) -> None:
        """Put low-rank adapters on the policy in place; everything else is frozen.

        Args:
            lora (LoraConfig): which layers get one, and how large.

        Keyword Args:
            path (path, optional): the folder that the policy was loaded from. Given it,
                :meth:`save_pretrained` writes the adapters alone, and needs it to be loaded again.
            stated (Mapping, optional): what was stated about it.

        Raises:
            ImportError: without PEFT.
            ValueError: if the policy has adapters, or no layer gets one.
        """
        if self.config.lora is not None:
            raise ValueError(
                f"lora must be None for a policy that has adapters, got {lora} and "
                f"{self.config.lora}. Train those further, or export them merged and begin there."
            )
        if path is not None:
            self.base = BaseCheckpoint(
                path=str(Path(path).absolute()),
                checksum=weights_checksum(self),
                stated=dict(stated or {}),
            )
        self._add_adapters(lora)
        self.config = dataclasses.replace(self.config, lora=lora)

    def merged(self) -> Self:
        """The policy without adapters, which are merged into the weights that they are on."""
        from transformers.initialization import no_init_weights

        with torch.random.fork_rng(devices=[]), no_init_weights():
            policy = type(self)(
                dataclasses.replace(self.config, lora=None),
                tokenizer=self.tokenizer,
            )
        policy.load_state_dict(merged_weights(self))
        policy.origin = self.origin
        return policy

    def _add_adapters(self, lora: LoraConfig) -> None:
        add_adapters_(self, lora)

    def save_pretrained(self, folder: str | os.PathLike[str], *, fingerprint: bool = True) -> None:
        """Write weights, config and instruction tokenizer, replacing a previous checkpoint.

        Args:
            folder (path): the checkpoint folder; made if missing.

        Keyword Args:
            fingerprint (bool): decide once for a stored input, so that whoever loads it can see
                that it decides the same. Default: ``True``.

        Raises:
            OSError: if the folder cannot be written.
        """
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".writing-", dir=folder) as scratch:
                self._write(folder, Path(scratch), fingerprint)
        except (OSError, SafetensorError) as error:
            raise OSError(
                getattr(error, "errno", None) or errno.EIO,
                f"the checkpoint could not be written to {str(folder)!r} ({error}). Free some disk "
                "space, mend the folder's permissions or choose another one; a previous checkpoint "
                "there is untouched.",
            ) from error

    def _write(self, folder: Path, scratch: Path, fingerprint: bool) -> None:
        draft = scratch / "weights"
        # Parameters may be views on shared memory, or tied: the file must own its bytes.
        kept = self._saved_names()
        tensors = {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, tensor in self.state_dict().items()
            if name in kept
        }
        save_file(tensors, str(draft), metadata={"format": "pt"})
        checksum = _checksum(draft)
        weights = f"weights-{checksum}.safetensors"
        data = {
            "architecture": type(self).__name__,
            "format_version": _FORMAT_VERSION,
            "config": self.config.to_dict(),
            "weights": {"file": weights, "num_bytes": draft.stat().st_size, "crc32": checksum},
            "fingerprint": take_fingerprint(self) if fingerprint else None,
        }
        if self.base is not None:
            data["base"] = dataclasses.asdict(self.base)
        if self.origin is not None:
            data["origin"] = dataclasses.asdict(self.origin)
        (scratch / _CONFIG).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
        self.tokenizer.save_pretrained(str(scratch / _TOKENIZER))

        (folder / _TOKENIZER).mkdir(exist_ok=True)
        for file in sorted((scratch / _TOKENIZER).iterdir()):
            _move(file, folder / _TOKENIZER / file.name)
        _move(draft, folder / weights)
        _move(scratch / _CONFIG, folder / _CONFIG)
        for old in folder.glob("weights-*.safetensors"):
            if old.name != weights:
                old.unlink(missing_ok=True)

    def _saved_names(self) -> set[str]:
        """Names of the state dict that a folder of this policy holds."""
        if self.base is None:
            return set(self.state_dict())
        return {name for name, tensor in self.named_parameters() if tensor.requires_grad}

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        **kwargs: Any,
    ) -> Self:
        """Policy from a folder that :meth:`save_pretrained` wrote.

        Args:
            folder (path): the checkpoint folder.

        Keyword Args:
            **kwargs: fields of the config that are ``changeable``, e.g. ``dtype``; ``None`` leaves
                what the config says. The others are passed on to the constructor, e.g. ``device``.

        Returns:
            The policy.

        Raises:
            FileNotFoundError: if the folder or one of its files is missing.
            ValueError: if a file is truncated or corrupt, or holds another architecture, or the
                policy does not do what its fingerprint says.
        """
        from transformers import AutoTokenizer
        from transformers.initialization import no_init_weights

        config, weights, fingerprint, base = _read_folder(Path(folder), cls)
        given = {name: kwargs.pop(name, None) for name in cls.config_class.changeable}
        given = {name: value for name, value in given.items() if value is not None}
        if base is not None:
            raise ValueError(
                f"folder must hold a whole policy, got {str(folder)!r} with the adapters of one in "
                f"{base.path!r}. Use torchrl_dvla.modules.load_policy, which reads both."
            )
        _require_file(folder, f"{_TOKENIZER}/tokenizer_config.json")
        _refuse_code(Path(folder) / _TOKENIZER)
        with _refuse_damage(Path(folder)):
            tokenizer = AutoTokenizer.from_pretrained(
                str(Path(folder) / _TOKENIZER), local_files_only=True, trust_remote_code=False
            )
            with torch.random.fork_rng(devices=[]), no_init_weights():
                policy = cls(dataclasses.replace(config, **given), tokenizer=tokenizer, **kwargs)
        policy.load_state_dict(policy._checked(weights, source=folder))
        if (origin := _read_config(Path(folder), cls.__name__).get("origin")) is not None:
            policy.origin = Origin(**origin)
        # Of another dtype or sampler it is another policy.
        if fingerprint is not None and policy.config == config:
            check_fingerprint(policy, fingerprint, repr(str(folder)))
        return policy

    @classmethod
    def read_base(
        cls, folder: str | os.PathLike[str]
    ) -> tuple[PolicyConfig, BaseCheckpoint] | None:
        """Config of the adapters in a folder and the checkpoint that they are on, or ``None``.

        Args:
            folder (path): the checkpoint folder.

        Raises:
            FileNotFoundError: if that checkpoint is not there.
            ValueError: if ``config.json`` is damaged.
        """
        data = _read_config(Path(folder), cls.__name__)
        if "base" not in data:
            return None
        config, base = _read_architecture(Path(folder), cls, data)
        assert base is not None
        if not Path(base.path).is_dir():
            raise FileNotFoundError(
                f"the adapters in {str(folder)!r} must be loaded on the checkpoint that they were "
                f"trained on, got {base.path!r}, where nothing is. If it has been moved, correct "
                f"'base.path' in {Path(folder) / _CONFIG}."
            )
        return config, base

    def load_adapters(self, folder: str | os.PathLike[str]) -> None:
        """Put the adapters of a folder on this policy, which they were trained on.

        Args:
            folder (path): what :meth:`save_pretrained` wrote.

        Raises:
            FileNotFoundError: if one of its files is missing.
            ValueError: if a file is damaged, they were trained on another checkpoint, or the policy
                does not do what the fingerprint says.
        """
        config, weights, fingerprint, base = _read_folder(Path(folder), type(self))
        assert config.lora is not None and base is not None
        self.add_adapters(config.lora, path=base.path, stated=base.stated)
        self._require_base(folder, base)
        self.load_state_dict({**self.state_dict(), **self._checked(weights, source=folder)})
        if fingerprint is not None and self.config == config:
            check_fingerprint(self, fingerprint, repr(str(folder)))

    def _require_base(self, folder: str | os.PathLike[str], base: BaseCheckpoint | None) -> None:
        """Refuse adapters of another checkpoint than this policy's."""
        own, saved = (None if each is None else each.checksum for each in (self.base, base))
        if own != saved:
            here, there = (
                "none" if each is None else f"{each.path!r} with checksum {each.checksum}"
                for each in (self.base, base)
            )
            raise ValueError(
                f"the adapters in {str(folder)!r} must be loaded on the checkpoint that they were "
                f"trained on, {there}, got {here}. Added to other weights they do something else: "
                "name that checkpoint."
            )

    def read_weights(self, folder: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
        """State dict of a checkpoint that fits this policy, which it is not loaded into yet.

        Args:
            folder (path): the checkpoint folder.

        Raises:
            FileNotFoundError: if the folder or one of its files is missing.
            ValueError: if a file is damaged or the architecture differs; names what differs.
        """
        config, weights, _, base = _read_folder(Path(folder), type(self))
        problems = self.config.differences(config)
        if problems:
            raise ValueError(
                f"the checkpoint in {str(folder)!r} must have this policy's architecture, got "
                f"differences: {join_some(problems, limit=12)}. Use "
                f"{type(self).__name__}.from_pretrained to build the policy it was saved from."
            )
        self._require_base(folder, base)
        checked = self._checked(weights, source=folder)
        return checked if base is None else {**self.state_dict(), **checked}

    def _checked(
        self, weights: dict[str, torch.Tensor], source: str | os.PathLike[str]
    ) -> dict[str, torch.Tensor]:
        kept = self._saved_names()
        own = {n: list(tensor.shape) for n, tensor in self.state_dict().items() if n in kept}
        saved = {name: list(tensor.shape) for name, tensor in weights.items()}
        problems = differences(own, saved)
        problems += [
            f"{name!r} holds NaN or infinity"
            for name, _ in self.named_parameters()  # a buffer may be a mask
            if name in weights and not weights[name].isfinite().all()
        ]
        if problems:
            raise ValueError(
                f"the weights in {str(source)!r} must be those of the architecture in its "
                f"config.json, got {len(problems)} difference(s): {join_some(problems)}. The "
                "checkpoint was put together from two, or written by another version."
            )
        return weights


def _read_folder(
    folder: Path, policy_class: type[PretrainedMixin]
) -> tuple[PolicyConfig, dict[str, torch.Tensor], dict[str, Any] | None, BaseCheckpoint | None]:
    """Config, weights by name after comparing their checksum, fingerprint, and base if any."""
    data = _read_config(folder, policy_class.__name__)
    entry = data["weights"]
    path = _require_file(folder, entry["file"])
    num_bytes = path.stat().st_size
    if num_bytes != entry["num_bytes"]:
        kind = "truncated" if num_bytes < entry["num_bytes"] else "damaged"
        raise ValueError(
            f"{path} must have {entry['num_bytes']} bytes, got {num_bytes}. The file is {kind} (or "
            f"a Git LFS pointer): {_COPY_AGAIN}."
        )
    if (found := _checksum(path)) != entry["crc32"]:
        raise ValueError(
            f"{path} must have checksum {entry['crc32']}, got {found}. The file is corrupt: "
            f"{_COPY_AGAIN}."
        )
    try:
        weights = load_file(str(path))
    except SafetensorError as error:
        raise ValueError(
            f"{path} must be a safetensors file, got an error: {error}. The file is corrupt: "
            f"{_COPY_AGAIN}."
        ) from error
    config, base = _read_architecture(folder, policy_class, data)
    return config, weights, data.get("fingerprint"), base


def _read_architecture(
    folder: Path, policy_class: type[PretrainedMixin], data: dict[str, Any]
) -> tuple[PolicyConfig, BaseCheckpoint | None]:
    """Config, and the checkpoint that adapters are on."""
    with _refuse_damage(folder):
        config = policy_class.config_class.from_dict(data["config"])
    base = data.get("base")
    if base is None:
        return config, None
    form = {"path": str, "checksum": str, "stated": {str: object}}
    require_form(form, base, f"{folder / _CONFIG}.base")
    if config.lora is None:
        raise ValueError(
            f"'config.lora' in {folder / _CONFIG} must be given beside 'base', got nothing. The "
            f"file is damaged: {_COPY_AGAIN}."
        )
    return config, BaseCheckpoint(**base)


@contextlib.contextmanager
def _refuse_damage(folder: Path) -> Iterator[None]:
    """Errors of what is built from the files of ``folder``, as errors about the folder."""
    try:
        yield
    except (ValueError, OSError):
        raise
    except Exception as error:
        raise ValueError(
            f"the files of {str(folder)!r} must describe a policy, got {type(error).__name__} "
            f"({error}). They are damaged, or an argument does not fit: {_COPY_AGAIN}."
        ) from error


def _refuse_code(folder: Path) -> None:
    """Refuse a folder whose files name Python code to import, before transformers asks for it."""
    for path in sorted(folder.glob("*config.json")):
        keys: set[str] = set()
        try:
            json.loads(path.read_text(encoding="utf-8"), object_hook=keys.update)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{path} must be valid JSON, got an error: {error}. The file is damaged: "
                f"{_COPY_AGAIN}."
            ) from error
        if "auto_map" in keys:
            raise ValueError(
                f"{path} must name no code of its own, got an 'auto_map'. Nothing that is loaded "
                "here runs code: use a model whose classes are part of transformers."
            )


def _read_config(folder: Path, architecture: str) -> dict[str, Any]:
    path = _require_file(folder, _CONFIG)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} must be valid JSON, got an error: {error}. The file is damaged: {_COPY_AGAIN}."
        ) from error
    data = data if isinstance(data, dict) else {}
    found = data.get("architecture")
    if found != architecture:
        remedy = f"Load it with {found}.from_pretrained."
        if "model_type" in data:
            remedy = (
                f"It is a transformers checkpoint of type {data['model_type']!r}: pass it to "
                f"{architecture}.from_backbone."
            )
        elif found is None:
            remedy = "Point to a torchrl_dvla checkpoint."
        raise ValueError(
            f"the architecture in {path} must be {architecture!r}, got {found!r}. {remedy}"
        )
    version = data.get("format_version")
    if version != _FORMAT_VERSION:
        raise ValueError(
            f"format_version in {path} must be {_FORMAT_VERSION}, got {version!r}. Use the version "
            "of torchrl_dvla that wrote the checkpoint."
        )
    weights = {"file": str, "num_bytes": COUNT, "crc32": str}
    form: dict[str, Any] = {"weights": weights, "config": {str: object}}
    if data.get("origin") is not None:
        form["origin"] = {"path": str, "fingerprint": str, "stated": {str: object}}
    require_form(form, {key: data.get(key) for key in form}, str(path))
    if not _WEIGHTS_FILE.fullmatch(data["weights"]["file"]):
        raise ValueError(
            f"'weights.file' in {path} must be the name of a file beside it, got "
            f"{data['weights']['file']!r}. The file is damaged: {_COPY_AGAIN}."
        )
    _refuse_code(Path(folder))
    return data


def _require_file(folder: str | os.PathLike[str], name: str) -> Path:
    path = Path(folder) / name
    if not path.is_file():
        found = sorted(entry.name for entry in Path(folder).glob("*"))[:8]
        raise FileNotFoundError(
            f"folder must contain {name}, got {str(folder)!r} with {found or 'nothing'}. Check the "
            f"path, or {_COPY_AGAIN}."
        )
    return path


def _move(source: Path, target: Path) -> None:
    """Rename once the bytes are on disk: a power cut must leave no empty file of that name."""
    with source.open("rb") as file:
        os.fsync(file.fileno())
    source.replace(target)


def _checksum(path: Path) -> str:
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return f"{value:08x}"


# -- backbones ------------------------------------------------------------------------------------

#: Fields of a transformers config that say where it came from, not what it is.
_PROVENANCE = ("transformers_version", "_name_or_path", "architectures", "dtype", "torch_dtype")

_BICUBIC = 3  # PIL's number


def backbone_to_dict(config: PreTrainedConfig) -> dict[str, Any]:
    """Transformers config as plain JSON types, without provenance.

    Args:
        config (PreTrainedConfig): the config.

    Returns:
        A dict for :func:`backbone_from_dict`, equal for equal architectures.

    Raises:
        ValueError: if there is no adapter for its model type.
    """
    backbone_class(config.model_type)
    return config_to_dict(config)


def config_to_dict(config: PreTrainedConfig) -> dict[str, Any]:
    """Transformers config of any model type as plain JSON types, without provenance."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: clean(item) for name, item in value.items() if name not in _PROVENANCE}
        return value

    return json.loads(json.dumps(clean(config.to_dict())))


def backbone_from_dict(data: dict[str, Any], *, dtype: torch.dtype) -> PreTrainedModel:
    """Backbone with random weights.

    Args:
        data (dict): see :func:`backbone_to_dict`.

    Keyword Args:
        dtype (torch.dtype): dtype of the parameters.

    Returns:
        The base model, without a language-modelling head.

    Raises:
        ValueError: if there is no adapter for its model type.
    """
    from transformers import AutoModel
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if (network := backbone_class(data["model_type"]).network) is not None:
        return network(data, dtype=dtype)
    config = CONFIG_MAPPING[data["model_type"]].from_dict(dict(data))
    return AutoModel.from_config(
        config, dtype=dtype, attn_implementation=_attention(config), trust_remote_code=False
    )


def resolve_backbone(
    source: str | os.PathLike[str] | PreTrainedConfig | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    instructions: Iterable[str] | None,
    dtype: torch.dtype,
    hub_kwargs: dict[str, Any],
) -> tuple[PreTrainedConfig, PreTrainedModel | None, PreTrainedTokenizerBase, dict[str, Any]]:
    """Config, weights, tokenizer and input style of a backbone.

    Args:
        source (str, path, PreTrainedConfig or PreTrainedModel): a hub id or local folder for
            pre-trained weights, a config for random ones, or a base model.
        tokenizer (PreTrainedTokenizerBase, optional): used instead of the checkpoint's own.
        instructions (iterable of str, optional): make a word-level tokenizer of these instead; it
            knows none of the family's prompt strings, so there are none.
        dtype (torch.dtype): dtype of pre-trained parameters.
        hub_kwargs (dict): passed on to transformers, e.g. ``revision``.

    Returns:
        The transformers config, the model (``None`` where the weights are still to be drawn), the
        tokenizer, and ``prompt_style``, ``pixel_style`` and ``bidirectional_prompt`` of
        :class:`TransformersVLAConfig`.

    Raises:
        ValueError: if there is no adapter for the model type, or no tokenizer, or the source brings
            code of its own.
    """
    from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedConfig, PreTrainedModel

    model = source if isinstance(source, PreTrainedModel) else None
    is_path = model is None and not isinstance(source, PreTrainedConfig)
    if hub_kwargs.get("trust_remote_code"):
        raise ValueError(
            "trust_remote_code must be False, got True. Nothing that is loaded here runs code: use "
            "a model whose classes are part of transformers."
        )
    hub_kwargs = {**hub_kwargs, "trust_remote_code": False}
    if is_path:
        if Path(source).is_dir():
            _refuse_code(Path(source))
        config = AutoConfig.from_pretrained(source, **hub_kwargs)
    else:
        config = source if model is None else model.config
    family = backbone_class(config.model_type)
    pixel_style, prompt_style = family.pixel_style, family.prompt_style
    if is_path:
        pixel_style = _pixel_style(source, pixel_style, **hub_kwargs)
        model = AutoModel.from_pretrained(
            source,
            config=config,
            dtype=dtype,
            attn_implementation=_attention(config),
            **{**hub_kwargs, "use_safetensors": True},
        )
    if instructions is not None:
        tokenizer, prompt_style = word_tokenizer(instructions), PromptStyle()
    elif tokenizer is None and is_path:
        tokenizer = AutoTokenizer.from_pretrained(source, **hub_kwargs)
    if tokenizer is None:
        raise ValueError(
            "tokenizer must be given where source is a config or a model, got None. Pass "
            "tokenizer=AutoTokenizer.from_pretrained(...) or instructions=[...]."
        )
    style = {
        "prompt_style": prompt_style,
        "pixel_style": pixel_style,
        "bidirectional_prompt": family.bidirectional_prompt,
    }
    return config, model, tokenizer, style


def _attention(config: PreTrainedConfig) -> str:
    # Fused attention has no soft cap (Gemma 2).
    softcap = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    return "sdpa" if softcap is None else "eager"


def _pixel_style(source: str | os.PathLike[str], default: PixelStyle, **kwargs: Any) -> PixelStyle:
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        data, _ = ImageProcessingMixin.get_image_processor_dict(source, **kwargs)
    except OSError:
        return default
    return PixelStyle(
        mean=tuple(data.get("image_mean") or default.mean),
        std=tuple(data.get("image_std") or default.std),
        interpolation="bilinear" if data.get("resample", _BICUBIC) == 2 else "bicubic",
    )
