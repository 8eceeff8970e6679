# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Memory of a stored LIBERO trajectory in pages, against one that is padded to the horizon.

    python benchmarks/memory_per_trajectory.py [--quick] [--horizon 280] [--chunk 8]

All sides store the same fields: a decision of one 128x128 camera, 8 numbers of proprioception, and
8x7 action tokens, log-probs and actions; each trajectory four times, as in a buffer in use. Each
side runs in a process of its own, in turns, five times.

pooled     pages of the size that ``DualPool.plan`` recommends
padded     TorchRL's ``LazyTensorStorage`` of ``[trajectory, horizon]``, padded with zeros; images
           stay bytes, and ``("next", "observation")``, which would double it, is left out
unpadded   the same, but only existing decisions are written: untouched memory is not resident

Lengths are those of ``libero_expert.py --episodes 5``, in env steps; the horizon is that of
OpenVLA's and openpi's evaluation. The last line of stdout is one JSON object:

ratio                  bytes that the pool has allocated over those of the padded storage
ratio_resident         what the pooled process has grown by over what the padded one has
ratio_resident_unpadded the same over the unpadded one
bytes_per_trajectory   allocated and resident, for each side: median, min, max
ratio_by_horizon       ratio at other horizons, in env steps, worked out; 120 is the recipe's
least_success_for_half success rate from which the ratio is at most a half, if a failure lasts until
                       the horizon
"""

from __future__ import annotations

import ctypes
import gc
import os
import random
import statistics
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from _machine import arguments, in_process, memory_bytes, report, spread
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage

from torchrl_dvla.data import decision_layout
from torchrl_dvla.memory import EnvironmentPool, Page
from torchrl_dvla.memory.dual_pool import expected_waste, recommended_rows_per_page

SIDES = ("pooled", "padded", "unpadded")
# fmt: off
LENGTHS = (  # two tasks a line
    84, 85, 85, 86, 84, 71, 84, 81, 88, 73,
    74, 73, 74, 74, 73, 71, 72, 70, 72, 72,
    83, 82, 82, 83, 81, 77, 76, 76, 78, 75,
    80, 82, 80, 80, 80, 86, 86, 85, 85, 81,
    80, 82, 80, 82, 81, 75, 75, 74, 73, 83,
)
# fmt: on
LAYOUT = decision_layout(
    {
        ("observation", "image"): ((3, 128, 128), torch.uint8),
        ("observation", "state"): ((8,), torch.float32),
    },
    chunk_size=8,
    action_dim=7,
)


def laps(lengths: list[int]) -> list[list[int]]:
    """The same lengths in another order each time."""
    return [random.Random(seed).sample(lengths, len(lengths)) for seed in range(4)]


def store_pooled(lengths: list[int]) -> tuple[int, EnvironmentPool]:
    rows_per_page = recommended_rows_per_page(statistics.fmean(lengths))
    num_pages = sum(-(-length // rows_per_page) for length in lengths)
    pool = EnvironmentPool(LAYOUT, num_pages, rows_per_page)
    row = LAYOUT.empty(1)[0].apply_(lambda tensor: tensor.fill_(1))
    stored: list[Page] = []
    for lap in laps(lengths):
        pool.free(stored)
        stored = []
        for key, length in enumerate(lap):
            pages = [
                pool.lease("writer", key, reserved=False)
                for _ in range(-(-length // rows_per_page))
            ]
            for number in pool.row_index(pages, length).tolist():
                pool.rows[number] = row
            stored += pool.seal(pages, length)
    pool.store(stored)
    return pool.nbytes, pool


def store_padded(lengths: list[int], horizon: int, *, pad: bool) -> tuple[int, LazyTensorStorage]:
    storage = LazyTensorStorage(len(lengths), ndim=1)
    storage.set(0, TensorDict(LAYOUT.empty(horizon).zero_().to_dict(), [horizon]))
    rows = LAYOUT.empty(horizon).apply_(lambda tensor: tensor.fill_(1))
    for lap in laps(lengths):
        for index, length in enumerate(lap):
            if pad:
                trajectory = rows.clone()
                trajectory[length:].zero_()
                storage.set(index, trajectory)
            else:
                storage._storage[index, :length].copy_(rows[:length])
    return sum(tensor.nbytes for tensor in storage._storage.values(True, True)), storage


def run_side(side: str, lengths: list[int], horizon: int) -> tuple[float, float]:
    torch.set_num_threads(1)
    # What either side needs besides what it stores is there before the first measurement.
    store_pooled([1, 2])
    store_padded([1, 2], 2, pad=True)
    before = memory_bytes("Rss")
    if side == "pooled":
        allocated, storage = store_pooled(lengths)
    else:
        allocated, storage = store_padded(lengths, horizon, pad=side == "padded")
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is left of trajectories on their way in
    resident = memory_bytes("Rss") - before
    del storage  # alive until here
    return allocated / len(lengths), resident / len(lengths)


def ratio(mean_decisions: float, horizon_decisions: int) -> float:
    """Bytes of a pooled trajectory over a padded one, worked out."""
    waste = expected_waste(recommended_rows_per_page(mean_decisions), mean_decisions)
    return round(mean_decisions / (1 - waste) / horizon_decisions, 3)


def main() -> None:
    args = arguments(__doc__, "one repeat", horizon=280, chunk=8)
    lengths = [-(-steps // args.chunk) for steps in LENGTHS]
    horizon = -(-args.horizon // args.chunk)
    if max(lengths) > horizon:
        sys.exit(f"--horizon must be at least {max(LENGTHS)}, the longest episode")
    mean = statistics.fmean(lengths)
    found: dict[str, list[tuple[float, float]]] = {side: [] for side in SIDES}
    for _ in range(1 if args.quick else 5):
        for side in SIDES:
            found[side].append(in_process(run_side, side, lengths, horizon))
    allocated, resident = (
        {side: spread((sample[column] for sample in found[side]), 0) for side in SIDES}
        for column in (0, 1)
    )
    rates = (share / 100 for share in range(101))
    least = next((r for r in rates if ratio(r * mean + (1 - r) * horizon, horizon) <= 0.5), None)

    def over(column: dict[str, dict[str, float]], rival: str) -> float:
        return round(column["pooled"]["median"] / column[rival]["median"], 3)

    result = {
        "ratio": over(allocated, "padded"),
        "ratio_resident": over(resident, "padded"),
        "ratio_resident_unpadded": over(resident, "unpadded"),
        "ratio_by_horizon": {n: ratio(mean, -(-n // args.chunk)) for n in (120, 160, 280, 512)},
        "least_success_for_half": least,
        "bytes_per_trajectory": {"allocated": allocated, "resident": resident},
        "mean_decisions": round(mean, 2),
        "horizon_decisions": horizon,
    }
    report("memory_per_trajectory", result, args.quick)


if __name__ == "__main__":
    main()
