# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Starts the inference lane, and starts it again."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

from tensordict.nn import TensorDictModuleBase

from torchrl_dvla.collectors.checks import build_policy
from torchrl_dvla.collectors.configs import InferenceConfig
from torchrl_dvla.swimlane import InferenceProcess, InferenceThread
from torchrl_dvla.weight_update import AsyncWeightUpdater, WeightReader

__all__ = ["LaneStarter"]


class LaneStarter:
    """Starts an inference lane on the newest weights; the lane before it must be gone.

    Args:
        policy (TensorDictModuleBase): the learner's policy.
        policy_factory (Callable, optional): builds the lane's policy, in the lane. Defaults to a
            copy of ``policy``.
        updater (AsyncWeightUpdater): gives the lane its place in the weight store.
        config (InferenceConfig): where it runs.
        seed (int): seed of what the policy draws before its first call.
        start_method (str): how a process is started.
    """

    def __init__(
        self,
        policy: TensorDictModuleBase,
        policy_factory: Callable[[], TensorDictModuleBase] | None,
        updater: AsyncWeightUpdater,
        config: InferenceConfig,
        *,
        seed: int,
        start_method: str,
    ) -> None:
        self._policy = policy
        self._policy_factory = policy_factory
        self._updater = updater
        self._config = config
        self._seed = seed
        self._start_method = start_method
        self._reader: WeightReader | None = None

    def __call__(self) -> InferenceProcess | InferenceThread:
        """The lane; it has been started."""
        if self._reader is not None:  # the lane before this one is gone
            self._updater.store.release(self._reader)
        self._reader = reader = self._updater.reader("inference")
        factory: Callable[[], TensorDictModuleBase]
        if self._policy_factory is not None:
            factory = functools.partial(build_policy, self._policy_factory)
        elif self._config.where == "thread":
            factory = functools.partial(copy.deepcopy, self._policy)
        else:
            factory = functools.partial(_identity, self._policy)
        if self._config.where == "thread":
            return InferenceThread(factory, reader)
        return InferenceProcess(
            factory,
            reader,
            num_threads=self._config.num_threads,
            seed=self._seed,
            start_method=self._start_method,
        )


def _identity(policy: TensorDictModuleBase) -> TensorDictModuleBase:
    return policy
