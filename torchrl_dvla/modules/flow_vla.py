# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Flow-matching policy: continuous action chunks with log-probabilities."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import InteractionType
from tensordict.nn.probabilistic import interaction_type
from torch import distributions as d
from torch import nn
from torch.nn.functional import pad
from torchrl.data.vla import VLA_ACTION_KEY
from torchrl.modules.vla import VLAWrapperBase

from torchrl_dvla import functional as F
from torchrl_dvla.modules.adapters import LoraConfig
from torchrl_dvla.modules.backbones import PromptStyle
from torchrl_dvla.modules.config import FlowVLAConfig
from torchrl_dvla.modules.flow_network import FlowNetwork, Prefix
from torchrl_dvla.modules.gradient_checkpointing import checkpoint_layers_
from torchrl_dvla.modules.pi0 import Pi0
from torchrl_dvla.modules.pi05 import Pi05, state_words
from torchrl_dvla.modules.policy_inputs import (
    PixelNormalizer,
    RangeScaler,
    Standardizer,
    read_images,
    read_instructions,
    read_proprio,
)
from torchrl_dvla.modules.pretrained import PretrainedMixin, config_to_dict
from torchrl_dvla.modules.prompt import InstructionEncoder, word_tokenizer
from torchrl_dvla.modules.smolvla import SmolVLA
from torchrl_dvla.modules.tiny import TinyFlowConfig, initialize_tiny_

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["DenoisingPath", "FlowVLA"]

_NETWORKS: dict[str, type[FlowNetwork]] = {"pi0": Pi0, "pi05": Pi05, "smolvla": SmolVLA}
_SCALERS: dict[str, Any] = {"standard": Standardizer, "range": RangeScaler}


