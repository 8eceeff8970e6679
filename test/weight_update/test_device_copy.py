# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch

from torchrl_dvla.weight_update import device_copy
from torchrl_dvla.weight_update.device_copy import SideStream, side_stream


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is said to CUDA, in order."""
    calls: list[str] = []

    class Event:
        def record(self, stream: object) -> None:
            calls.append(f"record on {stream}")

        def synchronize(self) -> None:
            calls.append("synchronize")

    class Stream:
        def __init__(self, device: torch.device) -> None:
            calls.append(f"new stream on {device}")

        def wait_event(self, event: Event) -> None:
            calls.append("side waits for event")

        def __str__(self) -> str:
            return "side"

    @contextlib.contextmanager
    def stream(stream: Stream) -> Iterator[None]:
        calls.append(f"enter {stream}")
        yield
        calls.append(f"leave {stream}")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"current of {device}")
    return calls


def test_the_side_stream_works_after_the_callers(calls: list[str]) -> None:
    side = SideStream(torch.device("cuda:1"))
    taken = side.on_current(lambda: calls.append("snapshot"))
    done = side.on_side(lambda: calls.append("copy"), after=taken)
    assert "synchronize" not in calls  # nothing so far made the host wait
    side.wait(done)
    assert calls == [
        "new stream on cuda:1",
        "snapshot",
        "record on current of cuda:1",
        "side waits for event",
        "enter side",
        "copy",
        "leave side",
        "record on side",
        "synchronize",
    ]


class OnCuda:
    is_cuda = True
    device = torch.device("cuda:3")


def test_each_device_has_one_side_stream(calls: list[str]) -> None:
    device_copy._side_stream_of.cache_clear()
    try:
        tensors = [torch.zeros(1), OnCuda()]
        side = side_stream(tensors)  # type: ignore[arg-type]
        assert side is not None
        assert side.device == torch.device("cuda:3")
        assert side_stream(tensors) is side  # type: ignore[arg-type]
        assert calls == ["new stream on cuda:3"]
        assert side_stream([torch.zeros(1)]) is None
    finally:
        device_copy._side_stream_of.cache_clear()
