# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The weight store as a TorchRL weight-sync scheme."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import nn
from torchrl.weight_update.weight_sync_schemes import (
    WeightSyncScheme,
    register_weight_sync_backend,
)

from torchrl_dvla.weight_update.binding import memory_of
from torchrl_dvla.weight_update.broadcast import WeightBroadcast
from torchrl_dvla.weight_update.layout import WeightSource
from torchrl_dvla.weight_update.reader import WeightReader
from torchrl_dvla.weight_update.scalars import store_scalars
from torchrl_dvla.weight_update.store import WeightStore
from torchrl_dvla.weight_update.transport import (
    BeforeCall,
    StoreTransport,
    as_source,
    asks_for_weights,
    received_model,
    sent_model,
    tell_version,
)

__all__ = ["AsyncWeightUpdater"]

_BEFORE, _AFTER = "before", "after"


@register_weight_sync_backend("dvla")
class AsyncWeightUpdater(WeightSyncScheme):
    """Publishes weights that readers adopt on their own time: nobody waits for anybody.

    A :class:`~torchrl.weight_update.WeightSyncScheme` over a :class:`WeightStore`. ``send`` (which
    a collector's ``update_policy_weights_()`` calls) is :meth:`publish`: one copy into shared
    memory. A receiver adopts the newest version just before its policy is called, so a version
    changes between two calls and never within one; all readers of a node share the slots' memory.

    It is used unchanged in three places:

    - ``DVLACollector(..., weight_sync_schemes={"policy": updater})``;
    - TorchRL's ``Collector`` and ``MultiCollector``, by the same argument. Workers point their
      policy at the store. A single-process ``Collector`` copies into its policy, if that is not the
      very module that is published;
    - TorchRL's ``InferenceServer`` and ``ProcessInferenceServer``, which ask for weights between
      two batches: ``updater.init_on_sender(model=..., num_workers=1)``, then
      ``weight_sync=updater.receiver(0)``.

    Keyword Args:
        num_slots (int): see :class:`WeightStore`. Default: 3.
        store (WeightStore, optional): an existing store; the default makes one in
            ``init_on_sender``, with the arguments that follow.
        trainable_only (bool): frozen parameters travel once. Default: ``False``.
        lora_only (bool): everything but low-rank adapters travels once. Default: ``False``.
        transport_dtype (torch.dtype, optional): stored precision.
        check_finite (bool): refuse NaN and infinite weights. Default: ``True``.
        checksum (bool): verify each adoption. Default: ``False``.
        first_version (int): number of the first version. Default: 0.

    Examples:
        >>> from torchrl.weight_update import WeightSyncScheme
        >>> from torchrl_dvla.weight_update import AsyncWeightUpdater
        >>> updater = WeightSyncScheme.from_backend("dvla")
        >>> trained, served = nn.Linear(2, 1), nn.Linear(2, 1)
        >>> updater.init_on_sender(model=trained, num_workers=1)
        >>> updater.connect()
        >>> reader = updater.reader("mine")
        >>> updater.publish(), reader.adopt_into(served)
        (1, 1)
        >>> updater.versions()
        {'worker 0': -1, 'mine': 1}
        >>> reader.close(); updater.shutdown()
    """

    def __init__(
        self,
        *,
        num_slots: int = 3,
        store: WeightStore | None = None,
        trainable_only: bool = False,
        lora_only: bool = False,
        transport_dtype: torch.dtype | None = None,
        check_finite: bool = True,
        checksum: bool = False,
        first_version: int = 0,
    ) -> None:
        super().__init__(strategy="tensordict")
        self._store = store
        self._owns_store = store is None
        self._num_slots = num_slots
        self._store_options: dict[str, Any] = {
            "trainable_only": trainable_only,
            "lora_only": lora_only,
            "transport_dtype": transport_dtype,
            "check_finite": check_finite,
            "checksum": checksum,
            "first_version": first_version,
        }
        self._source: WeightSource | None = None
        self.broadcast: WeightBroadcast | None = None
        self._readers: dict[int, WeightReader] = {}
        self._reader: WeightReader | None = None
        self._hooks: dict[str, dict[int, Callable[[int], None]]] = {_BEFORE: {}, _AFTER: {}}
        self._local_policy: weakref.ref[nn.Module] | None = None
        self._local_is_behind = False
        self._before_call: BeforeCall | None = None

    # -- the learner's side --------------------------------------------------------------------

    @property
    def store(self) -> WeightStore:
        """The store.

        Raises:
            RuntimeError: on a receiver, or before ``init_on_sender``.
        """
        if self._store is None:
            raise RuntimeError(
                "AsyncWeightUpdater has no store here. Call init_on_sender(model=...) in the "
                "learner's process, or hand the updater to a collector."
            )
        return self._store

    @property
    def version(self) -> int:
        """The version published last; on a receiver, the one adopted last."""
        if self._store is None and self._reader is not None:
            return self._reader.version
        return self.store.version

    def publish(self, weights: WeightSource | None = None, *, version: int | None = None) -> int:
        """Copy the weights into the store and return at once.

        Large ones are looked at afterwards, see :meth:`WeightStore.publish`, which also lists what
        it raises.

        Args:
            weights (optional): a module, its tensordict, or a flat or nested dict of tensors; the
                default is the model that the updater was initialised with.

        Keyword Args:
            version (int, optional): the number to give; it must grow. The default is the next one.

        Returns:
            the version.
        """
        source = self._source if weights is None else as_source(weights)
        for hook in list(self._hooks[_BEFORE].values()):
            hook(self.store.version)
        version = self.store.publish(source, version=version)
        policy = self._local_policy() if self._local_policy is not None else None
        self._local_is_behind = policy is not None and not self.store.publishes_from(
            memory_of(policy)
        )
        for hook in list(self._hooks[_AFTER].values()):
            hook(version)
        return version

    def send(self, weights: Any = None, worker_ids: int | list[int] | None = None) -> None:
        """Publish; what TorchRL's ``update_policy_weights_`` calls.

        Raises:
            ValueError: if ``worker_ids`` names only some of the workers: all share one version.
        """
        if worker_ids is not None:
            ids = {worker_ids} if isinstance(worker_ids, int) else set(worker_ids)
            if not ids.issuperset(self._readers):
                raise ValueError(
                    f"worker_ids must be None or all workers, got {worker_ids}. The readers of a "
                    "store share one copy of the weights; use one updater for each group."
                )
        self.publish(weights)

    def reader(self, name: str | int) -> WeightReader:
        """A new reader of the store, for a process or thread that is no TorchRL worker."""
        return self.store.reader(name)

    def open_broadcast(self, **options: Any) -> WeightBroadcast:
        """Bring every version to other nodes, too; :attr:`broadcast` from now on.

        It is one more reader of the store and wants a slot more: ``num_slots=4``.

        Args:
            **options: see :class:`WeightBroadcast`. It ends with the updater.

        Raises:
            RuntimeError: if there is one already.
        """
        if self.broadcast is not None:
            raise RuntimeError(
                f"AsyncWeightUpdater has a broadcast at {self.broadcast.address} already. Let all "
                "nodes join that one."
            )
        self.broadcast = WeightBroadcast(self.store.reader("broadcast"), **options)
        return self.broadcast

    def receiver(self, worker_idx: int) -> AsyncWeightUpdater:
        """The receiving end of worker ``worker_idx``, for a TorchRL part that takes a scheme.

        Raises:
            ValueError: if ``num_workers`` in ``init_on_sender`` did not provide for it.
        """
        if worker_idx not in self._readers:
            raise ValueError(
                f"worker_idx must be one of {sorted(self._readers)}, got {worker_idx}. Give "
                "init_on_sender a larger num_workers."
            )
        twin = type(self).__new__(type(self))
        twin.__setstate__(self.__getstate__())
        return twin

    def finish(self) -> None:
        """Wait until what was published can be adopted; see :meth:`WeightStore.finish`."""
        self.store.finish()

    def wait(self, version: int | None = None, timeout_s: float = 60.0) -> None:
        """Wait until every reader adopted ``version``; see :meth:`WeightStore.wait`."""
        self.store.wait(version, timeout_s)

    def versions(self) -> dict[str, int]:
        """The version that each reader acts with; -1 before its first."""
        return self.store.adopted_versions()

    def lag(self) -> dict[str, int]:
        """How many versions each reader is behind the one published last."""
        return {name: self.store.version - version for name, version in self.versions().items()}

    def stats(self) -> dict[str, float]:
        """Scalars of both sides, see :func:`~torchrl_dvla.weight_update.scalars.store_scalars`."""
        return store_scalars(self.store)

    def pause(self) -> None:
        """Keep readers at what they have: later versions are taken, but not offered."""
        self.store.pause()

    def resume(self) -> None:
        """Offer the newest version taken since :meth:`pause`."""
        self.store.resume()

    def register_publish_hook(
        self, hook: Callable[[int], None], *, when: str = "after"
    ) -> contextlib.ExitStack:
        """Have ``hook(version)`` called in the publishing thread.

        Args:
            hook (callable): gets the last version (``"before"``) or the new one (``"after"``).

        Keyword Args:
            when (str): ``"before"`` or ``"after"``. Default: ``"after"``.

        Returns:
            call its ``close()`` to remove the hook.

        Raises:
            ValueError: for another ``when``.
        """
        if when not in self._hooks:
            raise ValueError(f"when must be 'before' or 'after', got {when!r}. Choose one.")
        hooks = self._hooks[when]
        key = max(hooks, default=-1) + 1
        hooks[key] = hook
        handle = contextlib.ExitStack()
        handle.callback(hooks.pop, key, None)
        return handle

    # -- TorchRL's contract --------------------------------------------------------------------

    def _init_on_sender_impl(
        self,
        *,
        model_id: str | None = None,
        context: Any = None,
        model: nn.Module | None = None,
        weights: TensorDictBase | None = None,
        num_workers: int | None = None,
        devices: list[torch.device] | None = None,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("params_map") is not None or kwargs.get("device_map_fn") is not None:
            raise ValueError(
                "AsyncWeightUpdater must be given one model or weights, got weights per worker "
                "(params_map or device_map_fn). Readers move the weights to their own device."
            )
        self.model_id = model_id or "policy"
        if context is not None:
            self.context = context
            if num_workers is None:
                num_workers = getattr(context, "num_workers", 0)
            if model is None and weights is None:
                model = sent_model(context, self.model_id)
        if num_workers is None:
            num_workers = len(devices) if devices is not None else 0
        self._source = weights if weights is not None else model
        if self._store is None:
            if self._source is None:
                raise ValueError(
                    "model or weights must be given, got neither and no context that has a policy. "
                    "Call init_on_sender(model=policy, num_workers=...)."
                )
            self._store = WeightStore(self._source, self._num_slots, **self._store_options)
        self._readers = {
            index: self._store.reader(f"worker {index}") for index in range(num_workers)
        }
        if context is not None and num_workers == 0:
            self._serve_locally(received_model(context, self.model_id))

    def _setup_connection_and_weights_on_sender_impl(
        self, *, worker_idx: int | None = None, weights: Any | None = None
    ) -> None:
        if weights is not None:
            self.publish(weights)
            self.finish()  # receivers begin with these

    def _init_on_receiver_impl(
        self,
        model_id: str,
        context: Any = None,
        worker_idx: int | None = None,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        self.model_id = model_id
        if context is not None:
            self.context = context
            if model is None:
                model = received_model(context, model_id)
            if worker_idx is None:
                worker_idx = getattr(context, "worker_idx", None)
        if worker_idx not in self._readers:
            raise ValueError(
                f"worker_idx must be one of {sorted(self._readers)}, got {worker_idx}. Give "
                "init_on_sender the number of workers."
            )
        self.worker_idx = worker_idx
        self._reader = self._readers[worker_idx]
        self._receiver_transport = self.create_transport(reader=self._reader)
        if model is not None:
            self.model = model

    def _setup_connection_and_weights_on_receiver_impl(
        self, *, worker_idx: int | None = None
    ) -> None:
        self._follow(self.model)

    def create_transport(self, **kwargs: Any) -> StoreTransport:
        """A transport over ``store`` or ``reader``."""
        return StoreTransport(**kwargs)

    @property
    def model(self) -> Any:
        """The module that receives, see :class:`WeightSyncScheme`."""
        return WeightSyncScheme.model.fget(self)

    @model.setter
    def model(self, model: Any) -> None:
        WeightSyncScheme.model.fset(self, model)
        # A collector may swap the policy for its own copy after it connected.
        if model is not None and self.synchronized_on_receiver:
            self._follow(model)

    def receive(self, timeout: float | None = None) -> TensorDictBase | None:
        """Adopt the newest version, if it is new; never waits.

        Args:
            timeout (optional): not used.

        Returns:
            the weights, as views on the store, or None if there was nothing new.

        Raises:
            RuntimeError: on a sender.
        """
        return TensorDict.from_module(self.model) if self._adopt() else None

    def shutdown(self) -> None:
        """Close what this side owns: the store of a sender, the reader of a receiver."""
        super().shutdown()
        if self._before_call is not None:
            self._before_call.remove()
        if self._reader is not None:
            self._reader.close()
        if self.broadcast is not None:
            self.broadcast.close()
        if self._store is not None and self._owns_store:
            self._store.close()

    def _follow(self, model: nn.Module) -> None:
        """Keep ``model`` at the newest version from now on."""
        self._adopt()
        if asks_for_weights(self.context):
            return
        if self._before_call is None or not self._before_call.serves(model):
            if self._before_call is not None:
                self._before_call.remove()
            self._before_call = BeforeCall(self._receive_before_call, model)

    def _receive_before_call(self) -> None:
        self._adopt()

    def _adopt(self) -> bool:
        if self._reader is None or self._receiver_transport is None:
            raise RuntimeError("receive() needs a receiver. Call init_on_receiver first.")
        is_new = self._receiver_transport.adopt(self.model)
        if is_new and self.context is not None:
            tell_version(self.context, self.model_id or "policy", self._reader.version, self.model)
        return is_new

    def _serve_locally(self, policy: Any) -> None:
        """A single-process collector acts with ``policy`` here, beside the learner."""
        if isinstance(policy, nn.Module):
            self._local_policy = weakref.ref(policy)
            self._reader = self.store.reader("collector")
            self._before_call = BeforeCall(self._copy_before_call, policy)

    def _copy_before_call(self) -> None:
        policy = self._local_policy() if self._local_policy is not None else None
        if policy is not None and self._local_is_behind and self._reader is not None:
            self.finish()
            # In the thread that runs the policy, and by copy: its parameters may be under training.
            version = self._reader.adopt_into(policy, copy=True)
            self._local_is_behind = version < self.store.version

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        # A receiver takes its reader along, not the learner's end.
        state.update(_store=None, broadcast=None, _source=None, _reader=None, _before_call=None)
        state.update(_local_policy=None, _local_is_behind=False, _receiver_transport=None)
        state["_hooks"] = {_BEFORE: {}, _AFTER: {}}
        return state
