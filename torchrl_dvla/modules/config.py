# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Architecture of a policy as plain data: its config and its action tokenizer."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from torchrl.data.vla import (
    ActionTokenizerBase,
    UniformActionTokenizer,
    VocabTailActionTokenizer,
)

from torchrl_dvla.differences import differences
from torchrl_dvla.modules.adapters import LoraConfig
from torchrl_dvla.modules.backbones import PixelStyle, PromptStyle
from torchrl_dvla.validation import Count, Natural, NonNegative, Positive, Range, check_fields

if TYPE_CHECKING:
    from typing import Self

__all__ = [
    "FlowVLAConfig",
    "PolicyConfig",
    "TransformersVLAConfig",
    "action_tokenizer_from_dict",
    "action_tokenizer_to_dict",
]

DType = Literal["float32", "bfloat16", "float16"]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """What policies of all kinds have in their ``config.json``.

    Args:
        backbone (dict): ``to_dict()`` of the transformers config, ``"model_type"`` included.
        action_dim (int): action dimension ``A``.
        image_size (tuple of int): height and width of the camera images the policy is given.
        state_dim (int): size of the proprioception vector; 0 for a policy that reads none.
        num_cameras (int): 1, or 2 to read ``("observation", "wrist_image")`` as well.
        prompt_style (PromptStyle): the strings around images and instruction.
        pixel_style (PixelStyle): normalisation of pixels.
        dtype (str): ``"float32"``, ``"bfloat16"`` or ``"float16"``, of the backbone. The action
            head and everything after it is float32.
        gradient_checkpointing (bool): whether activations inside of a transformer's layer are
            computed anew in the backward pass instead of kept.
        lora (LoraConfig, optional): low-rank adapters, beside which nothing is trained.

    Raises:
        ValueError: if a number is out of range.
    """

    #: Fields that a checkpoint may be loaded with other values of. But for ``dtype`` they are no
    #: part of the architecture.
    changeable: ClassVar[tuple[str, ...]] = ("dtype", "gradient_checkpointing")

    backbone: dict[str, Any]
    action_dim: Count
    image_size: tuple[Count, Count]
    state_dim: Natural = 0
    num_cameras: Annotated[int, Range(1, 2)] = 1
    prompt_style: PromptStyle = field(default_factory=PromptStyle)
    pixel_style: PixelStyle = field(default_factory=PixelStyle)
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    gradient_checkpointing: bool = False
    lora: LoraConfig | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if "model_type" not in self.backbone:
            raise ValueError(
                f"backbone must contain 'model_type', got keys {sorted(self.backbone)[:8]}. Pass "
                "to_dict() of a transformers config."
            )

    @property
    def torch_dtype(self) -> torch.dtype:
        """The backbone's dtype."""
        return _DTYPES[self.dtype]

    def to_dict(self) -> dict[str, Any]:
        """Fields as plain JSON types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Config from the fields that :meth:`to_dict` wrote.

        Args:
            data (dict): the fields.

        Returns:
            The config.

        Raises:
            ValueError: if a field is missing or unknown.
        """
        names, required = set(), set()
        for field_ in dataclasses.fields(cls):
            names.add(field_.name)
            if field_.default is field_.default_factory is dataclasses.MISSING:
                required.add(field_.name)
        unknown, missing = sorted(set(data) - names), sorted(required - set(data))
        if unknown or missing:
            raise ValueError(
                f"data must hold the fields of {cls.__name__}, got unknown {unknown} and missing "
                f"{missing}. The checkpoint was written by another version of torchrl_dvla."
            )
        data = dict(data)
        kinds = {"prompt_style": PromptStyle, "pixel_style": PixelStyle, "lora": LoraConfig}
        for name, kind in kinds.items():
            if isinstance(data.get(name), dict):
                data[name] = kind(**data[name])
        return cls(**data)

    def differences(self, other: PolicyConfig) -> list[str]:
        """Fields in which another config differs, see :func:`torchrl_dvla.differences.differences`.

        What is :attr:`changeable`, the dtype apart, does not count.

        Args:
            other (PolicyConfig): the config to compare with.

        Returns:
            One line a difference; nested fields have dotted names.
        """
        ignored = {*self.changeable, "backbone.transformers_version"} - {"dtype"}
        return differences(_flatten(self.to_dict(), ignored), _flatten(other.to_dict(), ignored))


