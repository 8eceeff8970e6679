# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""How often, and how fast, does the scripted expert solve LIBERO's tasks?

    python benchmarks/libero_expert.py [--quick] [--suite libero_object] [--episodes 10]

Plays the benchmark's init states without action noise and renders one frame an episode. The last
line of stdout is one JSON object:

tasks            for each task id: ``num_solved``, ``num_episodes`` and ``num_env_steps``, the mean
                 length of the solved episodes; tasks without a placement among their goals are
                 left out
success_rate     solved episodes over all episodes played
num_env_steps    mean length of all solved episodes
lengths          the length of each
env_steps_per_s  physics and expert together, resets not counted
"""

from __future__ import annotations

import statistics
import time

import torch
from _machine import arguments, log, report
from tensordict import TensorDict

from torchrl_dvla.envs import LiberoChunkEnv, libero_tasks
from torchrl_dvla.envs.expert import ExpertScene, PickPlaceExpert

MAX_ENV_STEPS = 300


def play(env: LiberoChunkEnv, init_state_id: int) -> tuple[bool, float]:
    """One episode; returns success and the seconds it took, reset not counted."""
    env.set_seed(init_state_id)
    env.reset(TensorDict({"init_state_id": torch.tensor([init_state_id])}, []))
    expert = PickPlaceExpert(ExpertScene(env.robosuite_env))
    start = time.perf_counter()
    # a chunk is as long as the episode: one decision, one frame
    outcome = env.step_with(expert.act)
    return bool(outcome["success"]), time.perf_counter() - start


def main() -> None:
    args = arguments(__doc__, "two tasks, one episode each", suite="libero_object", episodes=int)
    num_episodes = args.episodes or (1 if args.quick else 10)
    tasks: dict[int, dict[str, float]] = {}
    lengths: list[int] = []
    total_steps, total_s = 0, 0.0
    for task_id in range(2 if args.quick else len(libero_tasks(args.suite))):
        env = LiberoChunkEnv(
            args.suite,
            task_id,
            chunk_size=MAX_ENV_STEPS,
            max_episode_steps=MAX_ENV_STEPS,
            shadows=False,
            msaa=False,
        )
        if not ExpertScene(env.robosuite_env).goals:
            log(f"{args.suite}[{task_id}]: no placement among its goals")
            env.close()
            continue
        solved: list[int] = []
        for init_state_id in range(num_episodes):
            success, elapsed_s = play(env, init_state_id)
            total_steps, total_s = total_steps + env.num_env_steps, total_s + elapsed_s
            if success:
                solved.append(env.num_env_steps)
        env.close()
        lengths += solved
        tasks[task_id] = {
            "num_solved": len(solved),
            "num_episodes": num_episodes,
            "num_env_steps": statistics.fmean(solved) if solved else 0.0,
        }
        log(f"{args.suite}[{task_id}]: {tasks[task_id]}")
    result = {
        "suite": args.suite,
        "tasks": tasks,
        "success_rate": len(lengths) / max(1, num_episodes * len(tasks)),
        "num_env_steps": statistics.fmean(lengths) if lengths else 0.0,
        "lengths": lengths,
        "env_steps_per_s": total_steps / max(1e-9, total_s),
    }
    report("libero_expert", result, args.quick)


if __name__ == "__main__":
    main()
