# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The weight store as a TorchRL weight-sync scheme."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from tensordict import TensorDict, TensorDictBase
from torch import nn
from torchrl.weight_update.utils import _resolve_model
from torchrl.weight_update.weight_sync_schemes import (
    WeightSyncScheme,
    register_weight_sync_backend,
)

from torchrl_dvla.weight_update.reader import WeightReader, memory_of
from torchrl_dvla.weight_update.store import WeightStore, check_options
from torchrl_dvla.weight_update.weight_layout import WeightSource

if TYPE_CHECKING:
    from torchrl_dvla.memory import ModelPool

__all__ = ["AsyncWeightUpdater", "StoreTransport"]


def _read_only(name: str, remedy: str) -> property:
    """TorchRL's property ``name``, whose setter would have no effect on a store."""

    def refuse(self: AsyncWeightUpdater, value: Any) -> NoReturn:
        raise NotImplementedError(f"{name} must be left as it is, got another value. {remedy}")

    inherited: property = getattr(WeightSyncScheme, name)
    return property(inherited.fget, refuse, doc=inherited.__doc__)


@register_weight_sync_backend("dvla")
class AsyncWeightUpdater(WeightSyncScheme):
    """Weight-sync scheme over a :class:`WeightStore`: nobody waits for anybody.

    ``send`` (which a collector's ``update_policy_weights_()`` calls) is :meth:`publish`: one copy
    into shared memory, visible when it returns. A receiver adopts the latest version just before
    its policy is called, so a version changes between two calls and never within one; all readers
    of a node share the slots' memory.

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
            ``init_on_sender``.
        model_pool (ModelPool, optional): gives the store's shared memory, within its budget. It
            may be set until ``init_on_sender``. Default: none.
        **store_options: further arguments of the :class:`WeightStore` that is made:
            ``trainable_only``, ``lora_only``, ``transport_dtype``, ``check_finite``,
            ``max_readers``, ``first_version``.

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
        >>> updater.stats()["mine_lag"]
        0
        >>> reader.close(); updater.shutdown()
    """

    def __init__(
        self,
        *,
        num_slots: int = 3,
        store: WeightStore | None = None,
        model_pool: ModelPool | None = None,
        **store_options: Any,
    ) -> None:
        super().__init__(strategy="tensordict")
        # An argument that WeightStore does not have is refused here, not in init_on_sender.
        inspect.signature(WeightStore).bind_partial(None, num_slots, **store_options)
        check_options(num_slots=num_slots, **store_options)
        self.num_slots = num_slots
        self.model_pool = model_pool
        self._store = store
        self._owns_store = store is None
        self._store_options = store_options
        self._source: WeightSource | None = None
        self._readers: dict[int, WeightReader] = {}
        self._reader: WeightReader | None = None
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

    def publish(
        self,
        weights: WeightSource | Iterator[tuple[str, torch.Tensor]] | None = None,
        *,
        version: int | None = None,
    ) -> int:
        """Copy the weights into the store; see :meth:`WeightStore.publish` for what it raises.

        Args:
            weights (optional): a module, its tensordict, or a flat or nested dict of tensors; the
                default is the model that the updater was initialised with. Or an iterator of names
                and tensors, each of which is copied before the next one is asked for.

        Keyword Args:
            version (int, optional): the number to give; it must grow. The default is the next one.

        Returns:
            the version.
        """
        source = weights if isinstance(weights, Iterator) else _as_source(weights)
        source = self._source if weights is None else source
        version = self.store.publish(source, version=version)
        policy = self._local_policy() if self._local_policy is not None else None
        self._local_is_behind = policy is not None and not self.store.publishes_from(
            memory_of(policy)
        )
        return version

    def send(self, weights: Any = None, worker_ids: int | list[int] | None = None) -> None:
        """Publish; what TorchRL's ``update_policy_weights_`` calls.

        Raises:
            ValueError: if ``worker_ids`` names only some of the workers: all share one version.
            RuntimeError: on a receiver, or before ``connect``.
        """
        if not self.synchronized_on_sender:
            raise RuntimeError(
                "send() needs a sender that is connected. Call init_on_sender() and connect()."
            )
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

    def wait(self, version: int | None = None, timeout_s: float = 60.0) -> None:
        """Wait until every reader adopted ``version``; see :meth:`WeightStore.wait`."""
        self.store.wait(version, timeout_s)

    def stats(self) -> dict[str, float]:
        """Scalars of both sides, see :meth:`WeightStore.scalars`."""
        return self.store.scalars()

    def store_bytes(self, model: WeightSource) -> int:
        """Bytes of shared memory that a store of ``model`` will take; 0 if one was given."""
        if self._store is not None:
            return 0
        return WeightStore.bytes_for(model, self.num_slots, **self._store_options)

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
                model = _sent_model(context, self.model_id)
        if num_workers is None:
            num_workers = len(devices) if devices is not None else 0
        self._source = weights if weights is not None else model
        if model is not None:
            self.model = model
        if self._store is None:
            if self._source is None:
                raise ValueError(
                    "model or weights must be given, got neither and no context that has a policy. "
                    "Call init_on_sender(model=policy, num_workers=...)."
                )
            self._store = WeightStore(
                self._source,
                self.num_slots,
                model_pool=self.model_pool,
                **self._store_options,
            )
        self._readers = {
            index: self._store.reader(f"worker {index}") for index in range(num_workers)
        }
        if context is not None and num_workers == 0:
            self._serve_locally(_received_model(context, self.model_id))

    def _setup_connection_and_weights_on_sender_impl(
        self, *, worker_idx: int | None = None, weights: Any | None = None
    ) -> None:
        if weights is not None:
            self.publish(weights)

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
                model = _received_model(context, model_id)
            if worker_idx is None:
                worker_idx = getattr(context, "worker_idx", None)
        if worker_idx not in self._readers:
            raise ValueError(
                f"worker_idx must be one of {sorted(self._readers)}, got {worker_idx}. Give "
                "init_on_sender the number of workers."
            )
        self.worker_idx = worker_idx
        self._reader = self._readers[worker_idx]
        if model is not None:
            self.model = model

    def _setup_connection_and_weights_on_receiver_impl(
        self, *, worker_idx: int | None = None
    ) -> None:
        if worker_idx not in (None, self.worker_idx):
            raise ValueError(
                f"worker_idx must be init_on_receiver's, {self.worker_idx}, got {worker_idx}. "
                "Leave it out."
            )
        self._follow(self.model)

    def create_transport(self, **kwargs: Any) -> StoreTransport:
        """This updater behind TorchRL's ``TransportBackend`` interface."""
        return StoreTransport(self)

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
        """Adopt the latest version, if it is new; never waits.

        Args:
            timeout (optional): ``None`` or 0.

        Returns:
            the weights, as views on the store, or None if there was nothing new.

        Raises:
            RuntimeError: on a sender, or before ``connect``.
            ValueError: for a timeout to wait for.
        """
        if timeout:
            raise ValueError(
                f"timeout must be None or 0, got {timeout}. receive() never waits: call it again, "
                "or wait() on the sender."
            )
        if not self.synchronized_on_receiver:
            raise RuntimeError(
                "receive() needs a receiver that is connected. Call init_on_receiver() and "
                "connect() first."
            )
        return TensorDict.from_module(self.model) if self._adopt() else None

    def apply_weights(self, weights: Any, inplace: bool = True) -> NoReturn:
        """Refuse to write to a receiver's model: its parameters may be the store's memory."""
        raise NotImplementedError(
            "apply_weights would write into what other readers of the store read. Publish the "
            "weights on the sender, or copy them into a module that does not receive."
        )

    strategy = _read_only("strategy", "The store takes modules, tensordicts and dicts alike.")
    weights = _read_only("weights", "Pass them to publish() or send() on the sender.")
    shared_transport = _read_only("shared_transport", "The store is what all workers share.")

    def shutdown(self) -> None:
        """Close what this side owns: the store of a sender, the reader of a receiver."""
        super().shutdown()
        if self._before_call is not None:
            self._before_call.remove()
        if self._reader is not None:
            self._reader.close()
        if self._store is not None and self._owns_store:
            self._store.close()

    def _follow(self, model: nn.Module) -> None:
        """Keep ``model`` at the latest version from now on."""
        self._adopt()
        if hasattr(self.context, "_poll_weight_update"):
            return  # a server: it calls receive() by itself between two batches
        if self._before_call is None or not self._before_call.serves(model):
            if self._before_call is not None:
                self._before_call.remove()
            self._before_call = BeforeCall(self._receive_before_call, model)

    def _receive_before_call(self) -> None:
        self._adopt()

    def _adopt(self) -> bool:
        """Let the model read the latest version; whether it is another than before."""
        if self._reader is None:
            raise RuntimeError("receive() needs a receiver. Call init_on_receiver first.")
        previous = self._reader.version
        is_new = self._reader.adopt_into(self.model) != previous
        if is_new and self.context is not None:
            _report_version(
                self.context, self.model_id or "policy", self._reader.version, self.model
            )
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
            # In the thread that runs the policy, and by copy: its parameters may be under training.
            version = self._reader.adopt_into(policy, copy=True)
            self._local_is_behind = version < self.store.version

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        # A receiver takes its reader along, not the learner's end.
        state.update(_store=None, _source=None, _reader=None, _before_call=None)
        state.update(_local_policy=None, _local_is_behind=False, model_pool=None)
        return state


