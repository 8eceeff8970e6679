# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""How many times is a model in memory while it is trained: with LoRA, a reference too, and in full?

The toy task by the recipe's parts: a real DVLACollector with learner, weight store and inference
process on one machine, measured after an update was learned and published. What the memory of all
processes together (Pss: a shared page counts once) has more than the same with a tiny policy is
what the model takes; over the bytes of the model that is ``resident_over_model``, 1 for a model
that is there once. A reference policy (``loss.kl_to_ref_coeff``) is the same model with the
adapters of the start. The full training has gradients and two moments besides, the slots of the
store and what inference reads.

    python benchmarks/frozen_weights.py
    python benchmarks/frozen_weights.py --quick
"""

from __future__ import annotations

import ctypes
import gc
import os
from pathlib import Path
from typing import Any

from _machine import arguments, in_process, log, report, spread

#: Width and depth of the decoder: 13 and 120 million parameters, 50 and 490 MB.
QUICK, WHOLE = (768, 2), (1536, 5)


def measure(
    width: int, layers: int, rank: int | None, has_reference: bool = False
) -> dict[str, Any]:
    """Bytes of the model, and of all processes after an update."""
    from torchrl.data.vla import UniformActionTokenizer

    from torchrl_dvla.modules import LoraConfig, TinyBackboneConfig, TransformersVLA
    from torchrl_dvla.recipes.dvla_grpo import utils
    from torchrl_dvla.recipes.dvla_grpo.settings import compose_settings

    overrides = (
        "group.group_size=2", "group.groups_per_update=1", "group.on_no_signal=keep",
        "group.max_no_signal_groups=1", "workers.num_workers=1", "workers.envs_per_worker=2",
        "optim.minibatch_size=4", "optim.num_epochs=1", "workers.max_decisions=2",
        "workers.start_timeout_s=300", "group.max_policy_lag=0", "group.max_no_signal_groups=1000",
    )  # fmt: skip
    reference = ("loss.kl_to_ref_coeff=0.1",) if has_reference else ()
    cfg = compose_settings("toy", [*overrides, *reference])
    utils.make_deterministic(cfg)
    policy = TransformersVLA.tiny(
        utils.known_instructions(cfg),
        action_dim=2,
        chunk_size=4,
        state_dim=4,
        action_tokenizer=UniformActionTokenizer(32, low=-1.0, high=1.0),
        backbone=TinyBackboneConfig(
            image_size=32, patch_size=8, vision_size=32, vision_layers=1, text_size=width,
            text_layers=layers, head_size=32,
        ),
    )  # fmt: skip
    model_bytes = sum(p.nbytes for p in policy.parameters())
    if rank is not None:
        policy.add_adapters(LoraConfig(rank=rank))
    loss = utils.make_loss(cfg, policy)
    optimizer, *_ = utils.make_optimizer(cfg, loss, lambda: 0.0)
    buffer = utils.make_replay_buffer(cfg)
    with utils.make_collector(cfg, policy, buffer) as collector:
        for _ in range(2):
            for batch in buffer:
                loss(batch)["loss_objective"].backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=rank is not None)  # full training needs them again
            del batch
            collector.update_policy_weights_()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        pss = sum(map(_pss, [os.getpid(), *_descendants(os.getpid())]))

    return {"model_bytes": model_bytes, "pss_bytes": pss}


def _pss(pid: int) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0


def _descendants(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            found += [child, *_descendants(child)]
    return found


def main() -> None:
    args = arguments(__doc__ or "", "50 MB and one repeat instead of 490 MB and five", rank=8)
    size = QUICK if args.quick else WHOLE
    settings = {"lora": (args.rank,), "reference": (args.rank, True), "full": (None,)}
    runs: dict[str, list[float]] = {name: [] for name in settings}
    model_bytes = 0
    for repeat in range(1 if args.quick else 5):
        tiny = in_process(measure, 32, 1, None)
        for name, given in settings.items():
            large = in_process(measure, *size, *given)
            model_bytes = large["model_bytes"] - tiny["model_bytes"]
            runs[name].append((large["pss_bytes"] - tiny["pss_bytes"]) / model_bytes)
            log(f"repeat {repeat}: {name} {runs[name][-1]:.2f}")
    result = {
        "model_bytes": model_bytes,
        "rank": args.rank,
        "resident_over_model": spread(runs["lora"]),
        "resident_over_model_reference": spread(runs["reference"]),
        "resident_over_model_full": spread(runs["full"]),
    }
    report("frozen_weights", result, args.quick, "transformers", "peft")


if __name__ == "__main__":
    main()
