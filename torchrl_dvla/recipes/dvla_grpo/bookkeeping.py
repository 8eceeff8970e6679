# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Counters, progress bar, metrics, final report and last words of the recipe."""

from __future__ import annotations

import math
import re
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from omegaconf import OmegaConf
from tensordict import TensorDictBase
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchrl.checkpoint import Checkpoint
from tqdm import tqdm

from torchrl_dvla import DVLACollector
from torchrl_dvla.collectors import EvaluationResult
from torchrl_dvla.data import Group, GroupQueue
from torchrl_dvla.differences import differences, join_some
from torchrl_dvla.recipes.dvla_grpo.settings import Settings, flat, settings_from, to_dict
from torchrl_dvla.recipes.dvla_grpo.utils import make_env_factories
from torchrl_dvla.recipes.terminal import command, resume_command, shortened, watch_command
from torchrl_dvla.recording import RunRecorder, RunReport, SuccessRate, TensorBoardRecorder
from torchrl_dvla.saved_state import Number, form_of, require_form

#: Of all that the collector counts, what is worth a chart.
_LOGGED = re.compile(
    r"(cluster|collector|lane|weights|planes|faults)/\w+"
    r"|memory/\w+/(pages_\w+|\w+_bytes|internal_waste|page_wait_s)"
    r"|buffer/(groups_(?!failed)\w+|rows_kept|no_signal_groups|wait_s|last_wait_s)"
)


#: Settings that runs are compared by.
_COMPARED = re.compile(
    r"seed|env\.(task_suite|chunk_size|replan_interval)"
    r"|policy\.(kind|path|temperature|num_steps|sampler|noise_level|initial_noise)"
    r"|(group|loss|optim)\.\w+|workers\.(num_workers|envs_per_worker)"
)


def log(text: str) -> None:
    """Print above the progress bar, and at once, also into a pipe."""
    tqdm.write(text)
    sys.stdout.flush()


#: Settings that may differ from those of the checkpoint that a run goes on from. They are applied,
#: and named; any other is refused: what is in the checkpoint depends on it.
_MAY_CHANGE = re.compile(
    r"name|device|inference_device|policy\.(path|stated\..+)"
    r"|(train|eval|checkpoint|log|memory|inference|loss|learner|cluster|demo)(\..+)?"
    r"|optim\.(?!minibatch_size).+|workers\.(?!max_decisions).+"
    r"|group\.(return_bounds|advantage|max_no_signal_groups|on_no_signal)"
)


def check_resumed(cfg: Settings, resumed: Path) -> None:
    """Refuse to go on from a checkpoint of other settings, and say which others are new.

    Raises:
        ValueError: naming the settings that must not change.
    """
    saved = Checkpoint.manifest(resumed)["metadata"].get("config")
    if not saved:  # it was not written by this recipe
        return
    try:
        before, now = flat(to_dict(settings_from(saved))), flat(to_dict(cfg))
    except ValueError as error:
        raise ValueError(
            f"The checkpoint {str(resumed)!r} was written with other settings: {error} Resume it "
            "with the version that wrote it, or start a new run: checkpoint.resume=null."
        ) from error
    before["checkpoint.resume"] = now["checkpoint.resume"]
    names = before.keys() | now.keys()
    may_change = {name for name in names if _MAY_CHANGE.fullmatch(name)}
    fixed = differences(_without(before, may_change), _without(now, may_change))
    if fixed:
        raise ValueError(
            "checkpoint.resume must go on with the settings of the checkpoint, got "
            f"{join_some(fixed)}. Drop these overrides, or start a new run: checkpoint.resume=null."
        )
    new = differences(_without(before, names - may_change), _without(now, names - may_change))
    if new:
        log(f"resuming with settings that are new: {join_some(new, limit=len(new))}")


def _without(settings: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in names}


