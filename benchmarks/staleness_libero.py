# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What does stale data cost in samples on LIBERO, and what does it buy in time?

    python benchmarks/staleness_libero.py [--quick] [--csv staleness_libero.csv] [--repeats 3]

``staleness.py``, which says what is measured, on the task of ``make train`` from the shipped
checkpoint: success on the benchmark's 50 init states, which training never starts from. The
decoupled loss, which has nothing to correct without a lag, is tried with the largest alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from _machine import arguments, report
from staleness import LAGS, Kind, Task, measure

from torchrl_dvla import EpisodeSpec, WorkerConfig, recipes
from torchrl_dvla.envs import LiberoChunkEnv
from torchrl_dvla.modules import TransformersVLA

CHECKPOINT = Path(recipes.__file__).parent / "dvla_sft/checkpoints/libero_object"


def make_env() -> LiberoChunkEnv:
    """The environment of the recipe's ``libero``."""
    return LiberoChunkEnv(
        "libero_object",
        1,
        chunk_size=8,
        max_episode_steps=120,
        shadows=False,
        msaa=False,
        env_kwargs={"initialization_noise": "default"},
    )


def make_policy() -> Any:
    """The shipped checkpoint, at the recipe's temperature."""
    return TransformersVLA.from_pretrained(CHECKPOINT, temperature=0.3)


TASK = Task(
    make_env=make_env,
    make_policy=make_policy,
    held_out=[EpisodeSpec("default", seed=1_000_000 + k, init_state_id=k) for k in range(50)],
    workers=WorkerConfig(num_workers=2, max_decisions=15),
    num_updates=18,
    evaluate_every=6,
    groups_per_update=2,
    lr=1e-4,
)


def main() -> None:
    options = arguments(__doc__ or "", "one seed, two updates", repeats=3, csv=str)
    kinds = [Kind(lag) for lag in LAGS] + [Kind(max(LAGS), "decoupled"), Kind(1, is_forced=False)]
    repeats, num_updates = (1, 2) if options.quick else (options.repeats, TASK.num_updates)
    result = measure(TASK, kinds, repeats, num_updates, options.csv)
    report("staleness_libero", result, options.quick)


if __name__ == "__main__":
    main()
