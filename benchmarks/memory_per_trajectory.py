# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""How much memory does a stored LIBERO trajectory take, against one that is padded to the horizon?

    python benchmarks/memory_per_trajectory.py [--quick] [--horizon 280] [--chunk 8]

Both sides store the same trajectories, with the same fields of the same types: a decision of one
128x128 camera, 8 numbers of proprioception, and 8x7 action tokens, log-probs and actions. Each side
runs in a process of its own, in turns, five times.

pooled     pages of an ``EnvironmentPool`` adopted by a ``PooledStorage``; as many pages as the
           trajectories need, of the size that ``DualPool.plan`` recommends for their mean length
padded     TorchRL's ``LazyTensorStorage`` of ``[trajectory, horizon]``, each trajectory padded with
           zeros. At its best settings: images stay bytes, and ``("next", "observation")``, which
           would double it, is left out, as it is in our rows
unpadded   the same storage, into which only the decisions that exist are written: memory that was
           never touched is not resident. Each place is used four times, as in a buffer that is in
           use; both other sides are used as often

Lengths are those of 50 episodes of the scripted expert on libero_object, five benchmark init states
for each of its ten tasks, in env steps (``benchmarks/libero_expert.py --episodes 5``). The horizon
is 280 env steps, what the evaluation scripts of OpenVLA and openpi allow on this suite; its longest
human demonstration has 254. The other horizons and successes below are worked out from the page and
row sizes, not run: a failed episode lasts until the horizon, so memory per trajectory follows the
success rate. Human demonstrations are slower than the expert: the 1693 episodes of the LeRobot
conversion of the four suites have 273465 steps in all, which gives their mean; the horizon of the
longest suite is 520.

The last line of stdout is one JSON object:

ratio                  bytes that the pool has allocated over those of the padded storage
ratio_resident         what the pooled process has grown by over what the padded one has
ratio_resident_unpadded the same over the unpadded one
bytes_per_trajectory   allocated and resident, for each side: median, min, max
ratio_by_horizon       ratio at other horizons, in env steps; 120 is the two-core recipe's
ratio_by_success       ratio at the horizon of this run when only so many episodes succeed
least_success_for_half success rate from which the ratio is at most a half
ratio_human            the mean length of human demonstrations of all four suites at 520 env steps
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import multiprocessing
import os
import platform
import random
import statistics
from multiprocessing.connection import Connection
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage

from torchrl_dvla.data import PooledStorage, decision_layout
from torchrl_dvla.memory import EnvironmentPool
from torchrl_dvla.memory.dual_pool import expected_waste, recommended_rows_per_page

SIDES = ("pooled", "padded", "unpadded")
NUM_LAPS = 4
# fmt: off
LENGTHS = (  # two tasks a line
    84, 85, 85, 86, 84, 71, 84, 81, 88, 73,
    74, 73, 74, 74, 73, 71, 72, 70, 72, 72,
    83, 82, 82, 83, 81, 77, 76, 76, 78, 75,
    80, 82, 80, 80, 80, 86, 86, 85, 85, 81,
    80, 82, 80, 82, 81, 75, 75, 74, 73, 83,
)
# fmt: on
HUMAN_EPISODES, HUMAN_STEPS, HUMAN_HORIZON = 1693, 273465, 520
LAYOUT = decision_layout(
    {
        ("observation", "image"): ((3, 128, 128), torch.uint8),
        ("observation", "state"): ((8,), torch.float32),
    },
    chunk_size=8,
    action_dim=7,
)


