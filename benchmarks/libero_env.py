# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""How many LIBERO env steps per second does a chunked policy get?

    python benchmarks/libero_env.py [--quick]

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

import contextlib
import functools
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from _machine import arguments, env_step_summary, env_steps_per_s, paired_ratio, report
from _turns import in_turns
from tensordict import TensorDict
from torchrl.envs import LiberoEnv, MultiAction, TransformedEnv

from torchrl_dvla.envs import LiberoChunkEnv, choose_gl_backend, setup_libero, validate_libero

NAMES = ("stock", "stock_tuned", "same_pixels", "fast", "fast_coarse")
SUITE, TASK_ID, SIZE, CHUNK_SIZE = "libero_spatial", 0, 128, 8
OURS, RIVALS = NAMES[2:], NAMES[:2]


def make_env(name: str) -> Any:
    choose_gl_backend()
    setup_libero()
    size = {"camera_height": SIZE, "camera_width": SIZE}
    if name in ("stock", "stock_tuned"):
        tuned = {"camera_names": ["agentview"], "hard_reset": False}
        env = LiberoEnv(
            SUITE,
            TASK_ID,
            init_state_mode="fixed",
            env_kwargs=tuned if name == "stock_tuned" else {},
            **size,
        )
        return TransformedEnv(env, MultiAction.from_vla(stack_rewards=False))
    is_fast = name != "same_pixels"
    return LiberoChunkEnv(
        SUITE,
        TASK_ID,
        chunk_size=CHUNK_SIZE,
        shadows=not is_fast,
        msaa=not is_fast,
        max_mesh_faces=4000 if name == "fast_coarse" else None,
        **size,
    )


def play(env: Any, seed: int, decisions: int) -> dict[str, Any]:
    """One episode. The digest covers what the policy would see at each decision."""
    generator = torch.Generator().manual_seed(seed)
    chunks = torch.rand(decisions, CHUNK_SIZE, 7, generator=generator) - 0.5
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
        num_env_steps += CHUNK_SIZE
        if td["done"].item():
            break
    return {
        "env_steps": num_env_steps,
        "total_s": time.perf_counter() - start_s,
        "reset_s": reset_s,
        "digest": digest.hexdigest(),
    }


@contextlib.contextmanager
def build(name: str) -> Iterator[Callable[..., dict[str, Any]]]:
    """An environment, and the call that plays an episode."""
    torch.set_num_threads(1)
    env = make_env(name)
    try:
        yield functools.partial(play, env)
    finally:
        env.close()


def main() -> None:
    args = arguments(__doc__, "two short episodes")
    decisions, num_repeats = (4, 2) if args.quick else (16, 5)

    choose_gl_backend()
    setup_libero()
    validate_libero(SUITE, TASK_ID, camera_height=SIZE, camera_width=SIZE)
    runs = in_turns(
        {name: (build, name) for name in NAMES},
        # the first episode, a short one, only warms caches up
        lambda number: (1 + number, decisions if number >= 0 else 1),
        num_repeats,
        num_warm_ups=1,
    )
    ratios = {
        f"{name}_vs_{rival}": paired_ratio(
            env_steps_per_s(runs[name]), env_steps_per_s(runs[rival])
        )
        for name in OURS
        for rival in RIVALS
    }
    frames_equal = [
        ours["digest"] == theirs["digest"]
        for ours, theirs in zip(runs["same_pixels"], runs["stock"], strict=True)
    ]
    result = {
        "ratio_same_pixels": ratios["same_pixels_vs_stock"]["median"],
        "ratio_fast": ratios["fast_vs_stock"]["median"],
        "ratio_same_pixels_vs_tuned": ratios["same_pixels_vs_stock_tuned"]["median"],
        "ratio_fast_coarse": ratios["fast_coarse_vs_stock"]["median"],
        "ratio_fast_vs_tuned": ratios["fast_vs_stock_tuned"]["median"],
        "frames_equal": all(frames_equal),
        "ratios": ratios,
        "environments": {name: env_step_summary(runs[name]) for name in NAMES},
        "workload": {"gl": os.environ.get("MUJOCO_GL"), "decisions_per_episode": decisions},
    }
    report("libero_env", result, args.quick, "mujoco", "robosuite")


if __name__ == "__main__":
    main()
