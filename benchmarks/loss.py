# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Cost of ``GRPOLoss`` beside TorchRL's ``ClipPPOLoss``, and of its finite check.

    python benchmarks/loss.py [--quick] [--device cpu] [--repeats 45]

Forward and backward on the same batch, in turns: the loss with ``check_finite`` on and off, and
TorchRL's loss without a critic. On two policies:

small  ``TransformersVLA.tiny``, 16 decisions of a 128x128 camera in chunks of 8x7 tokens
bare   no network: the logits ``[256, 8, 7, 256]`` are the parameter, so this is the loss alone, at
       the batch of a policy of 7e9 parameters, whose own forward and backward take seconds

Seconds are those of the processor, of one thread; on another device, those of the clock. The last
line of stdout is one JSON object; for each policy:

ratio                 seconds with the check over without, within one repeat: median, min, max
ratio_vs_clip_ppo     seconds with the check over those of ClipPPOLoss; both with an entropy bonus
ratio_without_bonus   the same without a bonus: ours still reports the entropy, ClipPPOLoss does not
checked_ms            of one forward and backward with the check
unchecked_ms          without
clip_ppo_ms           of ClipPPOLoss
"""

from __future__ import annotations

import time

import torch
from _machine import arguments, log, paired_ratio, report, spread
from tensordict import NonTensorStack, TensorDict
from tensordict.nn import TensorDictModuleBase
from torch import distributions as d
from torch import nn
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.common import LossModule

from torchrl_dvla.modules import TransformersVLA
from torchrl_dvla.objectives import GRPOLoss

CHUNK, ACTION_DIM, VOCABULARY = 8, 7, 256


class Table(TensorDictModuleBase):
    """A policy whose parameter is its logits."""

    def __init__(self, num_rows: int) -> None:
        super().__init__()
        self.in_keys, self.out_keys = ["observation"], [("vla_action", "tokens")]
        self.logits = nn.Parameter(torch.randn(num_rows, CHUNK, ACTION_DIM, VOCABULARY))

    def get_dist(self, tensordict: TensorDict) -> d.Distribution:
        return d.Categorical(logits=self.logits)


def small(device: str) -> tuple[TensorDictModuleBase, TensorDict]:
    sizes = {"action_dim": ACTION_DIM, "chunk_size": CHUNK, "state_dim": 8}
    observation = {
        "image": torch.randint(0, 256, (16, 3, 128, 128), dtype=torch.uint8),
        "state": torch.randn(16, 8),
    }
    batch = {"observation": observation, "language_instruction": NonTensorStack(*["push"] * 16)}
    return TransformersVLA.tiny(["push"], **sizes).to(device), TensorDict(batch, [16])


def bare(device: str) -> tuple[TensorDictModuleBase, TensorDict]:
    return Table(256).to(device), TensorDict({"observation": torch.zeros(256, 1)}, [256])


def time_s(loss: LossModule, batch: TensorDict) -> float:
    """Seconds of one forward and backward."""
    clock = time.process_time if batch.device.type == "cpu" else time.perf_counter
    start_s = clock()
    losses = loss(batch)
    sum(value for key, value in losses.items() if key.startswith("loss_")).backward()
    loss.zero_grad()
    if batch.device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start_s


def measure(policy: TensorDictModuleBase, batch: TensorDict, repeats: int) -> dict[str, object]:
    def clip_ppo(**bonus: float | bool) -> ClipPPOLoss:
        loss = ClipPPOLoss(policy, critic_network=None, clip_epsilon=(0.2, 0.28), **bonus)
        loss.set_keys(action=("vla_action", "tokens"), sample_log_prob=("vla_action", "log_probs"))
        return loss

    losses = {
        "checked": GRPOLoss(policy, entropy_coeff=0.01),
        "unchecked": GRPOLoss(policy, entropy_coeff=0.01, check_finite=False),
        "clip_ppo": clip_ppo(entropy_coeff=0.01),
        "without_bonus": GRPOLoss(policy),
        "clip_ppo_without_bonus": clip_ppo(entropy_bonus=False),
    }
    seconds: dict[str, list[float]] = {name: [] for name in losses}
    for repeat in range(-1, repeats):  # the first warms up
        for name in list(losses)[:: 1 if repeat % 2 else -1]:
            found = time_s(losses[name], batch)
            if repeat >= 0:
                seconds[name].append(found)
    pairs = {
        "ratio": ("checked", "unchecked"),
        "ratio_vs_clip_ppo": ("checked", "clip_ppo"),
        "ratio_without_bonus": ("without_bonus", "clip_ppo_without_bonus"),
    }
    ratios = {name: paired_ratio(seconds[a], seconds[b]) for name, (a, b) in pairs.items()}
    names = ("checked", "unchecked", "clip_ppo")
    return ratios | {f"{name}_ms": spread((1e3 * s for s in seconds[name]), 3) for name in names}


def main() -> None:
    args = arguments(__doc__, "5 repeats", device="cpu", repeats=45)
    torch.set_num_threads(1)
    result = {}
    for make in (small, bare):
        torch.manual_seed(0)
        policy, batch = make(args.device)
        batch = batch.to(args.device)
        with torch.no_grad():
            dist = policy.get_dist(batch)
            tokens = dist.sample()
            batch["vla_action"] = {"tokens": tokens, "log_probs": dist.log_prob(tokens)}
        batch["advantage"] = torch.randn(len(batch), 1, device=args.device)
        result[make.__name__] = measure(policy, batch, 5 if args.quick else args.repeats)
        log(f"{make.__name__}: {result[make.__name__]}")
    report("loss", result, args.quick)


if __name__ == "__main__":
    main()