@dataclass(frozen=True, kw_only=True)
class TransformersVLAConfig(PolicyConfig):
    """Architecture of a :class:`TransformersVLA`, beside the fields of :class:`PolicyConfig`.

    Args:
        chunk_size (int): env steps per decision.
        action_tokenizer (dict): see :func:`action_tokenizer_to_dict`.
        tokens_per_step (int): action queries per env step, a divisor of ``action_dim``. One query
            predicts ``action_dim / tokens_per_step`` tokens: 1 is cheapest, ``action_dim`` is the
            layout of OpenVLA-OFT.
        bidirectional_prompt (bool): whether prompt tokens see later prompt tokens.
        freeze_vision (bool): whether the vision tower is left out of training.
        freeze_language (bool): whether the language model is left out of training.

    Raises:
        ValueError: if a number is out of range.

    Reference:
        Kim et al., "Fine-Tuning Vision-Language-Action Models: Optimizing Speed and Success", 2025.
        https://arxiv.org/abs/2502.19645
    """

    changeable = ("dtype", "gradient_checkpointing", "freeze_vision", "freeze_language")

    chunk_size: Count
    action_tokenizer: dict[str, Any]
    tokens_per_step: Count = 1
    bidirectional_prompt: bool = False
    freeze_vision: bool = False
    freeze_language: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.action_dim % self.tokens_per_step:
            raise ValueError(
                f"tokens_per_step must be a divisor of action_dim={self.action_dim}, got "
                f"{self.tokens_per_step}. Use 1 or {self.action_dim}."
            )

    @property
    def num_queries(self) -> int:
        """Number of action queries in the token stream."""
        return self.chunk_size * self.tokens_per_step


@dataclass(frozen=True, kw_only=True)
class FlowVLAConfig(PolicyConfig):
    """Architecture and sampler of a :class:`FlowVLA`, beside the fields of :class:`PolicyConfig`.

    Env steps per decision and the padded sizes of state and action are those of the backbone.

    Args:
        num_steps (int): denoising steps ``K`` of a decision.
        sampler (str): what makes a denoising step stochastic: ``"sde"``, ``"cps"`` or ``"noise"``
            (a learned head), see :mod:`torchrl_dvla.functional.flow`.
        noise_level (float): ``eta`` of ``"sde"`` and ``"cps"``.
        initial_noise (float): standard deviation of the noise that a sampled decision starts from;
            1 is what the flow was trained for. At 0 it starts where a greedy one does, and all that
            rollouts of a group differ by is recorded and learned from.
        stochastic_step (str or int): ``"all"``, or the one step that is stochastic while the others
            follow the ODE: its number from 0, or ``"random"``, drawn for each decision. One
            stochastic step is learned from with one pass of the expert, ``K`` with ``K``.
        freeze_prefix (bool): whether what reads images and instruction is left out of training.
        state_scaling (str): ``"standard"``, by mean and standard deviation, or ``"range"``, from a
            range to [-1, 1].
        action_scaling (str): the same of the actions.
        prompt_state_dim (int): size that a state in the prompt is padded to with zeros; 0: none.
        max_prompt_tokens (int, optional): of instruction and state, as the network was trained.

    Raises:
        ValueError: if a number is out of range, or the sampler has no stochastic step.

    Reference:
        Chen et al., "piRL: Online RL Fine-tuning for Flow-based Vision-Language-Action Models",
        2025, https://arxiv.org/abs/2510.25889.
    """

    changeable = (
        "dtype", "gradient_checkpointing", "freeze_prefix", "initial_noise", "noise_level",
        "num_steps", "sampler", "stochastic_step",
    )  # fmt: skip

    num_steps: Count = 4
    sampler: Literal["sde", "cps", "noise"] = "sde"
    noise_level: Positive = 0.5
    initial_noise: NonNegative = 1.0
    stochastic_step: Literal["random", "all"] | Natural = "random"
    freeze_prefix: bool = False
    state_scaling: Literal["standard", "range"] = "standard"
    action_scaling: Literal["standard", "range"] = "standard"
    prompt_state_dim: Natural = 0
    max_prompt_tokens: Count | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if "{state}" in self.prompt_style.instruction and not self.state_dim:
            raise ValueError(
                "state_dim must be at least 1 with a prompt that has the '{state}', got 0. Take it "
                "out of the prompt if the policy was trained without."
            )
        if self.sampler == "cps" and not self.noise_level <= 1:
            raise ValueError(
                f"noise_level must be at most 1 with sampler='cps', got {self.noise_level}. At 1 "
                "all noise is drawn anew."
            )
        if self.num_candidates < 1:
            raise ValueError(
                "num_steps must be at least 2 with sampler='cps', got 1. Its last step is "
                "deterministic."
            )
        if (step := self.stochastic_step) not in ("random", "all", *range(self.num_candidates)):
            raise ValueError(
                f"stochastic_step must be below {self.num_candidates} with num_steps="
                f"{self.num_steps} and sampler={self.sampler!r}, got {step}. Steps are counted "
                "from 0."
            )

    @property
    def num_candidates(self) -> int:
        """Number of steps that can be stochastic, from the first on."""
        return self.num_steps - (self.sampler == "cps")

    @property
    def num_stochastic(self) -> int:
        """Number of steps of a decision that are stochastic."""
        return self.num_candidates if self.stochastic_step == "all" else 1


