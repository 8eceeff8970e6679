# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Action-token policy on a transformers vision-language backbone."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import InteractionType
from tensordict.nn.probabilistic import interaction_type
from torch import distributions as torch_dist
from torch import nn
from torchrl.data.vla import ActionTokenizerBase, UniformActionTokenizer
from torchrl.modules.vla import VLAWrapperBase

from torchrl_dvla.modules.action_head import inverse_cdf_sample
from torchrl_dvla.modules.backbones import backbone_class
from torchrl_dvla.modules.config import (
    TransformersVLAConfig,
    action_tokenizer_from_dict,
    action_tokenizer_to_dict,
)
from torchrl_dvla.modules.gradient_checkpointing import checkpoint_layers_
from torchrl_dvla.modules.policy_inputs import (
    PixelNormalizer,
    StateProjector,
    read_images,
    read_instructions,
    read_proprio,
)
from torchrl_dvla.modules.pretrained import (
    PretrainedMixin,
    backbone_from_dict,
    backbone_to_dict,
    resolve_backbone,
)
from torchrl_dvla.modules.prompt import PromptBuilder, word_tokenizer
from torchrl_dvla.modules.tiny import TinyBackboneConfig, initialize_tiny_
from torchrl_dvla.validation import Range, check

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["TransformersVLA"]


