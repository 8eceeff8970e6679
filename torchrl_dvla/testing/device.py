# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""A device that is not there: calls that take a stated time and hold neither a core nor the GIL.

Overlap cannot be measured honestly where every lane competes for the same two cores. An emulated
device stands for an accelerator or a simulator elsewhere: the caller waits, the machine stays free.
Every figure obtained with it is a figure of the *schedule*, not of any hardware, and must say so.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from tensordict import TensorDictBase, is_tensor_collection
from torch import nn
from torchrl.envs import EnvBase, Transform, TransformedEnv

__all__ = ["EmulatedDevice", "Latency", "emulate_latency"]

T = TypeVar("T")


class Latency:
    r"""How long a call takes: fixed, growing with the batch, or heavy-tailed.

    .. math::
        t = t_0 X + n\,t_{row}

    for a batch of :math:`n` rows, where :math:`X` is one, or Pareto-distributed with mean one.

    Args:
        base_s (float): :math:`t_0`, seconds.

    Keyword Args:
        per_row_s (float): :math:`t_{row}`, seconds. Defaults to ``0.0``.
        tail_index (float, optional): shape of the Pareto law, ``> 1``; the smaller, the heavier the
            tail. ``None`` for none.
        seed (int): seed of the draws. Defaults to ``0``.

    Raises:
        ValueError: for a negative time, or a tail without a mean.

    Examples:
        >>> Latency(0.02, per_row_s=0.001).sample(num_rows=8)
        0.028
        >>> tailed = Latency(0.01, tail_index=2.0)
        >>> all(tailed.sample() >= 0.005 for _ in range(100))
        True
    """

    def __init__(
        self,
        base_s: float,
        *,
        per_row_s: float = 0.0,
        tail_index: float | None = None,
        seed: int = 0,
    ) -> None:
        if not base_s >= 0 or not per_row_s >= 0:
            raise ValueError(
                f"base_s and per_row_s must not be negative, got {base_s} and {per_row_s}. "
                "Pass seconds."
            )
        if tail_index is not None and not tail_index > 1:
            raise ValueError(
                f"tail_index must be greater than 1, got {tail_index}. A heavier tail has no mean "
                "to scale to base_s."
            )
        self.base_s = base_s
        self.per_row_s = per_row_s
        self.tail_index = tail_index
        self._random = random.Random(seed)

    def sample(self, num_rows: int = 1) -> float:
        """Draw the duration of one call on *num_rows* rows, in seconds."""
        factor = 1.0
        if self.tail_index is not None:
            factor = self._random.paretovariate(self.tail_index)
            factor *= (self.tail_index - 1) / self.tail_index
        return self.base_s * factor + self.per_row_s * num_rows


