# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Command ``python -m torchrl_dvla doctor``: what usually breaks, and its remedy.

Every check is split in two: one function reads the machine, another judges what was read. The
second takes plain values, so that a test can show it any machine.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata

from torchrl_dvla.doctor import machine, maniskill, rendering
from torchrl_dvla.findings import Finding, Status, report

__all__ = ["Finding", "Status", "diagnose", "report"]

Check = Callable[[], Iterable[Finding]]


def run_checks(checks: Iterable[tuple[str, Check]]) -> list[Finding]:
    """Findings of several checks; one that raises is a failed finding, not the end of the report.

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
            detail = f"the check itself failed: {type(error).__name__}: {error}"
            remedy = "This is a bug in the doctor or a broken installation; run `make setup` again."
            findings.append(Finding(name, Status.FAIL, detail, remedy))
    return findings


def diagnose(log_dir: str = "runs", *, libero: bool = True) -> list[Finding]:
    """Findings of every check on this machine.

    Args:
        log_dir (str): the folder that runs will write to.

    Keyword Args:
        libero (bool): also check the simulator and draw a frame, which takes some seconds. That of
            ManiSkill is checked where it is installed.

    Returns:
        One finding per line of the report.
    """
    checks: list[tuple[str, Check]] = [
        ("python", machine.check_python),
        ("versions", lambda: _check_installed(machine.REQUIRED)),
        ("torch build", _check_torch_build),
        ("machine", lambda: machine.check_machine(log_dir)),
    ]
    if libero:
        owners = metadata.packages_distributions().get("libero", [])
        checks.append(("libero", lambda: machine.check_libero_distributions(owners)))
        if owners:
            checks += [
                ("libero versions", lambda: _check_installed(machine.REQUIRED_FOR_LIBERO)),
                ("LIBERO files", rendering.check_libero_files),
                ("rendering", _check_rendering),
            ]
    if importlib.util.find_spec("mani_skill") is not None:
        checks += [
            ("ManiSkill versions", lambda: _check_installed(machine.REQUIRED_FOR_MANISKILL)),
            ("ManiSkill rendering", maniskill.check_maniskill),
        ]
    return run_checks(checks)


def _check_installed(required: dict[str, str]) -> Iterator[Finding]:
    return machine.check_versions(machine.installed_versions(required), required)


def _check_torch_build() -> Iterator[Finding]:
    import torch

    return machine.check_cuda_build(torch.version.cuda, os.path.exists("/dev/nvidia0"))


def _check_rendering() -> Iterator[Finding]:
    import torch

    from torchrl_dvla.envs.libero_setup import choose_gl_backend

    backend = choose_gl_backend()
    yield from rendering.check_rendering(backend)
    yield from rendering.check_egl_device(backend, torch.cuda.device_count(), os.environ)
