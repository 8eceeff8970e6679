# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""``python -m torchrl_dvla doctor``: what usually breaks, and how to mend it.

Every check is split in two: one function reads the machine, another judges what was read. The
second takes plain values, so that a test can show it any machine.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from importlib import metadata

from torchrl_dvla._version import __version__
from torchrl_dvla.doctor.findings import Check, Finding, Status, run_checks
from torchrl_dvla.doctor.machine import (
    check_cores,
    check_folder,
    check_machine,
    check_memory,
    check_open_files,
    check_shared_memory,
    usable_cores,
)
from torchrl_dvla.doctor.rendering import (
    Drawing,
    check_egl_device,
    check_libero_files,
    check_rendering,
    draw,
)
from torchrl_dvla.doctor.versions import (
    REQUIRED,
    REQUIRED_FOR_LIBERO,
    TESTED,
    check_cuda_build,
    check_libero_distributions,
    check_python,
    check_versions,
    installed_versions,
)

__all__ = [
    "REQUIRED",
    "REQUIRED_FOR_LIBERO",
    "TESTED",
    "Drawing",
    "Finding",
    "Status",
    "add_parser",
    "check_cores",
    "check_cuda_build",
    "check_egl_device",
    "check_folder",
    "check_libero_distributions",
    "check_libero_files",
    "check_machine",
    "check_memory",
    "check_open_files",
    "check_python",
    "check_rendering",
    "check_shared_memory",
    "check_versions",
    "diagnose",
    "draw",
    "installed_versions",
    "report",
    "run_checks",
    "usable_cores",
]


def diagnose(log_dir: str = "runs", *, libero: bool = True) -> list[Finding]:
    """Runs every check on this machine.

    Args:
        log_dir (str): the folder that runs will write to.

    Keyword Args:
        libero (bool): also look at the simulator and draw a frame, which takes some seconds.

    Returns:
        One finding per line of the report.
    """
    checks: list[tuple[str, Check]] = [
        ("python", check_python),
        ("versions", lambda: check_versions(installed_versions(list(REQUIRED)))),
        ("torch build", _torch_build),
        ("machine", lambda: check_machine(log_dir)),
    ]
    if libero:
        owners = sorted(set(metadata.packages_distributions().get("libero", [])))
        checks.append(("libero", lambda: check_libero_distributions(owners)))
        if owners:
            checks += [
                ("libero versions", _libero_versions),
                ("LIBERO files", check_libero_files),
                ("rendering", _rendering),
            ]
    return run_checks(checks)


def _torch_build() -> list[Finding]:
    import torch

    return check_cuda_build(torch.version.cuda, os.path.exists("/dev/nvidia0"))


def _libero_versions() -> list[Finding]:
    return check_versions(installed_versions(list(REQUIRED_FOR_LIBERO)), REQUIRED_FOR_LIBERO)


def _rendering() -> list[Finding]:
    import torch

    from torchrl_dvla.envs.libero_setup import choose_gl_backend

    backend = choose_gl_backend()
    return [
        *check_rendering(backend),
        *check_egl_device(backend, torch.cuda.device_count(), os.environ),
    ]


def report(findings: list[Finding], *, as_json: bool = False) -> str:
    """Writes findings as text for people, or as one JSON object.

    Args:
        findings (list of Finding): what was found.

    Keyword Args:
        as_json (bool): an object with ``version``, ``ok`` and ``findings``.

    Returns:
        The report, without a final line break.

    Examples:
        >>> from torchrl_dvla.doctor import Finding, Status, report
        >>> print(report([Finding("cores", Status.OK, "2 usable")]))
        ok    cores               2 usable
        <BLANKLINE>
        1 ok, 0 to look at, 0 to mend
    """
    count = {status: sum(f.status is status for f in findings) for status in Status}
    if as_json:
        return json.dumps(
            {
                "version": __version__,
                "ok": count[Status.FAIL] == 0,
                "findings": [finding.as_dict() for finding in findings],
            },
            indent=2,
        )
    lines = [finding.format() for finding in findings]
    total = f"{count[Status.OK]} ok, {count[Status.WARN]} to look at, {count[Status.FAIL]} to mend"
    return "\n".join([*lines, "", total])


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the ``doctor`` command to a command line.

    Args:
        commands: what :meth:`argparse.ArgumentParser.add_subparsers` returned.
    """
    parser = commands.add_parser(
        "doctor",
        help="check what usually breaks, and say how to mend it",
        description="Checks what usually breaks. Exits with 1 if something has to be mended.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--log-dir", default="runs", help="folder that runs write to")
    parser.add_argument("--no-libero", action="store_true", help="leave the simulator out")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    findings = diagnose(args.log_dir, libero=not args.no_libero)
    sys.stdout.write(report(findings, as_json=args.json) + "\n")
    return int(any(finding.status is Status.FAIL for finding in findings))
