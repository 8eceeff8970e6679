# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""How many ManiSkill env steps per second does a chunked policy get?

    python benchmarks/maniskill_env.py [--quick]

Two environments play the same episodes of PickCube (same seed, same actions, chunks of 8), resets
included, in turns (``_turns.py``), each in a process of its own:

stock  ManiSkill's own gymnasium environment with rgb observations, flattened by its
       ``FlattenRGBDObservationWrapper``: one camera, drawn at every env step.
ours   ``ManiSkillChunkEnv``: the same camera, drawn once a decision.

What a policy sees at each decision, frame and state, is compared (``frames_equal``). The last line
of stdout is one JSON object. ``ratio_vs_stock`` is the median over repeats of the ratio within one
repeat. ``expert`` is what the scripted expert makes of the scenes of seeds 0, 1, ...
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from _machine import arguments, env_step_summary, env_steps_per_s, in_process, paired_ratio, report
from _turns import in_turns

from torchrl_dvla.envs import ManiSkillChunkEnv, choose_vulkan_driver, validate_maniskill

TASK, SIZE, CHUNK_SIZE, NUM_DECISIONS = "PickCube-v1", 128, 8, 6  # the episode's limit is 50


class Stock:
    """ManiSkill's own environment, stepped chunk by chunk."""

    def __init__(self) -> None:
        backend = choose_vulkan_driver()
        import gymnasium
        import mani_skill.envs  # noqa: F401  it registers the tasks
        from mani_skill.utils.wrappers import FlattenRGBDObservationWrapper

        env = gymnasium.make(
            TASK,
            num_envs=1,
            obs_mode="rgb",
            control_mode="pd_ee_delta_pose",
            sim_backend="physx_cpu",
            render_backend=backend,
            sensor_configs={"shader_pack": "minimal", "width": SIZE, "height": SIZE},
        )
        self._env = FlattenRGBDObservationWrapper(env, rgb=True, depth=False, state=True)
        self.close = self._env.close

    def reset(self, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        observed, _ = self._env.reset(seed=seed)
        return observed["rgb"][0].movedim(-1, 0), observed["state"][0]

    def decide(self, chunk: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
        num_executed = 0
        for action in chunk:
            observed, _, terminated, truncated, _ = self._env.step(action)
            num_executed += 1
            if terminated or truncated:
                break
        return observed["rgb"][0].movedim(-1, 0), observed["state"][0], num_executed


class Ours:
    """ManiSkillChunkEnv behind the same two calls."""

    def __init__(self) -> None:
        self._env = ManiSkillChunkEnv(
            TASK, chunk_size=CHUNK_SIZE, camera_height=SIZE, camera_width=SIZE
        )
        self.close = self._env.close

    def reset(self, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        self._env.set_seed(seed)
        self._td = self._env.reset()
        return self._td["observation", "image"], self._td["observation", "state"]

    def decide(self, chunk: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
        self._td["vla_action", "chunk"] = chunk
        self._td = td = self._env.step(self._td)["next"]
        num_executed = int((~td["action_is_pad"]).sum())
        return td["observation", "image"], td["observation", "state"], num_executed


def play(env: Stock | Ours, seed: int, num_episodes: int) -> dict[str, Any]:
    """Some episodes. The digest covers what the policy would see at each decision."""
    digest, num_env_steps, reset_s = hashlib.sha256(), 0, 0.0

    def see(image: torch.Tensor, state: torch.Tensor) -> None:
        digest.update(image.contiguous().numpy().tobytes())
        digest.update(state.numpy().tobytes())

    start_s = time.perf_counter()
    for episode in range(seed, seed + num_episodes):
        generator = torch.Generator().manual_seed(episode)
        chunks = torch.rand(NUM_DECISIONS, CHUNK_SIZE, 7, generator=generator) - 0.5
        reset_start_s = time.perf_counter()
        seen = env.reset(episode)
        reset_s += time.perf_counter() - reset_start_s
        see(*seen)
        for chunk in chunks:
            image, state, num_executed = env.decide(chunk)
            see(image, state)
            num_env_steps += num_executed
            if num_executed < CHUNK_SIZE:
                break
    return {
        "env_steps": num_env_steps,
        "total_s": time.perf_counter() - start_s,
        "reset_s": reset_s / num_episodes,
        "digest": digest.hexdigest(),
    }


@contextlib.contextmanager
def build(make: Callable[[], Stock | Ours]) -> Iterator[Callable[..., dict[str, Any]]]:
    """An environment, and the call that plays episodes."""
    torch.set_num_threads(1)
    env = make()
    try:
        yield functools.partial(play, env)
    finally:
        env.close()


def play_expert(num_seeds: int) -> dict[str, float]:
    """How often, and how fast, the scripted expert solves the task."""
    from torchrl_dvla.envs.maniskill_expert import PickCubeExpert, PickCubeScene

    torch.set_num_threads(1)
    # a chunk is as long as an episode: one decision, one frame
    env = ManiSkillChunkEnv(TASK, chunk_size=50, camera_height=8, camera_width=8)
    lengths = []
    for seed in range(num_seeds):
        env.set_seed(seed)
        env.reset()
        expert = PickCubeExpert()
        td = env.step_with(lambda: expert.act(PickCubeScene.read(env.maniskill_env)))  # noqa: B023
        if td["success"]:
            lengths.append(int((~td["action_is_pad"]).sum()))
    env.close()
    return {
        "num_seeds": num_seeds,
        "num_solved": len(lengths),
        "num_env_steps": round(statistics.fmean(lengths), 1) if lengths else 0.0,
        "max_num_env_steps": max(lengths, default=0),
    }


def main() -> None:
    args = arguments(__doc__, "two repeats of one episode, the expert on five seeds")
    num_episodes, num_repeats, num_seeds = (1, 2, 5) if args.quick else (4, 5, 50)

    validate_maniskill(TASK, camera_height=SIZE, camera_width=SIZE)
    runs = in_turns(
        {"stock": (build, Stock), "ours": (build, Ours)},
        # the first episodes only warm caches up
        lambda number: (100 * (1 + number), num_episodes),
        num_repeats,
        num_warm_ups=1,
    )
    ratio = paired_ratio(env_steps_per_s(runs["ours"]), env_steps_per_s(runs["stock"]))
    pairs = zip(runs["ours"], runs["stock"], strict=True)
    result = {
        "ratio_vs_stock": ratio["median"],
        "frames_equal": all(ours["digest"] == theirs["digest"] for ours, theirs in pairs),
        "ratio": ratio,
        "environments": {name: env_step_summary(found) for name, found in runs.items()},
        "expert": in_process(play_expert, num_seeds),
        "workload": {"render_backend": choose_vulkan_driver(), "episodes_per_turn": num_episodes},
    }
    report("maniskill_env", result, args.quick, "mani_skill", "sapien")


if __name__ == "__main__":
    main()
