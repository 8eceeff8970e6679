# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Passes of the action expert that a flow policy's decision costs, to take and to learn from.

    python benchmarks/flow.py [--quick] [--device cpu] [--repeats 15]

Random weights; only the expert is trained. Two policies, 4 denoising steps, one of them stochastic:

tiny   ``FlowVLA.tiny``, 16 decisions of a 64x64 camera in chunks of 8x7
small  25 million parameters, 8 decisions of two 224x224 cameras (512 image tokens) in pi0's chunks
       of 50x32

Seconds are those of the processor, of one thread; on another device, those of the clock. The last
line of stdout is one JSON object; for each policy:

passes_per_decision  seconds of a decision's log-probabilities and their gradient, apart from the
                     prefix, over those of one forward and backward pass of the expert
passes_per_sample    seconds of a sampled decision, apart from the prefix, over those of one forward
                     pass of the expert: 4 and the rest
prefix_over_pass     seconds of the prefix over those of one forward and backward pass
calls                how often the expert and the prefix ran, to sample and to learn a decision
"""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Callable

import torch
from _machine import arguments, log, paired_ratio, report, spread
from tensordict import TensorDict
from torchrl.envs.utils import ExplorationType, set_exploration_type

from torchrl_dvla.modules import FlowVLA, TinyFlowConfig

PATH = ("vla_action", "path")


def tiny() -> tuple[FlowVLA, int]:
    sizes = {"action_dim": 7, "chunk_size": 8, "state_dim": 8}
    return FlowVLA.tiny(["push"], freeze_prefix=True, **sizes), 16


def small() -> tuple[FlowVLA, int]:
    backbone = TinyFlowConfig(
        image_size=224, patch_size=14, vision_size=256, vision_layers=4, text_size=512,
        expert_size=256, layers=6, head_size=64, mlp_ratio=4.0,
    )  # fmt: skip
    sizes = {"action_dim": 7, "max_action_dim": 32, "chunk_size": 50, "state_dim": 8}
    return FlowVLA.tiny(["push"], freeze_prefix=True, backbone=backbone, num_cameras=2, **sizes), 8


def observations(policy: FlowVLA, num_rows: int) -> TensorDict:
    image = (num_rows, 3, *policy.config.image_size)
    observation = {
        name: torch.randint(0, 256, image, dtype=torch.uint8) for name in ("image", "wrist_image")
    }
    observation["state"] = torch.randn(num_rows, policy.config.state_dim)
    return TensorDict({"observation": observation, "language_instruction": "push"}, [num_rows])


def count_calls(policy: FlowVLA, action: Callable[[], object]) -> dict[str, int]:
    calls: Counter[str] = Counter()
    pi0 = policy.network.model.model
    hooks = [
        module.register_forward_hook(lambda *_, name=name: calls.update([name]))
        for name, module in (("prefix", pi0.vlm), ("expert", pi0.dit))
    ]
    action()
    for hook in hooks:
        hook.remove()
    return dict(calls)


def time_s(action: Callable[[], object], device: str) -> float:
    clock = time.process_time if device == "cpu" else time.perf_counter
    start_s = clock()
    action()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - start_s


def measure(policy: FlowVLA, num_rows: int, device: str, repeats: int) -> dict[str, object]:
    policy, batch = policy.to(device), observations(policy, num_rows).to(device)

    @torch.no_grad()
    def sample() -> TensorDict:
        with set_exploration_type(ExplorationType.RANDOM):
            return policy(batch.clone())

    decisions = sample()
    x, time = decisions[PATH][:, :, 0], torch.rand(num_rows, device=device)
    with torch.no_grad():
        observed = policy._observe(decisions)

    def expert() -> torch.Tensor:
        return policy.network.velocity(observed[0], x, time)[0]

    def learn() -> None:
        policy.get_dist(decisions).log_prob(decisions[PATH]).sum().backward()
        policy.zero_grad()

    def expert_pass() -> None:
        expert().sum().backward()
        policy.zero_grad()

    calls = {"sample": count_calls(policy, sample), "learn": count_calls(policy, learn)}
    prefix = torch.no_grad()(functools.partial(policy._observe, decisions))
    policy._observe = lambda _: observed  # for "sample" and "learn", from here on
    actions = {
        "sample": sample,
        "learn": learn,
        "prefix": prefix,
        "expert_forward": torch.no_grad()(expert),
        "expert_pass": expert_pass,
    }
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for repeat in range(-1, repeats):  # the first warms up
        for name in list(actions)[:: 1 if repeat % 2 else -1]:
            found = time_s(actions[name], device)
            if repeat >= 0:
                seconds[name].append(found)

    def ratio(name: str, over: str) -> dict[str, float]:
        return paired_ratio(seconds[name], seconds[over])

    return {
        "passes_per_decision": ratio("learn", "expert_pass"),
        "passes_per_sample": ratio("sample", "expert_forward"),
        "prefix_over_pass": ratio("prefix", "expert_pass"),
        "calls": calls,
        "ms": {name: spread(1e3 * s for s in found) for name, found in seconds.items()},
        "num_parameters": sum(p.numel() for p in policy.parameters()),
    }


def main() -> None:
    args = arguments(__doc__, "3 repeats", device="cpu", repeats=15)
    torch.set_num_threads(1)
    result = {}
    for make in (tiny, small):
        torch.manual_seed(0)
        policy, num_rows = make()
        repeats = 3 if args.quick else args.repeats
        result[make.__name__] = measure(policy, num_rows, args.device, repeats)
        log(f"{make.__name__}: {result[make.__name__]}")
    report("flow", result, args.quick, "transformers")


if __name__ == "__main__":
    main()
