# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What TorchRL's collectors and servers expect around a weight store."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import nn
from torchrl.weight_update.utils import _resolve_model

from torchrl_dvla.weight_update.layout import WeightSource
from torchrl_dvla.weight_update.reader import WeightReader
from torchrl_dvla.weight_update.store import WeightStore

__all__ = ["BeforeCall", "StoreTransport"]


class StoreTransport:
    """A weight store behind TorchRL's ``TransportBackend`` interface.

    Keyword Args:
        store (WeightStore, optional): for sending.
        reader (WeightReader, optional): for receiving.
    """

    def __init__(
        self, *, store: WeightStore | None = None, reader: WeightReader | None = None
    ) -> None:
        self._store = store
        self._reader = reader

    def send_weights(self, weights: WeightSource) -> None:
        """Publish ``weights``."""
        if self._store is None:
            raise RuntimeError("This transport only receives. Send through the learner's updater.")
        self._store.publish(weights)

    def receive_weights(
        self,
        timeout: float | None = None,
        *,
        weights: Any = None,
        model: nn.Module | None = None,
        strategy: Any = None,
    ) -> TensorDictBase | None:
        """Let ``model`` adopt the newest version; its weights, or None if there was nothing new."""
        if model is None:
            raise RuntimeError("Receiving needs a model. Call init_on_receiver first.")
        return TensorDict.from_module(model) if self.adopt(model) else None

    def adopt(self, model: nn.Module) -> bool:
        """Let ``model`` read the newest version; whether it is another than before.

        For those who do not want the weights: to gather them takes longer than to adopt them.
        """
        if self._reader is None:
            raise RuntimeError("Receiving needs a reader. Call init_on_receiver first.")
        previous = self._reader.version
        return self._reader.adopt_into(model) != previous


class BeforeCall:
    """A forward pre-hook that stays with one module: copies and pickles of the module lose it.

    Args:
        callback (callable): bound method of the owner, called before each forward pass.
        module (nn.Module): the module to hook.
    """

    def __init__(self, callback: Callable[[], None], module: nn.Module) -> None:
        self._callback = weakref.WeakMethod(callback)
        self._module = weakref.ref(module)
        self._handle = module.register_forward_pre_hook(self)

    def serves(self, module: nn.Module) -> bool:
        """Whether this is the hook of ``module``."""
        return self._module() is module

    def remove(self) -> None:
        """Unhook the module."""
        self._handle.remove()

    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: Any) -> None:
        callback = self._callback()
        if callback is not None and self._module() is module:
            callback()

    def __deepcopy__(self, memo: dict[int, Any]) -> BeforeCall:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _nothing_before_call, ()


def _do_nothing(module: nn.Module, args: Any) -> None:
    """What a pickled :class:`BeforeCall` becomes."""


def _nothing_before_call() -> Callable[[nn.Module, Any], None]:
    return _do_nothing


def sent_model(context: Any, model_id: str) -> nn.Module | None:
    """The module that a collector's user trains."""
    # A single-process collector whose policy moved to another device keeps the user's own aside.
    original = getattr(context, "_orig_policy", None) if model_id == "policy" else None
    if isinstance(original, nn.Module):
        return original
    try:
        model = received_model(context, model_id)
    except (AttributeError, ValueError):
        model = None
    if model is None and model_id == "policy":
        # Only factories were given: the workers begin with the weights of the first one's policy.
        factories = [f for f in getattr(context, "policy_factory", None) or [] if f is not None]
        model = factories[0]() if factories else None
    return model if isinstance(model, nn.Module) else None


def received_model(context: Any, model_id: str) -> Any:
    """The module that a collector or server acts with."""
    if hasattr(context, "get_model"):
        return context.get_model(model_id)
    return _resolve_model(context, model_id)


def asks_for_weights(context: Any) -> bool:
    """Whether ``context`` calls ``receive`` by itself between two batches, as servers do."""
    return hasattr(context, "_poll_weight_update")


def tell_version(context: Any, model_id: str, version: int, model: nn.Module) -> None:
    """Tell a collector or server which version its policy has now."""
    if hasattr(context, "_mark_weight_update"):
        context._mark_weight_update(version)
    elif hasattr(context, "_set_received_policy_version"):
        context._set_received_policy_version(version)
    if getattr(context, "_weight_sync_schemes", None):  # it has workers of its own
        context.update_policy_weights_(
            model_id=model_id, policy_or_weights=TensorDict.from_module(model)
        )


def as_source(weights: Any) -> WeightSource | None:
    """``weights`` as given to ``update_policy_weights_``, in a form that can be published.

    Raises:
        ValueError: for weights per worker.
    """
    if not isinstance(weights, Mapping) or isinstance(weights, TensorDictBase):
        return weights
    if any(isinstance(key, int) for key in weights):
        raise ValueError(
            f"weights must be the same for all workers, got weights per worker {list(weights)}. "
            "The readers of a store share one copy; use one updater for each group."
        )
    return TensorDict(dict(weights), batch_size=[])
