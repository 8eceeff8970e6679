# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Behaviour cloning of tokens and of flows: the supervised stage before reinforcement learning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase, dispatch
from torchrl.objectives import BCLoss

from torchrl_dvla.data.schema import ACTION_CHUNK_KEY, ACTION_IS_PAD_KEY, ACTION_TOKENS_KEY
from torchrl_dvla.objectives.distribution import log_prob_of, run_policy
from torchrl_dvla.objectives.validation import (
    FINITE,
    ValueRange,
    check_ranges,
    executed_tokens,
    leaves_of,
)
from torchrl_dvla.validation import check

__all__ = ["ActionTokenBCLoss", "FlowMatchingLoss"]


class _ExpertLoss(BCLoss):
    """What losses of an expert's decisions share: their mask, and the check of their values."""

    def __init__(
        self,
        actor_network: TensorDictModuleBase,
        *,
        reduction: Literal["mean", "sum", "none"] | None = None,
        check_finite: bool = True,
    ) -> None:
        super().__init__(actor_network, reduction=reduction)
        self.check_finite: bool = check("check_finite", check_finite, bool)

    def _read_expert(
        self, tensordict: TensorDictBase, what: str, remedy: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The expert's entry ``[*B, chunk, A]``, and as a bool which of it is not padded."""
        values = tensordict.get(self.tensor_keys.action, None)
        if values is None:
            raise KeyError(
                f"the batch must hold the expert's {what} under {self.tensor_keys.action!r}, got "
                f"{leaves_of(tensordict)}. {remedy}"
            )
        pad_key = self.tensor_keys.pad_mask
        pad = None if pad_key is None else tensordict.get(pad_key, None)
        return values, executed_tokens(pad, values, pad_key)


class ActionTokenBCLoss(_ExpertLoss):
    """Negative log-likelihood of an expert's action tokens.

    :class:`~torchrl.objectives.BCLoss` compares what the actor *writes* at the action key with the
    expert's action. A token policy writes sampled tokens, which carry no gradient; this subclass
    asks for the distribution of the tokens instead, and leaves padded env steps out of the mean.

    Args:
        actor_network (TensorDictModule): a token policy whose ``get_dist`` gives token-level
            log-probabilities ``[*B, chunk, A]`` (``log_probs_mode="token"``).

    Keyword Args:
        reduction (str, optional): ``"mean"`` (default), ``"sum"`` or ``"none"``, over the tokens of
            unpadded env steps.
        check_finite (bool): refuse tokens outside of the vocabulary, and log-probabilities that are
            not finite. Not done inside of ``torch.compile`` and ``torch.vmap``. Defaults to
            ``True``.

    Returns:
        A tensordict with ``"loss_bc"``, the loss, and ``"accuracy"``, the share of tokens whose
        most likely value is the expert's (no gradient).

    Examples:
        >>> import torch
        >>> from tensordict import NonTensorStack, TensorDict
        >>> from torchrl.modules.vla import TinyVLA
        >>> policy = TinyVLA(
        ...     action_dim=2,
        ...     chunk_size=4,
        ...     action_head="tokens",
        ...     vocab_size=5,
        ...     log_probs_mode="token",
        ... )
        >>> batch = TensorDict(
        ...     {
        ...         "observation": {
        ...             "image": torch.zeros(3, 3, 16, 16, dtype=torch.uint8),
        ...             "state": torch.zeros(3, 6),
        ...         },
        ...         "language_instruction": NonTensorStack("pick", "pick", "place"),
        ...         "vla_action": {"tokens": torch.zeros(3, 4, 2, dtype=torch.int64)},
        ...         "action_is_pad": torch.zeros(3, 4, dtype=torch.bool),
        ...     },
        ...     [3],
        ... )
        >>> _ = policy(batch.clone())
        >>> ActionTokenBCLoss(policy)(batch)["loss_bc"].shape
        torch.Size([])
    """

    @dataclass
    class _AcceptedKeys(BCLoss._AcceptedKeys):
        """Keys read by the loss.

        Attributes:
            action (NestedKey): the expert's tokens, int64 ``[*B, chunk, A]``.
            pad_mask (NestedKey, optional): bool ``[*B, chunk]``, True = padded env step.
        """

        action: NestedKey = ACTION_TOKENS_KEY
        pad_mask: NestedKey | None = ACTION_IS_PAD_KEY

    default_keys = _AcceptedKeys
    out_keys = ["loss_bc", "accuracy"]

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Compute the loss of a batch of expert decisions.

        Args:
            tensordict (TensorDictBase): observations and the expert's tokens, ``[*B]``.

        Returns:
            TensorDict with ``"loss_bc"`` and ``"accuracy"``.

        Raises:
            KeyError: if an entry is missing.
            ValueError: if the policy's log-probabilities are not token-level, shapes or dtypes do
                not fit together, or values are out of range (see *check_finite*).
        """
        tokens, valid = self._read_expert(tensordict, "tokens", "An action tokenizer writes them.")
        key = self.tensor_keys.action
        dist = run_policy(tensordict, self.actor_network, self.actor_network_params, key)
        log_prob, ranges = log_prob_of(tokens, dist, valid, check=self.check_finite)
        if self.check_finite:
            check_ranges(ranges, tensordict, tokens.shape[:-2].numel())
        hit = (dist.mode == tokens).to(log_prob.dtype)
        out = TensorDict(
            {
                "loss_bc": self._reduce_loss(-log_prob, mask=valid),
                "accuracy": self._reduce_loss(hit.detach(), mask=valid, reduction="mean"),
            }
        )
        self._clear_weakrefs(tensordict, out, "actor_network_params")
        return out


class FlowMatchingLoss(_ExpertLoss):
    """Conditional flow matching: mean squared error of the velocity towards an expert's chunk.

    Each chunk is seen at one random noise and time a call
    (:func:`~torchrl_dvla.functional.flow_matching_pair`). Padded env steps and padded action
    dimensions are left out of the mean.

    Args:
        actor_network (TensorDictModule): a policy with ``flow_matching_error``, such as
            :class:`~torchrl_dvla.modules.FlowVLA`.

    Keyword Args:
        reduction (str, optional): ``"mean"`` (default), ``"sum"`` or ``"none"``, over the action
            dimensions of unpadded env steps.
        check_finite (bool): refuse chunks and errors that are not finite. Not done inside of
            ``torch.compile`` and ``torch.vmap``. Defaults to ``True``.

    Returns:
        A tensordict with ``"loss_bc"``.

    Raises:
        ValueError: for a policy without ``flow_matching_error``.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl_dvla.modules import FlowVLA
        >>> policy = FlowVLA.tiny(["lift the cup"], action_dim=2, chunk_size=4)
        >>> batch = TensorDict(
        ...     {
        ...         "observation": {"image": torch.zeros(3, 3, 64, 64, dtype=torch.uint8)},
        ...         "language_instruction": "lift the cup",
        ...         "vla_action": {"chunk": torch.zeros(3, 4, 2)},
        ...     },
        ...     [3],
        ... )
        >>> FlowMatchingLoss(policy)(batch)["loss_bc"].shape
        torch.Size([])

    Reference:
        Lipman et al., "Flow Matching for Generative Modeling", 2022,
        https://arxiv.org/abs/2210.02747; Black et al., "pi0: A Vision-Language-Action Flow Model
        for General Robot Control", 2024, https://arxiv.org/abs/2410.24164.
    """

    @dataclass
    class _AcceptedKeys(BCLoss._AcceptedKeys):
        """Keys read by the loss.

        Attributes:
            action (NestedKey): the expert's chunk ``[*B, chunk, A]``, in the environment's units.
            pad_mask (NestedKey, optional): bool ``[*B, chunk]``, True = padded env step.
        """

        action: NestedKey = ACTION_CHUNK_KEY
        pad_mask: NestedKey | None = ACTION_IS_PAD_KEY

    default_keys = _AcceptedKeys
    out_keys = ["loss_bc"]

    def __init__(
        self,
        actor_network: TensorDictModuleBase,
        *,
        reduction: Literal["mean", "sum", "none"] | None = None,
        check_finite: bool = True,
    ) -> None:
        if not callable(getattr(actor_network, "flow_matching_error", None)):
            raise ValueError(
                "actor_network must have a method flow_matching_error, got "
                f"{type(actor_network).__name__}. A policy of tokens is cloned by "
                "ActionTokenBCLoss."
            )
        super().__init__(actor_network, reduction=reduction, check_finite=check_finite)

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Compute the loss of a batch of expert decisions.

        Args:
            tensordict (TensorDictBase): observations and the expert's chunks, ``[*B]``.

        Returns:
            TensorDict with ``"loss_bc"``.

        Raises:
            KeyError: if an entry is missing.
            ValueError: if shapes do not fit together, or values are not finite (see
                *check_finite*).
        """
        chunk, valid = self._read_expert(tensordict, "chunk", "Demonstrations have it.")
        # The network reads all env steps of a chunk: what is no number in one spoils the others.
        chunk = chunk.masked_fill(~valid & ~torch.isfinite(chunk), 0.0)
        with self.actor_network_params.to_module(self.actor_network, preserve_module_state=False):
            error = self.actor_network.flow_matching_error(tensordict, chunk)
        if self.check_finite:
            names = {"the expert's chunk": chunk, "velocity error": error}
            remedy = "Look at the demonstrations, and at the weights."
            ranges = [ValueRange(k, v, -FINITE, FINITE, remedy) for k, v in names.items()]
            check_ranges(ranges, tensordict, chunk.shape[:-2].numel())
        out = TensorDict({"loss_bc": self._reduce_loss(error, mask=valid)})
        self._clear_weakrefs(tensordict, out, "actor_network_params")
        return out
