# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Fakes that ship: emulated devices and networks, faults on order, known answers.

For tests and benchmarks, the user's own included; nothing else in the package imports them.
"""

from torchrl_dvla.testing.device import EmulatedDevice, Latency, emulate_latency
from torchrl_dvla.testing.environment import CountingChunkEnv, CountingOracle, Scene
from torchrl_dvla.testing.faults import Fault, FaultInjector, FaultyEnvFactory, InjectedFault
from torchrl_dvla.testing.network import EmulatedNetwork
from torchrl_dvla.testing.remote import Remote

__all__ = [
    "CountingChunkEnv",
    "CountingOracle",
    "EmulatedDevice",
    "EmulatedNetwork",
    "Fault",
    "FaultInjector",
    "FaultyEnvFactory",
    "InjectedFault",
    "Latency",
    "Remote",
    "Scene",
    "emulate_latency",
]
