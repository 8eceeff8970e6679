# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""How many LIBERO env steps per second does the whole loop make, beside TorchRL's recipe?

    python benchmarks/libero_throughput.py [--quick]

The whole loop: simulation, inference, updates, new weights. Every arrangement drives two simulators
on the same task with the checkpoint of ``sota-implementations/dvla_sft``, plays episodes of the
same length, and takes the same gradient step (``GRPOLoss``, AdamW) for each decision once.

stock        the arrangement of TorchRL's VLA recipe (``_recipe.py``) on ``LiberoEnv`` with
             ``MultiAction``, built as the recipe builds it. On two cores its best is one collector
             with two environments: they step side by side and share the policy call. Two collectors
             with one each take a batch of one from the server twice as often.
same_pixels  ``DVLACollector`` on ``LiberoChunkEnv`` with stock render settings, whose frames
             ``benchmarks/libero_env.py`` finds equal to stock's.
fast         the same without shadows and multisampling.

So short an episode ends by its limit, unsolved. That groups are learned from nevertheless, each
decision once, returns are drawn at random, by a transform on every environment alike; and the
learning rate is so small that the policy stays what it is.

ratio_same_pixels, ratio_fast: env steps/s over those of ``stock``. Resets count: stock's takes
seconds, and recipes reset after every episode. ``env_steps_per_episode`` says how much they weigh;
the recipe's own episodes take about as long.

The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import time
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from _machine import in_processes, machine, paired_ratio, spread
from tensordict import TensorDictBase
from torchrl.envs import Compose, EnvBase, LiberoEnv, MultiAction, StepCounter, TransformedEnv
from torchrl.envs.transforms import Transform

SUITE, TASK_ID, CHUNK_SIZE, SIZE = "libero_object", 3, 8, 128
GROUP_SIZE, GROUPS_PER_UPDATE, MINIBATCH = 2, 2, 16
NAMES = ("stock", "same_pixels", "fast")
CHECKPOINT = Path(__file__).resolve().parents[1] / "sota-implementations/dvla_sft/checkpoints"


class RandomReturn(Transform):
    """Rewards from a generator of their own: every group has contrast."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._generator = torch.Generator().manual_seed(seed)

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        return next_tensordict.set("reward", torch.rand(1, generator=self._generator))


def make_env(name: str, decisions: int, worker_idx: int = 0) -> EnvBase:
    """An environment whose episodes have ``decisions`` decisions."""
    from torchrl_dvla.envs import LiberoChunkEnv, choose_gl_backend, setup_libero

    choose_gl_backend()
    setup_libero()
    size = {"camera_height": SIZE, "camera_width": SIZE}
    reward = RandomReturn(os.getpid() + worker_idx)
    if name != "stock":
        render = {"shadows": name != "fast", "msaa": name != "fast"}
        env = LiberoChunkEnv(SUITE, TASK_ID, chunk_size=CHUNK_SIZE, **render, **size)
        return TransformedEnv(env, reward)
    stock = LiberoEnv(
        SUITE,
        TASK_ID,
        init_state_mode="cycle",
        group_repeats=GROUP_SIZE,
        group_id_offset=worker_idx * 10**6,
        **size,
    )
    stock.set_seed(worker_idx)
    transforms = (MultiAction.from_vla(stack_rewards=False), reward, StepCounter(decisions))
    return TransformedEnv(stock, Compose(*transforms))


def make_policy() -> Any:
    """The shipped checkpoint."""
    from torchrl_dvla.modules import TransformersVLA

    return TransformersVLA.from_pretrained(CHECKPOINT / "libero_object", temperature=0.3)


class Update:
    """The gradient step that every arrangement takes for each minibatch."""

    def __init__(self, policy: Any) -> None:
        from torchrl_dvla.objectives import GRPOLoss

        self._loss = GRPOLoss(policy)
        trained = [p for p in policy.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(trained, lr=1e-9)
        #: Decisions that were learned from.
        self.num_learned = 0

    def __call__(self, batch: TensorDictBase) -> None:
        self._loss(batch)["loss_objective"].backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.num_learned += len(batch)


class Ours:
    """``DVLACollector`` with the interface of the recipe's arrangement."""

    def __init__(self, name: str, decisions: int) -> None:
        from torchrl_dvla import DVLACollector, PooledReplayBuffer
        from torchrl_dvla.collectors import GroupConfig, WorkerConfig

        policy = make_policy()
        self.update = Update(policy)
        self._collector = DVLACollector(
            functools.partial(make_env, name, decisions),
            policy,
            replay_buffer=functools.partial(PooledReplayBuffer, batch_size=MINIBATCH),
            group=GroupConfig(group_size=GROUP_SIZE, groups_per_update=GROUPS_PER_UPDATE),
            workers=WorkerConfig(num_workers=2, max_decisions=decisions),
        )

    def __enter__(self) -> Ours:
        self._collector.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._collector.shutdown()

    def num_decisions(self) -> int:
        return int(self._collector.stats().get("collector/decisions", 0))

    def learn_for(self, seconds: float) -> None:
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s:
            for batch in self._collector.replay_buffer:
                self.update(batch)
            self._collector.update_policy_weights_()


