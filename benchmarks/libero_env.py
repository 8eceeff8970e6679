# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""How many LIBERO env steps per second does a chunked policy get?

    python benchmarks/libero_env.py [--quick] [--suite libero_spatial] [--task-id 0]

Five environments play the same episodes (same seed, same init state, same action chunks), resets
included, in turns (``_turns.py``), each in a process of its own so that no one's GL context
disturbs another's:

stock         ``TransformedEnv(LiberoEnv(suite, task), MultiAction.from_vla(stack_rewards=False))``
              with TorchRL's defaults: two cameras, hard reset. The rival of the two ratios.
stock_tuned   the same with what its ``env_kwargs`` can do: one camera, soft reset.
same_pixels   ``LiberoChunkEnv`` with stock render settings. Its frames are compared with stock's.
fast          ``LiberoChunkEnv(shadows=False, msaa=False)``.
fast_coarse   the same with ``max_mesh_faces=4000``.

The last line of stdout is one JSON object. ``ratio_*`` are medians over repeats of the ratio within
one repeat, so that a machine that slows down for a while slows both sides.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from _machine import machine, paired_ratio, spread
from _turns import TurnTaker, close, wait_ready
from tensordict import TensorDict
from torchrl.envs import LiberoEnv, MultiAction, TransformedEnv

from torchrl_dvla.envs import (
    LiberoChunkEnv,
    choose_gl_backend,
    setup_libero,
    validate_libero,
)

NAMES = ("stock", "stock_tuned", "same_pixels", "fast", "fast_coarse")
OURS, RIVALS = NAMES[2:], NAMES[:2]


def make_env(name: str, args: argparse.Namespace) -> Any:
    choose_gl_backend()
    setup_libero()
    size = {"camera_height": args.size, "camera_width": args.size}
    if name in ("stock", "stock_tuned"):
        tuned = {"camera_names": ["agentview"], "hard_reset": False}
        env = LiberoEnv(
            args.suite,
            args.task_id,
            init_state_mode="fixed",
            env_kwargs=tuned if name == "stock_tuned" else {},
            **size,
        )
        return TransformedEnv(env, MultiAction.from_vla(stack_rewards=False))
    is_fast = name != "same_pixels"
    return LiberoChunkEnv(
        args.suite,
        args.task_id,
        chunk_size=args.chunk_size,
        shadows=not is_fast,
        msaa=not is_fast,
        max_mesh_faces=4000 if name == "fast_coarse" else None,
        **size,
    )


def play(env: Any, args: argparse.Namespace, seed: int, decisions: int) -> dict[str, Any]:
    """One episode. The digest covers what the policy would see at each decision."""
    generator = torch.Generator().manual_seed(seed)
    chunks = torch.rand(decisions, args.chunk_size, 7, generator=generator) - 0.5
    digest = hashlib.sha256()

    def see(td: Any) -> None:
        digest.update(td["observation", "image"].numpy().tobytes())
        digest.update(td["observation", "state"].numpy().tobytes())

    env.set_seed(seed)
    start_s = time.perf_counter()
    td = env.reset(TensorDict({"init_state_id": torch.tensor([0])}))  # stock's "fixed" one
    reset_s = time.perf_counter() - start_s
    see(td)
    num_env_steps = 0
    for chunk in chunks:
        td["vla_action", "chunk"] = chunk
        td = env.step(td)["next"]
        see(td)
        num_env_steps += args.chunk_size
        if td["done"].item():
            break
    return {
        "env_steps": num_env_steps,
        "total_s": time.perf_counter() - start_s,
        "reset_s": reset_s,
        "digest": digest.hexdigest(),
    }


@contextlib.contextmanager
def build(name: str, args: argparse.Namespace) -> Iterator[Callable[..., dict[str, Any]]]:
    """An environment, and the call that plays an episode."""
    torch.set_num_threads(1)
    env = make_env(name, args)
    try:
        yield functools.partial(play, env, args)
    finally:
        env.close()


def rates(runs: list[dict[str, Any]]) -> list[float]:
    return [run["env_steps"] / run["total_s"] for run in runs]


def summary(runs: list[dict[str, Any]]) -> dict[str, float]:
    found = spread(rates(runs))
    return {
        "env_steps_per_s": found.pop("median"),
        **found,
        "reset_s": round(statistics.median(run["reset_s"] for run in runs), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two short episodes")
    parser.add_argument("--suite", default="libero_spatial")
    parser.add_argument("--task-id", type=int, default=0)
    parser.add_argument("--size", type=int, default=128, help="frame height and width")
    parser.add_argument("--chunk-size", type=int, default=8)
    parser.add_argument("--decisions", type=int, help="per episode; 16 by default, 4 with --quick")
    parser.add_argument("--repeats", type=int, help="5 by default, 2 with --quick")
    args = parser.parse_args()
    args.decisions = args.decisions or (4 if args.quick else 16)
    args.repeats = args.repeats or (2 if args.quick else 5)

    choose_gl_backend()
    setup_libero()
    validate_libero(args.suite, args.task_id, camera_height=args.size, camera_width=args.size)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in NAMES}
    takers: dict[str, TurnTaker] = {}
    try:
        for name in NAMES:  # one after the other: they compile and cache the same things
            takers[name] = TurnTaker(build, name, args)
            list(wait_ready({name: takers[name]}))
        for repeat in range(args.repeats + 1):
            for name in NAMES if repeat % 2 == 0 else NAMES[::-1]:
                # the first episode, a short one, only warms caches up
                run = takers[name].take(repeat, args.decisions if repeat else 1)
                if repeat:
                    runs[name].append(run)
                rate = run["env_steps"] / run["total_s"]
                print(f"{repeat} {name:<12} {rate:7.2f} env steps/s", file=sys.stderr)
    finally:
        close(takers.values())
    ratios = {
        f"{name}_vs_{rival}": paired_ratio(rates(runs[name]), rates(runs[rival]))
        for name in OURS
        for rival in RIVALS
    }
    frames_equal = [
        ours["digest"] == theirs["digest"]
        for ours, theirs in zip(runs["same_pixels"], runs["stock"], strict=True)
    ]
    result = {
        "benchmark": "libero_env",
        "ratio_same_pixels": ratios["same_pixels_vs_stock"]["median"],
        "ratio_fast": ratios["fast_vs_stock"]["median"],
        "ratio_same_pixels_vs_tuned": ratios["same_pixels_vs_stock_tuned"]["median"],
        "ratio_fast_coarse": ratios["fast_coarse_vs_stock"]["median"],
        "ratio_fast_vs_tuned": ratios["fast_vs_stock_tuned"]["median"],
        "frames_equal": all(frames_equal),
        "ratios": ratios,
        "environments": {name: summary(runs[name]) for name in NAMES},
        "workload": {
            "suite": args.suite,
            "task_id": args.task_id,
            "size": args.size,
            "chunk_size": args.chunk_size,
            "decisions_per_episode": args.decisions,
            "repeats": args.repeats,
        },
        "machine": {
            **machine("mujoco", "robosuite"),
            "gl": os.environ.get("MUJOCO_GL"),
        },
        "quick": args.quick,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
