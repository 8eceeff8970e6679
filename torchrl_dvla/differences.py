# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Comparison of two mappings, for errors that name what differs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["differences", "join_some"]


def differences(expected: Mapping[Any, Any], found: Mapping[Any, Any]) -> list[str]:
    """Keys that are missing, unknown or have another value, one line each.

    Entries are compared with ``==`` and shown by ``str``: map each name to what counts, such as
    ``f"{list(tensor.shape)} {tensor.dtype}"``.

    Args:
        expected (Mapping): what there should be.
        found (Mapping): what there is.

    Returns:
        list of str: empty if the two are equal, whatever their order.

    Examples:
        >>> differences({"a": [2, 3], "b": 1, "c": 0}, {"a": [2, 4], "c": 0, "d": 1})
        ["'b' is missing", "'d' is unknown", "'a' is [2, 4] instead of [2, 3]"]
    """
    lines = [f"{key!r} is missing" for key in expected if key not in found]
    lines += [f"{key!r} is unknown" for key in found if key not in expected]
    lines += [
        f"{key!r} is {found[key]} instead of {value}"
        for key, value in expected.items()
        if key in found and found[key] != value
    ]
    return lines


def join_some(lines: list[str], *, limit: int = 8) -> str:
    """The first ``limit`` lines, separated by semicolons, and how many more there are.

    Examples:
        >>> join_some(["a", "b", "c"], limit=2)
        'a; b; and 1 more'
    """
    more = [f"and {len(lines) - limit} more"] if len(lines) > limit else []
    return "; ".join(lines[:limit] + more)
