# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Versions: what is installed against what the package was tested with."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib import metadata

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from torchrl_dvla.doctor.findings import Finding, Status

#: Ranges of pyproject.toml (a test compares them).
REQUIRED: dict[str, str] = {
    "torch": ">=2.13",
    "torchrl": ">=0.14.1,<0.15",
    "tensordict": ">=0.14.3,<0.15",
    "transformers": ">=5.20",
}
#: Only needed for the simulator.
REQUIRED_FOR_LIBERO: dict[str, str] = {
    "mujoco": ">=3.8,<4",
    "robosuite": "==1.4.0",
}
#: Releases that the shipped checkpoint was trained and scored with. Another minor release may run
#: without an error and succeed less: openvla-oft's issue 135 tells of 38 points lost that way.
TESTED: dict[str, str] = {"transformers": "5.23"}
MINIMUM_PYTHON = (3, 11)


def installed_versions(names: Sequence[str]) -> dict[str, str | None]:
    """Versions of distributions; ``None`` for one that is not installed."""
    found: dict[str, str | None] = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def check_python(version: tuple[int, ...] | None = None) -> list[Finding]:
    """The interpreter is recent enough."""
    version = tuple(sys.version_info[:3]) if version is None else version
    text = ".".join(map(str, version))
    if version[:2] >= MINIMUM_PYTHON:
        return [Finding("python", Status.OK, text)]
    need = ".".join(map(str, MINIMUM_PYTHON))
    return [
        Finding("python", Status.FAIL, text, f"Install Python {need} or newer and `make setup`.")
    ]


def check_versions(
    installed: Mapping[str, str | None],
    required: Mapping[str, str] = REQUIRED,
    tested: Mapping[str, str] = TESTED,
) -> list[Finding]:
    """Each distribution is there, in its range, and of the minor release that was tested.

    Args:
        installed (mapping of str to str or None): versions found; ``None`` where absent.
        required (mapping of str to str): a version specifier per distribution.
        tested (mapping of str to str): ``"major.minor"`` for those where another minor release can
            change results silently.

    Returns:
        One finding per distribution.

    Examples:
        >>> from torchrl_dvla.doctor import check_versions
        >>> for finding in check_versions({"transformers": "4.57.1"}, {"transformers": ">=5.20"}):
        ...     print(finding.format())
        fail  transformers        4.57.1, must be >=5.20
              -> pip install 'transformers==5.23.*' (or `make setup` for all pins)
    """
    findings = []
    for name, specifier in required.items():
        version = installed.get(name)
        minor = tested.get(name)
        wanted = f"=={minor}.*" if minor else specifier
        remedy = f"pip install '{name}{wanted}' (or `make setup` for all pins)"
        if version is None:
            findings.append(
                Finding(name, Status.FAIL, f"not installed, must be {specifier}", remedy)
            )
        elif not SpecifierSet(specifier).contains(version, prereleases=True):
            findings.append(Finding(name, Status.FAIL, f"{version}, must be {specifier}", remedy))
        elif minor and not _same_minor(version, minor):
            findings.append(
                Finding(
                    name,
                    Status.WARN,
                    f"{version}; checkpoints were scored with {minor}, another release can cost "
                    "success without an error",
                    remedy,
                )
            )
        else:
            findings.append(Finding(name, Status.OK, version))
    return findings


def _same_minor(version: str, minor: str) -> bool:
    return Version(version).release[:2] == Version(minor).release[:2]


def check_cuda_build(cuda_version: str | None, has_nvidia_device: bool) -> list[Finding]:
    """A machine with an NVIDIA GPU has a torch that can use it.

    Args:
        cuda_version (str or None): ``torch.version.cuda``.
        has_nvidia_device (bool): whether the machine shows such a device.
    """
    if cuda_version is not None:
        return [Finding("torch build", Status.OK, f"CUDA {cuda_version}")]
    if not has_nvidia_device:
        return [Finding("torch build", Status.OK, "CPU (no NVIDIA device found)")]
    return [
        Finding(
            "torch build",
            Status.WARN,
            "CPU build on a machine with an NVIDIA device",
            "pip install --force-reinstall torch, from the index that fits your CUDA driver.",
        )
    ]


def check_libero_distributions(owners: Sequence[str]) -> list[Finding]:
    """No two distributions share the ``libero`` namespace.

    Args:
        owners (sequence of str): distributions that install a top-level package ``libero``.
    """
    owners = sorted(set(owners))
    if not owners:
        return [
            Finding(
                "libero",
                Status.WARN,
                "not installed: only environments without it, such as ToyVLAEnv, will run",
                "pip install 'torchrl-dvla[libero]', or `make setup`.",
            )
        ]
    if len(owners) == 1:
        version = installed_versions(owners)[owners[0]]
        return [Finding("libero", Status.OK, f"{owners[0]} {version or ''}".rstrip())]
    return [
        Finding(
            "libero",
            Status.FAIL,
            f"{', '.join(owners)} overwrite each other's files",
            f"pip uninstall {' '.join(owners)}, then `make setup` for the one that is pinned.",
        )
    ]
