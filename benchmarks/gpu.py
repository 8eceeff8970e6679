# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What does the loop do with learner and policy on one GPU?

    python benchmarks/gpu.py [--quick] [--size tiny]

Policies are real transformers models with random weights: ``tiny``, 1 million parameters in
float32, and ``half``, 0.5 billion in bfloat16. **The env steps are emulated**: a chunk takes 30 ms
and holds no core, as a simulator does on a machine with a core for each worker. All else is real:
policy calls and GRPO updates on the GPU, worker processes, pages, weights published after each.

decisions_per_s          collected at ``max_policy_lag=2`` while the learner learns from them
speedup_vs_sequential    over the same with ``max_policy_lag=0``, which collects and learns in turn;
                         the two take turns
publish_ms               of the learner, which checks for NaN and infinity
stall_over_copy          its median over one copy of as many bytes into page-locked memory
learner_bytes            largest use of the GPU by one learner: weights, optimizer, rows
lane_bytes               what the inference lane's process holds there, its CUDA context included

The last line of stdout is one JSON object.
"""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import replace
from typing import Any

import torch
from _machine import arguments, in_process, log, paired_ratio, report, spread
from overlap import Mix, running
from tensordict import TensorDictBase

from torchrl_dvla import GRPOLoss
from torchrl_dvla.modules import TinyBackboneConfig, TransformersVLA

#: Its widths and depths are near those of SmolVLM-500M.
HALF = TinyBackboneConfig(
    image_size=224,
    vision_size=768,
    vision_layers=12,
    text_size=1280,
    text_layers=26,
    head_size=64,
)
SIZES = {"tiny": (TinyBackboneConfig(image_size=64), "float32"), "half": (HALF, "bfloat16")}
#: 24 rollouts an update fill two environments of each worker exactly.
MIX = Mix(0.03, 0.0, 0.0, 0.0, max_batch_size=24, num_workers=12)


class Learner:
    """A policy on the GPU, its loss and its optimizer."""

    def __init__(self, size: str) -> None:
        backbone, dtype = SIZES[size]
        self.policy = TransformersVLA.from_backbone(
            backbone.to_transformers(num_words=64),
            instructions=["push the way the arrow points"],
            action_dim=2,
            chunk_size=4,
            state_dim=4,
            image_size=(backbone.image_size, backbone.image_size),
            dtype=dtype,
        ).to("cuda")
        self._loss = GRPOLoss(self.policy)
        self._optimizer = torch.optim.AdamW(self.policy.parameters(), lr=1e-6)

    def learn(self, batch: TensorDictBase) -> int:
        self._loss(batch.to("cuda"))["loss_objective"].backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        torch.cuda.synchronize()  # what is published next waits for nothing else
        return len(batch)


def copy_seconds(nbytes: int) -> float:
    """One copy from the GPU into page-locked memory."""
    source = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
    target = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    seconds = []
    for _ in range(5):
        torch.cuda.synchronize()
        start_s = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - start_s)
    return statistics.median(seconds)


def measure(size: str, num_repeats: int, min_s: float) -> dict[str, Any]:
    mix = replace(MIX, image_size=SIZES[size][0].image_size)
    free_before, _ = torch.cuda.mem_get_info()
    ours = Learner(size)
    rates: list[tuple[float, float]] = []
    with running(mix, policy=ours.policy, learn=ours.learn) as lanes:
        lanes.catch_up()
        learner_bytes = torch.cuda.max_memory_allocated()
        lane_bytes = free_before - torch.cuda.mem_get_info()[0] - torch.cuda.memory_reserved()
        narrow, theirs = replace(mix, envs_per_worker=2), Learner(size)
        with running(narrow, sequential=True, policy=theirs.policy, learn=theirs.learn) as rival:
            for repeat in range(num_repeats):
                with rival.collector.pause():
                    lanes.catch_up()
                    ours_per_s = lanes.run(min_s).rate
                with lanes.collector.pause():
                    rival.catch_up()
                    rates.append((ours_per_s, rival.run(min_s).rate))
                log(f"{size} {repeat + 1}/{num_repeats}: {rates[-1]}")
        busy = {key: round(value, 2) for key, value in lanes.reading.scalars().items()}
    nbytes = sum(tensor.nbytes for tensor in ours.policy.parameters())
    return {
        "decisions_per_s": spread((rate for rate, _ in rates), 1),
        "sequential": spread((rate for _, rate in rates), 1),
        "speedup_vs_sequential": paired_ratio(*zip(*rates, strict=True)),
        "publish_ms": spread((1000 * seconds for seconds in lanes.publish_s), 2),
        "stall_over_copy": round(statistics.median(lanes.publish_s) / copy_seconds(nbytes), 2),
        "weight_bytes": nbytes,
        "learner_bytes": learner_bytes,
        "lane_bytes": lane_bytes,
        "timeline_of_last_repeat": busy,
    }


def main() -> None:
    args = arguments(__doc__, "short repeats", size=str)
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py needs a CUDA device; `make doctor` says what PyTorch sees.")
    num_repeats, min_s = (2, 2.0) if args.quick else (5, 6.0)
    names = [args.size] if args.size else list(SIZES)
    sizes = {name: in_process(measure, name, num_repeats, min_s) for name in names}
    result = {"gpu": torch.cuda.get_device_name(), "env_steps": "emulated", "sizes": sizes}
    report("gpu", {**result, "repeats": num_repeats}, args.quick)


if __name__ == "__main__":
    main()