class TransformersVLA(PretrainedMixin, VLAWrapperBase):
    """Vision-language-action policy with parallel decoding of a whole action chunk.

    Camera image(s) ``[*B, 3, h, w]``, proprioception ``[*B, S]`` and an instruction enter a
    transformers image-text backbone as one token stream. Learned action queries follow the prompt;
    they see all of it and each other. One forward pass turns them into logits
    ``[*B, chunk, A, V]``: every action token of the chunk at once, independent given the prompt.

    Build one with :meth:`tiny` (random, CPU size, nothing downloaded), :meth:`from_backbone` (any
    pre-trained or configured backbone) or :meth:`from_pretrained` (a saved policy).

    Reads ``("observation", "image")`` uint8, ``("observation", "state")``,
    ``"language_instruction"`` and, with two cameras, ``("observation", "wrist_image")``. Writes
    ``("vla_action", "tokens")`` int64 ``[*B, chunk, A]``, ``("vla_action", "log_probs")`` of the
    same shape and ``("vla_action", "chunk")``.

    *Temperature* belongs to the distribution: stored logits are those of the network, and
    sampling, ``log_prob`` and :meth:`get_dist` divide them by it. The learner's importance ratio
    is then one at equal weights, whatever the temperature.

    Supervised training takes cross-entropy on :meth:`action_logits`.

    Args:
        config (TransformersVLAConfig): the architecture.

    Keyword Args:
        tokenizer (PreTrainedTokenizerBase): turns instructions into ids.
        model (PreTrainedModel, optional): the backbone with its weights. Defaults to a random one
            built from ``config.backbone``.
        temperature (float): of the action distribution.
        output_mode (str): ``"both"``, ``"tokens"`` or ``"chunk"``.
        log_probs_mode (str): ``"token"``, or ``"sequence"`` for one sum per decision.
        device (torch.device, optional): where to put the policy.
        **kwargs: further arguments of TorchRL's ``VLAWrapperBase``: ``return_logits`` to write
            ``("vla_action", "logits")`` too, ``default_interaction_type`` for outside an
            exploration context.

    Raises:
        ValueError: if the backbone's family is unknown or an argument is out of range.

    Examples:
        >>> import torch
        >>> from tensordict import NonTensorStack, TensorDict
        >>> from torchrl.envs.utils import ExplorationType, set_exploration_type
        >>> from torchrl_dvla.modules import TransformersVLA
        >>> policy = TransformersVLA.tiny(
        ...     ["pick up the bowl", "open the drawer"], action_dim=7, chunk_size=4, state_dim=8
        ... )
        >>> td = TensorDict(
        ...     {
        ...         "observation": {
        ...             "image": torch.zeros(2, 3, 128, 128, dtype=torch.uint8),
        ...             "state": torch.zeros(2, 8),
        ...         },
        ...         "language_instruction": NonTensorStack("pick up the bowl", "open the drawer"),
        ...     },
        ...     batch_size=[2],
        ... )
        >>> with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
        ...     td = policy(td)
        >>> td["vla_action", "chunk"].shape
        torch.Size([2, 4, 7])
        >>> log_probs = policy.get_dist(td).log_prob(td["vla_action", "tokens"])
        >>> torch.allclose(log_probs, td["vla_action", "log_probs"], atol=1e-5)
        True

    Reference:
        Kim et al., "Fine-Tuning Vision-Language-Action Models: Optimizing Speed and Success", 2025.
        https://arxiv.org/abs/2502.19645
    """

    config_class = TransformersVLAConfig
    config: TransformersVLAConfig
    in_keys: list[NestedKey]
    use_state: bool
    tensor_keys: Any
    _tensor_keys: Any
    action_tokenizer: Any
    query_head: Any

    def __init__(
        self,
        config: TransformersVLAConfig,
        *,
        tokenizer: PreTrainedTokenizerBase,
        model: PreTrainedModel | None = None,
        temperature: float = 1.0,
        output_mode: Literal["chunk", "tokens", "both"] = "both",
        log_probs_mode: Literal["sequence", "token"] = "token",
        device: torch.device | str | None = None,
        **kwargs: Any,
    ) -> None:
        remedy = "For greedy actions set the exploration type to DETERMINISTIC."
        temperature = check("temperature", temperature, float, Range(above=0, remedy=remedy))
        action_tokenizer = action_tokenizer_from_dict(config.action_tokenizer)
        super().__init__(
            action_dim=config.action_dim,
            chunk_size=config.chunk_size,
            action_head="tokens",
            vocab_size=action_tokenizer.vocab_size,
            action_tokenizer=action_tokenizer,
            output_mode=output_mode,
            return_vla_action_container=False,
            log_probs_mode=log_probs_mode,
            use_state=config.state_dim > 0,
            wrist_image_key=("observation", "wrist_image") if config.num_cameras == 2 else None,
            device=device,
            **kwargs,
        )
        adapter = backbone_class(config.backbone["model_type"])
        if model is None:
            model = backbone_from_dict(config.backbone, dtype=config.torch_dtype)
        image_size = adapter.image_size_of(model.config, config.image_size)
        self.config = config
        self.temperature = temperature
        self.tokenizer = tokenizer
        self.backbone = adapter(model, image_size=image_size)
        width = self.backbone.hidden_size
        self.normalize = PixelNormalizer(config.pixel_style, image_size=image_size)
        self.state_projector = (
            StateProjector(config.state_dim, width, clip=adapter.clip_state)
            if self.use_state
            else None
        )
        self.query_head = self._make_head()
        self.prompt = PromptBuilder(
            self.backbone,
            tokenizer,
            style=config.prompt_style,
            num_cameras=config.num_cameras,
            use_state=self.use_state,
            num_queries=config.num_queries + adapter.num_extra_queries,
            bidirectional=config.bidirectional_prompt,
        )
        self.backbone.freeze(vision=config.freeze_vision, language=config.freeze_language)
        if config.gradient_checkpointing:
            checkpoint_layers_(self.backbone)
        if config.lora is not None:
            self._add_adapters(config.lora)
        if device is not None:
            self.to(device)

    def _make_head(self) -> nn.Module:
        """What reads the hidden states of the queries."""
        return self.backbone.make_head(
            chunk_size=self.config.chunk_size,
            action_dim=self.config.action_dim,
            vocab_size=self.action_tokenizer.vocab_size,
            tokens_per_step=self.config.tokens_per_step,
        )

    # -- construction ------------------------------------------------------
    @classmethod
    def tiny(
        cls,
        instructions: Iterable[str],
        *,
        action_dim: int,
        chunk_size: int,
        state_dim: int = 0,
        action_tokenizer: ActionTokenizerBase | None = None,
        backbone: TinyBackboneConfig | None = None,
        num_cameras: int = 1,
        tokens_per_step: int = 1,
        query_std: float = 1.0,
        seed: int = 0,
        **kwargs: Any,
    ) -> TransformersVLA:
        """Random policy of a size that trains and serves on two CPU cores.

        Args:
            instructions (iterable of str): the tasks; their words are the vocabulary.

        Keyword Args:
            action_dim (int): action dimension ``A``.
            chunk_size (int): env steps per decision.
            state_dim (int): size of the proprioception vector, 0 for none.
            action_tokenizer (ActionTokenizerBase, optional): defaults to 256 uniform bins over
                [-1, 1].
            backbone (TinyBackboneConfig, optional): sizes; ``image_size`` is the camera's.
            num_cameras (int): 1, or 2 with a wrist camera.
            tokens_per_step (int): action queries per env step.
            query_std (float): standard deviation of the initial queries. Small ones (0.02) let
                what the queries read outweigh what they are, and clone faster.
            seed (int): of the initial weights; the global generator is left alone.
            **kwargs: passed on to the constructor, e.g. ``temperature``.

        Returns:
            The policy.

        Examples:
            >>> from torchrl_dvla.modules import TransformersVLA
            >>> policy = TransformersVLA.tiny(["lift the cup"], action_dim=7, chunk_size=8)
            >>> sum(parameter.numel() for parameter in policy.parameters()) < 3_000_000
            True
        """
        backbone = TinyBackboneConfig() if backbone is None else backbone
        tokenizer = word_tokenizer(instructions)
        config = TransformersVLAConfig(
            backbone=backbone_to_dict(backbone.to_transformers(len(tokenizer))),
            action_dim=action_dim,
            chunk_size=chunk_size,
            action_tokenizer=_describe(action_tokenizer),
            image_size=(backbone.image_size, backbone.image_size),
            state_dim=state_dim,
            num_cameras=num_cameras,
            tokens_per_step=tokens_per_step,
            bidirectional_prompt=True,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            policy = cls(config, tokenizer=tokenizer, **kwargs)
            initialize_tiny_(policy.backbone.model, policy.backbone.model.get_input_embeddings())
            policy.query_head.queries.data.normal_(std=query_std)
        return policy

    @classmethod
    def from_backbone(
        cls,
        source: str | os.PathLike[str] | PreTrainedConfig | PreTrainedModel,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        instructions: Iterable[str] | None = None,
        action_tokenizer: ActionTokenizerBase | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        hub_kwargs: dict[str, Any] | None = None,
        seed: int = 0,
        **architecture: Any,
    ) -> TransformersVLA:
        """Policy on a backbone; action queries, head and proprioception start random.

        Args:
            source (str, path, PreTrainedConfig or PreTrainedModel): a hub id or local folder for
                pre-trained weights, a config for random ones, or a base model.

        Keyword Args:
            tokenizer (PreTrainedTokenizerBase, optional): defaults to the checkpoint's own.
            instructions (iterable of str, optional): make a word-level tokenizer of these instead,
                without the family's prompt strings.
            action_tokenizer (ActionTokenizerBase, optional): defaults to 256 uniform bins over
                [-1, 1].
            policy_kwargs (dict, optional): passed on to the constructor.
            hub_kwargs (dict, optional): passed on to transformers, e.g. ``revision``.
            seed (int): of the random weights; the global generator is left alone.
            **architecture: fields of :class:`TransformersVLAConfig`. ``action_dim``,
                ``chunk_size`` and ``image_size`` are required; prompt, pixels and attention default
                to the family's, ``tokens_per_step`` to ``action_dim``, the layout of OpenVLA-OFT.

        Returns:
            The policy.

        Raises:
            ValueError: if the family is unknown, or there is no tokenizer to be found.
        """
        dtype = getattr(torch, architecture.get("dtype", "float32"))
        backbone, model, tokenizer, style = resolve_backbone(
            source, tokenizer, instructions, dtype, hub_kwargs or {}
        )
        style["tokens_per_step"] = architecture.get("action_dim", 1)
        config = TransformersVLAConfig(
            backbone=backbone_to_dict(backbone),
            action_tokenizer=_describe(action_tokenizer),
            **style | architecture,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls(config, tokenizer=tokenizer, model=model, **(policy_kwargs or {}))

    # -- the forward pass --------------------------------------------------
    def action_logits(self, tensordict: TensorDictBase) -> torch.Tensor:
        """Logits of a batch; nothing is written.

        Args:
            tensordict (TensorDictBase): observations of any batch shape ``[*B]``.

        Returns:
            Logits of the network ``[*B, chunk, A, V]``, float32, before the temperature.

        Raises:
            KeyError: if an observation is missing.
            ValueError: if one has the wrong size.

        Examples:
            >>> import torch
            >>> from tensordict import TensorDict
            >>> from torchrl_dvla.modules import TransformersVLA
            >>> policy = TransformersVLA.tiny(["lift the cup"], action_dim=7, chunk_size=2)
            >>> td = TensorDict(
            ...     {
            ...         "observation": {"image": torch.zeros(3, 3, 128, 128, dtype=torch.uint8)},
            ...         "language_instruction": "lift the cup",
            ...     },
            ...     batch_size=[3],
            ... )
            >>> tokens = torch.zeros(3, 2, 7, dtype=torch.int64)
            >>> torch.nn.functional.cross_entropy(
            ...     policy.action_logits(td).flatten(0, -2), tokens.flatten()
            ... ).requires_grad
            True
        """
        hidden, batch_shape = self._read(tensordict)
        logits = self.query_head(hidden)
        return logits.reshape(*batch_shape, *logits.shape[1:])

    def _read(self, tensordict: TensorDictBase) -> tuple[torch.Tensor, torch.Size]:
        """Hidden states of the queries ``[rows, queries, D]``, and the batch shape."""
        keys = self.tensor_keys
        image_keys = [keys.image, keys.wrist_image][: self.config.num_cameras]
        cameras = read_images(tensordict, image_keys, self.config.image_size)
        batch_shape = cameras[0].shape[:-3]
        num_rows = batch_shape.numel()
        backbone = self.backbone
        dtype = backbone.dtype
        device = cameras[0].device

        instructions = read_instructions(tensordict, keys.instruction, num_rows)
        prompt = self.prompt(instructions, device=device, dtype=dtype)
        images = [camera.reshape(num_rows, *camera.shape[-3:]) for camera in cameras]
        pixels = self.normalize(images[0] if len(images) == 1 else torch.cat(images), dtype)
        features = backbone.embed_images(pixels).split(num_rows)

        # frame | instruction | padding | queries
        start, image_start, image_end = (
            backbone.embed_tokens(ids.to(device)).expand(num_rows, -1, -1)
            for ids in (
                self.prompt.start_ids,
                self.prompt.image_start_ids,
                self.prompt.image_end_ids,
            )
        )
        stream = [start]
        for image_tokens in features:
            stream += [image_start, image_tokens, image_end]
        if self.state_projector is not None:
            state = read_proprio(tensordict, keys.state, self.config.state_dim)
            stream.append(self.state_projector(state.reshape(num_rows, -1)))
        stream.append(backbone.embed_tokens(prompt.token_ids))
        queries = backbone.queries(self.query_head, self.config.num_queries)
        stream.append(queries.expand(num_rows, -1, -1))
        embeddings = torch.cat([piece.to(dtype) for piece in stream], 1)

        hidden = backbone.decode(
            embeddings, prompt.position_ids, prompt.attention_bias, len(queries)
        )
        return hidden, batch_shape

    _predict_logits = action_logits

    def _update_keys(self) -> None:
        super()._update_keys()
        if self._tensor_keys.wrist_image is not None:
            self.in_keys = [*self.in_keys, self._tensor_keys.wrist_image]

    def _dist_from_logits(
        self, logits: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch_dist.Distribution:
        # The one place where the temperature enters: sampling, log_prob and get_dist all come here.
        if self.temperature != 1.0:
            logits = logits / self.temperature
        return super()._dist_from_logits(logits, mask)

    def _sample_tokens(self, dist: torch_dist.Distribution, logits: torch.Tensor) -> torch.Tensor:
        interaction = interaction_type() or self.default_interaction_type
        if interaction != InteractionType.RANDOM or self.num_samples is not None:
            return super()._sample_tokens(dist, logits)
        categorical = dist.base_dist if isinstance(dist, torch_dist.Independent) else dist
        assert isinstance(categorical, torch_dist.Categorical)
        return inverse_cdf_sample(categorical.probs)


def _describe(action_tokenizer: ActionTokenizerBase | None) -> dict[str, Any]:
    if action_tokenizer is None:
        action_tokenizer = UniformActionTokenizer(256, low=-1.0, high=1.0)
    return action_tokenizer_to_dict(action_tokenizer)
