# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Faults on order: environments that raise, hang, stall, leak or die at a given moment.

What a fault does is plain, picklable configuration, so it reaches a worker in a spawned process.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from tensordict import TensorDictBase
from torchrl.envs import EnvBase, Transform, TransformedEnv

__all__ = ["Fault", "FaultInjector", "FaultyEnvFactory", "InjectedFault"]

FaultKind = Literal["raise", "hang", "stall", "kill", "leak"]
FaultPlace = Literal["constructor", "reset", "step"]


class InjectedFault(RuntimeError):
    """What a fault of kind ``"raise"`` raises."""


@dataclass(frozen=True)
class Fault:
    """What goes wrong, where and when.

    =============  ===============================================================================
    *kind*         effect
    =============  ===============================================================================
    ``"raise"``    raises :class:`InjectedFault`
    ``"hang"``     waits forever, without a core; other threads run, signals are handled
    ``"stall"``    waits forever inside of C code that keeps the GIL, as a stuck renderer does: no
                   Python thread or signal handler runs any more, only SIGKILL is sure to end it
    ``"kill"``     ends the process with SIGKILL
    ``"leak"``     keeps *leak_bytes* more memory resident, and goes on
    =============  ===============================================================================

    Args:
        kind (str): one of the above.
        place (str): ``"constructor"``, ``"reset"`` or ``"step"`` (one decision).
        at (int): which reset or decision of the environment's life, from 0. Defaults to ``0``.
        repeat (bool): whether every later one fails too. Defaults to ``False``.
        once_path (str, optional): a file that marks the fault as spent. It is made when the fault
            strikes; where it exists, the fault does not strike. A replacement built from the same
            configuration is then healthy.
        leak_bytes (int): for ``"leak"``. Defaults to 16 MiB.

    Raises:
        ValueError: for an unknown kind or place, or a negative number.

    Examples:
        >>> Fault("kill", "step", at=3)
        Fault(kind='kill', place='step', at=3, repeat=False, once_path=None, leak_bytes=16777216)
    """

    kind: FaultKind
    place: FaultPlace
    at: int = 0
    repeat: bool = False
    once_path: str | None = None
    leak_bytes: int = 1 << 24

    def __post_init__(self) -> None:
        for name, choices in (("kind", get_args(FaultKind)), ("place", get_args(FaultPlace))):
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(
                    f"{name} must be one of {list(choices)}, got {value!r}. See Fault's table."
                )
        if self.at < 0 or self.leak_bytes < 0:
            raise ValueError(
                f"at and leak_bytes must not be negative, got {self.at} and {self.leak_bytes}. "
                "Calls are counted from 0."
            )

    def is_due(self, count: int) -> bool:
        """Whether the call number *count* is to fail."""
        if count < self.at or (count > self.at and not self.repeat):
            return False
        return self.once_path is None or not os.path.exists(self.once_path)


class FaultInjector(Transform):
    """Transform that strikes before a reset or a decision of the environment it is put on.

    Args:
        faults (sequence of Fault): what goes wrong; those of place ``"constructor"`` are for
            :class:`FaultyEnvFactory`.

    Examples:
        >>> from torchrl.envs import TransformedEnv
        >>> from torchrl_dvla.testing import CountingChunkEnv
        >>> env = TransformedEnv(CountingChunkEnv(), FaultInjector([Fault("raise", "reset", at=1)]))
        >>> _ = env.reset()
        >>> env.reset()
        Traceback (most recent call last):
        ...
        torchrl_dvla.testing.faults.InjectedFault: injected at reset 1
    """

    def __init__(self, faults: Sequence[Fault]) -> None:
        super().__init__()
        self.faults = tuple(faults)
        self.num_resets = 0
        self.num_decisions = 0
        self._leaked: list[mmap.mmap] = []

    def _reset_env_preprocess(self, tensordict: TensorDictBase) -> TensorDictBase:
        count = self.num_resets
        self.num_resets += 1
        strike(self.faults, "reset", count, self._leaked)
        return tensordict

    def _inv_call(self, tensordict: TensorDictBase) -> TensorDictBase:
        count = self.num_decisions
        self.num_decisions += 1
        strike(self.faults, "step", count, self._leaked)
        return tensordict


class FaultyEnvFactory:
    """Factory of environments with faults, their constructor included.

    Args:
        create_env_fn (callable): makes the healthy environment; must be picklable if the factory is
            to be.
        faults (sequence of Fault): what goes wrong.

    Examples:
        >>> from torchrl_dvla.testing import CountingChunkEnv
        >>> env = FaultyEnvFactory(CountingChunkEnv, [Fault("raise", "step", at=2)])()
        >>> env.rollout(2)["action_is_pad"].shape
        torch.Size([2, 4])
    """

    def __init__(self, create_env_fn: Callable[..., EnvBase], faults: Sequence[Fault]) -> None:
        self.create_env_fn = create_env_fn
        self.faults = tuple(faults)

    def __call__(self, **kwargs: Any) -> EnvBase:
        leaked: list[mmap.mmap] = []
        strike(self.faults, "constructor", 0, leaked)
        injector = FaultInjector(self.faults)
        injector._leaked.extend(leaked)
        return TransformedEnv(self.create_env_fn(**kwargs), injector)


def strike(faults: Sequence[Fault], place: FaultPlace, count: int, leaked: list[mmap.mmap]) -> None:
    """Let every fault of *place* that is due at call *count* happen.

    Args:
        faults (sequence of Fault): the plan.
        place (str): where the caller is.
        count (int): number of the call, from 0.
        leaked (list of mmap): keeps what ``"leak"`` allocates.
    """
    for fault in faults:
        # A constructor runs once per environment: `at` has nothing to count there.
        if fault.place != place or not fault.is_due(fault.at if place == "constructor" else count):
            continue
        if fault.once_path is not None:
            Path(fault.once_path).touch()
        if fault.kind == "raise":
            raise InjectedFault(f"injected at {place} {count}")
        if fault.kind == "hang":
            threading.Event().wait()
        elif fault.kind == "stall":
            # A signal would end pause() and let Python's handlers run.
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            ctypes.PyDLL(None).pause()  # unlike CDLL's, calls through PyDLL keep the GIL
        elif fault.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        else:
            # Mapped, not allocated: an allocator would hand out pages that are resident already.
            # Private, as what a heap leaks: shared memory is no process's own.
            region = mmap.mmap(-1, fault.leak_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            region.write(b"\1" * fault.leak_bytes)
            leaked.append(region)
