# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

import pytest
import torch

from torchrl_dvla.weight_update import WeightStore

from .linear import constant, value_of


class TestBytesFromAnotherNode:
    """An empty store, filled from the bytes of another one."""

    def test_a_version_is_carried_on_as_bytes(self, store: WeightStore) -> None:
        source = store.reader("broadcast")
        copy_ = WeightStore(store.layout)
        reader, served = copy_.reader("worker"), constant(-1.0)
        assert (copy_.version, copy_.offered_version) == (-1, -1)
        assert not reader.has_update()
        with pytest.raises(RuntimeError, match="no version has arrived yet"):
            reader.adopt_into(served)
        with pytest.raises(TimeoutError, match="waited 0.0 s for version 0, got -1"):
            reader.wait(0, timeout_s=0.0)
        for version, value in ((3, 2.0), (7, 5.0)):
            store.publish(constant(value), version=version)
            slot = source.pin_slot()
            assert slot.version == version
            assert slot.live.shape == (store.layout.slot_bytes,)
            copy_.receive(lambda memory, live=slot.live: memory.copy_(live), version=version)
            assert reader.adopt_into(served) == copy_.version == version
            assert value_of(served) == value
        with pytest.raises(ValueError, match="version must grow, got 7 after 7"):
            copy_.receive(lambda memory: None, version=7)
        with pytest.raises(ValueError, match="made empty"):
            copy_.publish()
        reader.close(), source.close(), copy_.close()

    def test_half_a_version_is_never_seen(self, store: WeightStore) -> None:
        def half(memory: torch.Tensor) -> None:
            memory[: len(memory) // 2].fill_(77)
            raise ConnectionError

        with WeightStore(store.layout) as copy_:
            with pytest.raises(ConnectionError):
                copy_.receive(half, version=0)
            assert (copy_.version, copy_.offered_version) == (-1, -1)
            copy_.receive(lambda memory: memory.zero_(), version=0)
            reader, served = copy_.reader("worker"), constant(-1.0)
            reader.adopt_into(served)
            for _ in range(3):
                with pytest.raises(ConnectionError):
                    copy_.receive(half, version=1)
                assert (copy_.version, copy_.offered_version) == (0, 0)
                assert (reader.adopt_into(served), value_of(served)) == (0, 0.0)
            assert copy_.stats().num_publishes == 1
            reader.close()

    def test_a_version_put_aside_is_lost_with_the_one_that_fails_on_top_of_it(
        self, store: WeightStore
    ) -> None:
        def write(value: int) -> None:
            copy_.receive(lambda memory: memory.fill_(value), version=value)

        def fail(memory: torch.Tensor) -> None:
            raise ConnectionError

        with WeightStore(store.layout) as copy_:
            copy_._writer._start_flusher = lambda: None  # type: ignore[method-assign]
            pins = []
            for version in range(3):  # two slots stay pinned at old versions, the third is offered
                write(version)
                pins.append(copy_.reader(version))
                pins[-1].pin()
            write(3)
            assert (copy_.version, copy_.offered_version) == (3, 2)
            with pytest.raises(ConnectionError):
                copy_.receive(fail, version=4)
            assert (copy_.version, copy_.offered_version) == (2, 2)
            write(3)  # so it can come again
            assert copy_.version == 3
            for pin in pins:
                pin.close()

    def test_frozen_weights_are_written_once(self) -> None:
        learner = constant(4.0)
        learner.bias.requires_grad_(False)
        with WeightStore(learner, trainable_only=True) as store, WeightStore(store.layout) as copy_:
            slot = store.reader("broadcast").pin_slot()
            assert slot.frozen.shape == (store.layout.frozen_bytes,)
            copy_.frozen_memory.copy_(slot.frozen)
            copy_.receive(lambda memory: memory.copy_(slot.live), version=0)
            served = constant(-1.0)
            reader = copy_.reader("worker")
            reader.adopt_into(served)
            assert value_of(served) == 4.0
            reader.close()
