# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""A small collector that the tests of this folder share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import cloudpickle
import pytest

from torchrl_dvla.collectors import DVLACollector, GroupConfig, InferenceConfig, WorkerConfig
from torchrl_dvla.data import PooledReplayBuffer

from . import counting_task
from .counting_task import make_env, make_policy

# The inference process cannot import the tests' modules: it gets their functions whole.
cloudpickle.register_pickle_by_value(counting_task)


@pytest.fixture
def make_collector() -> Iterator[Callable[..., DVLACollector]]:
    """Builds collectors on :class:`CountingChunkEnv`; all are shut down after the test.

    A policy that is False is none: that of ``policy_factory`` alone.
    """
    built: list[DVLACollector] = []

    def make(
        create_env_fn: Any = None,
        *,
        workers: dict[str, Any] | None = None,
        inference: InferenceConfig = InferenceConfig(),
        batch_size: int = 16,
        num_epochs: int = 1,
        policy: Any = None,
        replay_buffer: Any = None,
        **kwargs: Any,
    ) -> DVLACollector:
        group = kwargs.pop("group", None) or GroupConfig(group_size=3, groups_per_update=2)
        buffer = PooledReplayBuffer(batch_size=batch_size, num_epochs=num_epochs, timeout_s=60.0)
        collector = DVLACollector(
            create_env_fn or make_env,
            make_policy() if policy is None else policy or None,
            replay_buffer=buffer if replay_buffer is None else replay_buffer,
            group=group,
            workers=WorkerConfig(**{"num_workers": 1, "max_decisions": 4, **(workers or {})}),
            inference=inference,
            **kwargs,
        )
        built.append(collector)
        return collector

    yield make
    for collector in built:
        collector.shutdown()


@pytest.fixture
def start_collector(make_collector: Callable[..., DVLACollector]) -> Callable[..., DVLACollector]:
    """Builds collectors as ``make_collector`` does, and starts them."""

    def start(*args: Any, **kwargs: Any) -> DVLACollector:
        collector = make_collector(*args, **kwargs)
        collector.start()
        return collector

    return start
