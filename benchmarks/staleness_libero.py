# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What does stale data cost in samples on LIBERO, and what does it buy in time?

    python benchmarks/staleness_libero.py [--quick] [--csv staleness_libero.csv] [--repeats 3]
        [--runs staleness_libero.jsonl]

``staleness.py``, which says what is measured, on the task of ``make train`` from the shipped
checkpoint: success on the benchmark's 50 init states, which training never starts from. The
decoupled loss, which has nothing to correct without a lag, is tried with the largest alone.
"""

from __future__ import annotations

import functools

from _machine import arguments, report
from staleness import LAGS, Kind, Task, measure

from torchrl_dvla.recipes.dvla_grpo import utils
from torchrl_dvla.recipes.dvla_grpo.settings import compose_settings


def make_task() -> Task:
    """The recipe's ``libero``, at the learning rate of ``libero_suite``."""
    cfg = compose_settings("libero", [])
    held_out, _ = utils.make_evaluation_episodes(cfg)
    return Task(
        make_env=utils.make_env_factories(cfg),
        make_policy=functools.partial(utils.make_policy, cfg),
        held_out=held_out,
        workers=cfg.workers,
        num_updates=12,
        evaluate_every=6,
        groups_per_update=cfg.group.groups_per_update,
        lr=1e-4,
    )


def main() -> None:
    options = arguments(__doc__ or "", "one seed, two updates", repeats=3, csv=str, runs=str)
    kinds = [Kind(lag) for lag in LAGS] + [Kind(max(LAGS), "decoupled"), Kind(1, is_forced=False)]
    task = make_task()
    repeats, num_updates = (1, 2) if options.quick else (options.repeats, task.num_updates)
    result = measure(task, kinds, repeats, num_updates, options.csv, options.runs)
    report("staleness_libero", result, options.quick)


if __name__ == "__main__":
    main()