def num_decisions(env_steps: float, chunk: int) -> int:
    return -(-int(env_steps) // chunk)


def resident_bytes() -> int:
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Rss:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("The kernel does not tell the resident memory of a process.")


def laps(lengths: list[int]) -> list[list[int]]:
    """The same lengths in another order each time."""
    return [random.Random(seed).sample(lengths, len(lengths)) for seed in range(NUM_LAPS)]


def store_pooled(lengths: list[int]) -> tuple[int, PooledStorage]:
    rows_per_page = recommended_rows_per_page(statistics.fmean(lengths))
    num_pages = sum(-(-length // rows_per_page) for length in lengths)
    pool = EnvironmentPool(LAYOUT, num_pages, rows_per_page)
    storage = PooledStorage(pool)
    row = LAYOUT.empty(1)[0].apply_(lambda tensor: tensor.fill_(1))
    for lap in laps(lengths):
        for key in storage.segments():
            storage.evict(key)
        for key, length in enumerate(lap):
            pages = [pool.lease("writer", key) for _ in range(-(-length // rows_per_page))]
            pages = pool.seal(pages, length)
            for number in pool.row_index(pages, length).tolist():
                pool.rows[number] = row
            storage.adopt(key, [pages], [length])
    assert len(storage) == sum(lengths)
    return pool.nbytes, storage


def store_padded(lengths: list[int], horizon: int, *, pad: bool) -> tuple[int, LazyTensorStorage]:
    storage = LazyTensorStorage(len(lengths), ndim=1)
    example = TensorDict(LAYOUT.empty(horizon).zero_().to_dict(), [horizon])
    storage.set(0, example)
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


def run_side(connection: Connection, side: str, lengths: list[int], horizon: int) -> None:
    torch.set_num_threads(1)
    # What either side needs besides what it stores is there before the first measurement.
    store_pooled([1, 2])
    store_padded([1, 2], 2, pad=True)
    before = resident_bytes()
    if side == "pooled":
        allocated, storage = store_pooled(lengths)
    else:
        allocated, storage = store_padded(lengths, horizon, pad=side == "padded")
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is left of trajectories on their way in
    connection.send((allocated, resident_bytes() - before))
    del storage  # alive until here


def measure(side: str, lengths: list[int], horizon: int) -> tuple[int, int]:
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=run_side, args=(theirs, side, lengths, horizon)
    )
    process.start()
    theirs.close()
    found: tuple[int, int] = ours.recv()
    process.join()
    return found


def ratio(mean_decisions: float, horizon_decisions: int) -> float:
    """Bytes of a pooled trajectory over a padded one, worked out."""
    rows = mean_decisions / (
        1 - expected_waste(recommended_rows_per_page(mean_decisions), mean_decisions)
    )
    return rows / horizon_decisions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one repeat")
    parser.add_argument("--horizon", type=int, default=280, help="env steps")
    parser.add_argument("--chunk", type=int, default=8, help="env steps of a decision")
    args = parser.parse_args()
    lengths = [num_decisions(steps, args.chunk) for steps in LENGTHS]
    horizon = num_decisions(args.horizon, args.chunk)
    if max(lengths) > horizon:
        parser.error(f"--horizon must be at least {max(LENGTHS)}, the longest episode")
    mean = statistics.fmean(lengths)
    found: dict[str, list[tuple[int, int]]] = {side: [] for side in SIDES}
    for _ in range(1 if args.quick else 5):
        for side in SIDES:
            found[side].append(measure(side, lengths, horizon))

    def summary(side: str, column: int) -> dict[str, float]:
        values = [sample[column] / len(lengths) for sample in found[side]]
        return {
            "median": round(statistics.median(values)),
            "min": round(min(values)),
            "max": round(max(values)),
        }

    allocated = {side: summary(side, 0) for side in SIDES}
    resident = {side: summary(side, 1) for side in SIDES}

    def over(column: dict[str, dict[str, float]], rival: str) -> float:
        return round(column["pooled"]["median"] / column[rival]["median"], 3)

    horizons = {steps: num_decisions(steps, args.chunk) for steps in (120, 160, 280, 512)}
    by_success = {s: s * mean + (1 - s) * horizon for s in (1.0, 0.9, 0.75, 0.5, 0.25)}
    shares = [share / 100 for share in range(101)]
    least = next(
        (s for s in shares if ratio(s * mean + (1 - s) * horizon, horizon) <= 0.5),
        None,
    )
    human = HUMAN_STEPS / HUMAN_EPISODES / args.chunk + 0.5  # half a chunk is left over on average
    result = {
        "benchmark": "memory_per_trajectory",
        "ratio": over(allocated, "padded"),
        "ratio_resident": over(resident, "padded"),
        "ratio_resident_unpadded": over(resident, "unpadded"),
        "ratio_by_horizon": {s: round(ratio(mean, n), 3) for s, n in horizons.items()},
        "ratio_by_success": {s: round(ratio(n, horizon), 3) for s, n in by_success.items()},
        "least_success_for_half": least,
        "ratio_human": round(ratio(human, num_decisions(HUMAN_HORIZON, args.chunk)), 3),
        "bytes_per_trajectory": {"allocated": allocated, "resident": resident},
        "trajectories": len(lengths),
        "mean_decisions": round(mean, 2),
        "horizon_decisions": horizon,
        "rows_per_page": recommended_rows_per_page(mean),
        "row_bytes": LAYOUT.row_bytes,
        "machine": {
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        "quick": args.quick,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