class FlowVLA(PretrainedMixin, VLAWrapperBase):
    r"""Vision-language-action policy that denoises a chunk of continuous actions.

    Networks: pi0, pi0.5 and SmolVLA.

    A decision starts from noise :math:`x_0` ``[H, D]`` and takes ``K`` denoising steps along the
    velocity that the action expert gives. The prefix (images and instruction) is computed once, the
    expert runs once a step. The flow's ODE has no log-probability: while exploring, some steps are
    stochastic instead (:class:`FlowVLAConfig`: flow-SDE, flow-CPS or a learned deviation), normal
    distributions whose means depend on the weights. Padded action dimensions follow the ODE and
    have no log-probability.

    Reads ``("observation", "image")`` uint8, ``("observation", "state")``,
    ``"language_instruction"`` and, with two cameras, ``("observation", "wrist_image")``. Writes

    ===============================  ===================  =====================================
    ``("vla_action", "chunk")``      ``[*B, H, A]``       actions in the environment's units
    ``("vla_action", "path")``       ``[*B, H, n+1, D]``  points before and after the ``n``
                                                          stochastic steps
    ``("vla_action", "path_step")``  ``[*B, 1]``, int64   number of the first stochastic step
    ``("vla_action", "log_probs")``  ``[*B, H, A]``       log-densities, summed over these steps
    ===============================  ===================  =====================================

    :meth:`get_dist` runs the expert once for each stochastic step, from the points before them, and
    returns the :class:`DenoisingPath` of the points after them: its ``log_prob`` of the path is
    what the policy has recorded. Greedy decisions start from the mode of the noise, zero, and
    follow the ODE; their log-probabilities are zero.

    Build one with :meth:`tiny` (random, CPU size) or :meth:`from_pretrained` (a saved policy).
    Supervised training takes :class:`~torchrl_dvla.objectives.FlowMatchingLoss`.

    Log-densities leave out that of the initial noise, which no weight has a part in.

    Args:
        config (FlowVLAConfig): architecture and sampler.

    Keyword Args:
        tokenizer (PreTrainedTokenizerBase): turns instructions into ids.
        network (FlowNetwork, optional): with its weights, a :class:`~torchrl_dvla.modules.pi0.Pi0`
            for instance. Defaults to a random one built from ``config.backbone``.
        device (torch.device, optional): where to put the policy.
        default_interaction_type (InteractionType): outside an exploration context.

    Raises:
        ValueError: if actions or states have more dimensions than the network.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl.envs.utils import ExplorationType, set_exploration_type
        >>> from torchrl_dvla.modules import FlowVLA
        >>> policy = FlowVLA.tiny(["open the drawer"], action_dim=7, chunk_size=4, state_dim=8)
        >>> td = TensorDict(
        ...     {
        ...         "observation": {
        ...             "image": torch.zeros(2, 3, 64, 64, dtype=torch.uint8),
        ...             "state": torch.zeros(2, 8),
        ...         },
        ...         "language_instruction": "open the drawer",
        ...     },
        ...     batch_size=[2],
        ... )
        >>> with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
        ...     td = policy(td)
        >>> td["vla_action", "chunk"].shape, td["vla_action", "path"].shape
        (torch.Size([2, 4, 7]), torch.Size([2, 4, 2, 7]))
        >>> log_probs = policy.get_dist(td).log_prob(td["vla_action", "path"])
        >>> torch.allclose(log_probs, td["vla_action", "log_probs"], atol=1e-5)
        True

    Reference:
        Black et al., "pi0: A Vision-Language-Action Flow Model for General Robot Control", 2024,
        https://arxiv.org/abs/2410.24164; Chen et al., "piRL: Online RL Fine-tuning for Flow-based
        Vision-Language-Action Models", 2025, https://arxiv.org/abs/2510.25889.
    """

    @dataclass
    class _AcceptedKeys(VLAWrapperBase._AcceptedKeys):
        """Keys of the policy; see the class."""

        path: NestedKey = (VLA_ACTION_KEY, "path")
        path_step: NestedKey = (VLA_ACTION_KEY, "path_step")

    config_class = FlowVLAConfig
    config: FlowVLAConfig
    chunk_size: int
    action_dim: int
    use_state: bool
    in_keys: list[NestedKey]
    out_keys: list[NestedKey]
    tensor_keys: Any
    _tensor_keys: Any

    def __init__(
        self,
        config: FlowVLAConfig,
        *,
        tokenizer: PreTrainedTokenizerBase,
        network: FlowNetwork | None = None,
        device: torch.device | str | None = None,
        default_interaction_type: InteractionType = InteractionType.DETERMINISTIC,
    ) -> None:
        super().__init__(
            action_dim=config.action_dim,
            chunk_size=config.backbone["chunk_size"],
            action_head="continuous",
            return_vla_action_container=False,
            use_state=config.state_dim > 0,
            wrist_image_key=("observation", "wrist_image") if config.num_cameras == 2 else None,
            default_interaction_type=default_interaction_type,
            device=device,
        )
        self.config = config
        self.tokenizer = tokenizer
        if network is None:
            family = _network_class(config.backbone["model_type"])
            network = family.from_dict(config.backbone, dtype=config.torch_dtype)
        self.network = network
        self._check_sizes()
        self.prompt = InstructionEncoder(tokenizer, config.prompt_style.instruction)
        self.normalize = PixelNormalizer(config.pixel_style, image_size=self.network.image_size)
        self.state_statistics = _SCALERS[config.state_scaling](config.state_dim)
        self.action_statistics = _SCALERS[config.action_scaling](config.action_dim)
        if config.sampler == "noise":
            self.noise_head = _noise_head(self.network.hidden_size, self._max_action_dim)
        if config.freeze_prefix:
            self.network.freeze_prefix()
        if config.gradient_checkpointing:
            checkpoint_layers_(self.network)
        if config.lora is not None:
            self._add_adapters(config.lora)
        if device is not None:
            self.to(device)

    @classmethod
    def tiny(
        cls,
        instructions: Iterable[str],
        *,
        action_dim: int,
        chunk_size: int,
        state_dim: int = 0,
        backbone: TinyFlowConfig | None = None,
        num_cameras: int = 1,
        max_action_dim: int | None = None,
        seed: int = 0,
        **kwargs: Any,
    ) -> FlowVLA:
        """Random policy of a size that trains and serves on two CPU cores.

        Args:
            instructions (iterable of str): the tasks; their words are the vocabulary.

        Keyword Args:
            action_dim (int): action dimension ``A``.
            chunk_size (int): env steps per decision ``H``.
            state_dim (int): size of the proprioception vector, 0 for none.
            backbone (TinyFlowConfig, optional): family and sizes; ``image_size`` is the camera's.
            num_cameras (int): 1, or 2 with a wrist camera.
            max_action_dim (int, optional): padded action dimension ``D``; none by default.
            seed (int): of the initial weights; the global generator is left alone.
            **kwargs: fields of :class:`FlowVLAConfig`, e.g. ``num_steps``, and arguments of the
                constructor.

        Returns:
            The policy.

        Examples:
            >>> from torchrl_dvla.modules import FlowVLA
            >>> policy = FlowVLA.tiny(["lift the cup"], action_dim=7, chunk_size=8, sampler="cps")
            >>> sum(parameter.numel() for parameter in policy.parameters()) < 3_000_000
            True
        """
        backbone = TinyFlowConfig() if backbone is None else backbone
        family = _network_class(backbone.model_type)
        template = family.template if state_dim else FlowNetwork.template  # without the state
        words = template.format(instruction="", state=" ".join(map(str, range(-1, 256))))
        tokenizer = word_tokenizer([*instructions, words])
        sizes = {
            "chunk_size": chunk_size,
            "max_action_dim": max_action_dim or action_dim,
            "max_state_dim": max(state_dim, 1),
        }
        changes = {name: kwargs.pop(name) for name in cls.config_class.changeable if name in kwargs}
        data = config_to_dict(backbone.to_transformers(len(tokenizer), **sizes))
        config = FlowVLAConfig(
            backbone={**data, "model_type": backbone.model_type},
            action_dim=action_dim,
            image_size=(backbone.image_size, backbone.image_size),
            state_dim=state_dim,
            num_cameras=num_cameras,
            prompt_style=PromptStyle(instruction=template),
            pixel_style=family.pixel_style,
            state_scaling=family.scaling,
            action_scaling=family.scaling,
            **changes,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            policy = cls(config, tokenizer=tokenizer, **kwargs)
            initialize_tiny_(policy.network, policy.network.words)
        return policy

    # -- deciding ----------------------------------------------------------
    def forward(
        self,
        tensordict: TensorDictBase,
        *,
        tensordict_out: TensorDictBase | None = None,
        **kwargs: Any,
    ) -> TensorDictBase:
        """Denoise a chunk for every observation.

        Args:
            tensordict (TensorDictBase): observations of any batch shape ``[*B]``.

        Keyword Args:
            tensordict_out (TensorDictBase, optional): where to write.

        Returns:
            The tensordict with the entries that the class lists.

        Raises:
            KeyError: if an observation is missing.
            ValueError: if one has the wrong size.
        """
        prefix, batch_shape = self._observe(tensordict)
        explores = self._interaction_type() == InteractionType.RANDOM
        num_rows, device = len(prefix.mask), prefix.mask.device
        shape = (num_rows, self.chunk_size, self._max_action_dim)
        x = torch.zeros(shape, device=device)
        if explores:
            x.normal_(std=self.config.initial_noise)
        first = self._first_step(num_rows, device, explores)
        num_stochastic = self.config.num_stochastic
        points, log_probs = [x], torch.zeros(shape, device=device)
        for i in range(self.config.num_steps):
            step = torch.full_like(first, i)
            is_stochastic = (first <= step) & (step < first + num_stochastic) & explores
            mean, std = self._transition(prefix, x, step, is_stochastic)
            x = mean + std * torch.randn_like(mean) if explores else mean
            log_probs = log_probs + F.transition_log_prob(x, mean, std)
            points.append(x)
        kept = first[:, None] + torch.arange(num_stochastic + 1, device=device)
        path = torch.stack(points, 1)[torch.arange(num_rows, device=device)[:, None], kept]

        keys = self.tensor_keys
        written = {
            keys.action_chunk: self.action_statistics.restore(x[..., : self.action_dim]),
            keys.path: path.transpose(1, 2),
            keys.path_step: first[:, None],
            keys.log_probs: log_probs[..., : self.action_dim],
        }
        out = TensorDict({}, batch_size=batch_shape, device=device)
        for key, value in written.items():
            out.set(key, value.reshape(*batch_shape, *value.shape[1:]))
        output = super()._output_tensordict
        return output(tensordict, out, tensordict_out)

    def get_dist(self, tensordict: TensorDictBase, **kwargs: Any) -> DenoisingPath:
        """Distribution of a recorded path: one pass of the expert for each stochastic step.

        Args:
            tensordict (TensorDictBase): observations with ``("vla_action", "path")`` and
                ``("vla_action", "path_step")``, ``[*B]``.

        Returns:
            The :class:`DenoisingPath` of ``[*B, H, A]``, given the points before each step.

        Raises:
            KeyError: if an entry is missing.
            ValueError: if the path is not one of this policy.
        """
        path, first = self._read_path(tensordict)
        prefix, batch_shape = self._observe(tensordict)
        is_stochastic = torch.ones_like(first, dtype=torch.bool)
        transitions = [
            self._transition(prefix, path[:, :, k], first + k, is_stochastic)
            for k in range(self.config.num_stochastic)
        ]
        shape = (*batch_shape, self.chunk_size, len(transitions), self.action_dim)
        mean, std = (
            torch.stack(entries, 2)[..., : self.action_dim].reshape(shape)
            for entries in zip(*transitions, strict=True)
        )
        return DenoisingPath(mean, std)

    def log_prob(self, tensordict: TensorDictBase, **kwargs: Any) -> TensorDictBase:
        """Write the log-probabilities of the recorded path under the present weights."""
        log_probs = self.get_dist(tensordict).log_prob(tensordict.get(self.tensor_keys.path))
        return tensordict.set(self.tensor_keys.log_probs, log_probs)

    def _transition(
        self,
        prefix: Prefix,
        x: torch.Tensor,
        step: torch.Tensor,
        is_stochastic: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation ``[B, H, D]`` of the points after ``step`` ``[B]``.

        Sampling and learning both come here. Where ``is_stochastic`` ``[B]`` is False, and in
        padded action dimensions, the step is that of the ODE and the deviation zero.
        """
        config = self.config
        time = F.flow_time(step, config.num_steps)
        velocity, hidden = self.network.velocity(prefix, x, time)
        is_real = torch.arange(x.shape[-1], device=x.device) < self.action_dim
        is_noisy = is_stochastic[:, None, None] & is_real
        times = time[:, None, None], F.flow_time(step + 1, config.num_steps)[:, None, None]
        if config.sampler == "noise":
            std = F.bounded_std(self.noise_head(hidden))
            return F.ode_step(x, velocity, *times), std * is_noisy
        step_of = F.sde_step if config.sampler == "sde" else F.cps_step
        mean, std = step_of(x, velocity, *times, config.noise_level * is_noisy)
        return mean, std.expand_as(mean)

    def _first_step(self, num_rows: int, device: torch.device, explores: bool) -> torch.Tensor:
        step = self.config.stochastic_step
        if step == "random" and explores:
            return torch.randint(self.config.num_candidates, (num_rows,), device=device)
        return torch.full((num_rows,), 0 if isinstance(step, str) else step, device=device)

    def _interaction_type(self) -> InteractionType:
        return interaction_type() or self.default_interaction_type

    # -- supervised training -----------------------------------------------
    def flow_matching_error(self, tensordict: TensorDictBase, chunk: torch.Tensor) -> torch.Tensor:
        """Squared error of the velocity, at one random noise and time for each chunk.

        Times are drawn as the network's config says, for pi0 from Beta(1.5, 1): more of them noisy.

        Args:
            tensordict (TensorDictBase): observations of any batch shape ``[*B]``.
            chunk (torch.Tensor): an expert's actions in the environment's units ``[*B, H, A]``.

        Returns:
            Squared errors ``[*B, H, A]``; padded action dimensions are left out.

        Raises:
            KeyError: if an observation is missing.
            ValueError: if an entry has the wrong size.
        """
        prefix, batch_shape = self._observe(tensordict)
        config = self.network.config
        wanted = (*batch_shape, self.chunk_size, self.action_dim)
        if chunk.shape != wanted:
            raise ValueError(
                f"chunk must have shape {list(wanted)}, got {list(chunk.shape)}. Cut the "
                "demonstrations into chunks of the policy's size."
            )
        action = self.action_statistics.standardize(chunk).reshape(-1, *wanted[-2:])
        action = pad(action, (0, self._max_action_dim - self.action_dim))
        alpha, beta = config.time_sampling_beta_alpha, config.time_sampling_beta_beta
        time = d.Beta(alpha, beta).sample(action.shape[:1]).to(action.device)
        time = time * config.time_sampling_scale + config.time_sampling_offset
        x, target = F.flow_matching_pair(action, torch.randn_like(action), time[:, None, None])
        velocity, _ = self.network.velocity(prefix, x, time)
        return (velocity - target)[..., : self.action_dim].square().reshape(wanted)

    # -- reading -----------------------------------------------------------
    def _observe(self, tensordict: TensorDictBase) -> tuple[Prefix, torch.Size]:
        """Prefix of a batch, whose rows are flattened, and the shape ``[*B]`` of the batch."""
        config, keys = self.config, self.tensor_keys
        image_keys = [keys.image, keys.wrist_image][: config.num_cameras]
        cameras = read_images(tensordict, image_keys, config.image_size)
        batch_shape = cameras[0].shape[:-3]
        num_rows = batch_shape.numel()
        images = torch.stack([image.reshape(num_rows, *image.shape[-3:]) for image in cameras], 1)
        pixels = self.normalize(images.flatten(0, 1), self.network.dtype)
        pixels = pixels.unflatten(0, images.shape[:2])
        state = torch.zeros(num_rows, 0, device=pixels.device)
        if self.use_state:
            proprio = read_proprio(tensordict, keys.state, config.state_dim)
            state = self.state_statistics.standardize(proprio.reshape(num_rows, -1))
        instructions = read_instructions(tensordict, keys.instruction, num_rows)
        has_state = "{state}" in config.prompt_style.instruction
        in_words = pad(state, (0, max(0, config.prompt_state_dim - config.state_dim)))
        words = state_words(in_words) if has_state else [""] * num_rows
        text_ids = [
            self.prompt.instruction_ids(text.strip().replace("_", " ").replace("\n", " "), word)
            for text, word in zip(instructions, words, strict=True)
        ]
        longest = max(map(len, text_ids))
        if longest > (config.max_prompt_tokens or longest):
            raise ValueError(
                f"language_instruction must have at most {config.max_prompt_tokens} tokens with "
                f"the state, got {longest}. The network was trained with no more: shorten it."
            )
        state = pad(state, (0, self.network.config.max_state_dim - config.state_dim))
        return self.network.prefix(pixels, text_ids, state), batch_shape

    def _read_path(self, tensordict: TensorDictBase) -> tuple[torch.Tensor, torch.Tensor]:
        """Path ``[B, H, n + 1, D]`` and number of its first step ``[B]``."""
        keys = self.tensor_keys
        path, first = (tensordict.get(key, None) for key in (keys.path, keys.path_step))
        if path is None or first is None:
            raise KeyError(
                f"the batch must hold {keys.path} and {keys.path_step}, got "
                f"{sorted(map(str, tensordict.keys(True, True)))}. The policy writes them with "
                "every decision: record both."
            )
        shape = (self.chunk_size, self.config.num_stochastic + 1, self._max_action_dim)
        remedy = (
            "Learn with the sampler that the decisions were taken with: num_steps="
            f"{self.config.num_steps} and stochastic_step={self.config.stochastic_step!r} are the "
            "present ones."
        )
        if path.shape[-3:] != shape:
            raise ValueError(
                f"{keys.path} must have shape [*B, {', '.join(map(str, shape))}], got "
                f"{list(path.shape)}. {remedy}"
            )
        last = self.config.num_candidates - self.config.num_stochastic
        if not first.is_meta and (outside := first[(first < 0) | (first > last)]).numel():
            raise ValueError(
                f"{keys.path_step} must be from 0 to {last}, got {int(outside[0])}. {remedy}"
            )
        return path.reshape(-1, *shape), first.reshape(-1)

    @property
    def _max_action_dim(self) -> int:
        return int(self.network.config.max_action_dim)

    def _update_keys(self) -> None:
        super()._update_keys()
        keys = self._tensor_keys
        if keys.wrist_image is not None:
            self.in_keys = [*self.in_keys, keys.wrist_image]
        self.out_keys = [*self.out_keys, keys.path, keys.path_step, keys.log_probs]

    def _check_sizes(self) -> None:
        for name in ("action_dim", "state_dim"):
            size, largest = getattr(self.config, name), getattr(self.network.config, f"max_{name}")
            if size > largest:
                raise ValueError(
                    f"{name} must be at most max_{name}={largest} of the backbone, got {size}. "
                    "Take a backbone that was made for this robot."
                )

    def _add_adapters(self, lora: LoraConfig) -> None:
        super()._add_adapters(lora)
        if self.config.sampler == "noise":  # it starts anew, so nothing but training makes it
            self.noise_head.requires_grad_(True)

    def _checked(self, weights: dict[str, torch.Tensor], source: Any) -> dict[str, torch.Tensor]:
        # Only exploration needs the head: a checkpoint of supervised training has none, and another
        # sampler does without that of its checkpoint.
        own = {k: v for k, v in self.state_dict().items() if k.startswith("noise_head.")}
        head = {k: weights.get(k, v) for k, v in own.items()}
        weights = {k: v for k, v in weights.items() if not k.startswith("noise_head.")} | head
        return super()._checked(weights, source)


class DenoisingPath(d.Distribution):
    """Distribution of the stochastic steps of a denoising path, given the points before each.

    Each step is a normal distribution around what the network makes of the point before it. They
    follow each other, so log-densities and entropies of the ``n`` steps are summed.

    Args:
        mean (torch.Tensor): means of the points after each step ``[*B, H, n, A]``.
        std (torch.Tensor): their standard deviations, of the same shape.

    Examples:
        >>> import torch
        >>> from torchrl_dvla.modules.flow_vla import DenoisingPath
        >>> path = DenoisingPath(torch.zeros(4, 2, 7), torch.ones(4, 2, 7))
        >>> path.log_prob(torch.zeros(4, 3, 32)).shape
        torch.Size([4, 7])
    """

    arg_constraints: dict[str, Any] = {}

    def __init__(self, mean: torch.Tensor, std: torch.Tensor) -> None:
        self.mean_of_steps, self.std_of_steps = mean, std
        shape = torch.Size([*mean.shape[:-2], mean.shape[-1]])
        super().__init__(batch_shape=shape, validate_args=False)

    def log_prob(self, value: torch.Tensor) -> torch.Tensor:
        """Log-density ``[*B, H, A]`` of a path ``[*B, H, n + 1, D]``; its first point is given."""
        after = value[..., 1:, : self.batch_shape[-1]]
        return F.transition_log_prob(after, self.mean_of_steps, self.std_of_steps).sum(-2)

    def entropy(self) -> torch.Tensor:
        """Entropy ``[*B, H, A]`` of the steps; with a learned deviation it has a gradient."""
        return F.transition_entropy(self.std_of_steps).sum(-2)


@d.register_kl(DenoisingPath, DenoisingPath)
def _kl_of_paths(p: DenoisingPath, q: DenoisingPath) -> torch.Tensor:
    """Divergence ``[*B, H, A]`` of the steps of one path under two policies."""
    steps = (
        d.Normal(path.mean_of_steps, path.std_of_steps, validate_args=False) for path in (p, q)
    )
    return d.kl_divergence(*steps).sum(-2)


def _network_class(model_type: str) -> type[FlowNetwork]:
    if model_type not in _NETWORKS:
        raise ValueError(
            f"model_type must be one of {sorted(_NETWORKS)}, got {model_type!r}. FlowVLA has no "
            "other networks; TransformersVLA takes vision-language models."
        )
    return _NETWORKS[model_type]


def _noise_head(hidden_size: int, action_dim: int) -> nn.Sequential:
    """Head of the deviation of flow-noise; at first it is the middle of the bounds everywhere."""
    first, last = nn.Linear(hidden_size, hidden_size), nn.Linear(hidden_size, action_dim)
    with torch.no_grad():  # no function of nn.init: a policy that is loaded switches them off
        first.weight.copy_(torch.randn_like(first.weight) * hidden_size**-0.5)
        for tensor in (first.bias, last.weight, last.bias):
            tensor.zero_()
    return nn.Sequential(first, nn.SiLU(), last)
