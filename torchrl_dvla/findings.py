# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Findings of a check, and the report that lists them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum

from torchrl_dvla._version import __version__

__all__ = ["Finding", "Status", "report"]


class Status(StrEnum):
    """Severity: ``fail`` stops a run or spoils its result, ``warn`` slows it or limits it."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Args:
        name (str): what was checked.
        status (Status): ok, warn or fail.
        detail (str): what was found.
        remedy (str): what to do about it; empty when there is nothing to do.

    Examples:
        >>> from torchrl_dvla.findings import Finding, Status
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


def report(findings: Sequence[Finding], *, as_json: bool = False) -> str:
    """Report of findings, as text for people or as one JSON object.

    Args:
        findings (sequence of Finding): what was found.

    Keyword Args:
        as_json (bool): an object with ``version``, ``ok`` and ``findings``.

    Returns:
        The report, without a final line break.

    Examples:
        >>> from torchrl_dvla.findings import Finding, Status, report
        >>> print(report([Finding("cores", Status.OK, "2 usable")]))
        ok    cores               2 usable
        <BLANKLINE>
        1 ok, 0 warn, 0 fail
    """
    count = {status: sum(f.status is status for f in findings) for status in Status}
    if as_json:
        listed = [asdict(finding) for finding in findings]
        content = {"version": __version__, "ok": count[Status.FAIL] == 0, "findings": listed}
        return json.dumps(content, indent=2)
    lines = [finding.format() for finding in findings]
    total = ", ".join(f"{count[status]} {status.value}" for status in Status)
    return "\n".join([*lines, "", total])
