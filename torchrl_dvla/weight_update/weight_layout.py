# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Layout of parameters and buffers in a slot of the weight store."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias

import torch
from tensordict import TensorDict, TensorDictBase
from torch import nn
from torch.nn.parameter import is_lazy

from torchrl_dvla.weight_update.lora import find_lora_updates, is_adapter_name, plain_name

__all__ = ["Bucket", "Entry", "WeightLayout", "WeightSource", "named_weights"]

#: What can be published: a module, its weights as a tensordict, or a mapping of names to tensors.
WeightSource: TypeAlias = "nn.Module | TensorDictBase | Mapping[str, torch.Tensor]"

_ENTRY_ALIGNMENT_BYTES = 64
_PAGE_BYTES = 4096


def align(num_bytes: int, alignment: int = _PAGE_BYTES) -> int:
    """``num_bytes`` rounded up to a multiple of ``alignment``."""
    return -(-num_bytes // alignment) * alignment


def named_weights(source: WeightSource) -> dict[str, torch.Tensor]:
    """Every parameter and buffer of ``source`` by its dotted name, tied ones under each name.

    Args:
        source (nn.Module, TensorDictBase or mapping): where the weights are.

    Returns:
        names to the live tensors, in the order of the module.

    Raises:
        ValueError: if a parameter of a lazy module has no shape yet.

    Examples:
        >>> sorted(named_weights(nn.BatchNorm1d(2)))
        ['bias', 'num_batches_tracked', 'running_mean', 'running_var', 'weight']
    """
    if isinstance(source, TensorDictBase):
        weights = dict(source.flatten_keys(".").items())
    elif isinstance(source, nn.Module):
        weights = {
            name: tensor
            for name, tensor, _, _ in iter_weights(source)  # one name for each place in the module
        }
    else:
        weights = dict(source)
    for name, tensor in weights.items():
        if is_lazy(tensor):
            raise ValueError(
                f"weights must have known shapes, got the uninitialised {name!r}. Run the lazy "
                "module once before it is published or adopted into."
            )
    return weights


def iter_weights(
    module: nn.Module,
) -> Iterator[tuple[str, torch.Tensor, dict[str, torch.Tensor | None], str]]:
    """``(name, tensor, the owner's dictionary, key in it)`` of each parameter and buffer."""
    for prefix, owner in module.named_modules(remove_duplicate=False):
        dot = f"{prefix}." if prefix else ""
        for contents in (owner._parameters, owner._buffers):
            for key, tensor in contents.items():
                if tensor is not None:
                    yield dot + key, tensor, contents, key


@dataclasses.dataclass(frozen=True)
class Entry:
    """Tensor of the layout; tied weights are one entry with several names.

    Args:
        names (tuple of str): the names that share this tensor, the first one in module order first.
        shape (tuple of int): its shape.
        stride (tuple of int): the source's stride where that is dense, else the contiguous one.
        dtype (torch.dtype): what is stored, which ``transport_dtype`` may have narrowed.
        source_dtype (torch.dtype): what is published from.
        offset_bytes (int): from the start of its region.
        is_frozen (bool): stored once, outside the slots.
        is_buffer (bool): no parameter, though the source has parameters. It may be infinite, as
            attention masks are.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    source_dtype: torch.dtype
    offset_bytes: int
    is_frozen: bool
    is_buffer: bool = False

    @property
    def name(self) -> str:
        """The first of its names."""
        return self.names[0]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return torch.Size(self.shape).numel()

    def accepts(self, dtype: torch.dtype, *, as_reader: bool = False) -> bool:
        """Whether a tensor of ``dtype`` may be published here, or read into (floats are cast)."""
        if as_reader and self.dtype.is_floating_point:
            return dtype.is_floating_point
        return dtype == self.source_dtype


@dataclasses.dataclass(frozen=True)
class Bucket:
    """Contiguous run of one dtype, padding (which stays zero) included."""

    dtype: torch.dtype
    offset_bytes: int
    numel: int


class WeightLayout:
    """Order, alignment and dtypes of everything that a store publishes.

    Parameters and buffers are laid out once, contiguous by dtype; a tensor begins on a cache line.
    Dense source strides (``channels_last`` convolutions, transposed matrices) are kept, so that the
    copy of a publish is a plain run over memory.

    Args:
        source (nn.Module, TensorDictBase or mapping): the weights to lay out.

    Keyword Args:
        trainable_only (bool): put parameters with ``requires_grad=False`` in the frozen region,
            which is written once; buffers always travel. Default: ``False``.
        lora_only (bool): put everything but low-rank adapters there, whatever its
            ``requires_grad`` and buffers included; see :mod:`~torchrl_dvla.weight_update.lora`.
            Default: ``False``.
        transport_dtype (torch.dtype, optional): store floating-point weights in this dtype.

    Raises:
        ValueError: if there is no weight at all, nothing that would travel, or ``transport_dtype``
            is no floating-point dtype.

    Examples:
        >>> layout = WeightLayout(nn.Linear(3, 2))
        >>> [(entry.name, entry.shape, entry.offset_bytes) for entry in layout.entries]
        [('weight', (2, 3), 0), ('bias', (2,), 64)]
        >>> layout.weight_bytes
        32
        >>> print(*layout.differences(nn.Linear(3, 2, bias=False)))
        bias: missing
    """

    def __init__(
        self,
        source: WeightSource,
        *,
        trainable_only: bool = False,
        lora_only: bool = False,
        transport_dtype: torch.dtype | None = None,
    ) -> None:
        if transport_dtype is not None and not transport_dtype.is_floating_point:
            raise ValueError(
                f"transport_dtype must be a floating-point dtype, got {transport_dtype}. "
                "Use torch.bfloat16, or None to store weights as they are."
            )
        self.trainable_only = trainable_only
        self.lora_only = lora_only
        self.transport_dtype = transport_dtype
        groups: dict[tuple[object, ...], list[str]] = {}
        tensors: dict[str, torch.Tensor] = named_weights(source)
        for name, tensor in tensors.items():
            groups.setdefault(_identity(tensor), []).append(name)
        if not groups:
            raise ValueError(
                "source must have at least one parameter or buffer, got none. A policy without "
                "weights needs no weight store."
            )
        has_parameters = any(isinstance(tensor, nn.Parameter) for tensor in tensors.values())
        drafts = [
            _draft(names, tensors[names[0]], self, has_parameters) for names in groups.values()
        ]
        self.entries, self.buckets, self.slot_bytes = _place(drafts, frozen=False)
        frozen, _, self.frozen_bytes = _place(drafts, frozen=True)
        self.entries += frozen
        self.index_of = {
            name: index for index, entry in enumerate(self.entries) for name in entry.names
        }
        if not self.slot_bytes:
            what, remedy = "trainable_only", "are all frozen. Unfreeze the trained ones"
            if lora_only:
                what, remedy = "lora_only", "have no lora_A or lora_B among them. Add the adapters"
            raise ValueError(
                f"{what} must leave something to publish, got a source whose parameters {remedy} "
                "before the store is made."
            )
        #: What a reader without adapters calls the weights, and the adapted ones among them.
        self.plain_index_of = {
            plain_name(name): index
            for name, index in self.index_of.items()
            if not is_adapter_name(name)
        }
        self.lora_updates = (
            find_lora_updates(source, self.index_of) if isinstance(source, nn.Module) else {}
        )

    @property
    def weight_bytes(self) -> int:
        """Bytes that one publish copies, without padding."""
        return sum(e.numel * e.dtype.itemsize for e in self.entries if not e.is_frozen)

    def tensors_of(self, source: WeightSource) -> list[torch.Tensor]:
        """The source's tensors in the order of :attr:`entries`, as they are now.

        The source is walked anew at each call: a layer that was replaced since the last one is
        found, or refused by name.

        Raises:
            ValueError: listing every difference, if the source does not fit the layout.
        """
        weights = named_weights(source)
        if self.differences(weights):
            raise self.mismatch("source", weights)
        tensors = [weights[entry.name] for entry in self.entries]
        for entry, tensor in zip(self.entries, tensors, strict=True):
            if entry.is_frozen and tensor.requires_grad:
                raise ValueError(
                    f"source must keep {entry.name!r} frozen, got requires_grad=True: frozen "
                    "weights were published once, when the store was made. Unfreeze it before that."
                )
        return tensors

    def differences(self, source: WeightSource, *, as_reader: bool = False) -> list[str]:
        """One line for each name that ``source`` misses, adds, shapes, types or ties otherwise.

        A reader (``as_reader``) may keep floating-point weights in another precision, may leave
        tied what the store holds twice or the reverse, as long as every name finds its tensor, and
        may lack the adapters.
        """
        weights = named_weights(source)
        index_of = self.index_of
        if as_reader and self.is_without_adapters(weights):
            index_of = self.plain_index_of
        lines = [f"{name}: missing" for name in index_of if name not in weights]
        for name, tensor in weights.items():
            index = index_of.get(name)
            if index is None:
                lines.append(f"{name}: not in the store, shape {tuple(tensor.shape)}")
            elif tensor.shape != self.entries[index].shape:
                lines.append(
                    f"{name}: shape {tuple(tensor.shape)}, the store has "
                    f"{self.entries[index].shape}"
                )
            elif not self.entries[index].accepts(tensor.dtype, as_reader=as_reader):
                lines.append(
                    f"{name}: {tensor.dtype}, the store has {self.entries[index].source_dtype}"
                )
        if not as_reader:
            lines += [
                f"{', '.join(entry.names)}: one tensor in the store, several here"
                for entry in self.entries
                if len(entry.names) > 1 and not _is_tied(entry, weights)
            ]
        return lines

    def is_without_adapters(self, names: Iterable[str]) -> bool:
        """Whether ``names`` are those of the model without the adapters that the store has."""
        return bool(self.lora_updates) and not any(is_adapter_name(name) for name in names)

    def mismatch(
        self, argument: str, source: WeightSource, *, as_reader: bool = False
    ) -> ValueError:
        """The error that lists the differences."""
        lines = self.differences(source, as_reader=as_reader)
        listed = "\n  ".join(lines[:20] + ([f"... and {len(lines) - 20} more"] * (len(lines) > 20)))
        return ValueError(
            f"{argument} must have the parameters and buffers that the weight store was made from, "
            f"got {len(lines)} differences:\n  {listed}\nBuild both from one configuration."
        )

    def unflatten(self, tensors: Sequence[torch.Tensor]) -> TensorDict:
        """The nested tensordict of ``tensors``, ordered as :attr:`entries`, tied names repeated."""
        flat = {name: tensors[index] for name, index in self.index_of.items()}
        return TensorDict(flat, batch_size=[]).unflatten_keys(".")


def _identity(tensor: torch.Tensor) -> tuple[object, ...]:
    # An expanded or empty tensor may share its address with others without being tied to them.
    if tensor.device.type == "meta" or not tensor.numel():
        return (id(tensor),)
    return (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())


def _is_tied(entry: Entry, weights: Mapping[str, torch.Tensor]) -> bool:
    present = [weights[name] for name in entry.names if name in weights]
    return len({_identity(tensor) for tensor in present}) <= 1


def _draft(
    names: list[str], tensor: torch.Tensor, layout: WeightLayout, has_parameters: bool
) -> Entry:
    dtype = tensor.dtype
    if layout.transport_dtype is not None and dtype.is_floating_point:
        dtype = layout.transport_dtype
    # empty_like keeps the stride of a dense tensor and makes any other one contiguous.
    stride = torch.empty_like(tensor.detach(), device="meta").stride()
    is_parameter = isinstance(tensor, nn.Parameter)
    if layout.lora_only:
        is_frozen = not any(is_adapter_name(name) for name in names)
    else:
        is_frozen = layout.trainable_only and is_parameter and not tensor.requires_grad
    return Entry(
        names=tuple(names),
        shape=tuple(tensor.shape),
        stride=stride,
        dtype=dtype,
        source_dtype=tensor.dtype,
        offset_bytes=0,
        is_frozen=is_frozen,
        is_buffer=has_parameters and not is_parameter,
    )


def _place(drafts: list[Entry], *, frozen: bool) -> tuple[list[Entry], list[Bucket], int]:
    entries: list[Entry] = []
    buckets: list[Bucket] = []
    offset = 0
    drafts = [entry for entry in drafts if entry.is_frozen == frozen]
    for dtype in dict.fromkeys(entry.dtype for entry in drafts):
        start = offset
        for entry in drafts:
            if entry.dtype == dtype:
                entries.append(dataclasses.replace(entry, offset_bytes=offset))
                offset = align(offset + entry.numel * dtype.itemsize, _ENTRY_ALIGNMENT_BYTES)
        buckets.append(Bucket(dtype, start, (offset - start) // dtype.itemsize))
    return entries, buckets, align(offset)
