# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Checks of settings in one wording: type, finiteness, range, and names that do not exist."""

from __future__ import annotations

import contextlib
import difflib
import dis
import functools
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from math import inf, isfinite
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

__all__ = [
    "Count",
    "Limit",
    "Natural",
    "NonNegative",
    "Positive",
    "Range",
    "Seconds",
    "Section",
    "Threads",
    "check",
    "check_fields",
    "check_path",
    "describe_error",
    "from_mapping",
    "is_refusal",
]

_T = TypeVar("_T")
_kinds_of: Callable[[Any], dict[str, Any]] = functools.cache(
    functools.partial(get_type_hints, include_extras=True)
)
_WORDS = {bool: "true or false", int: "a whole number of at most 63 bits", str: "a text"}
_WORDS |= {float: "a finite number", NoneType: "None", Any: "anything"}


@dataclass(frozen=True)
class Range:
    """Numbers that a setting may have.

    Args:
        least (float): the smallest of them.
        most (float): the largest.
        above (float): a lower bound that is none of them.
        below (float): an upper bound that is none of them.
        remedy (str): last sentence of the error about a value that is none of them.

    Examples:
        >>> Range(1).violated_by(0), Range(above=0, most=1).violated_by(0.5)
        ('at least 1', '')
    """

    least: float = -inf
    most: float = inf
    above: float = -inf
    below: float = inf
    remedy: str = ""

    def violated_by(self, number: float) -> str:
        """The bound that ``number`` does not keep, in words; empty if it keeps all."""
        if number < self.least or number <= self.above:
            low = f"at least {self.least}" if isfinite(self.least) else f"above {self.above}"
            return "positive" if self.above == 0 else low
        if number > self.most or number >= self.below:
            return f"at most {self.most}" if isfinite(self.most) else f"below {self.below}"
        return ""


Count = Annotated[int, Range(1)]
Natural = Annotated[int, Range(0)]
Threads = Annotated[int, Range(1, 4096)]
Positive = Annotated[float, Range(above=0)]
NonNegative = Annotated[float, Range(0)]
#: A time to wait. The kernel's calls count milliseconds in 32 bits, which is 24 days.
Seconds = Annotated[float, Range(above=0, most=2_000_000)]
Limit = Annotated[float, Range(above=0, remedy="Use null for no limit.")] | None


def check(name: str, value: Any, kind: Any, bounds: Range = Range()) -> Any:
    """A setting's value in the type that it is declared with.

    A bool is no number, a float no whole number, NaN and infinity are no numbers, a text is none of
    these. A whole number is taken for a float, a list for a tuple, and a NumPy or torch scalar for
    the number in it.

    Args:
        name (str): the setting, for the error.
        value (Any): what it was given.
        kind (Any): ``bool``, ``int``, ``float``, ``str``, a class, or a ``Literal``, ``Union``,
            ``tuple`` or ``Mapping`` of them; ``Annotated[kind, Range(...)]`` bounds its numbers.
        bounds (Range): the same for all of it.

    Raises:
        ValueError: for another type, or a number out of range.

    Examples:
        >>> check("optim.lr", 1, Positive), check("optim.betas", [0, 0.5], tuple[float, float])
        (1.0, (0.0, 0.5))
        >>> check("optim.lr", float("nan"), float | None)
        Traceback (most recent call last):
        ...
        ValueError: optim.lr must be a finite number or None, got nan. Correct it.
    """
    try:
        return _within(bounds, _convert(value, kind))
    except TypeError as error:
        requirement = str(error) or _describe(kind)
    shown = repr(value)
    shown = shown if len(shown) < 200 else f"{shown[:200]}..."
    remedy = _remedy_of(kind) or bounds.remedy or "Correct it."
    raise ValueError(f"{name} must be {requirement}, got {shown}. {remedy}")


def check_fields(config: Any) -> None:
    """:func:`check` for each field of a dataclass, by its annotation; for its ``__post_init__``.

    Args:
        config (Any): the dataclass, whose fields get their values in the right type.

    Raises:
        ValueError: as :func:`check`; it names the default if there is no other remedy.
    """
    kinds = _kinds_of(type(config))
    for field in fields(config):
        default = "" if field.default is MISSING else f"The default is {field.default!r}."
        value = getattr(config, field.name)
        value = check(field.name, value, kinds[field.name], Range(remedy=default))
        object.__setattr__(config, field.name, value)


@dataclass(frozen=True)
class Section:
    """Settings of a recipe, whose fields are of the types and ranges they are declared with."""

    def __post_init__(self) -> None:
        check_fields(self)


def check_path(name: str, path: str | None) -> None:
    """Require that a text can be the path of a file or folder; ``None`` is none to check.

    Raises:
        ValueError: if it is empty or holds characters that do not show.
    """
    if path is not None and not (path.strip() and path.isprintable()):
        raise ValueError(f"{name} must be a path, got {path!r}. Name a file or folder.")


