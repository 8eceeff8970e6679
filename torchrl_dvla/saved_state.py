# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Saved states: read without running code, and compared with what they are loaded into.

A *form* says what an entry must be; :func:`form_of` takes it from a live object's own state:

====================  =============================================================
``torch.Tensor``      a tensor of that shape and dtype, finite where the form is
:class:`Number`       a number within its bounds
``(form, form)``      a list or tuple of exactly these
``[form]``            a list or tuple of any length
``{"key": form}``     a mapping with exactly these keys
``{type: form}``      a mapping with any keys of that type
:class:`MaybeAbsent`  of a key: what older versions did not write
a string              that string
a type                an instance of it
====================  =============================================================
"""

from __future__ import annotations

import errno
import math
import os
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from torchrl_dvla.differences import join_some

__all__ = [
    "COUNT",
    "MaybeAbsent",
    "Number",
    "form_of",
    "form_problems",
    "read_state",
    "require_form",
    "types_of",
]


@dataclass(frozen=True)
class Number:
    """Form of a finite number in ``[low, high]``: a whole one, or also ``None``, if so asked."""

    low: float = -math.inf
    high: float = math.inf
    whole: bool = False
    optional: bool = False

    def admits(self, value: Any) -> bool:
        """Whether ``value`` is such a number; ``True`` and ``False`` are none."""
        if value is None:
            return self.optional
        is_number = isinstance(value, int if self.whole else (int, float))
        if not is_number or isinstance(value, bool):
            return False
        if not abs(value) < (2**63 if self.whole else 2**1000):
            return False  # NaN, infinity, or no number of 64 bits
        return self.low <= value <= self.high

    def __str__(self) -> str:
        return f"a {'whole' if self.whole else 'finite'} number in [{self.low:g}, {self.high:g}]"


@dataclass(frozen=True)
class MaybeAbsent:
    """Form of an entry of a mapping that may be missing, and else is of ``form``."""

    form: Any


#: Remedy for a state that lacks what states hold now.
OLDER_VERSION = (
    "It was written by an older version of torchrl_dvla: load the policy and the optimizer alone, "
    "and start with an empty buffer."
)

#: Form of a count, an index or a version.
COUNT = Number(0, whole=True)


def form_of(state: Any, *, whole: bool = True) -> Any:
    """Form of states like ``state``: its keys, lengths, types, shapes; other numbers and tensors.

    A number that is not negative here must not be negative there. What is empty here says nothing
    about what is to come.

    Args:
        state (Any): state of a live object.

    Keyword Args:
        whole (bool): whether whole numbers must stay whole. Defaults to ``True``.

    Examples:
        >>> form = form_of({"lr": 0.1, "betas": (0.9, 0.99), "step": torch.zeros(2)})
        >>> form_problems(form, {"lr": -1.0, "betas": [0.9], "step": torch.zeros(3)}, "adam")
        ["'adam.lr' must be a finite number in [0, inf], got -1.0", "'adam.betas' must have 2 \
items, got 1", "'adam.step' must be float32 [2], got float32 [3]"]
    """
    if isinstance(state, torch.Tensor):
        return torch.Tensor if is_lazy(state) else state.detach()
    if isinstance(state, Mapping):
        entries = {key: form_of(item, whole=whole) for key, item in state.items()}
        return entries or {object: object}
    if isinstance(state, (list, tuple)):
        return tuple(form_of(item, whole=whole) for item in state) or [object]
    if state is None or isinstance(state, bool):
        return bool | None  # a switch that may be unset
    if isinstance(state, (int, float)):
        if not math.isfinite(state):
            return int | float
        return Number(min(0, state), whole=whole and isinstance(state, int))
    return state if isinstance(state, str) and state else type(state)


def types_of(state: Mapping[str, Any]) -> dict[str, Any]:
    """Form of states with the keys of ``state``, and values of its types or ``None``.

    For what only its author understands, such as a schedule: neither a length nor a sign, a string
    or ``None`` says there what is to come.
    """
    kinds = (bool, int | float, list | tuple, Mapping, str, torch.Tensor)
    return {
        key: object
        if value is None
        else next(filter(lambda kind: isinstance(value, kind), kinds), type(value)) | None
        for key, value in state.items()
    }


def form_problems(form: Any, state: Any, name: str) -> list[str]:
    """Entries of ``state``, called ``name``, that are not of their form, one line each."""
    return list(_problems(form, state, name))


def _problems(form: Any, state: Any, name: str) -> Iterator[str]:
    expected = None
    if isinstance(form, dict):
        if isinstance(state, Mapping):
            kind = next(iter(form), None)
            if isinstance(kind, type):
                form = {key: form[kind] for key in state if isinstance(key, kind)}
            needed = (key for key, item in form.items() if not isinstance(item, MaybeAbsent))
            yield from (f"'{name}.{key}' is missing" for key in needed if key not in state)
            yield from (f"'{name}.{key}' is unknown" for key in state if key not in form)
            for key in filter(form.__contains__, state):
                yield from _problems(form[key], state[key], f"{name}.{key}")
        else:
            expected = "a mapping"
    elif isinstance(form, (list, tuple)):
        if not isinstance(state, (list, tuple)):
            expected = "a list"
        elif isinstance(form, tuple) and len(form) != len(state):
            yield f"'{name}' must have {len(form)} items, got {len(state)}"
        else:
            forms = form if isinstance(form, tuple) else form * len(state)
            for number, entry in enumerate(state):
                yield from _problems(forms[number], entry, f"{name}.{number}")
    elif isinstance(form, torch.Tensor):
        if not isinstance(state, torch.Tensor) or _show(state) != _show(form):
            expected = _show(form)
        else:
            broken = ~state.isfinite()
            if broken.any() and (broken & form.isfinite().to(state.device)).any():
                yield f"'{name}' must be finite, got NaN or infinity"
    elif isinstance(form, MaybeAbsent):
        yield from _problems(form.form, state, name)
    elif isinstance(form, Number):
        expected = None if form.admits(state) else str(form)
    elif isinstance(form, str):
        expected = None if isinstance(state, str) and state == form else repr(form)
    elif not isinstance(state, form):
        expected = getattr(form, "__name__", form)
    if expected is not None:
        yield f"'{name}' must be {expected}, got {_show(state)}"


def _show(state: Any) -> str:
    if isinstance(state, torch.Tensor):
        return f"{str(state.dtype).removeprefix('torch.')} {list(state.shape)}"
    return reprlib.repr(state)


def require_form(form: Any, state: Any, name: str) -> None:
    """Refuse a saved state that is not of its form, before any of it is taken over.

    Raises:
        ValueError: naming the entries, and what they must be.
    """
    if problems := form_problems(form, state, name):
        raise ValueError(
            f"{join_some(problems)}. The saved state is damaged, or of something else: load an "
            "older checkpoint, or one that was made with the same settings."
        )


def read_state(
    path: str | os.PathLike[str], *, safe_globals: Iterable[Any] = (), mmap: bool = False
) -> Any:
    """What :func:`torch.save` wrote to ``path``, on the CPU: tensors, numbers, text, containers.

    Nothing in the file can run code.

    Args:
        path (path): the file.

    Keyword Args:
        safe_globals (iterable): what else it may hold, see ``torch.serialization.safe_globals``.
        mmap (bool): leave tensors on disk until they are used. Defaults to ``False``.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is damaged, or holds anything else.
    """
    try:
        with torch.serialization.safe_globals(list(safe_globals)):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # the unpickler of a damaged file raises anything
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # it seeks before the start
            raise
        # PyTorch goes on to tell how the file is loaded with whatever code it brings.
        text = str(error).partition("WeightsUnpickler error: ")[2] or str(error)
        cause = text.partition("\n")[0].partition(" Please ")[0] or type(error).__name__
        raise ValueError(
            f"{str(path)!r} must be a whole file of tensors, numbers and text, got something "
            f"else: {cause} It is damaged, or holds objects that would run code: use another copy."
        ) from error
