# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from torchrl_dvla.weight_update.copying import WeightCopier
from torchrl_dvla.weight_update.finite import is_finite, non_finite_names
from torchrl_dvla.weight_update.layout import WeightLayout
from torchrl_dvla.weight_update.segment import private_views


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
def test_every_layout_is_copied_exactly(piece_bytes: int) -> None:
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


def test_pieces_bound_what_is_copied_between_two_looks() -> None:
    source = {"a": torch.ones(64), "b": torch.ones(64), "c": torch.ones(320)}
    layout = WeightLayout(source)  # a and b have 256 bytes, c has 1280
    views = private_views(layout)
    seen: list[int] = []

    def look() -> bool:
        seen.append(int(views.runs[torch.float32].sum()))
        return False

    copier = WeightCopier(layout, piece_bytes=512)
    assert copier.copy(layout.tensors_of(source), views, between=look)
    assert seen == [128, 128 + 128, 128 + 256, 128 + 320]

    views.runs[torch.float32].zero_()
    assert not copier.copy(layout.tensors_of(source), views, between=lambda: True)
    assert int(views.runs[torch.float32].sum()) == 128  # stopped after one piece


def test_the_views_of_a_destination_are_made_once_and_go_with_it() -> None:
    source = {"a": torch.ones(64), "b": torch.ones(320)}
    layout = WeightLayout(source)
    copier = WeightCopier(layout, piece_bytes=512)
    first, second = private_views(layout), private_views(layout)
    assert copier.copy(layout.tensors_of(source), first)
    made = copier._targets_of[first]
    source["b"] = torch.full((320,), 2.0)  # another tensor: only the destination is remembered
    assert copier.copy(layout.tensors_of(source), first)
    assert copier.copy(layout.tensors_of(source), second)
    assert copier._targets_of[first] is made
    for views in (first, second):
        assert int(views.runs[torch.float32].sum()) == 64 + 2 * 320
    memory = weakref.ref(first.memory)
    del first, made, views
    gc.collect()
    assert len(copier._targets_of) == 1
    assert memory() is None  # a closed store's memory goes, whatever copier there is


def test_a_look_reads_the_source_where_it_has_the_bytes_that_are_written() -> None:
    source = {
        "large": torch.ones(200),  # 800 bytes: 512 and the rest
        "strided": torch.ones(200, 2)[::2],
        "first": torch.ones(8),
        "second": torch.ones(8),
        "half": torch.ones(128, dtype=torch.float64),
        **{f"tiny{k}": torch.ones(1, dtype=torch.int32) for k in range(5)},
    }
    layout = WeightLayout(source, transport_dtype=torch.float32)
    views = private_views(layout)
    copier = WeightCopier(layout, piece_bytes=512)
    sights = copier.sights(layout.tensors_of(source), views)
    name_of = {tensor.data_ptr(): name for name, tensor in source.items()}
    name_of[source["large"][128:].data_ptr()] = "rest of large"
    read = [[name_of[part.data_ptr()] for part in source] for _, source in sights if source]
    assert sorted(read) == [["first", "second"], ["large"], ["rest of large"]]
    assert copier.copy(layout.tensors_of(source), views)
    # What is not dense, what was cast, and what is too many: each element is 1, padding is 0.
    assert sum(float(part.sum()) for (part,), source in sights if not source) == 200 + 128 + 5
    everything = sum(tensor.numel() for tensor in layout.tensors_of(source))
    assert sum(float(part.sum()) for (part,), _ in sights) == everything


@pytest.mark.parametrize("name", ["small", "large", "transposed", "expanded", "half"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_bad_element_is_found_anywhere(name: str, value: float) -> None:
    source = make_source()
    source[name] = source[name].clone(memory_format=torch.preserve_format)
    source[name][..., -1] = value
    layout = WeightLayout(source)
    copier = WeightCopier(layout, piece_bytes=256)
    assert not copier.copy(layout.tensors_of(source), private_views(layout), check_finite=True)
    views = private_views(layout)
    assert copier.copy(layout.tensors_of(source), views)
    sights = copier.sights(layout.tensors_of(source), views)
    assert not all(is_finite(part) for sight in sights for part in sight.written)
    (line,) = non_finite_names(layout, layout.tensors_of(source))
    assert line.startswith(f"{name} (")


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.complex64]
)
def test_finiteness_of_every_precision(dtype: torch.dtype) -> None:
    flat = torch.ones(9).to(dtype)
    assert is_finite(flat)
    flat[4] = float("nan")
    assert not is_finite(flat)
    assert is_finite(torch.ones(2, dtype=torch.int32))


def test_finite_numbers_whose_sum_overflows_are_finite() -> None:
    large = torch.full((100,), 3e38)
    assert large.sum().item() == float("inf")
    assert is_finite(large)
    large[7] = float("-inf")
    assert not is_finite(large)
    assert not is_finite(torch.tensor([float("inf"), float("-inf")]))


def test_a_cast_that_overflows_is_not_finite() -> None:
    source = {"a": torch.tensor([1e30])}
    layout = WeightLayout(source, transport_dtype=torch.float16)
    copier = WeightCopier(layout)
    assert not copier.copy(layout.tensors_of(source), private_views(layout), check_finite=True)
    assert non_finite_names(layout, layout.tensors_of(source)) == ["a (1 of 1 elements)"]