def _flatten(data: dict[str, Any], ignored: set[str], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in data.items():
        if isinstance(value, dict):
            flat.update(_flatten(value, ignored, f"{prefix}{name}."))
        elif value is not None and prefix + name not in ignored:
            # JSON has no tuples.
            flat[prefix + name] = list(value) if isinstance(value, tuple) else value
    return flat


_TOKENIZERS: dict[str, tuple[type[ActionTokenizerBase], tuple[str, ...]]] = {
    "uniform": (UniformActionTokenizer, ("num_bins", "low", "high")),
    "vocab_tail": (VocabTailActionTokenizer, (
        "num_bins", "full_vocab_size", "norm_low", "norm_high", "norm_mask", "gripper_binarize",
        "gripper_binarize_threshold", "gripper_invert",
    )),
}  # fmt: skip
_TENSOR_DTYPES = {
    "low": torch.float32,
    "high": torch.float32,
    "norm_low": torch.float64,
    "norm_high": torch.float64,
    "norm_mask": torch.bool,
}


def action_tokenizer_to_dict(tokenizer: ActionTokenizerBase) -> dict[str, Any]:
    """Plain JSON description of an action tokenizer.

    Args:
        tokenizer (ActionTokenizerBase): a ``UniformActionTokenizer`` or
            ``VocabTailActionTokenizer``.

    Returns:
        A dict for :func:`action_tokenizer_from_dict`.

    Raises:
        ValueError: if the class is another one.

    Examples:
        >>> from torchrl.data.vla import UniformActionTokenizer
        >>> from torchrl_dvla.modules.config import action_tokenizer_to_dict
        >>> action_tokenizer_to_dict(UniformActionTokenizer(64, low=-1.0, high=1.0))
        {'kind': 'uniform', 'num_bins': 64, 'low': -1.0, 'high': 1.0}
    """
    for kind, (kind_class, names) in _TOKENIZERS.items():
        if type(tokenizer) is kind_class:
            values = {name: getattr(tokenizer, name) for name in names}
            return {"kind": kind} | {
                name: value.tolist() if isinstance(value, torch.Tensor) else value
                for name, value in values.items()
            }
    raise ValueError(
        "action_tokenizer must be a UniformActionTokenizer or a VocabTailActionTokenizer, got "
        f"{type(tokenizer).__name__}. Other tokenizers cannot be stored in a checkpoint yet."
    )


def action_tokenizer_from_dict(data: dict[str, Any]) -> ActionTokenizerBase:
    """Action tokenizer from its description by :func:`action_tokenizer_to_dict`.

    Args:
        data (dict): the description.

    Returns:
        The tokenizer.

    Raises:
        ValueError: if the kind is unknown.
    """
    arguments = dict(data)
    kind = arguments.pop("kind", None)
    if kind not in _TOKENIZERS:
        raise ValueError(
            f"kind must be 'uniform' or 'vocab_tail', got {kind!r}. The checkpoint was written by "
            "another version of torchrl_dvla."
        )
    for name, dtype in _TENSOR_DTYPES.items():
        if arguments.get(name) is not None:
            arguments[name] = torch.tensor(arguments[name], dtype=dtype)
    return _TOKENIZERS[kind][0](**arguments)
