# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from torchrl_dvla.memory import SharedArena
from torchrl_dvla.weight_update import WeightStore, slot_writer
from torchrl_dvla.weight_update.segment import private_views, wait_for_devices
from torchrl_dvla.weight_update.slot_writer import WeightCopier, is_finite
from torchrl_dvla.weight_update.weight_layout import WeightLayout

from .linear import constant
from .stepping import step_writer

NAN, INF = float("nan"), float("inf")


def bad_names(layout: WeightLayout, source: dict[str, torch.Tensor]) -> list[str]:
    tensors = layout.tensors_of(source)
    return slot_writer.non_finite_names(layout, tensors, range(len(layout.entries)))


def make_source() -> dict[str, torch.Tensor]:
    return {
        "small": torch.randn(3),
        "large": torch.randn(70, 10),
        "transposed": torch.randn(10, 60).t(),
        "expanded": torch.randn(1, 90).expand(8, 90),
        "empty": torch.zeros(0),
        "count": torch.tensor(7),
        "half": torch.randn(5).half(),
    }


@pytest.mark.parametrize("piece_bytes", [256, 1 << 20])
def test_every_layout_is_copied_exactly(piece_bytes):
    source = make_source()
    layout = WeightLayout(source)
    views = private_views(layout)
    copier = WeightCopier(layout, piece_bytes=piece_bytes)
    assert copier.copy(layout.tensors_of(source), views, check_finite=True)
    for entry, view in zip(layout.entries, views.entries, strict=True):
        torch.testing.assert_close(view, source[entry.name], rtol=0, atol=0)
    # Nothing but the entries was written: the rest of each run is padding.
    num_weights = sum(tensor.numel() for tensor in source.values() if tensor.dtype == torch.float32)
    assert int((views.runs[torch.float32] != 0).sum()) == num_weights


def test_pieces_bound_what_is_copied_between_two_checks():
    source = {"a": torch.ones(64), "b": torch.ones(64), "c": torch.ones(320)}
    layout = WeightLayout(source)  # a and b have 256 bytes, c has 1280
    views = private_views(layout)
    seen: list[int] = []

    def note() -> bool:
        seen.append(int(views.runs[torch.float32].sum()))
        return False

    copier = WeightCopier(layout, piece_bytes=512)
    assert copier.copy(layout.tensors_of(source), views, should_stop=note)
    assert seen == [128, 128 + 128, 128 + 256, 128 + 320]

    views.runs[torch.float32].zero_()
    assert not copier.copy(layout.tensors_of(source), views, should_stop=lambda: True)
    assert int(views.runs[torch.float32].sum()) == 128  # stopped after one piece


def test_a_piece_is_checked_before_the_next_one_is_copied():
    source = {"a": torch.ones(128), "b": torch.ones(128), "c": torch.ones(128)}
    source["b"][7] = NAN
    layout = WeightLayout(source)
    views = private_views(layout)
    copier = WeightCopier(layout, piece_bytes=512)
    assert not copier.copy(layout.tensors_of(source), views, check_finite=True)
    copied = {e.name: bool(v.any()) for e, v in zip(layout.entries, views.entries, strict=True)}
    assert copied == {"a": True, "b": True, "c": False}


@pytest.mark.parametrize("name", ["small", "large", "transposed", "expanded", "half"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_bad_element_is_found_anywhere(name, value):
    source = make_source()
    source[name] = source[name].clone(memory_format=torch.preserve_format)
    source[name][..., -1] = value
    layout = WeightLayout(source)
    copier = WeightCopier(layout, piece_bytes=256)
    assert not copier.copy(layout.tensors_of(source), private_views(layout), check_finite=True)
    assert copier.copy(layout.tensors_of(source), private_views(layout))
    (line,) = bad_names(layout, source)
    assert line.startswith(f"{name} (")


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.complex64]
)
def test_finiteness_of_every_precision(dtype):
    flat = torch.ones(9).to(dtype)
    assert is_finite(flat)
    flat[4] = float("nan")
    assert not is_finite(flat)
    assert is_finite(torch.ones(2, dtype=torch.int32))


def test_finite_numbers_whose_sum_overflows_are_finite():
    large = torch.full((100,), 3e38)
    assert large.sum().item() == float("inf")
    assert is_finite(large)
    large[7] = float("-inf")
    assert not is_finite(large)
    assert not is_finite(torch.tensor([float("inf"), float("-inf")]))


def test_a_cast_that_overflows_is_not_finite():
    source = {"a": torch.tensor([1e30])}
    layout = WeightLayout(source, transport_dtype=torch.float16)
    copier = WeightCopier(layout)
    assert not copier.copy(layout.tensors_of(source), private_views(layout), check_finite=True)
    assert bad_names(layout, source) == ["a (1 of 1 elements)"]


class Masked(nn.Module):
    """A policy with an attention mask, as transformers keep them."""

    def __init__(self, size: int = 4) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        mask = torch.full((size, size), -INF).triu_(1)
        self.register_buffer("mask", mask, persistent=False)


