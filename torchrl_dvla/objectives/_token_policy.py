# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What losses over action tokens share: reading a batch of decisions, running the policy on it."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, TensorDictParams
from tensordict.nn import TensorDictModuleBase
from torch import distributions as d
from torchrl.objectives.common import LossModule

from torchrl_dvla import functional as F

__all__ = ["TokenPolicyLoss", "masked_log_ratio"]

_WRITERS = {
    "action": "The policy writes it while collecting",
    "sample_log_prob": (
        "The policy writes it while collecting if it was built with log_probs_mode='token'"
    ),
    "advantage": "Group assembly writes it, see torchrl_dvla.functional.group_advantage",
    "proximal_log_prob": (
        "Call loss.write_proximal_log_prob(batch) on every batch before its first optimiser step, "
        "or use importance='behavior'"
    ),
    "ref_log_prob": "Pass reference_network, or write the reference's log-probabilities beforehand",
    "weight": "It was asked for by set_keys(weight=...); set_keys(weight=None) turns it off",
}


class TokenPolicyLoss(LossModule):
    """Base of losses over the tokens ``[*B, chunk, A]`` of chunked decisions.

    Holds the trained policy and, optionally, a frozen reference. Keys are those of the subclass.
    """

    actor_network: TensorDictModuleBase
    actor_network_params: TensorDictParams
    target_actor_network_params: TensorDictParams  # never made; TorchRL warns if not declared
    reference_network: TensorDictModuleBase | None
    reference_network_params: TensorDictParams
    #: The learner's version, for the lag metrics; set it after each publish.
    version: int | None = None

    def __init__(
        self,
        actor_network: TensorDictModuleBase,
        reference_network: TensorDictModuleBase | None = None,
    ) -> None:
        super().__init__()
        self._in_keys: list[NestedKey] | None = None
        self._out_keys: list[NestedKey] | None = None
        self.convert_to_functional(actor_network, "actor_network")
        # Kept out of _modules, and its weights registered as buffers: an optimiser built on
        # loss.parameters() must never see them, yet loss.to(device) must move them.
        self.__dict__["reference_network"] = reference_network
        if reference_network is not None:
            params = TensorDict.from_module(reference_network).data
            self.reference_network_params = TensorDictParams(params, no_convert=True)

    def _forward_value_estimator_keys(self, **kwargs: Any) -> None:
        self._in_keys = None  # set_keys ends here: what it changed must be listed again

    @property
    def in_keys(self) -> list[NestedKey]:
        """Entries that are read, optional ones included."""
        if self._in_keys is None:
            self._in_keys = list(dict.fromkeys(self._list_in_keys()))
        return self._in_keys

    @in_keys.setter
    def in_keys(self, values: list[NestedKey]) -> None:
        self._in_keys = values

    @property
    def out_keys(self) -> list[NestedKey]:
        """Entries that are always written."""
        if self._out_keys is None:
            self._out_keys = self._list_out_keys()
        return self._out_keys

    @out_keys.setter
    def out_keys(self, values: list[NestedKey]) -> None:
        self._out_keys = values

    def _list_in_keys(self) -> list[NestedKey]:
        raise NotImplementedError

    def _list_out_keys(self) -> list[NestedKey]:
        raise NotImplementedError

    # -- reading a batch -------------------------------------------------------------------------
    def _get(self, tensordict: TensorDictBase, name: str) -> torch.Tensor:
        key = getattr(self.tensor_keys, name)
        value = tensordict.get(key, None)
        if value is None:
            raise KeyError(
                f"the batch must hold {name} under {key!r}, got {_leaves(tensordict)}. "
                f"{_WRITERS[name]}."
            )
        return value

    def _mask(self, tensordict: TensorDictBase, tokens: torch.Tensor) -> torch.Tensor:
        """Boolean ``[*B, chunk, A]``, ``True`` = the token was executed and counts."""
        pad = tensordict.get(self.tensor_keys.pad_mask, None)
        if pad is None:
            mask = torch.ones_like(tokens, dtype=torch.bool)
        else:
            if pad.shape != tokens.shape[:-1]:
                raise ValueError(
                    f"{self.tensor_keys.pad_mask!r} must have shape {list(tokens.shape[:-1])} "
                    f"(one flag per env step of the chunk), got {list(pad.shape)}. Is the "
                    "environment's chunk size that of the policy?"
                )
            mask = F.executed_mask(pad, tokens.shape[-1])
        # Padding that TorchRL's own samplers leave behind, see LossModule.loss_mask_key.
        for key in self._loss_mask_keys():
            valid = tensordict.get(key, None)
            if valid is not None:
                valid = valid.reshape(*tokens.shape[:-2], 1, 1)
                mask = mask & valid
        return mask

    def _row_weight(self, tensordict: TensorDictBase) -> torch.Tensor | None:
        if self.tensor_keys.weight is None:
            return None
        return self._get(tensordict, "weight").unsqueeze(-1)

    def _policy_lag(self, tensordict: TensorDictBase) -> dict[str, torch.Tensor]:
        stamped = tensordict.get(self.tensor_keys.policy_version, None)
        if self.version is None or stamped is None:
            return {}
        lag = (self.version - stamped).float()
        return {"policy_lag_mean": lag.mean(), "policy_lag_max": lag.max()}

    # -- running a policy ------------------------------------------------------------------------
    def _dist(
        self,
        tensordict: TensorDictBase,
        network: TensorDictModuleBase,
        params: TensorDictParams,
    ) -> d.Distribution:
        """Distribution of the single tokens ``[*B, chunk, A]``, from one forward of *network*."""
        # Only what the policy declares to read, and its token mask. Logits that were stored while
        # collecting must not get through: get_dist would take them for its own, and the loss would
        # have no gradient.
        keys = list(network.in_keys)
        mask_key = getattr(getattr(network, "tensor_keys", None), "action_mask", None)
        if mask_key is not None and tensordict.get(mask_key, None) is not None:
            keys.append(mask_key)
        try:
            inputs = tensordict.select(*keys)
        except KeyError as error:
            raise KeyError(
                f"the batch must hold the policy's inputs {network.in_keys}, got "
                f"{_leaves(tensordict)}. Environment workers write observations; sampling the "
                "buffer rebuilds the instruction from its id."
            ) from error
        with params.to_module(network, preserve_module_state=False):
            dist = network.get_dist(inputs)
        while isinstance(dist, d.Independent):  # log_probs_mode="sequence" sums over the chunk
            dist = dist.base_dist
        return dist

    @torch.no_grad()
    def write_proximal_log_prob(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Make the present policy the proximal one for these decisions (``"decoupled"``).

        Call it before the first optimiser step on the data, once for all of its epochs.

        Args:
            tensordict (TensorDictBase): decisions ``[*B]``.

        Returns:
            TensorDictBase: *tensordict*, with ``proximal_log_prob`` ``[*B, chunk, A]``.
        """
        dist = self._dist(tensordict, self.actor_network, self.actor_network_params)
        log_prob = dist.log_prob(self._get(tensordict, "action"))
        return tensordict.set(self.tensor_keys.proximal_log_prob, log_prob)

    def _kl_to_ref(
        self,
        tensordict: TensorDictBase,
        dist: d.Distribution,
        log_prob: torch.Tensor,
        tokens: torch.Tensor,
        mask: torch.Tensor,
    ) -> torch.Tensor:
        """Divergence of the learner's policy from the reference ``[*B, chunk, A]``."""
        if self.reference_network is None:
            ref_log_prob = self._get(tensordict, "ref_log_prob")
        else:
            with torch.no_grad():
                ref_dist = self._dist(
                    tensordict, self.reference_network, self.reference_network_params
                )
            if self.kl_estimator == "exact":
                return d.kl_divergence(dist, ref_dist)
            ref_log_prob = ref_dist.log_prob(tokens)
        # The estimators want log p - log q for tokens drawn from q, the learner's policy.
        log_ratio = -masked_log_ratio(log_prob, ref_log_prob, mask)
        return F.kl_k2(log_ratio) if self.kl_estimator == "k2" else F.kl_k3(log_ratio)


def _leaves(tensordict: TensorDictBase) -> list[NestedKey]:
    return list(tensordict.keys(include_nested=True, leaves_only=True))


def masked_log_ratio(
    log_prob: torch.Tensor, other: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """Log-ratios ``[*B, chunk, A]``; zero where masked, whatever the padding holds."""
    return F.log_ratio(log_prob.masked_fill(~mask, 0.0), other.masked_fill(~mask, 0.0))
