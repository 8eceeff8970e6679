# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""GRPO loss for policies that act in chunks, of tokens or of real numbers."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, TensorDictParams, unravel_key_list
from tensordict.nn import TensorDictModuleBase, dispatch
from torch import distributions as d
from torchrl.objectives.common import LossModule

from torchrl_dvla import functional as F
from torchrl_dvla.data import schema
from torchrl_dvla.objectives.distribution import (
    entropy_of,
    exact_kl,
    fit_to,
    log_prob_of,
    of_single_actions,
    run_policy,
)
from torchrl_dvla.objectives.validation import (
    FINITE,
    ValueRange,
    agreement_of,
    can_check,
    check_actor,
    check_ranges,
    check_reference,
    check_rows,
    check_trust_region,
    check_whole_rollouts,
    depends_on_mode,
    executed_tokens,
    leaves_of,
)
from torchrl_dvla.validation import check

__all__ = ["ROLLOUT_LEVELS", "GRPOLoss"]

RatioLevel = Literal[
    "token", "env_step", "sequence", "sequence_mean", "trajectory", "trajectory_mean"
]
Importance = Literal["behavior", "decoupled"]
KLEstimator = Literal["k1", "k2", "k3", "exact"]

#: Largest magnitude of advantages and weights. With log-ratios within their bound, losses and
#: gradients are then finite in float32 and bfloat16.
_LARGEST = 1e6
_KL = {"k1": F.kl_k1, "k2": F.kl_k2, "k3": F.kl_k3}
#: Levels with one ratio for a rollout: all of its decisions have to be in one batch.
ROLLOUT_LEVELS = ("trajectory", "trajectory_mean")
#: Dimensions of ``[*B, chunk, A]`` over which log-ratios are put together.
_LEVEL_DIMS: dict[str, tuple[int, ...]] = {
    "token": (),
    "env_step": (-1,),
    "sequence": (-2, -1),
    "sequence_mean": (-2, -1),
    "trajectory": (-2, -1),
    "trajectory_mean": (-2, -1),
}

#: Who writes what the loss reads, for the error of an entry that is missing.
_WRITERS = {
    "action": "The policy writes it while collecting",
    "sample_log_prob": (
        "The policy writes it while collecting; a VLAWrapperBase with log_probs_mode='token'"
    ),
    "advantage": "GroupQueue.complete() writes it, see torchrl_dvla.functional.group_advantage",
    "proximal_log_prob": (
        "Call loss.write_proximal_log_prob(batch) on every batch before its first optimiser step, "
        "or use importance='behavior'"
    ),
    "ref_log_prob": "Pass reference_network, or write the reference's log-probabilities beforehand",
    "num_decisions": (
        "Iterating a PooledReplayBuffer writes it; only reduction='trajectory_mean' and "
        "ratio_level='trajectory' or 'trajectory_mean' need it"
    ),
    "rollout_id": "The collector writes it; only a ratio of each rollout needs it",
    "weight": "It was asked for by set_keys(weight=...); set_keys(weight=None) turns it off",
}


