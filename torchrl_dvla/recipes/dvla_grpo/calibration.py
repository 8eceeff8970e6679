# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Lane costs of a configuration, measured on this machine by a few updates in lockstep."""

from __future__ import annotations

import copy
import multiprocessing
import os
import platform
import statistics
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.envs.utils import ExplorationType, set_exploration_type

from torchrl_dvla import DVLACollector
from torchrl_dvla.recipes.dvla_grpo import utils
from torchrl_dvla.recipes.dvla_grpo.settings import Settings, flat, to_dict
from torchrl_dvla.recipes.dvla_grpo.train import learn
from torchrl_dvla.recipes.dvla_grpo.validation import check_policy, check_settings
from torchrl_dvla.recording import GracefulStop
from torchrl_dvla.topology import LaneCosts

__all__ = ["calibrate", "cost_settings"]

#: Settings that lane costs depend on: whole sections, and single ones.
_COUNT = (
    "device",
    "env.",
    "inference.num_threads",
    "inference_device",
    "optim.micro_batch_size",
    "optim.minibatch_size",
    "optim.num_",
    "policy.",
    "workers.max_decisions",
    "workers.num_threads",
)
#: Rows of the larger of the two policy calls that are compared, and repeats of each.
_NUM_ROWS, _NUM_CALLS = 8, 9


def cost_settings(cfg: Settings) -> dict[str, Any]:
    """The settings that lane costs depend on, by full name.

    Examples:
        >>> from torchrl_dvla.recipes.dvla_grpo.settings import compose_settings
        >>> found = cost_settings(compose_settings("toy"))
        >>> found["env.chunk_size"], found["optim.num_epochs"], "seed" in found
        (4, 2, False)
    """
    return {key: value for key, value in flat(to_dict(cfg)).items() if key.startswith(_COUNT)}


def calibrate(cfg: Settings, *, num_updates: int = 3) -> LaneCosts:
    """Lane costs of a configuration, of the synchronous loop with one worker.

    In lockstep (``max_policy_lag=0``) no two lanes are busy at once, so each lane's time on the
    timeline is its own, whatever it would share cores with later. What other programs take of it is
    left out: the kernel says how long a thread that could run waited for a core. Policy calls of
    one and of several rows tell what a row adds.

    Args:
        cfg (Settings): of a run; its learner, environments and policy are used as they are.

    Keyword Args:
        num_updates (int): updates that count, after a first one that does not.

    Raises:
        ValueError: for settings that a run would refuse.
        TimeoutError: if no group with contrast comes within ``train.timeout_s``.
    """
    cfg = replace(
        cfg,
        group=replace(cfg.group, max_policy_lag=0),
        workers=replace(cfg.workers, num_workers=1),
        inference=replace(cfg.inference, deterministic=None),
    )
    check_settings(cfg)
    utils.make_deterministic(cfg)
    policy = utils.make_policy(cfg)
    check_policy(cfg, policy)
    loss = utils.make_loss(cfg, policy)
    optimizer, scheduler, _ = utils.make_optimizer(cfg, loss, lambda: 0.0)
    buffer, stop = utils.make_replay_buffer(cfg), GracefulStop()
    buffer.timeout_s = cfg.train.timeout_s
    publish_s: list[float] = []
    num_learned, before = 0, _Totals()
    with utils.make_collector(cfg, policy, buffer) as collector:
        for number in range(num_updates + 1):
            if number == 1:
                before = _Totals.of(collector)
            learn(cfg, loss, optimizer, scheduler, collector, stop)
            if number:
                num_learned += sum(group.num_rows for group in buffer.cohort)
            # Before the version is published, nothing else is at work.
            start_s = time.monotonic()
            if number == num_updates:
                total = _Totals.of(collector).since(before)
                call_row_s = _row_seconds(cfg, policy, buffer.sample()[:_NUM_ROWS])
                env_bytes = _worker_bytes() // cfg.workers.envs_per_worker
                break
            collector.update_policy_weights_()
            publish_s.append(time.monotonic() - start_s)
        row_bytes = collector.plan.row_bytes
    call_s = (total.infer_s - total.num_decisions * call_row_s) / total.num_calls
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    device = torch.device(cfg.device).type
    return LaneCosts(
        name=cfg.name,
        env_step_s=total.step_s / total.num_env_steps,
        env_steps_per_decision=total.num_env_steps / total.num_decisions,
        decisions_per_rollout=total.num_decisions / total.num_rollouts,
        call_row_s=call_row_s,
        learn_row_s=total.learn_s / num_learned,
        row_bytes=row_bytes,
        version_bytes=sum(tensor.nbytes for tensor in policy.state_dict().values()),
        call_s=max(0.0, call_s),
        reset_s=total.reset_s / total.num_rollouts,
        loop_s=total.loop_s / total.num_decisions,
        publish_s=statistics.median(publish_s),
        trained_bytes=sum(parameter.nbytes for parameter in trained),
        optimizer_steps_per_row=cfg.optim.num_epochs / cfg.optim.minibatch_size,
        learned_share=min(1.0, num_learned / total.num_decisions),
        env_bytes=env_bytes,
        policy_device="cuda" if device == "cuda" else "cpu",
        settings=cost_settings(cfg),
        machine={
            "host": platform.node(),
            "cores": os.cpu_count(),
            "load": round(os.getloadavg()[0], 1),
            "torch": torch.__version__,
        },
    )


