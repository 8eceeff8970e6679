# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""How many LIBERO env steps per second does the whole loop make, beside TorchRL's recipe?

    python benchmarks/libero_throughput.py [--quick]

The whole loop: simulation, inference, updates, new weights. Every arrangement drives two simulators
on the same task with the checkpoint of ``recipes/dvla_sft``, plays episodes of at most
120 env steps (the horizon of ``dvla_grpo``'s configuration), and takes the same gradient step
(``GRPOLoss``, AdamW) once for each decision that it learns from.

stock        the arrangement of TorchRL's VLA recipe (``_recipe.py``) on ``LiberoEnv`` with
             ``MultiAction``, built as the recipe builds it. On two cores its best is one collector
             with two environments; ``--search 1x2,2x1`` compares it with two collectors of one,
             which came to 0.8 of it.
same_pixels  ``DVLACollector`` on ``LiberoChunkEnv`` with stock render settings, whose frames
             ``benchmarks/libero_env.py`` finds equal to stock's.
fast         the same without shadows and multisampling.

All are built once and work in turns (``_turns.py``), each of whole updates and at least ``seconds``
long; ``docs/source/guide/benchmarks.md`` tells what counts. Returns are drawn at random, so that
every group has contrast, and the learning rate is so small that the policy stays what it is.

ratio_same_pixels, ratio_fast: env steps/s over those of ``stock``, resets and updates included.
ratio_*_vs_collecting: over those of ``stock`` outside of its updates, as if these cost nothing.

The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from _machine import arguments, paired_ratio, report, spread
from _recipe import Recipe, Update
from _turns import in_turns
from tensordict import TensorDictBase
from torchrl.envs import Compose, EnvBase, LiberoEnv, MultiAction, StepCounter, TransformedEnv
from torchrl.envs.transforms import Transform

from torchrl_dvla import DVLACollector, PooledReplayBuffer, recipes
from torchrl_dvla.collectors import GroupConfig, InferenceConfig, WorkerConfig
from torchrl_dvla.envs import LiberoChunkEnv, choose_gl_backend, setup_libero
from torchrl_dvla.modules import TransformersVLA

SUITE, TASK_ID, CHUNK_SIZE, SIZE = "libero_object", 3, 8, 128
GROUP_SIZE, GROUPS_PER_UPDATE, MINIBATCH = 2, 2, 16
NUM_ENVS, LAYOUT = 2, "1x2"
OURS = ("same_pixels", "fast")
NEVER_S = 1e5  # deadlines go on while a process stands still
CHECKPOINT = Path(recipes.__file__).parent / "dvla_sft/checkpoints"


class RandomReturn(Transform):
    """Rewards from a generator of their own: every group has contrast."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._generator = torch.Generator().manual_seed(seed)

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        return next_tensordict.set("reward", torch.rand(1, generator=self._generator))


def make_env(name: str, decisions: int, worker_idx: int = 0) -> EnvBase:
    """An environment whose episodes have ``decisions`` decisions."""
    choose_gl_backend()
    setup_libero()
    size = {"camera_height": SIZE, "camera_width": SIZE}
    reward = RandomReturn(os.getpid() + worker_idx)
    if name in OURS:
        render = {"shadows": name != "fast", "msaa": name != "fast"}
        env = LiberoChunkEnv(SUITE, TASK_ID, chunk_size=CHUNK_SIZE, **render, **size)
        return TransformedEnv(env, reward)
    stock = LiberoEnv(
        SUITE,
        TASK_ID,
        init_state_mode="cycle",
        group_repeats=GROUP_SIZE,
        group_id_offset=worker_idx * 10**6,
        device="cpu",  # ParallelEnv's; else its first partial reset fails
        **size,
    )
    stock.set_seed(worker_idx)
    transforms = (MultiAction.from_vla(stack_rewards=False), reward, StepCounter(decisions))
    return TransformedEnv(stock, Compose(*transforms))


def make_policy() -> Any:
    """The shipped checkpoint."""
    return TransformersVLA.from_pretrained(CHECKPOINT / "libero_object", temperature=0.3)


class Ours:
    """``DVLACollector`` with the interface of the recipe's arrangement."""

    update_s = 0.0  # it collects meanwhile

    def __init__(self, name: str, decisions: int) -> None:
        policy = make_policy()
        self.update = Update(policy)
        self._collector = DVLACollector(
            functools.partial(make_env, name, decisions),
            policy,
            replay_buffer=PooledReplayBuffer(batch_size=MINIBATCH),
            group=GroupConfig(group_size=GROUP_SIZE, groups_per_update=GROUPS_PER_UPDATE),
            workers=WorkerConfig(
                num_workers=NUM_ENVS,
                max_decisions=decisions,
                reset_timeout_s=NEVER_S,
                step_timeout_s=NEVER_S,
            ),
            inference=InferenceConfig(timeout_s=NEVER_S),
        )

    def __enter__(self) -> Ours:
        self._collector.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._collector.shutdown()

    def num_decisions(self) -> int:
        return int(self._collector.stats()["frames"])

    def learn_once(self) -> None:
        for batch in self._collector.replay_buffer:
            self.update(batch)
        self._collector.update_policy_weights_()


def make_stock(name: str, decisions: int, layout: str) -> Any:
    """The recipe's arrangement; it begins an update when it has as many groups as ours."""
    num_collectors, envs_per_collector = (int(number) for number in layout.split("x"))
    return Recipe(
        functools.partial(make_env, name, decisions),
        make_policy,
        Update,
        group_size=GROUP_SIZE,
        minibatch=MINIBATCH,
        # groups less than these cannot be so many
        update_decisions=GROUP_SIZE * (GROUPS_PER_UPDATE - 1) * decisions + 1,
        return_bounds=None,
        num_collectors=num_collectors,
        envs_per_collector=envs_per_collector,
        server_timeout=0.001,
        worker_metadata=True,
    )


@contextlib.contextmanager
def build(name: str, decisions: int, layout: str) -> Iterator[Callable[[float], dict[str, float]]]:
    """An arrangement, and the call that measures it for a while."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    built = Ours(name, decisions) if name in OURS else make_stock(name, decisions, layout)
    with built as arrangement:
        yield functools.partial(measure, arrangement)


def measure(arrangement: Any, seconds: float) -> dict[str, float]:
    """Whole updates, from the end of one to the end of another at least ``seconds`` later."""
    decisions, learned = arrangement.num_decisions(), arrangement.update.num_learned
    start_s, update_s, num_updates = time.monotonic(), arrangement.update_s, 0
    while num_updates == 0 or time.monotonic() - start_s < seconds:
        arrangement.learn_once()
        num_updates += 1
    elapsed_s = time.monotonic() - start_s
    env_steps = (arrangement.num_decisions() - decisions) * CHUNK_SIZE
    learned = arrangement.update.num_learned - learned
    return {
        "env_steps_per_s": env_steps / elapsed_s,
        "env_steps": env_steps,
        "elapsed_s": elapsed_s,
        "num_updates": num_updates,
        "learned_share": learned * CHUNK_SIZE / env_steps,
        "update_share": (arrangement.update_s - update_s) / elapsed_s,
    }


def take_turns(
    arrangements: dict[str, tuple[str, str]], args: argparse.Namespace
) -> dict[str, list[dict[str, float]]]:
    """Measure ``arrangements`` (name and layout by label) in turns, each from standing."""
    return in_turns(
        {key: (build, name, args.decisions, at) for key, (name, at) in arrangements.items()},
        lambda number: (args.seconds if number >= 0 else 0.0,),
        args.repeats,
        num_warm_ups=0 if args.quick else 1,
    )


def main() -> None:
    args = arguments(__doc__, "one round of very short episodes", search=str)
    args.decisions, args.seconds, args.repeats = (2, 4.0, 1) if args.quick else (15, 15.0, 5)
    if args.search:
        layouts = args.search.split(",")
        runs = take_turns({f"stock {layout}": ("stock", layout) for layout in layouts}, args)
        rates = {key: spread(run["env_steps_per_s"] for run in runs[key]) for key in runs}
        report("libero_throughput", {"search": rates}, args.quick)
        return
    names = ("stock", *OURS)
    runs = take_turns({name: (name, LAYOUT) for name in names}, args)

    def column(name: str, key: str = "env_steps_per_s") -> list[float]:
        return [run[key] for run in runs[name]]

    def outside_updates(name: str) -> list[float]:
        return [run["env_steps_per_s"] / (1.0 - run["update_share"]) for run in runs[name]]

    ratios = {f"ratio_{name}": paired_ratio(column(name), column("stock")) for name in OURS}
    for name in OURS:
        ratios[f"ratio_{name}_vs_collecting"] = paired_ratio(column(name), outside_updates("stock"))
    result = {
        **{key: found["median"] for key, found in ratios.items()},
        "spread": ratios,
        "env_steps_per_s": {name: spread(column(name)) for name in names},
        "learned_share": {name: spread(column(name, "learned_share")) for name in names},
        "update_share": {"stock": spread(column("stock", "update_share"))},
        "num_updates": {name: sum(column(name, "num_updates")) for name in names},
        "elapsed_s": {name: round(sum(column(name, "elapsed_s")), 1) for name in names},
        "env_steps_per_episode": CHUNK_SIZE * args.decisions,
    }
    report("libero_throughput", result, args.quick, "mujoco", "robosuite")


if __name__ == "__main__":
    main()