@pytest.mark.parametrize("transport_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("size", [4, 20])  # beside others in a piece, and of several pieces
def test_infinity_is_allowed_in_buffers_alone(size, transport_dtype):
    learner, served = Masked(size), Masked(size)
    with WeightStore(learner, transport_dtype=transport_dtype) as store:
        store._writer._copier = WeightCopier(store.layout, piece_bytes=256)
        assert store.publish() == 1
        reader = store.reader("a")
        served.mask.zero_()
        assert reader.adopt_into(served) == 1
        assert served.mask.equal(learner.mask)
        for tensor, value, message in (
            (learner.linear.bias, -INF, r"linear.bias \(1 of 4 elements\)"),
            (learner.linear.bias, NAN, r"linear.bias \(1 of 4 elements\)"),
            (learner.mask.view(-1), NAN, rf"mask \(1 of {size * size} elements\)"),
        ):
            with torch.no_grad():
                good = tensor[0].item()
                tensor[0] = value
                with pytest.raises(ValueError, match=message):
                    store.publish()
                tensor[0] = good
        assert store.publish() == 2
        reader.close()


def test_an_infinity_that_the_cast_makes_is_refused_in_a_buffer_too():
    learner = nn.BatchNorm1d(2)
    with WeightStore(learner, transport_dtype=torch.float16) as store:
        learner.running_var.fill_(1e30)
        with pytest.raises(ValueError, match=r"running_var \(2 of 2 elements\)"):
            store.publish()


def test_a_frozen_weight_is_checked_when_the_store_is_made():
    learner = Masked()
    learner.linear.weight.requires_grad_(False).fill_(NAN)
    with pytest.raises(ValueError, match=r"linear.weight \(16 of 16 elements\) of version 0"):
        WeightStore(learner, trainable_only=True)


def test_two_learners_are_refused(store):
    errors: list[BaseException | None] = []

    def second_learner(step: str) -> None:
        if step == "copying":
            with ThreadPoolExecutor(1) as threads:
                errors.append(threads.submit(store.publish).exception())

    step_writer(store, second_learner, piece_bytes=1 << 20)
    assert store.publish() == 1
    assert [type(error) for error in errors] == [RuntimeError]
    assert "one learner at a time" in str(errors[0])


def test_a_second_writer_on_the_same_memory_is_refused(store):
    reader = store.reader("a")
    with pytest.raises(RuntimeError, match="one learner, got a second writer"):
        slot_writer.SlotWriter(store._segment, check_finite=True)
    assert reader.adopt_into(constant(-1.0)) == 0  # it touched nothing
    assert store.publish() == 1


def test_a_copy_that_fails_leaves_the_store_as_it_was(store):
    steps: list[str] = []

    def fail(step: str) -> None:
        steps.append(step)
        if step == "copying" and steps.count("copying") == 1:
            raise ArithmeticError

    step_writer(store, fail)
    with pytest.raises(ArithmeticError):
        store.publish(constant(1.0))
    assert steps == ["claimed", "marked", "copying", "unlocked"]
    assert (store.version, store.visible_version) == (0, 0)
    assert store.publish(constant(2.0)) == 1


class OnDevice(torch.Tensor):
    """A tensor that says it is on CUDA; its memory is the host's."""

    is_cuda = True


def on_device(module: nn.Linear) -> dict[str, torch.Tensor]:
    return {n: p.detach().as_subclass(OnDevice) for n, p in module.named_parameters()}


def test_weights_on_a_device_are_checked_there_and_visible_when_publish_returns(store, monkeypatch):
    """The order alone: what CUDA does is not run here."""
    trace: list[str] = []

    def wait(tensors: Iterable[torch.Tensor]) -> None:
        assert all(tensor.is_cuda for tensor in tensors)
        assert store.visible_version == 0  # not shown before the copy has ended
        trace.append("waited")

    monkeypatch.setattr(slot_writer, "wait_for_devices", wait)
    monkeypatch.setattr(SharedArena, "pin", lambda arena: trace.append("page-locked"))
    with pytest.raises(ValueError, match="finite"):
        store.publish(on_device(constant(NAN)))
    assert (trace, store.version) == (["page-locked"], 0)  # refused before anything was copied
    trace.clear()
    step_writer(store, trace.append, piece_bytes=1 << 20)
    assert store.publish(on_device(constant(3.0))) == store.visible_version == 1
    copied = ["claimed", "marked", "copying", "waited", "written", "unlocked", "visible"]
    assert trace == ["page-locked", *copied]
    assert store.reader("a").pin()[1]["weight"].eq(3.0).all()


def test_each_device_is_waited_for_once(monkeypatch):
    def stream(device: str) -> SimpleNamespace:
        return SimpleNamespace(synchronize=lambda: waited.append(device))

    waited: list[str] = []
    monkeypatch.setattr(torch.cuda, "current_stream", stream)
    devices = ("cuda:0", "cpu", "cuda:1", "cuda:0")
    tensors = [SimpleNamespace(device=name, is_cuda=name != "cpu") for name in devices]
    wait_for_devices(tensors)  # type: ignore[arg-type]
    assert sorted(waited) == ["cuda:0", "cuda:1"]