def use_optim_settings(cfg: Settings, optimizer: Optimizer, scheduler: LRScheduler) -> None:
    """Have the settings decide, not the checkpoint that optimizer and scheduler came from."""
    lr = cfg.optim.lr
    for group in optimizer.param_groups:
        group["lr"] *= lr / group["initial_lr"]
        group["initial_lr"] = lr
        group.update(betas=tuple(cfg.optim.betas), weight_decay=cfg.optim.weight_decay)
    scheduler.base_lrs = [lr for _ in optimizer.param_groups]


@dataclass
class RunState:
    """Progress and results of a run, part of its checkpoints, so that resumed runs add up."""

    num_updates: int = 0
    training_s: float = 0.0
    #: Outcomes of the held-out episodes.
    before: list[bool] = field(default_factory=list)
    after: list[bool] = field(default_factory=list)
    #: Counters of the collector, and seconds each lane was busy, while the run was training.
    counts: dict[str, float] = field(default_factory=dict)
    lane_busy_s: dict[str, float] = field(default_factory=dict)
    num_learned: int = 0
    policy_lag_sum: float = 0.0
    policy_lag_max: int = 0
    ended_by: str = ""
    checkpoint: str = ""

    @property
    def num_env_steps(self) -> int:
        """Env steps of training until now."""
        return int(self.counts.get("collector/env_steps", 0))

    def progress(self, cfg: Settings) -> float:
        """Share of the budget of updates or of time, whichever is further, that is used up."""
        shares = [self.num_updates / (cfg.train.num_updates or 1)]
        if cfg.train.max_minutes is not None:
            shares.append(self.training_s / (60.0 * cfg.train.max_minutes))
        return min(1.0, max(shares))

    def state_dict(self) -> dict[str, Any]:
        """The fields, as plain data."""
        return asdict(self)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` was taken.

        Raises:
            ValueError: if it holds something else.
        """
        form = form_of(asdict(RunState())) | {"before": [bool], "after": [bool]}
        form |= {"counts": {str: Number(0)}, "lane_busy_s": {str: Number(0)}}
        require_form(form, state_dict, "run")
        vars(self).update(state_dict)


class Meter:
    """Budgets, totals, rates and the progress bar of a training; it lasts while it is entered."""

    _COUNTS = ("collector/decisions", "collector/env_steps", "collector/episodes")

    def __init__(self, cfg: Settings, state: RunState, collector: DVLACollector) -> None:
        self._cfg, self._state, self._collector = cfg, state, collector
        minutes = cfg.train.max_minutes
        self._max_s = math.inf if minutes is None else 60.0 * minutes
        every = cfg.eval.every_minutes
        self._every_s = math.inf if every is None else 60.0 * every
        self._update_s = 0.0
        self._lag = self._env_steps_per_s = math.nan

    def __enter__(self) -> Meter:
        state = self._state
        self._start_s = time.monotonic() - state.training_s
        self._stats, self._usage = self._collector.stats(), self._collector.timeline.usage()
        self._next_evaluation_s = state.training_s + self._every_s
        self._is_terminal = sys.stderr.isatty()
        self._next_line_s = 0.0
        self._bar = tqdm(
            total=1.0,
            initial=state.progress(self._cfg),
            disable=not self._is_terminal,
            dynamic_ncols=True,
            miniters=0,
            bar_format=self._status("{bar}"),
        )
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._count()
        self._bar.bar_format = self._status("{bar}")
        self._bar.close()
        if not self._is_terminal:
            log(self._status())

    def budget_is_left(self) -> bool:
        """Whether another update is allowed; the last one ends inside the time budget."""
        state = self._state
        if state.num_updates >= self._cfg.train.num_updates:
            state.ended_by = "update budget"
            return False
        mean_s = state.training_s / max(1, state.num_updates)
        if self._time_s() + max(mean_s, self._update_s) > self._max_s:
            state.ended_by = "time budget"
            return False
        return True

    def patience_s(self) -> float | None:
        """How long the learner may wait for groups: as its settings say, within the time budget."""
        patience_s = min(self._cfg.train.timeout_s or math.inf, self._max_s - self._time_s())
        return None if patience_s == math.inf else max(1.0, patience_s)

    def is_out_of_time(self) -> bool:
        """Whether the time budget ended while the learner waited for groups."""
        if self._time_s() < self._max_s:
            return False
        self._state.ended_by = "time budget, waiting for a group with contrast"
        return True

    def is_solved(self) -> bool:
        """Whether no group will come any more, for nothing is left to learn."""
        groups = groups_of(self._collector)
        if groups.is_solved:
            self._state.ended_by = "a solved task"
            log(
                f"all rollouts of {groups.config.max_no_signal_groups} groups in a row succeeded: "
                "nothing is left to learn"
            )
        return groups.is_solved

    def evaluation_is_due(self) -> bool:
        """Whether ``eval.every_minutes`` went by since this last said so."""
        if self._time_s() < self._next_evaluation_s:
            return False
        self._next_evaluation_s = self._time_s() + self._every_s
        return True

    def after_update(
        self, metrics: Mapping[str, float], groups: Sequence[Group]
    ) -> dict[str, float]:
        """Count one update; returns everything that is to be logged for it."""
        state = self._state
        self._update_s = self._time_s() - state.training_s
        state.num_updates += 1
        stats = self._count()
        self._env_steps_per_s = stats["collector/env_steps_per_s"]
        num_rows = sum(group.num_rows for group in groups)
        lag = metrics.get("staleness/policy_lag_mean", math.nan)
        if not math.isnan(lag):
            state.num_learned += num_rows
            state.policy_lag_sum += num_rows * lag
        lag_max = int(metrics.get("staleness/policy_lag_max", 0))
        state.policy_lag_max = max(state.policy_lag_max, lag_max)
        self._lag = lag
        if self._is_terminal:
            self._bar.bar_format = self._status("{bar}")
            self._bar.update(state.progress(self._cfg) - self._bar.n)
        elif self._time_s() >= self._next_line_s:
            self._next_line_s = self._time_s() + self._cfg.log.line_every_s
            log(self._status())
        logged = {name: value for name, value in stats.items() if _LOGGED.fullmatch(name)}
        own = {
            "train/update_s": self._update_s,
            "train/rows_per_update": num_rows,
            "train/minutes": state.training_s / 60.0,
        }
        return logged | own | dict(metrics)

    def _status(self, bar: str = "") -> str:
        """The line of the progress, with or without a bar; what comes last may be cut off."""
        state, share = self._state, self._state.progress(self._cfg)
        success = self._stats.get("collector/success_rate", math.nan)
        left_s = state.training_s * (1.0 - share) / share if share else math.nan
        times = [tqdm.format_interval(state.training_s), "?"]
        if not math.isnan(left_s):
            times[1] = tqdm.format_interval(left_s)
        parts = [
            f"sampled success {_shown(success, '.0%')}",
            f" |{bar}|{share:4.0%}" if bar else f", {share:.0%} of the budget,",
            f" {state.num_updates}/{self._cfg.train.num_updates} [{'<'.join(times)}]",
            f" lag {_shown(self._lag, '.1f')}, {_shown(self._env_steps_per_s, '.0f')} env steps/s",
        ]
        return "".join(parts)

    def _time_s(self) -> float:
        return time.monotonic() - self._start_s

    def _count(self) -> dict[str, float]:
        """Add what happened since the last call to the totals of the run; returns its statistics.

        Rates and shares of the lanes are those of the time since then.
        """
        state, stats, usage = self._state, self._collector.stats(), self._collector.timeline.usage()
        window, window_s = usage.since(self._usage), max(1e-9, self._time_s() - state.training_s)
        rates = {}
        for name in self._COUNTS:
            count = stats.get(name, 0) - self._stats.get(name, 0)
            state.counts[name] = state.counts.get(name, 0) + count
            rates[f"{name}_per_s"] = count / window_s
        for lane, busy_s in window.busy_s.items():
            mean_s = busy_s / max(1, window.num_tracks[lane])
            state.lane_busy_s[lane] = state.lane_busy_s.get(lane, 0.0) + mean_s
        state.training_s += window_s
        self._stats, self._usage = stats, usage
        return stats | rates | window.scalars()


def _shown(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)


def groups_of(collector: DVLACollector) -> GroupQueue:
    """The groups that the collector's replay buffer learns from."""
    groups = collector.replay_buffer.groups
    assert groups is not None  # the collector bound it
    return groups


def loss_metrics(parts: Sequence[tuple[int, int, TensorDictBase]]) -> dict[str, float]:
    """Mean of each output of the loss over the decisions of an update, by TensorBoard name.

    Args:
        parts (sequence): of each micro-batch its rows, those of its minibatch, and the outputs. Its
            losses are its share of the minibatch's: they add up.
    """
    out: dict[str, float] = {}
    num_rows = sum(count for count, *_ in parts)
    for key in list(parts[0][2].keys()):
        is_share = key.startswith("loss_")
        values = [(of if is_share else count, float(losses[key])) for count, of, losses in parts]
        if key.endswith("_max") or key.startswith("max_"):
            value = max(value for _, value in values)
        else:
            value = sum(count * value for count, value in values) / num_rows
        out[("staleness/" if key.startswith("policy_lag") else "loss/") + key] = value
    return out


def group_metrics(groups: GroupQueue) -> dict[str, float]:
    """What the groups of the update were like, and which were left out, by TensorBoard name."""
    out = {
        "groups/mean_return": fmean(group.mean_return for group in groups.cohort),
        "groups/success_rate": fmean(group.success_rate for group in groups.cohort),
        "groups/episode_env_steps": fmean(group.mean_length for group in groups.cohort),
    }
    for reason, counts in groups.drop_counts().items():
        name = "groups/dropped_" + re.sub(r"\W+", "_", reason)
        out[name], out[name + "_env_steps"] = counts["count"], counts["mean_length"]
    stats = groups.stats()
    num_kept = stats["groups_kept"]
    return out | {"groups/kept_share": num_kept / (num_kept + stats["groups_dropped"])}


def make_recorder(
    cfg: Settings, run_folder: Path, state: RunState, *, is_resumed: bool
) -> RunRecorder:
    """The recorder of the run, with its settings, by the logger that they name."""
    kwargs: dict[str, Any] = {}
    if is_resumed:
        kwargs = {"start_step": state.num_updates + 1, "start_env_steps": state.num_env_steps + 1}
    recorder: RunRecorder
    if cfg.log.backend == "tensorboard":
        recorder = TensorBoardRecorder(run_folder, **kwargs)
    else:
        recorder = RunRecorder(run_folder, backend=cfg.log.backend, **kwargs)
    settings = to_dict(cfg)
    recorder.text("settings", f"```yaml\n{OmegaConf.to_yaml(settings)}```", step=state.num_updates)
    compared = {name: value for name, value in flat(settings).items() if _COMPARED.match(name)}
    recorder.hparams(compared)
    return recorder


def record(
    recorder: RunRecorder,
    name: str,
    result: EvaluationResult,
    *,
    step: int,
    env_steps: int,
    fps: float = 10.0,
) -> None:
    """Record the outcome of an evaluation, with its videos and the scenes it started from.

    The name of a video begins with its episode, then comes the update: the same scene before and
    after training stands side by side.
    """
    success = SuccessRate.of(result.successes)
    low, high = success.interval
    num_episodes = len(result.successes)
    recorder.scalars(
        {
            f"{name}/success_rate": success.rate,
            f"{name}/success_low": low,
            f"{name}/success_high": high,
            f"{name}/episode_return": fmean(result.episode_returns),
            f"{name}/episode_env_steps": sum(result.num_env_steps) / num_episodes,
            f"{name}/policy_version": result.policy_version,
        },
        step=step,
        env_steps=env_steps,
    )
    for index, frames in sorted(result.frames.items()):
        outcome = "success" if result.successes[index] else "failure"
        video = f"{name}/episode_{index}_update_{step}_{outcome}"
        recorder.video(video, frames, step=step, fps=fps)
    if result.frames:
        starts = torch.stack([frames[0] for _, frames in sorted(result.frames.items())])
        recorder.images(f"{name}/start", starts, step=step)
    recorder.flush()
    log(f"greedy success ({name}, policy version {result.policy_version}): {success}")


def report_of(cfg: Settings, state: RunState) -> RunReport:
    """Final report."""
    seconds = max(state.training_s, 1e-9)
    return RunReport(
        name=f"{cfg.name}, seed {cfg.seed}",
        before=SuccessRate.of(state.before) if state.before else None,
        after=SuccessRate.of(state.after) if state.after else None,
        lane_shares={lane: busy_s / seconds for lane, busy_s in state.lane_busy_s.items()},
        env_steps_per_s=state.counts.get("collector/env_steps", 0) / seconds,
        decisions_per_s=state.counts.get("collector/decisions", 0) / seconds,
        num_updates=state.num_updates,
        num_episodes=int(state.counts.get("collector/episodes", 0)),
        num_env_steps=state.num_env_steps,
        mean_policy_lag=state.policy_lag_sum / max(1, state.num_learned),
        max_policy_lag=state.policy_lag_max,
        training_s=state.training_s,
        ended_by=state.ended_by,
        checkpoint=state.checkpoint,
        tasks=_by_task(cfg, state),
    )


def _by_task(cfg: Settings, state: RunState) -> dict[str, dict[str, SuccessRate]]:
    """Success of each of several tasks, whose held-out episodes come in turn."""
    names = list(make_env_factories(cfg))
    out: dict[str, dict[str, SuccessRate]] = {}
    for when, successes in {"before": state.before, "after": state.after}.items():
        for k, name in enumerate(names):
            if len(names) > 1 and (own := successes[k :: len(names)]):
                out.setdefault(name, {})[when] = SuccessRate.of(own)
    return out


def watch_it(cfg: Settings, run_folder: Path) -> list[tuple[str, str]]:
    """How the run is watched, or drawn, as a label and a command."""
    if cfg.log.backend == "wandb":
        return []  # wandb prints its page
    if cfg.log.backend == "tensorboard":
        return [("watch", watch_command(run_folder))]
    return [("draw", command("curve", shortened(run_folder), "curve.svg"))]


def last_words(cfg: Settings, run_folder: Path, state: RunState) -> str:
    """Commands to resume, to evaluate and to watch a run that has ended, however it has."""
    rows = []
    if state.checkpoint:
        resume = resume_command(run_folder)
        if state.progress(cfg) >= 1.0:
            resume += "  # and raise train.num_updates or train.max_minutes: they are used up"
        rows += [("resume", resume), ("evaluate", command("evaluate", shortened(run_folder)))]
    return "\n".join(f"{label + ':':<10}{line}" for label, line in rows + watch_it(cfg, run_folder))


def save_after(error: Exception, policy: torch.nn.Module, save: Callable[[], None]) -> None:
    """The run ends with ``error``: save what was learned, unless that is what is broken."""
    try:
        # On the CPU: there may be no memory left on the device.
        # Of a sharded policy, what this rank has.
        own = (p.to_local() if isinstance(p, DTensor) else p for p in policy.parameters())
        if not all(bool(p.detach().cpu().isfinite().all()) for p in own):
            log(f"{type(error).__name__}: the weights hold NaN or infinity, so they are not saved")
            return
        log(f"{type(error).__name__}: saving a checkpoint")
        save()
    except Exception as second:  # a full disk, perhaps: the first error is the one to show
        log(f"it could not be saved: {second!r}")
