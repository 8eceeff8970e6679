# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Cost of the finite check of ``GRPOLoss``, beside forward and backward of the loss.

    python benchmarks/loss.py [--quick] [--device cpu] [--repeats 45]

The same loss with ``check_finite`` on and off, in turns, on two policies:

small  ``TransformersVLA.tiny``, 16 decisions of a 128x128 camera in chunks of 8x7 tokens
bare   no network: the logits ``[256, 8, 7, 256]`` are the parameter, so this is the loss alone, at
       the batch of a policy of 7e9 parameters, whose own forward and backward take seconds

Seconds are those of the processor, of one thread; on another device, those of the clock. The last
line of stdout is one JSON object; for each policy:

ratio           seconds with the check over without, within one repeat: median, min, max
checked_ms      of one forward and backward with the check
unchecked_ms    without
"""

from __future__ import annotations

import time

import torch
from _machine import arguments, log, paired_ratio, report, spread
from tensordict import NonTensorStack, TensorDict
from tensordict.nn import TensorDictModuleBase
from torch import distributions as d
from torch import nn

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


def time_s(loss: GRPOLoss, batch: TensorDict, *, check: bool) -> float:
    """Seconds of one forward and backward."""
    loss.check_finite = check
    clock = time.process_time if batch.device.type == "cpu" else time.perf_counter
    start_s = clock()
    losses = loss(batch)
    sum(value for key, value in losses.items() if key.startswith("loss_")).backward()
    loss.zero_grad()
    if batch.device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start_s


def measure(loss: GRPOLoss, batch: TensorDict, repeats: int) -> dict[str, object]:
    seconds = {True: [], False: []}
    for repeat in range(-1, repeats):  # the first warms up
        for check in (True, False) if repeat % 2 else (False, True):
            found = time_s(loss, batch, check=check)
            if repeat >= 0:
                seconds[check].append(found)
    checked, unchecked = (spread((1e3 * s for s in seconds[check]), 3) for check in (True, False))
    ratio = paired_ratio(seconds[True], seconds[False])
    return {"ratio": ratio, "checked_ms": checked, "unchecked_ms": unchecked}


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
        result[make.__name__] = measure(GRPOLoss(policy), batch, 5 if args.quick else args.repeats)
        log(f"{make.__name__}: {result[make.__name__]}")
    report("loss", result, args.quick)


if __name__ == "__main__":
    main()