def make_stock(decisions: int) -> Any:
    """The recipe's arrangement, which begins an update when it has as many decisions as ours."""
    from _recipe import Recipe

    updates: list[Update] = []

    def make_update(policy: Any) -> Update:
        updates.append(Update(policy))
        return updates[0]

    recipe = Recipe(
        functools.partial(make_env, "stock", decisions),
        make_policy,
        make_update,
        group_size=GROUP_SIZE,
        minibatch=MINIBATCH,
        update_decisions=GROUP_SIZE * GROUPS_PER_UPDATE * decisions,
        return_bounds=None,
        num_collectors=1,
        envs_per_collector=2,
        server_timeout=0.001,
    )
    recipe.update = updates[0]
    return recipe


def run(connection: Connection, name: str, args: argparse.Namespace) -> None:
    """In a process of its own: build, play until all is warm, measure whole update cycles."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    with open(os.devnull, "w") as null:
        sys.stdout = null
        built = make_stock(args.decisions) if name == "stock" else Ours(name, args.decisions)
        with built as arrangement:
            start_s = time.monotonic()
            while arrangement.num_decisions() < 2:  # first steps compile
                arrangement.learn_for(1.0 if name == "stock" else 0.1)
            warm_up_s = time.monotonic() - start_s
            before, learned = arrangement.num_decisions(), arrangement.update.num_learned
            start_s = time.monotonic()
            arrangement.learn_for(args.stock_seconds if name == "stock" else args.seconds)
            elapsed_s = time.monotonic() - start_s
            decisions = arrangement.num_decisions() - before
            learned = arrangement.update.num_learned - learned
        connection.send(
            {
                "env_steps_per_s": decisions * CHUNK_SIZE / elapsed_s,
                "learned_share": learned / decisions,
                "elapsed_s": elapsed_s,
                "warm_up_s": warm_up_s,
            }
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one round of short stretches")
    parser.add_argument("--decisions", type=int, help="of an episode; 6 by default, 2 with --quick")
    parser.add_argument("--seconds", type=float, help="of ours; 15 by default, 4 with --quick")
    parser.add_argument("--stock-seconds", type=float, help="60 by default, 15 with --quick")
    parser.add_argument("--repeats", type=int, help="5 by default, 1 with --quick")
    parser.add_argument("--only", choices=NAMES[1:], help="one of ours beside stock: half the time")
    args = parser.parse_args()
    args.decisions = args.decisions or (2 if args.quick else 6)
    args.seconds = args.seconds or (4.0 if args.quick else 15.0)
    args.stock_seconds = args.stock_seconds or (15.0 if args.quick else 60.0)
    args.repeats = args.repeats or (1 if args.quick else 5)
    ours = (args.only,) if args.only else NAMES[1:]
    names = ("stock", *ours)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for repeat in range(args.repeats):
        for name in names if repeat % 2 == 0 else names[::-1]:
            runs[name].append(in_processes(run, [(name, args)])[0])
            line = "  ".join(f"{key} {value:.2f}" for key, value in runs[name][-1].items())
            print(f"{repeat} {name:<12} {line}", file=sys.stderr)

    def column(name: str, key: str = "env_steps_per_s") -> list[float]:
        return [one[key] for one in runs[name]]

    ratios = {name: paired_ratio(column(name), column("stock")) for name in ours}
    result = {
        "benchmark": "libero_throughput",
        **{f"ratio_{name}": found["median"] for name, found in ratios.items()},
        "spread": {f"ratio_{name}": found for name, found in ratios.items()},
        "env_steps_per_s": {name: spread(column(name)) for name in names},
        "learned_share": {name: spread(column(name, "learned_share")) for name in names},
        "workload": {
            "suite": SUITE,
            "task_id": TASK_ID,
            "size": SIZE,
            "chunk_size": CHUNK_SIZE,
            "env_steps_per_episode": CHUNK_SIZE * args.decisions,
            "group_size": GROUP_SIZE,
            "groups_per_update": GROUPS_PER_UPDATE,
            "policy": "checkpoint of sota-implementations/dvla_sft",
            "seconds": {"ours": args.seconds, "stock": args.stock_seconds},
            "repeats": args.repeats,
        },
        "machine": machine("mujoco", "robosuite"),
        "quick": args.quick,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