class EmulatedDevice:
    """A device that works through one call after the other, as a stream of kernels would.

    A call lasts its latency, counted from when the device takes it up. The call's own work on the
    CPU is part of that time, not added to it; where it takes longer, the device is late and
    ``num_overruns`` counts it. Waiting holds no core and no GIL. Several functions may share a
    device: their calls then queue, as inference and training on the same accelerator do.

    A copy, or a device that was pickled to another process, is a device of its own.

    Args:
        latency_s (float or Latency): duration of a call, in seconds.

    Keyword Args:
        clock (callable): seconds, monotonic. Defaults to :func:`time.monotonic`.
        sleep (callable): waits for a number of seconds. Defaults to :func:`time.sleep`.

    Examples:
        >>> device = EmulatedDevice(0.001)
        >>> double = device.wrap(lambda x: 2 * x)
        >>> double(21), device.num_calls, device.busy_s >= 0.001
        (42, 1, True)
    """

    def __init__(
        self,
        latency_s: float | Latency,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self.latency = latency_s if isinstance(latency_s, Latency) else Latency(latency_s)
        self._clock = clock
        self._sleep = sleep
        self._stream = threading.RLock()
        self._depth = 0
        self._start_s = 0.0
        #: Calls served, calls whose own work outlasted their latency, and time spent in calls.
        self.num_calls = 0
        self.num_overruns = 0
        self.busy_s = 0.0

    def now_s(self) -> float:
        """Return the device's clock."""
        return self._clock()

    def begin(self, start_s: float | None = None) -> None:
        """Wait for the device and start a call, or enter one that started at *start_s*."""
        self._stream.acquire()
        self._depth += 1
        if self._depth == 1:  # a call inside of a call belongs to it
            self._start_s = self._clock() if start_s is None else start_s

    def end(self, num_rows: int = 1) -> None:
        """Wait until the call that :meth:`begin` started has lasted its latency, then leave."""
        try:
            if self._depth == 1:
                latency_s = self.latency.sample(num_rows)
                remaining_s = self._start_s + latency_s - self._clock()
                if remaining_s > 0:
                    self._sleep(remaining_s)
                elif remaining_s < 0:
                    self.num_overruns += 1
                self.num_calls += 1
                self.busy_s += self._clock() - self._start_s
        finally:
            self._depth -= 1
            self._stream.release()

    def wrap(self, function: Callable[..., T]) -> Callable[..., T]:
        """Return *function*, run on this device."""
        return _Call(self, function)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        del state["_stream"]
        state["_depth"] = 0
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._stream = threading.RLock()


def emulate_latency(target: Any, latency_s: float | Latency | EmulatedDevice) -> Any:
    """Make *target* take a stated time, without holding a core or the GIL.

    - A policy, or any module: its ``forward`` does, through hooks; the module itself is returned,
      so its class, keys and parameter names stay as they are.
    - An environment: its steps do, through a transform around it; resets stay as fast as they are.
    - A function, for instance a learner's step: the wrapped function is returned.

    Args:
        target (nn.Module, EnvBase or callable): what shall be slow.
        latency_s (float, Latency or EmulatedDevice): for how long, in seconds, or the device that
            runs it. Rows are counted on the first tensordict among the arguments.

    Returns:
        *target* itself for a module, a :class:`~torchrl.envs.TransformedEnv` for an environment, a
        callable for a function.

    Raises:
        ValueError: if *target* is none of these.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> device = EmulatedDevice(0.001)
        >>> layer = emulate_latency(nn.Linear(2, 3), device)
        >>> layer(torch.zeros(1, 2)).shape, device.num_calls
        (torch.Size([1, 3]), 1)
    """
    device = latency_s if isinstance(latency_s, EmulatedDevice) else EmulatedDevice(latency_s)
    if isinstance(target, EnvBase):
        return TransformedEnv(target, _StepLatency(device))
    if isinstance(target, nn.Module):
        hooks = _Hooks(device)
        target.register_forward_pre_hook(hooks.before, with_kwargs=True)
        # Also called when forward raises: the device must not stay taken.
        target.register_forward_hook(hooks.after, with_kwargs=True, always_call=True)
        return target
    if callable(target):
        return device.wrap(target)
    raise ValueError(
        f"target must be a module, an environment or a callable, got {type(target).__name__}. "
        "Wrap the function that does the work."
    )


class _Call:
    """A function on a device; a class so that it pickles."""

    def __init__(self, device: EmulatedDevice, function: Callable[..., Any]) -> None:
        self.device = device
        self.function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.device.begin()
        try:
            return self.function(*args, **kwargs)
        finally:
            self.device.end(_num_rows(args, kwargs))


class _Hooks:
    """Forward hooks of a module on a device."""

    def __init__(self, device: EmulatedDevice) -> None:
        self.device = device

    def before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.device.begin()

    def after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.device.end(_num_rows(args, kwargs))


class _StepLatency(Transform):
    """Makes an environment's step last the latency of a device."""

    def __init__(self, device: EmulatedDevice) -> None:
        super().__init__()
        self.emulated = device
        self._start_s = 0.0

    def _inv_call(self, tensordict: TensorDictBase) -> TensorDictBase:
        # The device is entered after the step only: one that raises must not leave it taken.
        self._start_s = self.emulated.now_s()
        return tensordict

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        self.emulated.begin(self._start_s)
        self.emulated.end(max(1, tensordict.numel()))
        return next_tensordict

    def _reset(
        self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase
    ) -> TensorDictBase:
        return tensordict_reset


def _num_rows(args: Any, kwargs: Any) -> int:
    for value in (*args, *kwargs.values()):
        if is_tensor_collection(value):
            return max(1, value.numel())
    return 1
