# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Random numbers of a policy call that depend on nothing but the call's number."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

__all__ = ["batch_seed", "seeded"]


def batch_seed(seed: int, number: int, *, evaluation: bool = False) -> int:
    """Seed of the tokens that the policy samples in one call.

    Training and evaluation count their calls apart, so an evaluation in between changes no training
    decision.

    Args:
        seed (int): the run's seed.
        number (int): of the call, from 0.

    Keyword Args:
        evaluation (bool): whether it serves an evaluation.

    Examples:
        >>> batch_seed(0, 0), batch_seed(0, 1), batch_seed(0, 0, evaluation=True)
        (0, 2, 1)
    """
    # An odd multiplier keeps (seed, number) apart for all counts that a run can reach.
    return (seed * 0x9E3779B97F4A7C15 + 2 * number + evaluation) % 2**63


@contextlib.contextmanager
def seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Draw from a generator seeded with ``seed`` inside the block, and as before afterwards.

    Args:
        seed (int, optional): ``None`` leaves the generator alone.
        device (torch.device): where the policy draws.

    Examples:
        >>> with seeded(7, torch.device("cpu")):
        ...     first = torch.rand(3)
        >>> with seeded(7, torch.device("cpu")):
        ...     second = torch.rand(3)
        >>> bool((first == second).all())
        True
    """
    if seed is None:
        yield
        return
    # Not torch.manual_seed: it formats a stack trace for CUDA, which costs more than the call.
    generators = [torch.default_generator]
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        generators.append(torch.cuda.default_generators[index])
    states = [generator.get_state() for generator in generators]
    try:
        for generator in generators:
            generator.manual_seed(seed)
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