class StoreTransport:
    """An updater behind TorchRL's ``TransportBackend`` interface.

    Args:
        updater (AsyncWeightUpdater): of the side that sends or receives.
    """

    def __init__(self, updater: AsyncWeightUpdater) -> None:
        self._updater = updater

    def send_weights(self, weights: Any) -> None:
        """Publish ``weights``."""
        self._updater.publish(weights)

    def receive_weights(self, timeout: float | None = None, **kwargs: Any) -> TensorDictBase | None:
        """Adopt the latest version; its weights, or None if there was nothing new."""
        return self._updater.receive(timeout)


class BeforeCall:
    """Forward pre-hook that stays with one module: copies and pickles of the module lose it.

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


def _sent_model(context: Any, model_id: str) -> nn.Module | None:
    """The module that a collector's user trains."""
    # A single-process collector whose policy moved to another device keeps the user's own aside.
    original = getattr(context, "_orig_policy", None) if model_id == "policy" else None
    if isinstance(original, nn.Module):
        return original
    try:
        model = _received_model(context, model_id)
    except (AttributeError, ValueError):
        model = None
    if model is None and model_id == "policy":
        # Only factories were given: the workers begin with the weights of the first one's policy.
        factories = [f for f in getattr(context, "policy_factory", None) or [] if f is not None]
        model = factories[0]() if factories else None
    return model if isinstance(model, nn.Module) else None


def _received_model(context: Any, model_id: str) -> Any:
    """The module that a collector or server acts with."""
    if hasattr(context, "get_model"):
        return context.get_model(model_id)
    return _resolve_model(context, model_id)


def _report_version(context: Any, model_id: str, version: int, model: nn.Module) -> None:
    """Tell a collector or server which version its policy has now."""
    if hasattr(context, "_mark_weight_update"):
        context._mark_weight_update(version)
    elif hasattr(context, "_set_received_policy_version"):
        context._set_received_policy_version(version)
    if getattr(context, "_weight_sync_schemes", None):  # it has workers of its own
        context.update_policy_weights_(
            model_id=model_id, policy_or_weights=TensorDict.from_module(model)
        )


def _as_source(weights: Any) -> WeightSource | None:
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
