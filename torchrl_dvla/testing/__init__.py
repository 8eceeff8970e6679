# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Fakes that ship: emulated devices, faults on order, known answers.

For tests and benchmarks, the user's own included; nothing else in the package imports them.
"""

from torchrl_dvla.testing.device import EmulatedDevice, Latency, emulate_latency
from torchrl_dvla.testing.environment import CountingChunkEnv, CountingOracle, Scene
from torchrl_dvla.testing.faults import Fault, FaultInjector, FaultyEnvFactory, InjectedFault

__all__ = [
    "CountingChunkEnv",
    "CountingOracle",
    "EmulatedDevice",
    "Fault",
    "FaultInjector",
    "FaultyEnvFactory",
    "InjectedFault",
    "Latency",
    "Scene",
    "emulate_latency",
]