class _Totals:
    """Seconds and counts of a collector until now; one made by itself is all zeros.

    Of each lane there are the seconds of its spans, those that its thread ran, and those that it
    could have run but had to wait for a core, which are somebody else's.
    """

    step_s = reset_s = infer_s = learn_s = loop_s = 0.0
    sampling_ran_s = sampling_waited_s = inference_ran_s = inference_waited_s = 0.0
    gradient_ran_s = gradient_waited_s = 0.0
    num_decisions = num_env_steps = num_rollouts = num_calls = 0

    @classmethod
    def of(cls, collector: DVLACollector) -> _Totals:
        """Those of a collector whose learner, this thread, is at work: the other lanes are idle."""
        totals, stats = cls(), collector.stats()
        names = {"step": "step_s", "reset": "reset_s", "infer": "infer_s"}
        names |= {"gather": "learn_s", "learn": "learn_s"}
        for span in collector.timeline.spans():
            if name := names.get(span.name):
                setattr(totals, name, getattr(totals, name) + span.end_s - span.start_s)
        (thread,) = [t for t in threading.enumerate() if t.name == "dvla-collector"]
        totals.loop_s = time.clock_gettime(time.pthread_getcpuclockid(thread.ident or 0))
        tasks = {
            "sampling": str(_process("dvla-env").pid),
            "inference": str(_process("dvla-inference").pid),
            "gradient": f"self/task/{threading.get_native_id()}",
        }
        for lane, task in tasks.items():
            ran_ns, waited_ns, _ = map(int, Path(f"/proc/{task}/schedstat").read_text().split())
            setattr(totals, f"{lane}_ran_s", 1e-9 * ran_ns)
            setattr(totals, f"{lane}_waited_s", 1e-9 * waited_ns)
        totals.num_decisions = int(stats["frames"])
        totals.num_env_steps = int(stats["collector/env_steps"])
        totals.num_rollouts = int(stats["collector/episodes"])
        totals.num_calls = int(stats["collector/inference_batches"])
        return totals

    def since(self, earlier: _Totals) -> _Totals:
        """What came after *earlier*, each span without what others took of it."""
        totals = _Totals()
        for name in (name for name in dir(self) if name.endswith("_s") or name.startswith("num_")):
            setattr(totals, name, getattr(self, name) - getattr(earlier, name))
        spans = {"sampling": ("step_s", "reset_s"), "inference": ("infer_s",)}
        for lane, names in {**spans, "gradient": ("learn_s",)}.items():
            busy_s = sum(getattr(totals, name) for name in names)
            own_s = busy_s - getattr(totals, f"{lane}_waited_s")
            # A thread may also have waited before a span, and worked on messages around it.
            own_s = max(own_s, getattr(totals, f"{lane}_ran_s"))
            for name in names:
                setattr(totals, name, getattr(totals, name) * own_s / busy_s)
        return totals


def _row_seconds(cfg: Settings, policy: TensorDictModuleBase, rows: TensorDictBase) -> float:
    """What each further row adds to a policy call, on the inference lane's device and threads."""
    device = torch.device(cfg.inference_device or cfg.device)
    policy = copy.deepcopy(policy).requires_grad_(False).eval().to(device)
    rows = rows.select(*policy.in_keys, strict=False).to(device)

    def seconds(count: int) -> float:
        start_s = time.monotonic()
        policy(rows[:count].clone(recurse=False))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.monotonic() - start_s

    num_threads = torch.get_num_threads()
    torch.set_num_threads(cfg.inference.num_threads)
    try:
        with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
            seconds(1), seconds(len(rows))  # the first of a size plans memory and kernels
            pairs = [(seconds(1), seconds(len(rows))) for _ in range(_NUM_CALLS)]
    finally:
        torch.set_num_threads(num_threads)
    one, all_of_them = (min(times) for times in zip(*pairs))  # the least disturbed of each
    return max(1e-9, (all_of_them - one) / (len(rows) - 1))


def _worker_bytes() -> int:
    """Memory of the environment worker, its share of what it shares with others included."""
    lines = Path(f"/proc/{_process('dvla-env').pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def _process(name: str) -> multiprocessing.process.BaseProcess:
    (process,) = [p for p in multiprocessing.active_children() if p.name.startswith(name)]
    return process
