# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What one check found out, and how it is shown."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any


class Status(StrEnum):
    """How bad it is: ``fail`` stops a run or spoils its result, ``warn`` slows it or limits it."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Args:
        name (str): what was looked at.
        status (Status): ok, warn or fail.
        detail (str): what was found.
        remedy (str): what to do about it; empty when there is nothing to do.

    Examples:
        >>> from torchrl_dvla.doctor import Finding, Status
        >>> print(Finding("cores", Status.WARN, "1 core", "give it 2").format())
        warn  cores               1 core
              -> give it 2
    """

    name: str
    status: Status
    detail: str
    remedy: str = ""

    def format(self) -> str:
        """The line, with its remedy below."""
        line = f"{self.status.value:<5} {self.name:<19} {self.detail}"
        return f"{line}\n      -> {self.remedy}" if self.remedy else line

    def as_dict(self) -> dict[str, Any]:
        """The finding as plain values for JSON."""
        return {**asdict(self), "status": self.status.value}


Check = Callable[[], Iterable[Finding]]


def run_checks(checks: Iterable[tuple[str, Check]]) -> list[Finding]:
    """Runs checks in order; one that raises is a failed finding, not the end of the report.

    Args:
        checks (iterable of (str, callable)): name, and a callable that returns findings.

    Returns:
        All findings, in order.
    """
    findings: list[Finding] = []
    for name, check in checks:
        try:
            findings.extend(check())
        except Exception as error:
            findings.append(
                Finding(
                    name,
                    Status.FAIL,
                    f"the check itself failed: {type(error).__name__}: {error}",
                    "This is a bug in the doctor or a broken installation; run `make setup` again.",
                )
            )
    return findings
