# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The memory, the processes and the speed of a configuration, before anything is started.

Builds the policy and works out the sizes of both pools as a run's collector does; what a run would
refuse is refused here, with exit code 1. An environment that is not one of this package is built
once, in a worker, to ask for its specs. Of a transformers policy it also prints what full training,
a part of it and LoRA take on a GPU, without the weights.

With the lane costs that `calibrate` has measured, it also says how fast a run is on this machine or
on a cluster (`topology` prints one), what bounds it, and what one more node or GPU would bring.

  torchrl-dvla plan --config-name libero workers.num_workers=4 group.group_size=16
  torchrl-dvla plan --config-name libero --costs costs.json --cluster cluster.yaml
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

from torch.nn import Module

from torchrl_dvla.commands.saved_policy import add_settings
from torchrl_dvla.doctor.machine import LIBERO_WORKER_BYTES
from torchrl_dvla.memory import available_bytes, format_bytes
from torchrl_dvla.modules import FlowVLA, TransformersVLA
from torchrl_dvla.modules.training_memory import memory_table
from torchrl_dvla.recipes.dvla_grpo import utils
from torchrl_dvla.recipes.dvla_grpo.calibration import cost_settings
from torchrl_dvla.recipes.dvla_grpo.settings import (
    LiberoSettings,
    Settings,
    compose_settings,
)
from torchrl_dvla.recipes.dvla_grpo.validation import check_policy, check_settings
from torchrl_dvla.topology import ClusterSpec, LaneCosts, RunPlan, draw_plan, plan_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What follows the command."""
    add_settings(parser, "libero")
    parser.add_argument("--costs", metavar="FILE", help="lane costs, as `calibrate` writes them")
    parser.add_argument("--cluster", metavar="FILE", help="YAML of nodes; default: this machine")
    parser.add_argument("--learner-gpus", type=int, metavar="N", help="default: the best split")
    parser.add_argument("--picture", metavar="FILE", help="SVG file to draw the plan to")


def run(args: argparse.Namespace) -> int:
    """Prints the plan."""
    cfg = compose_settings(args.config_name or "libero", args.overrides, config_dir=args.config_dir)
    speed = _plan_speed(args, cfg)
    check_settings(cfg)
    policy = utils.make_policy(cfg)
    plan = check_policy(cfg, policy)
    rows = [*_learner_rows(cfg, policy), *_process_rows(cfg)]
    free = available_bytes()
    rows.append(("free memory", "unknown" if free is None else format_bytes(free)))
    width = max(len(label) for label, _ in rows)
    print(f"{cfg.name}: fits.\n\n{plan}\n")
    print("\n".join(f"{label:<{width}}  {value}" for label, value in rows))
    # One that regresses actions is not learned.
    if isinstance(policy, TransformersVLA | FlowVLA) and callable(policy.get_dist):
        title = "largest micro-batch with learner and inference on one GPU"
        print(f"\n{title}, in {policy.config.dtype}:")
        print("\n".join(_gpu_table(cfg, policy, plan.row_bytes * cfg.optim.minibatch_size)))
    if speed is not None:
        best, configured = speed
        print(f"\n{configured}\n\nThe fastest plan:\n\n{best}")
        if args.picture:
            Path(args.picture).write_text(draw_plan(best), encoding="utf-8")
    return 0


def _plan_speed(args: argparse.Namespace, cfg: Settings) -> tuple[RunPlan, str] | None:
    """The fastest plan for a configuration and how fast it is as it stands, if costs are known."""
    given = [n for n in ("cluster", "picture", "learner_gpus") if getattr(args, n) is not None]
    if args.costs is None:
        if given:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise ValueError(
                f"--costs must be given with {names}, got none. Measure them: `torchrl-dvla "
                "calibrate --costs costs.json` and the same settings."
            )
        return None
    costs = LaneCosts.load(args.costs)
    costs.check_settings(cost_settings(cfg))
    cluster = ClusterSpec.from_yaml(args.cluster) if args.cluster else ClusterSpec.local()
    plan = functools.partial(
        plan_run,
        cluster,
        costs,
        workers=cfg.workers,
        inference=cfg.inference,
        group=cfg.group,
        num_learner_gpus=args.learner_gpus,
    )
    best, workers, lag = plan(), cfg.workers.num_workers, cfg.group.max_policy_lag
    try:
        found = plan(num_workers=workers, max_policy_lag=lag)
        rate = f"{found.decisions_per_s:.4g} decisions/s, bounded by {found.bounded_by.what}"
    except ValueError as error:  # a configuration of a larger machine
        rate = f"does not fit: {error}"
    return best, f"as configured  {rate} ({workers} workers a node, max_policy_lag={lag})"


def _gpu_table(cfg: Settings, policy: TransformersVLA | FlowVLA, batch_bytes: int) -> list[str]:
    """What each way to train takes."""
    known = utils.known_instructions(cfg)
    instruction = max(known, key=len, default="pick up the object and place it")
    return memory_table(policy.config, policy.tokenizer, instruction, batch_bytes=batch_bytes)


def _learner_rows(cfg: Settings, policy: Module) -> list[tuple[str, str]]:
    """What the learner holds beside the pools."""
    parameters = list(policy.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    weights = sum(tensor.nbytes for tensor in parameters)
    num, num_trained = (sum(tensor.numel() for tensor in some) for some in (parameters, trained))
    # Gradients and the optimizer's states are float32, whatever the policy's dtype.
    narrow = sum(tensor.numel() for tensor in trained if tensor.dtype.itemsize < 4)
    copies = {"weights": weights, "gradients": 4 * num_trained, "AdamW": 8 * num_trained}
    if narrow:
        copies["float32 masters"] = 4 * narrow
    if cfg.loss.kl_to_ref_coeff is not None:
        copies["reference policy"] = sum(tensor.nbytes for tensor in trained)
    parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in copies.items())
    inference = cfg.inference_device or cfg.device
    return [
        ("policy", f"{num:,} parameters, {num_trained:,} of them trained"),
        ("learner", f"{format_bytes(sum(copies.values()))} on {cfg.device}: {parts}"),
        (
            "inference",
            f"{format_bytes(weights)} of weights on {inference}; "
            f"{format_bytes(sum(tensor.nbytes for tensor in trained))} more in an evaluation",
        ),
    ]


def _process_rows(cfg: Settings) -> list[tuple[str, str]]:
    """The processes of a run."""
    workers = cfg.workers
    total = 2 + workers.num_workers
    rollouts = workers.num_workers * workers.envs_per_worker
    kinds = f"the learner, 1 of inference, {workers.num_workers} of environments"
    rows = [("processes", f"{total}: {kinds}"), ("rollouts at once", str(rollouts))]
    if isinstance(cfg.env, LiberoSettings):
        each = format_bytes(LIBERO_WORKER_BYTES)
        sum_of = format_bytes(workers.num_workers * LIBERO_WORKER_BYTES)
        rows.append(("LIBERO", f"up to {sum_of} of memory, {each} a worker"))
    return rows
