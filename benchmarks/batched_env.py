# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""How many decisions per second does one batched environment make, beside single ones of its kind?

    python benchmarks/batched_env.py [--quick] [--search]

``DVLACollector`` on ``ToyChunkEnv``, with a camera image in every observation and a tiny token
policy. What it collects is drawn and given back without a gradient step.

default   environments of batch size 64 with the default ``WorkerConfig``, two workers of one: one
          is stepped while the policy decides for the other.
one       one such environment in one worker: it and the policy take turns.
halves    two of batch size 32 in one worker, so that they do not.
single    64 single environments in two workers, the best of ``SEARCH`` on two cores.

ratio_vs_single                  decisions/s of ``default`` over ``single``.
one_vs_single, halves_vs_single  the same of the others.

The arrangements live side by side and take turns of some seconds; every other round goes backwards.
``--search`` measures the alternatives to the settings of ``single``. The last line of stdout is one
JSON object.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from _machine import arguments, paired_ratio, report, spread
from _turns import in_turns
from tensordict.nn import TensorDictModuleBase

from torchrl_dvla import DVLACollector, GroupConfig, PooledReplayBuffer, WorkerConfig
from torchrl_dvla.envs import ToyChunkEnv
from torchrl_dvla.modules import tiny_token_policy

#: Batch size of an environment, none for a single one; workers; environments of each.
SETTINGS: dict[str, tuple[tuple[int, ...], int, int]] = {
    "default": ((64,), WorkerConfig().num_workers, WorkerConfig().envs_per_worker),
    "one": ((64,), 1, 1),
    "halves": ((32,), 1, 2),
    "single": ((), 2, 32),
}
SEARCH: dict[str, tuple[tuple[int, ...], int, int]] = {
    f"{workers} x {envs}": ((), workers, envs)
    for workers, envs in ((1, 64), (2, 16), (2, 32), (2, 64), (3, 22), (4, 16))
}

make_env = functools.partial(ToyChunkEnv, action_dim=2, chunk_size=4, image_size=16)


def make_policy() -> TensorDictModuleBase:
    """A policy whose lazy layers are there."""
    torch.manual_seed(0)
    policy = tiny_token_policy(2, 4, vocab_size=8, hidden_dim=16)
    with torch.no_grad():
        policy(make_env().reset().unsqueeze(0))
    return policy


@contextmanager
def collecting(
    batch_size: tuple[int, ...], num_workers: int, envs_per_worker: int
) -> Iterator[Callable[[float], dict[str, float]]]:
    """A collector that collects for some seconds at a time."""
    torch.set_num_threads(1)
    buffer = PooledReplayBuffer(batch_size=64)
    with DVLACollector(
        functools.partial(make_env, batch_size=batch_size),
        make_policy(),
        replay_buffer=buffer,
        group=GroupConfig(
            group_size=8, groups_per_update=16, max_policy_lag=2, max_no_signal_groups=10**9
        ),
        workers=WorkerConfig(
            num_workers=num_workers,
            envs_per_worker=envs_per_worker,
            max_decisions=16,
            step_timeout_s=600.0,  # they outlast the turns of the others
            reset_timeout_s=600.0,
        ),
    ) as collector:

        def collect(seconds: float) -> dict[str, float]:
            before, start_s = collector.stats(), time.monotonic()
            while time.monotonic() < start_s + seconds:
                for _ in buffer:
                    pass
                collector.update_policy_weights_()
            after, elapsed_s = collector.stats(), time.monotonic() - start_s
            decisions = after["frames"] - before["frames"]
            calls, calls_before = (
                stats.get("collector/inference_batches", 0) for stats in (after, before)
            )
            return {
                "decisions_per_s": round(decisions / elapsed_s, 1),
                "rows_per_call": round(decisions / max(1, calls - calls_before), 1),
            }

        yield collect


def main() -> None:
    args = arguments(__doc__, "two rounds of short turns", search=False)
    num_rounds, seconds = (2, 2.0) if args.quick else (5, 6.0)
    settings = SEARCH if args.search else SETTINGS
    builders = {name: (collecting, *found) for name, found in settings.items()}
    found = in_turns(builders, lambda number: (seconds,), num_rounds, num_warm_ups=1)
    rates = {name: [turn["decisions_per_s"] for turn in turns] for name, turns in found.items()}
    result: dict[str, Any] = {}
    if not args.search:
        ratios = {
            f"{key}_vs_single": paired_ratio(rates[name], rates["single"])
            for key, name in (("ratio", "default"), ("one", "one"), ("halves", "halves"))
        }
        result = {name: ratio["median"] for name, ratio in ratios.items()} | {"spread": ratios}
    result["decisions_per_s"] = {name: spread(values, 1) for name, values in rates.items()}
    result["rows_per_call"] = {
        name: spread((turn["rows_per_call"] for turn in turns), 1) for name, turns in found.items()
    }
    result["settings"] = {name: list(found) for name, found in settings.items()}
    report("batched_env", result, args.quick, "tensordict")


if __name__ == "__main__":
    main()