def from_mapping(cls: type[_T], data: Mapping[str, Any], path: str = "") -> _T:
    """A dataclass of settings from nested mappings, such as a YAML file gives.

    The types are those of the dataclass, not what YAML guesses: the text ``"1e-3"`` is a number
    where one is wanted, ``1e3`` a whole one, and the number 7 a text. ``"???"`` counts as not
    given.

    Args:
        cls (type): the dataclass; it may hold others.
        data (Mapping): its fields by name.
        path (str): dotted name of ``data``, for errors.

    Raises:
        ValueError: with the dotted name of a setting that does not exist, is missing, or that
            ``cls`` refuses.

    Examples:
        >>> from_mapping(Range, {"least": "1e-3"}).least
        0.001
        >>> from_mapping(Range, {"leest": 1}, "range")
        Traceback (most recent call last):
        ...
        ValueError: range.leest must be a setting, got an unknown name. Did you mean range.least?
    """
    dot = f"{path}." if path else ""
    kinds, values = _kinds_of(cls), {}
    known = [field.name for field in fields(cls)]  # type: ignore[arg-type]  # a dataclass
    for name, value in data.items():
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            hint = f"Did you mean {dot}{near[0]}?" if near else f"There are {', '.join(known)}."
            raise ValueError(f"{dot}{name} must be a setting, got an unknown name. {hint}")
        options = (kinds[name], *get_args(kinds[name]))
        section = next((kind for kind in options if is_dataclass(kind)), None)
        if isinstance(section, type) and isinstance(value, Mapping):
            value = from_mapping(section, value, dot + name)
        if not (isinstance(value, str) and value == "???"):
            values[name] = value
            with contextlib.suppress(TypeError):  # cls raises, with the name
                values[name] = _convert(value, kinds[name], from_text=True)
    for field in fields(cls):  # type: ignore[arg-type]  # a dataclass
        if field.default is field.default_factory is MISSING and field.name not in values:
            name = dot + field.name
            raise ValueError(f"{name} must be given, got nothing. Pass {name}=<value>.")
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{dot}{error}") from None


def _convert(value: Any, kind: Any, *, from_text: bool = False) -> Any:
    """``value`` as a ``kind``, or a ``TypeError`` with what it must be if its type is right."""
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        found = TypeError()
        for option in args:
            try:
                return _convert(value, option, from_text=from_text)
            except TypeError as error:
                found = error if str(error) else found
        raise found
    if origin is Annotated:
        return _within(args[1], _convert(value, args[0], from_text=from_text))
    if origin is tuple and isinstance(value, list | tuple):
        kinds = args[:1] * len(value) if args[-1] is Ellipsis else args
        if len(kinds) == len(value):
            return tuple(_convert(v, k, from_text=from_text) for v, k in zip(value, kinds))
    elif origin in (dict, Mapping) and isinstance(value, Mapping):
        keys = [_convert(key, args[0]) for key in value]
        return dict(zip(keys, (_convert(v, args[1], from_text=from_text) for v in value.values())))
    elif origin is Literal and isinstance(value, str) and value in args:
        return value
    elif kind in (bool, int, float, str):
        return _convert_scalar(value, kind, from_text)
    elif kind is Any or (origin in (None, Callable) and isinstance(value, origin or kind)):
        return value
    raise TypeError


def _convert_scalar(value: Any, kind: type, from_text: bool) -> Any:
    if getattr(value, "ndim", None) == 0:
        value = value.item()
    if from_text and isinstance(value, str) and kind in (int, float):
        with contextlib.suppress(ValueError):
            text, value = value, float(value)
            value = int(text)  # exact, where a float is not
    if from_text and kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool | str):
        fits = kind is (bool if isinstance(value, bool) else str)
    elif isinstance(value, int):
        fits = (kind is int and -(2**63) <= value < 2**63) or (from_text and kind is str)
        fits = fits or (kind is float and abs(value) <= sys.float_info.max)
    else:
        fits = isinstance(value, float) and kind is float and abs(value) <= sys.float_info.max
    if not fits:
        raise TypeError
    return kind(value)


def _within(bounds: Range, value: Any) -> Any:
    for number in value if isinstance(value, tuple) else (value,):
        if type(number) in (int, float) and (words := bounds.violated_by(number)):
            raise TypeError(words)
    return value


def _remedy_of(kind: Any) -> str:
    if get_origin(kind) is Annotated:
        return str(get_args(kind)[1].remedy)
    return next(filter(None, map(_remedy_of, get_args(kind))), "")


def _describe(kind: Any) -> str:
    """A type in words."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _describe(args[0])
    if origin in (Union, UnionType):
        return " or ".join(map(_describe, args))
    if origin is Literal:
        return f"one of {list(args)}"
    if origin is tuple:
        entries = [_describe(each) for each in args if each is not Ellipsis]
        return f"a list of {' and '.join(entries)}"
    if origin in (dict, Mapping):
        return f"a mapping of {' to '.join(map(_describe, args))}"
    if origin is Callable:
        return "a function"
    return _WORDS.get(kind) or f"a {kind.__name__}"


def is_refusal(error: BaseException) -> bool:
    """Whether a check of this package raised an error, so that its message says all.

    That is what a ``raise`` statement of the package raises. What Python or another library raises
    is a bug, here or in what the user wrote, and so is a failed assertion: its traceback is needed.
    """
    last = error.__traceback__
    if last is None or not isinstance(error, Exception) or isinstance(error, AssertionError):
        return False
    while last.tb_next is not None:
        last = last.tb_next
    code, package = last.tb_frame.f_code, Path(__file__).parent
    path = Path(code.co_filename)
    is_ours = path.is_relative_to(package) and not path.is_relative_to(package / "testing")
    return is_ours and dis.opname[code.co_code[last.tb_lasti]] == "RAISE_VARARGS"


def describe_error(error: BaseException) -> str:
    """Type and message of a check's error, and the traceback of any other."""
    if is_refusal(error):
        return f"{type(error).__name__}: {error}"
    return "".join(traceback.format_exception(error))