class GRPOLoss(LossModule):
    r"""Clipped, critic-free policy loss over action tokens, or over actions of real numbers.

    For executed actions :math:`a` of a decision with group-relative advantage :math:`A` and
    importance ratio :math:`r = \pi_\theta(a) / \pi_b(a)` to the policy that took it,

    .. math::
        \mathcal{L} = -\frac{1}{Z} \sum w \min\bigl(r A,
            \operatorname{clip}(r, 1 - \epsilon_l, 1 + \epsilon_h) A\bigr)

    where *reduction* sets the weights :math:`w` and the normaliser :math:`Z`
    (:func:`~torchrl_dvla.functional.reduction_weights`). ``action_is_pad`` masks the env steps that
    were never executed because the episode ended inside the chunk. The actor runs once per call.

    A policy records a log-probability of each token, or of each action dimension, ``[*B, chunk,
    A]``; one of an env step as a whole, ``[*B, chunk]``, does for the ratio levels from
    ``"env_step"`` on. What they are of follows from its ``out_keys``: tokens, a denoising path, or
    the chunk. ``get_dist`` returns any distribution with a ``log_prob`` of it.
    Log-ratios are clamped (:data:`~torchrl_dvla.functional.LOG_RATIO_BOUND`): no ratio overflows.

    In the first forward of each version, decisions of that version must get the log-probabilities
    that the inference lane gave them, whose policy is in eval mode. If they do not, a warning names
    the modules to blame: call ``policy.eval()`` before the loop. A run may be resumed in the
    middle of a version, so set ``loss.compared_version = collector.policy_version`` then.

    Gradient accumulation: give every micro-batch the normaliser of the whole batch, and their
    losses and gradients sum to those of the whole batch::

        total = loss.normaliser(batch)
        for part in batch.split(8):
            losses = loss(part, normaliser=total)
            (losses["loss_objective"] + losses["loss_entropy"]).backward()

    With one ratio per rollout, micro-batches must hold whole ones, too:
    :func:`~torchrl_dvla.learner.deal_rollouts` says where to cut.

    Args:
        actor_network (TensorDictModuleBase): a policy whose ``get_dist`` returns the distribution
            of what it samples, ``[*B, chunk, A]``: a categorical one of tokens, as any token
            :class:`~torchrl.modules.vla.VLAWrapperBase` does, or a continuous one of the chunk.

    Keyword Args:
        clip_epsilon (float or tuple of float): clip range, symmetric or ``(low, high)``. Defaults
            to ``(0.2, 0.28)``.
        dual_clip (float, optional): bound on the ratio of negative advantages, ``> 1 + high``.
        trust_std (float, optional): standard deviation, in log-ratios, of a Gaussian trust weight
            instead of the clip (:func:`~torchrl_dvla.functional.gaussian_surrogate`, GIPO). The
            clip range then only says what ``clip_fraction`` counts.
        ratio_level (str): ``"token"`` (one ratio per token or action dimension), ``"env_step"``
            (one per env step: the product over its action dimensions), ``"sequence"`` (one per
            decision: the product over its executed env steps), ``"sequence_mean"`` (the geometric
            mean of its recorded log-probabilities, GSPO), ``"trajectory"`` or
            ``"trajectory_mean"`` (one per rollout, the same of all of its decisions, which must be
            in one batch: ``PooledReplayBuffer(whole_rollouts=True)``). Each decision then has the
            ratio of its rollout; with ``reduction="trajectory_mean"`` each rollout has one say.
            Defaults to ``"token"``.
        importance (str): centre of the clip range. ``"behavior"``: the policy that took the action.
            ``"decoupled"``: a recent proximal policy, the age of the data being corrected by a
            bounded weight (:func:`~torchrl_dvla.functional.behavior_weight`); needs
            :meth:`write_proximal_log_prob`. Defaults to ``"behavior"``.
        behavior_weight_cap (float, optional): bound of that weight. Defaults to ``5.0``.
        mask_behavior_weight (bool): what exceeds the bound is left out (but for the normaliser)
            instead of truncated. Defaults to ``False``.
        reduction (str): ``"token_mean"``, ``"sequence_mean"`` (each decision weighs the same),
            ``"trajectory_mean"`` (each rollout does), ``"fixed_length"``, ``"sum"`` or ``"none"``.
            Defaults to ``"token_mean"``.
        entropy_coeff (float): weight of the entropy bonus, from one reparametrised sample where the
            distribution has no entropy in closed form. Defaults to ``0.0``.
        kl_to_ref_coeff (float, optional): weight of the divergence from a reference policy;
            ``None`` writes no ``loss_kl``. Like *clip_epsilon*, *dual_clip* and *entropy_coeff* it
            is an attribute that may be set at any time.
        kl_estimator (str): ``"k3"``, ``"k2"``, ``"k1"`` (from what was sampled; the gradient of
            ``"k1"`` is that of ``"k2"``) or ``"exact"`` (of the two distributions; needs
            *reference_network*). Defaults to ``"k3"``.
        reference_network (TensorDictModuleBase, optional): frozen reference policy. Without it,
            the reference's log-probabilities are read from the batch.
        functional (bool): take the parameters out of the actor, as TorchRL's losses do. ``False``
            leaves them, as what acts on modules needs it, such as ``fully_shard``. Defaults to
            ``True``.
        check_finite (bool): refuse tokens outside of the vocabulary, log-probabilities that are not
            finite or (of tokens) positive, advantages and weights that are not finite or above 1e6
            in magnitude, and losses that are not finite. Not done inside of ``torch.compile`` and
            ``torch.vmap``. Defaults to ``True``.

    The output holds ``loss_objective``, ``loss_entropy`` and ``loss_kl`` (if enabled) and,
    detached: ``kl_approx`` (k3 estimate of the divergence from the behaviour policy),
    ``log_prob_difference`` (mean magnitude of the log-ratio to it), ``clip_fraction`` (ratios
    outside of the clip range), of it ``clip_fraction_low`` and ``clip_fraction_high`` (below,
    above), ``clip_fraction_dual`` (ratios cut by the dual clip, if it is set), ``entropy`` (without
    a closed form: the mean negative log-probability of what was sampled), ``ESS`` (share of
    effective samples), ``ratio_p05``, ``ratio_p50``, ``ratio_p95`` (quantiles of the ratio to the
    behaviour policy), ``max_ratio``, ``advantage_mean``, ``advantage_std``, ``kl_to_ref`` (if
    enabled), ``behavior_weight`` and ``behavior_weight_bounded`` (mean, and share beyond the bound;
    decoupled only). Once ``loss.version`` is set to the learner's version and the batch carries
    ``policy_version``, also ``policy_lag_mean``, ``policy_lag_max``.

    Raises:
        ValueError: for an actor without distribution, or an option out of range.

    Examples:
        >>> import torch
        >>> from tensordict import NonTensorStack, TensorDict
        >>> from torchrl.modules.vla import TinyVLA
        >>> policy = TinyVLA(action_dim=2, chunk_size=4, action_head="tokens", vocab_size=8,
        ...                  log_probs_mode="token", return_vla_action_container=False)
        >>> batch = TensorDict({
        ...     "observation": {"image": torch.zeros(3, 3, 16, 16, dtype=torch.uint8),
        ...                     "state": torch.zeros(3, 5)},
        ...     "language_instruction": NonTensorStack("push", "pull", "push"),
        ...     "action_is_pad": torch.zeros(3, 4, dtype=torch.bool),
        ...     "advantage": torch.tensor([[1.0], [-1.0], [0.0]]),
        ... }, batch_size=[3])
        >>> with torch.no_grad():
        ...     batch = policy(batch)
        >>> loss = GRPOLoss(policy)
        >>> losses = loss(batch)
        >>> losses["loss_objective"].backward()
        >>> float(losses["ESS"]), float(losses["clip_fraction"])
        (1.0, 0.0)

    Reference:
        Shao et al., "DeepSeekMath", 2024, https://arxiv.org/abs/2402.03300; Yu et al., "DAPO",
        2025, https://arxiv.org/abs/2503.14476; Zheng et al., "Group Sequence Policy Optimization",
        2025, https://arxiv.org/abs/2507.18071; Hilton et al., "Batch size-invariance for policy
        optimization", 2022, https://arxiv.org/abs/2110.00641.
    """

    @dataclass
    class _AcceptedKeys:
        """Keys that :meth:`set_keys` can change.

        Attributes:
            action (NestedKey): what was sampled, tokens or chunk ``[*B, chunk, A]`` or a path.
                Follows from what the policy writes.
            sample_log_prob (NestedKey): its behaviour log-probabilities, ``[*B, chunk, A]``, or
                ``[*B, chunk]`` of env steps.
            advantage (NestedKey): advantage of the decision ``[*B, 1]``.
            pad_mask (NestedKey): optional boolean ``[*B, chunk]``, ``True`` = never executed.
            proximal_log_prob (NestedKey): as *sample_log_prob*, read if decoupled.
            ref_log_prob (NestedKey): as *sample_log_prob*, read without *reference_network*.
            policy_version (NestedKey): optional ``[*B, 1]``, or ``[*B]``, as TorchRL's servers
                stamp it.
            num_decisions (NestedKey): decisions of the rollout, integers ``[*B, 1]``; read if each
                rollout weighs the same, or has one ratio.
            rollout_id (NestedKey): integers ``[*B, 1]``; read if each rollout has one ratio.
            weight (NestedKey, optional): weight of each decision ``[*B, 1]``; off by default.
        """

        action: NestedKey = schema.ACTION_TOKENS_KEY
        sample_log_prob: NestedKey = schema.SAMPLE_LOG_PROB_KEY
        advantage: NestedKey = schema.ADVANTAGE_KEY
        pad_mask: NestedKey = schema.ACTION_IS_PAD_KEY
        proximal_log_prob: NestedKey = "proximal_log_prob"
        ref_log_prob: NestedKey = "ref_log_prob"
        policy_version: NestedKey = schema.POLICY_VERSION_KEY
        num_decisions: NestedKey = schema.NUM_DECISIONS_KEY
        rollout_id: NestedKey = schema.ROLLOUT_ID_KEY
        weight: NestedKey | None = None

    tensor_keys: _AcceptedKeys
    default_keys = _AcceptedKeys
    actor_network: TensorDictModuleBase
    actor_network_params: TensorDictParams | None
    target_actor_network_params: TensorDictParams  # never made; TorchRL warns if not declared
    reference_network: TensorDictModuleBase | None
    reference_network_params: TensorDictParams
    #: The learner's version, for the lag metrics; set it after each publish.
    version: int | None = None
    #: Version whose comparison is over; set it to the learner's when the run is resumed: optimiser
    #: steps may have been taken in it. None: there is no other.
    compared_version: int | None = -1
    _schedulable_buffers = frozenset(
        {"clip_epsilon_low", "clip_epsilon_high", "entropy_coeff", "kl_to_ref_coeff"}
    )

    def __init__(
        self,
        actor_network: TensorDictModuleBase,
        *,
        clip_epsilon: float | tuple[float, float] = (0.2, 0.28),
        dual_clip: float | None = None,
        trust_std: float | None = None,
        ratio_level: RatioLevel = "token",
        importance: Importance = "behavior",
        behavior_weight_cap: float | None = 5.0,
        mask_behavior_weight: bool = False,
        reduction: F.Reduction = "token_mean",
        entropy_coeff: float = 0.0,
        kl_to_ref_coeff: float | None = None,
        kl_estimator: KLEstimator = "k3",
        reference_network: TensorDictModuleBase | None = None,
        functional: bool = True,
        check_finite: bool = True,
    ) -> None:
        check_actor(actor_network)
        clip_low, clip_high = check_trust_region(
            clip_epsilon,
            dual_clip=dual_clip,
            trust_std=trust_std,
            cap=behavior_weight_cap,
            mask=mask_behavior_weight,
        )
        check("ratio_level", ratio_level, RatioLevel)
        check("importance", importance, Importance)
        check("reduction", reduction, F.Reduction)
        check("kl_estimator", kl_estimator, KLEstimator)
        entropy_coeff = check("entropy_coeff", entropy_coeff, float)
        check_reference(actor_network, reference_network, kl_to_ref_coeff, kl_estimator)
        super().__init__()
        self._in_keys: list[NestedKey] | None = None
        self._out_keys: list[NestedKey] | None = None
        self._sampled = schema.sampled_key(getattr(actor_network, "out_keys", ()))
        self.tensor_keys.action = self._sampled
        if check("functional", functional, bool):
            self.convert_to_functional(actor_network, "actor_network")
        else:
            self.actor_network, self.actor_network_params = actor_network, None
        # Kept out of _modules, and its weights registered as buffers: an optimiser built on
        # loss.parameters() must never see them, yet loss.to(device) must move them.
        self.__dict__["reference_network"] = reference_network
        if reference_network is not None:
            # What is frozen may be one parameter of both, which moves with the actor. A second name
            # for its values would keep them where they were when a store takes them over.
            shared = {id(parameter) for parameter in actor_network.parameters()}
            params = TensorDict.from_module(reference_network)
            names = [name for name, value in params.items(True, True) if id(value) in shared]
            params = params.exclude(*names).data
            self.reference_network_params = TensorDictParams(params, no_convert=True)
        self.dual_clip = dual_clip
        self.trust_std = trust_std
        self.ratio_level = ratio_level
        self.importance = importance
        self.behavior_weight_cap = behavior_weight_cap
        self.mask_behavior_weight = mask_behavior_weight
        self.reduction = reduction
        self.kl_estimator = kl_estimator
        self.check_finite: bool = check("check_finite", check_finite, bool)
        device = next((p.device for p in self.parameters()), None)
        for name, value in (
            ("clip_epsilon_low", clip_low),
            ("clip_epsilon_high", clip_high),
            ("entropy_coeff", entropy_coeff),
            ("kl_to_ref_coeff", kl_to_ref_coeff),
        ):
            self.register_coeff_buffer(name, value, device=device, dtype=torch.float32)

    @property
    def clip_epsilon(self) -> Any:
        """Clip range ``(low, high)``; may be set to a number or a pair."""
        return self.clip_epsilon_low, self.clip_epsilon_high

    @clip_epsilon.setter
    def clip_epsilon(self, value: Any) -> None:
        low_and_high = check_trust_region(value, dual_clip=self.dual_clip)
        self.clip_epsilon_low, self.clip_epsilon_high = low_and_high

    @property
    def needs_whole_rollouts(self) -> bool:
        """Whether a batch must hold every decision of each of its rollouts."""
        return self.ratio_level in ROLLOUT_LEVELS

    def make_value_estimator(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: there is no critic whose value could be estimated."""
        raise NotImplementedError(
            f"{type(self).__name__} must be used without a value estimator. Its advantages come "
            "from groups: torchrl_dvla.functional.group_advantage."
        )

    # -- keys ------------------------------------------------------------------------------------
    def _forward_value_estimator_keys(self, **kwargs: Any) -> None:
        self._in_keys = None  # set_keys ends here: what it changed must be listed again
        action, sampled = self.tensor_keys.action, self._sampled
        written = unravel_key_list(list(getattr(self.actor_network, "out_keys", ())))
        if action in (schema.ACTION_TOKENS_KEY, schema.ACTION_CHUNK_KEY) and action != sampled:
            self.tensor_keys.action = sampled
            raise ValueError(
                f"action must be what the policy samples, {sampled} by its out_keys {written}, got "
                f"{action}. Leave it out: log-probabilities of a token policy are those of its "
                "tokens, of a Gaussian one those of its chunk."
            )

    @property
    def in_keys(self) -> list[NestedKey]:
        """Entries that are read, optional ones included."""
        if self._in_keys is not None:
            return self._in_keys
        keys = self.tensor_keys
        wanted = [keys.action, keys.sample_log_prob, keys.advantage, keys.pad_mask]
        wanted.append(keys.policy_version)
        if self.importance == "decoupled":
            wanted.append(keys.proximal_log_prob)
        if self.kl_to_ref_coeff is not None and self.reference_network is None:
            wanted.append(keys.ref_log_prob)
        if self.reduction == "trajectory_mean" or self.needs_whole_rollouts:
            wanted.append(keys.num_decisions)
        if self.needs_whole_rollouts:
            wanted.append(keys.rollout_id)
        if keys.weight is not None:
            wanted.append(keys.weight)
        return list(dict.fromkeys([*self.actor_network.in_keys, *wanted]))

    @in_keys.setter
    def in_keys(self, values: list[NestedKey]) -> None:
        self._in_keys = values

    @property
    def out_keys(self) -> list[NestedKey]:
        """Entries that are always written."""
        if self._out_keys is not None:
            return self._out_keys
        keys: list[NestedKey] = ["loss_objective", "loss_entropy"]
        keys += ["loss_kl", "kl_to_ref"] if self.kl_to_ref_coeff is not None else []
        if self.importance == "decoupled":
            keys += ["behavior_weight", "behavior_weight_bounded"]
        keys += ["kl_approx", "log_prob_difference", "entropy", "ESS"]
        keys += ["clip_fraction", "clip_fraction_low", "clip_fraction_high"]
        keys += ["clip_fraction_dual"] if self.dual_clip is not None else []
        keys += ["ratio_p05", "ratio_p50", "ratio_p95", "max_ratio"]
        return [*keys, "advantage_mean", "advantage_std"]

    @out_keys.setter
    def out_keys(self, values: list[NestedKey]) -> None:
        self._out_keys = values

    # -- the loss --------------------------------------------------------------------------------
    @dispatch
    def forward(
        self, tensordict: TensorDictBase, *, normaliser: torch.Tensor | float | None = None
    ) -> TensorDictBase:
        """Compute the loss and its metrics.

        Args:
            tensordict (TensorDictBase): decisions ``[*B]``.

        Keyword Args:
            normaliser (torch.Tensor or float, optional): positive number the weighted sum is
                divided by, usually :meth:`normaliser` of a larger batch. By default that of this
                batch.

        Returns:
            TensorDict: scalars, see the class; under ``reduction="none"`` the losses are
            ``[*B, chunk, A]``, ``[*B, chunk, 1]`` with one ratio per env step, or ``[*B, 1, 1]``.

        Raises:
            KeyError: if an entry is missing.
            ValueError: if shapes or dtypes do not fit together, or values are out of range (see
                *check_finite*).
        """
        action, behavior = self._sampled_action(tensordict)
        advantage = self._get(tensordict, "advantage")
        version = tensordict.get(self.tensor_keys.policy_version, None)
        if version is not None and version.shape == behavior.shape[:-2]:
            version = version.unsqueeze(-1)  # as TorchRL's inference servers stamp it
        check_rows(behavior, advantage, version)
        mask = self._mask(tensordict, behavior)
        rollouts = self._rollouts(tensordict, advantage.shape)
        dist = self._dist(tensordict, self.actor_network, self.actor_network_params)
        log_prob, ranges = log_prob_of(action, dist, mask, check=self.check_finite)
        highest = ranges[-1].high

        def masked(name: str, value: torch.Tensor) -> torch.Tensor:
            value = value.masked_fill(~mask, 0.0)  # whatever the padding holds
            remedy = "Is it the logarithm of a probability, of a policy with finite weights?"
            ranges.append(ValueRange(name, value, -FINITE, highest, remedy))
            return value

        behavior = masked("sample_log_prob", behavior)
        log_ratio = F.log_ratio(log_prob, behavior)
        behavior_log_ratio = self._to_level(log_ratio, mask, rollouts)
        level_mask = self._level_mask(mask)
        row_weight, weight_ranges = self._row_weight(tensordict)
        total = self.normaliser(tensordict) if normaliser is None else normaliser
        total = torch.as_tensor(total, dtype=torch.get_default_dtype(), device=behavior.device)
        remedy = "Are the rewards finite, and the advantages normalised?"
        ranges.append(ValueRange("advantage", advantage, -_LARGEST, _LARGEST, remedy))
        remedy = "Take it from loss.normaliser()."
        ranges += [*weight_ranges, ValueRange("normaliser", total, 0.0, FINITE, remedy)]
        total = torch.where(total > 0, total, torch.ones_like(total))

        def reduce(values: torch.Tensor) -> torch.Tensor:
            weights = F.reduction_weights(level_mask, self.reduction)
            if row_weight is not None:
                weights = weights * row_weight
            values = torch.where(level_mask, values, torch.zeros_like(values)) * weights
            return (values if self.reduction == "none" else values.sum()) / total

        out: dict[str, torch.Tensor] = {}
        trust_log_ratio, weight = behavior_log_ratio, None
        if self.importance == "decoupled":
            proximal = masked("proximal_log_prob", self._log_prob(tensordict, "proximal_log_prob"))
            trust_log_ratio = self._to_level(F.log_ratio(log_prob, proximal), mask, rollouts)
            proximal_log_ratio = self._to_level(F.log_ratio(proximal, behavior), mask, rollouts)
            cap = self.behavior_weight_cap
            weight = F.behavior_weight(proximal_log_ratio, cap=cap, mask=self.mask_behavior_weight)
            out["behavior_weight"] = F.masked_mean(weight, level_mask)
            bounded = proximal_log_ratio.exp() != weight
            out["behavior_weight_bounded"] = F.masked_mean(bounded.to(weight.dtype), level_mask)
        gain = self._gain(trust_log_ratio, advantage.unsqueeze(-1))
        out["loss_objective"] = -reduce(gain if weight is None else weight * gain)

        # A weight of zero needs no gradient; on an accelerator, to ask would be to wait.
        is_zero = self.entropy_coeff.device.type == "cpu" and can_check() and not self.entropy_coeff
        with torch.set_grad_enabled(torch.is_grad_enabled() and not is_zero):
            entropy = entropy_of(dist, log_prob, mask, is_wanted=not is_zero)
        out["entropy"] = F.masked_mean(entropy.detach(), mask)
        out["loss_entropy"] = -self.entropy_coeff * reduce(self._level_mean(entropy, mask))
        if self.kl_to_ref_coeff is not None:
            ref = self._reference(tensordict, action, mask)
            if isinstance(ref, d.Distribution):
                kl = fit_to(exact_kl(dist, ref), mask)
            else:  # the estimators want log p - log q of what is drawn from q, the learner's policy
                kl = _KL[self.kl_estimator](-F.log_ratio(log_prob, masked("ref_log_prob", ref)))
            out["kl_to_ref"] = F.masked_mean(kl.detach(), mask)
            out["loss_kl"] = self.kl_to_ref_coeff * reduce(self._level_mean(kl, mask))
        if self.check_finite:
            remedy = "Are coefficients and normaliser of a usual size?"
            losses = [(key, out[key]) for key in out if key.startswith("loss_")]
            ranges += [ValueRange(key, value, -FINITE, FINITE, remedy) for key, value in losses]
            check_ranges(ranges, tensordict, advantage.numel())
            self._compare_log_probs(log_ratio.detach().abs(), mask, version)
        with torch.no_grad():
            out["kl_approx"] = F.masked_mean(F.kl_k3(log_ratio), mask)
            out["log_prob_difference"] = F.masked_mean(log_ratio.abs(), mask)
            out |= self._trust_metrics(trust_log_ratio, advantage.unsqueeze(-1), level_mask)
            out |= _ratio_metrics(behavior_log_ratio, level_mask)
            out["advantage_mean"] = advantage.mean()
            out["advantage_std"] = advantage.std(correction=0)
            if self.version is not None and version is not None:
                lag = (self.version - version).float()
                out |= {"policy_lag_mean": lag.mean(), "policy_lag_max": lag.max()}
        td_out = TensorDict(out)
        self._clear_weakrefs(tensordict, td_out, "actor_network_params", "reference_network_params")
        return td_out

    @torch.no_grad()
    def normaliser(self, tensordict: TensorDictBase) -> torch.Tensor:
        """What the weighted sum over *tensordict* is divided by; costs no forward pass.

        Args:
            tensordict (TensorDictBase): decisions ``[*B]``; actions, log-probabilities, masks and
                weights are read.

        Returns:
            torch.Tensor: scalar; zero if nothing was executed, which :meth:`forward` takes for one.
        """
        mask = self._mask(tensordict, self._sampled_action(tensordict)[1])
        return F.reduction_normaliser(
            self._level_mask(mask), self.reduction, self._row_weight(tensordict)[0]
        )

    # -- the trust region ------------------------------------------------------------------------
    def _gain(self, log_ratio: torch.Tensor, advantage: torch.Tensor) -> torch.Tensor:
        if self.trust_std is not None:
            return F.gaussian_surrogate(log_ratio, advantage, std=self.trust_std)
        return F.clipped_surrogate(
            log_ratio,
            advantage,
            clip_low=self.clip_epsilon_low,
            clip_high=self.clip_epsilon_high,
            dual_clip=self.dual_clip,
        )

    def _trust_metrics(
        self, log_ratio: torch.Tensor, advantage: torch.Tensor, mask: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Shares of the ratios that are clipped."""
        low, high = self.clip_epsilon_low, self.clip_epsilon_high
        outside = F.outside_clip(log_ratio, clip_low=low, clip_high=high)
        found = {"": outside, "_low": outside & (log_ratio < 0), "_high": outside & (log_ratio > 0)}
        if self.dual_clip is not None:
            found["_dual"] = (log_ratio.exp() > self.dual_clip) & (advantage < 0)
        shares = {key: value.to(log_ratio.dtype) for key, value in found.items()}
        return {f"clip_fraction{key}": F.masked_mean(shares[key], mask) for key in shares}

    # -- one ratio per token, env step, decision or rollout --------------------------------------
    def _to_level(
        self, log_ratio: torch.Tensor, mask: torch.Tensor, rollouts: torch.Tensor | None
    ) -> torch.Tensor:
        dims = _LEVEL_DIMS[self.ratio_level]
        if not dims or self.ratio_level == "sequence_mean":
            return self._level_mean(log_ratio, mask)
        total = log_ratio.sum(dims, keepdim=True)
        if rollouts is not None:
            total = F.rollout_sum(total.flatten(), rollouts).view_as(total)
        if self.ratio_level == "trajectory_mean" and rollouts is not None:
            count = mask.sum(dims, keepdim=True)
            count = F.rollout_sum(count.flatten(), rollouts).view_as(count)
            total = total / count.clamp_min(1)
        return total.clamp(-F.LOG_RATIO_BOUND, F.LOG_RATIO_BOUND)

    def _rollouts(self, tensordict: TensorDictBase, shape: torch.Size) -> torch.Tensor | None:
        """Rollout of each decision ``[B]``, all of whose decisions are there; if it is needed."""
        if not self.needs_whole_rollouts:
            return None
        ids = self._get(tensordict, "rollout_id", shape).flatten()
        check_whole_rollouts(ids, self._get(tensordict, "num_decisions", shape).flatten())
        return ids

    def _level_mask(self, mask: torch.Tensor) -> torch.Tensor:
        for dim in _LEVEL_DIMS[self.ratio_level]:
            mask = mask.any(dim, keepdim=True)
        return mask

    def _level_mean(self, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        # A mean, not a sum: entropy_coeff and kl_to_ref_coeff keep their meaning at every level.
        dims = _LEVEL_DIMS[self.ratio_level]
        if not dims:
            return values
        return F.masked_mean(values, mask, dim=dims).reshape(self._level_mask(mask).shape)

    # -- reading a batch -------------------------------------------------------------------------
    def _get(
        self, tensordict: TensorDictBase, name: str, shape: Sequence[int] | None = None
    ) -> torch.Tensor:
        key = getattr(self.tensor_keys, name)
        value = tensordict.get(key, None)
        if value is None:
            raise KeyError(
                f"the batch must hold {name} under {key!r}, got {leaves_of(tensordict)}. "
                f"{_WRITERS[name]}."
            )
        is_real = value.is_floating_point() or name in ("action", "num_decisions", "rollout_id")
        if not is_real or (shape is not None and value.shape != shape):
            of_shape = "" if shape is None else f" of shape {list(shape)}"
            raise ValueError(
                f"{name} must hold real floating-point numbers{of_shape}, got {value.dtype} "
                f"{list(value.shape)}. {_WRITERS[name]}."
            )
        return value

    def _sampled_action(self, tensordict: TensorDictBase) -> tuple[torch.Tensor, torch.Tensor]:
        """What was sampled, and log-probs ``[*B, chunk, A]``, or ``[*B, chunk, 1]`` of env steps.

        Raises:
            ValueError: if they do not fit each other or the ratio level.
        """
        action = self._get(tensordict, "action")
        log_prob = self._get(tensordict, "sample_log_prob")
        if not action.numel():
            raise ValueError(
                f"the batch must hold at least one token, got tokens {list(action.shape)}. Its "
                "loss would be a mean over nothing."
            )
        if self.tensor_keys.action == schema.ACTION_PATH_KEY or log_prob.shape == action.shape:
            return action, log_prob
        if action.ndim < 2 or log_prob.shape != action.shape[:-1]:
            raise ValueError(
                "sample_log_prob must have the shape of the tokens [*B, chunk, A], or of the "
                f"actions, or [*B, chunk] with one an env step, got {list(log_prob.shape)} for "
                f"{self.tensor_keys.action} {list(action.shape)}. Build the policy with "
                "log_probs_mode='token', or a distribution of each action dimension: a sum over "
                "the chunk cannot leave unexecuted steps out."
            )
        if self.ratio_level == "token" and action.shape[-1] > 1:
            raise ValueError(
                "ratio_level must be 'env_step', or one of a decision or rollout, for "
                f"log-probabilities {list(log_prob.shape)}, one an env step, of actions "
                f"{list(action.shape)}, got 'token'. Set it, or let the policy record one for each "
                "action dimension."
            )
        return action, log_prob.unsqueeze(-1)

    def _log_prob(self, tensordict: TensorDictBase, name: str) -> torch.Tensor:
        """Log-probs under another policy, in the shape that :meth:`_sampled_action` returns."""
        recorded = self._get(tensordict, "sample_log_prob")
        behavior = self._sampled_action(tensordict)[1]
        return self._get(tensordict, name, recorded.shape).reshape(behavior.shape)

    def _mask(self, tensordict: TensorDictBase, log_prob: torch.Tensor) -> torch.Tensor:
        """Boolean as ``log_prob`` ``[*B, chunk, A]``, ``True`` = was executed and counts."""
        pad = tensordict.get(self.tensor_keys.pad_mask, None)
        mask = executed_tokens(pad, log_prob, self.tensor_keys.pad_mask)
        # Padding that TorchRL's own samplers leave behind, see LossModule.loss_mask_key.
        for key in self._loss_mask_keys():
            valid = tensordict.get(key, None)
            if valid is None:
                continue
            if valid.dtype != torch.bool or valid.numel() != log_prob.shape[:-2].numel():
                raise ValueError(
                    f"{key!r} must hold one boolean for each decision, got {valid.dtype} "
                    f"{list(valid.shape)}. True marks those that count; see loss.loss_mask_key."
                )
            mask = mask & valid.reshape(*log_prob.shape[:-2], 1, 1)
        return mask

    def _row_weight(
        self, tensordict: TensorDictBase
    ) -> tuple[torch.Tensor | None, list[ValueRange]]:
        """Weight of each decision ``[*B, 1, 1]``, if they differ, and ranges to check."""
        shape = (*self._sampled_action(tensordict)[1].shape[:-2], 1)
        weight, ranges = None, []
        if self.tensor_keys.weight is not None:
            weight = self._get(tensordict, "weight", shape).unsqueeze(-1)
            ranges.append(ValueRange("weight", weight, 0.0, _LARGEST, "Clamp or normalise it."))
        if self.reduction == "trajectory_mean":
            counts = self._get(tensordict, "num_decisions", shape).unsqueeze(-1)
            remedy = f"{_WRITERS['num_decisions']}."
            ranges.append(ValueRange("num_decisions", counts, 1, FINITE, remedy))
            weight = 1 / counts if weight is None else weight / counts
        return weight, ranges

    def _compare_log_probs(
        self, difference: torch.Tensor, mask: torch.Tensor, stamped: torch.Tensor | None
    ) -> None:
        """Warn, once, if this is not the policy that took the decisions of the same version."""
        version = self.version or 0  # which is where a learner begins
        if self.compared_version in (None, version) or stamped is None or not can_check():
            return
        self.compared_version = version  # later in this version, optimiser steps come between
        found = F.masked_mean(difference, mask & (stamped == version).unsqueeze(-1)).item()
        allowed = agreement_of(value.dtype for value in self.parameters())
        if found <= allowed:
            return
        self.compared_version = None
        modules = self.actor_network.named_modules()
        in_training = [f"{k} ({type(m).__name__})" for k, m in modules if depends_on_mode(m)]
        warnings.warn(
            "the policy must give decisions of its own version the log-probabilities that they "
            f"were sampled with, got a mean difference of {found:.2g} (up to {allowed:g} is "
            f"rounding) at version {version}. Call policy.eval() before the loop (in training: "
            f"{', '.join(in_training) or 'no module that depends on it'}), and compare dtype, "
            "temperature, tokenizer and image processing with those of the inference lane.",
            stacklevel=2,
        )

    # -- running a policy ------------------------------------------------------------------------
    def _dist(
        self,
        tensordict: TensorDictBase,
        network: TensorDictModuleBase,
        params: TensorDictParams | None,
    ) -> d.Distribution:
        """Distribution of the single actions ``[*B, chunk, A]``, from one forward of *network*."""
        return of_single_actions(run_policy(tensordict, network, params, self.tensor_keys.action))

    @torch.no_grad()
    def write_proximal_log_prob(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Make the present policy the proximal one for these decisions (``"decoupled"``).

        Call it before the first optimiser step on the data, once for all of its epochs.

        Args:
            tensordict (TensorDictBase): decisions ``[*B]``.

        Returns:
            TensorDictBase: *tensordict*, with ``proximal_log_prob`` like ``sample_log_prob``.
        """
        action, behavior = self._sampled_action(tensordict)
        mask = self._mask(tensordict, behavior)
        dist = self._dist(tensordict, self.actor_network, self.actor_network_params)
        # Tokens outside of the vocabulary are reported by forward, with the other entries.
        log_prob, _ = log_prob_of(action, dist, mask, check=self.check_finite)
        shape = self._get(tensordict, "sample_log_prob").shape
        return tensordict.set(self.tensor_keys.proximal_log_prob, log_prob.reshape(shape))

    @torch.no_grad()
    def _reference(
        self, tensordict: TensorDictBase, action: torch.Tensor, mask: torch.Tensor
    ) -> d.Distribution | torch.Tensor:
        """The reference's distribution if it is needed, or log-probs as ``mask``."""
        if self.reference_network is None:
            return self._log_prob(tensordict, "ref_log_prob")
        dist = self._dist(tensordict, self.reference_network, self.reference_network_params)
        if self.kl_estimator == "exact":
            return dist
        return log_prob_of(action, dist, mask, check=self.check_finite)[0]


def _ratio_metrics(log_ratio: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """How far ratios to the behaviour policy spread."""
    ratio = log_ratio.exp()
    shares = torch.linspace(0.05, 0.95, 3, dtype=ratio.dtype, device=ratio.device)
    p05, p50, p95 = F.masked_quantile(ratio, mask, shares).unbind()
    return {
        "ESS": F.effective_sample_size(log_ratio, mask),
        "ratio_p05": p05,
        "ratio_p50": p50,
        "ratio_p95": p95,
        "max_ratio": ratio.masked_fill(~mask, 0.0).amax(),
    }
