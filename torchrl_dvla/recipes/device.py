# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Devices that settings name: in words that torch knows, and on this machine."""

from __future__ import annotations

import torch

__all__ = ["check_device", "check_device_name"]


def check_device_name(name: str, wanted: str) -> None:
    """Require the setting ``name`` to be a device, here or on another machine.

    Raises:
        ValueError: if it is none.

    Examples:
        >>> check_device_name("device", "cuda:7")
    """
    try:
        torch.device(wanted)
    except RuntimeError as error:
        raise ValueError(
            f"{name} must be a torch device, got {wanted!r}. Use cpu or cuda:0."
        ) from error


def check_device(name: str, wanted: str) -> None:
    """Require the device of the setting ``name`` to be there.

    Raises:
        ValueError: if torch does not see it.

    Examples:
        >>> check_device("device", "cpu")
    """
    device, found = torch.device(wanted), torch.accelerator.current_accelerator()
    count = torch.accelerator.device_count() if found and found.type == device.type else 0
    if device.type != "cpu" and (device.index or 0) >= count:
        raise ValueError(
            f"{name} must be one that torch sees, got {wanted!r} and {count} of its kind. Use "
            f"{name}=cpu, or a build of torch for the GPUs of this machine."
        )
