# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Asynchronous GRPO of a vision-language-action policy on one machine.

    python -m torchrl_dvla train                       # LIBERO, CPU
    python -m torchrl_dvla train --quick               # toy task, 2 minutes
    python -m torchrl_dvla train checkpoint.resume=auto

Every setting is in ``config/*.yaml``; README.md beside this file explains them.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import math
import signal
import sys
import time
from collections.abc import Generator, Sequence
from statistics import fmean
from typing import Any, Literal

import hydra
from omegaconf import DictConfig
from tensordict import TensorDictBase
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchrl.checkpoint import GlobalRNGState

from torchrl_dvla import DVLACollector, EpisodeSpec, GRPOLoss
from torchrl_dvla.collectors import Evaluation, EvaluationResult
from torchrl_dvla.data.schema import IMAGE_KEY, NUM_DECISIONS_KEY
from torchrl_dvla.learner import (
    LearnerRanks,
    check_same_on_all_ranks,
    deal_rollouts,
    launched_rank,
    serve_launched_rank,
)
from torchrl_dvla.recipes.dvla_grpo import utils
from torchrl_dvla.recipes.dvla_grpo.bookkeeping import (
    Meter,
    RunState,
    check_resumed,
    group_metrics,
    groups_of,
    last_words,
    log,
    loss_metrics,
    make_recorder,
    record,
    report_of,
    save_after,
    use_optim_settings,
    watch_it,
)
from torchrl_dvla.recipes.dvla_grpo.cluster_record import ClusterRecord
from torchrl_dvla.recipes.dvla_grpo.settings import CONFIG, Settings, settings_from, to_dict
from torchrl_dvla.recipes.dvla_grpo.validation import check_policy, check_settings
from torchrl_dvla.recipes.terminal import messages_only, shortened, write_settings
from torchrl_dvla.recording import (
    GracefulStop,
    RunCheckpoints,
    RunLock,
    StopRequested,
    check_writable,
)
from torchrl_dvla.streams import share_terminal


def main() -> None:
    """Runs the recipe with the settings that ``sys.argv`` chooses."""
    # `--quick` is the toy configuration, for a first look.
    sys.argv = ["--config-name=toy" if arg == "--quick" else arg for arg in sys.argv]
    try:
        run()
    finally:
        # Seconds on a busy machine: the interpreter's last collections walk half a million objects,
        # all of which the kernel is about to take back anyway.
        gc.freeze()


@hydra.main(version_base="1.3", config_path=str(CONFIG), config_name="libero")
def run(cfg: DictConfig) -> None:
    """Trains with the settings of a composed configuration, and exits as the shell expects."""
    share_terminal()
    if launched_rank():  # torchrun started several: this one serves the first, which has the rest
        settings = settings_from(cfg)
        check_settings(settings)
        serve_launched_rank(utils.make_learner_factory(settings), settings.learner.timeout_s)
        return
    with messages_only(), GracefulStop() as stop:
        try:
            train(settings_from(cfg), stop)
        except StopRequested:
            log(f"{stop.reason}: ended before training began")
    if stop.requested:
        # 128 + the signal is what a shell expects of a program that one ended; with --multirun, the
        # runs that were to follow are left out.
        sys.exit(128 + signal.Signals[str(stop.reason)])


def train(cfg: Settings, stop: GracefulStop) -> None:
    """Builds everything, trains within the budgets, and leaves folder, checkpoint and report."""
    # -- build: whatever is wrong with the settings ends the run here, before a process starts ----
    check_settings(cfg)
    check_writable(cfg.log.dir)
    utils.make_deterministic(cfg)
    resumed = utils.find_resumed_checkpoint(cfg)
    lock = None
    if resumed is not None:
        check_resumed(cfg, resumed)
        lock = RunLock(utils.make_run_folder(cfg, resumed))
    policy = utils.make_policy(cfg)
    if cfg.learner.num_ranks > 1:
        check_same_on_all_ranks(policy)
    check_policy(cfg, policy)
    loss = utils.make_loss(cfg, policy)
    state, failure = RunState(), None
    optimizer, scheduler, masters = utils.make_optimizer(cfg, loss, lambda: state.progress(cfg))
    held_out, subset = utils.make_evaluation_episodes(cfg)
    scenes = utils.find_training_scenes(cfg, resumed)
    lock = lock or RunLock(utils.make_run_folder(cfg, None))  # until the end of the process
    run_folder = lock.folder
    make_checkpoints = functools.partial(
        RunCheckpoints,
        run_folder / "checkpoints",
        keep_last=cfg.checkpoint.keep,
        rng=GlobalRNGState(),
        run=state,
    )
    checkpoints = make_checkpoints(policy=policy, optimizer=optimizer, scheduler=scheduler)
    if masters.masters:  # of a policy in bfloat16
        checkpoints.register("masters", masters)
    if resumed is not None:
        # Several ranks read the optimizer's state once they are there, each its part.
        early = None if cfg.learner.num_ranks == 1 else ("policy", "rng", "run")
        checkpoints.load(resumed, early)
        use_optim_settings(cfg, optimizer, scheduler)

    with contextlib.ExitStack() as stack:
        recorder = stack.enter_context(
            make_recorder(cfg, run_folder, state, is_resumed=resumed is not None)
        )
        write_settings(to_dict(cfg), run_folder)
        rows = [("run folder", shortened(run_folder)), *watch_it(cfg, run_folder)]
        log("\n".join(f"{label + ':':<12}{line}" for label, line in rows))
        buffer = utils.make_replay_buffer(cfg)
        with stop.interruptible():
            collector = utils.make_collector(cfg, policy, buffer)
        stack.push(collector)  # shuts it down; it starts to collect after the first evaluation
        checkpoints.register("collector", collector)
        if resumed is not None:
            checkpoints.load(resumed, ["collector"])
            loss.compared_version = collector.policy_version  # may have been stepped in it already
        ranks = None
        if cfg.learner.num_ranks > 1:
            with stop.interruptible():
                ranks = stack.enter_context(utils.make_learner_ranks(cfg, policy, buffer))
            ranks.own.loss.compared_version = loss.compared_version
            loss, optimizer = ranks.own.loss, ranks.optimizer
            scheduler = utils.make_scheduler(cfg, optimizer, lambda: state.progress(cfg))
            checkpoints = make_checkpoints(
                policy=ranks.gathered_policy(),
                optimizer=ranks,
                scheduler=scheduler,
                collector=collector,
            )
            if resumed is not None:
                checkpoints.load(resumed, ("optimizer", "scheduler"))
                use_optim_settings(cfg, optimizer, scheduler)
        nodes = ClusterRecord(cfg, state, collector)
        # A learner that waits for groups sees neither a signal nor that all succeed: this wakes it.
        stop.on_request(buffer.shutdown)
        if cfg.group.on_no_signal == "warn":
            groups = groups_of(collector)

            def end_if_solved() -> None:
                if groups.is_solved:
                    groups.end("nothing is left to learn")

            groups.add_listener(end_if_solved)

        def save(on_disk_error: Literal["raise", "warn"] = "raise") -> None:
            config = to_dict(cfg)
            # Stopped within an update, the policy has taken steps on these.
            scenes.add_groups(groups_of(collector).in_hand)
            path = checkpoints.save(
                state.num_updates,
                config=config,
                training_scenes=scenes,
                on_disk_error=on_disk_error,
            )
            state.checkpoint = str(path or state.checkpoint)

        def show(name: str, result: EvaluationResult, **kwargs: Any) -> None:
            now = {"step": state.num_updates, "env_steps": state.num_env_steps}
            record(recorder, name, result, **now, **kwargs)

        def evaluate_all() -> list[bool]:
            with stop.interruptible():
                log(f"evaluating: {len(held_out)} held-out episodes")
                evaluation = begin_evaluation(collector, held_out, num_videos=cfg.eval.num_videos)
                if evaluation is None:
                    return []
                result = evaluation.result(cfg.eval.timeout_s)
            show("eval", result, fps=cfg.eval.video_fps)
            return result.successes

        # -- loop: the other lanes work by themselves; learn from what is ready, and publish ------
        try:
            if held_out and not state.before:
                state.before = evaluate_all()
            with Meter(cfg, state, collector) as meter:
                is_over = not meter.budget_is_left()  # resumed, or only to be evaluated
                if not is_over:
                    collector.start()
                evaluation = None
                while meter.budget_is_left() and not stop.requested:
                    # A task that is hopeless yields no group to learn from.
                    buffer.timeout_s = meter.patience_s()
                    try:
                        metrics = learn(cfg, loss, optimizer, scheduler, collector, stop, ranks)
                    except TimeoutError:
                        if not meter.is_out_of_time():
                            raise
                        break
                    if stop.requested:
                        break  # the checkpoint goes on with the next minibatch of the same groups
                    if metrics is None and meter.is_solved():
                        break
                    assert metrics is not None
                    published_s = time.monotonic()
                    publish(collector, ranks)
                    metrics["weights/publish_s"] = time.monotonic() - published_s
                    metrics = meter.after_update(metrics, buffer.cohort)
                    nodes.after_update(buffer.cohort)
                    scenes.add_groups(buffer.cohort)
                    recorder.scalars(metrics, step=state.num_updates, env_steps=state.num_env_steps)
                    if evaluation is None and subset and meter.evaluation_is_due():
                        evaluation = begin_evaluation(collector, subset)
                    elif evaluation is not None and evaluation.done():
                        if result := result_of(evaluation):
                            show("eval_subset", result)
                        evaluation = None
                    if state.num_updates % cfg.checkpoint.every_updates == 0:
                        save(on_disk_error="warn")  # the next one tries again
            if not is_over:
                collector.timeline.export_chrome_trace(run_folder / "timeline.json")
            with collector.pause():
                with stop.interruptible():
                    pass  # what was asked for until now; the save is not left in the middle
                is_trained = bool(state.num_updates or cfg.train.num_updates)
                if is_trained:
                    save()
                if held_out and is_trained:
                    try:
                        state.after = evaluate_all()
                    except (RuntimeError, TimeoutError) as error:
                        log("the last evaluation failed, and the report goes without it")
                        failure = error
        except StopRequested:
            log(f"{stop.reason}: saving a checkpoint")
            state.ended_by = str(stop.reason)
            save()
        except Exception as error:
            if ranks is not None and ranks.has_failed:
                log("the ranks of the learner are not in step any more: nothing can be saved")
            else:
                save_after(error, policy, save)
            log(last_words(cfg, run_folder, state))
            raise
        report = report_of(cfg, state)
        recorder.text("report", report.to_markdown(), step=state.num_updates)
        log(collector.memory.report())

    # -- shut down: every lane has ended and every file is closed ---------------------------------
    report.save(run_folder / "report.json")
    log(report.to_text())
    if table := nodes.to_text():
        log(table)
    log(last_words(cfg, run_folder, state))
    if failure is not None:
        raise failure


def learn(
    cfg: Settings,
    loss: GRPOLoss,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    collector: DVLACollector,
    stop: GracefulStop,
    ranks: LearnerRanks | None = None,
) -> dict[str, float] | None:
    """One learner update: every minibatch of the next groups, unless the run is asked to stop.

    Returns:
        Its metrics; empty if a checkpoint was taken after the last of the minibatches, ``None`` if
        no groups came, for the run is to stop or nothing is left to learn.
    """
    loss.version = collector.policy_version
    parts: list[tuple[int, int, TensorDictBase]] = []
    norms: list[float] = []
    if ranks is None:
        steps = steps_alone(cfg, loss, optimizer, collector)
    else:
        steps = ranks.steps(
            max_grad_norm=cfg.optim.max_grad_norm,
            micro_batch_size=cfg.optim.micro_batch_size,
            version=loss.version,
        )
    try:
        with contextlib.closing(steps):
            for found, norm in steps:
                parts += found
                norms.append(norm)
                scheduler.step()
                if stop.requested:
                    break
    except RuntimeError:  # closing the buffer is how this loop is woken
        groups = groups_of(collector)
        if groups.in_hand or not (stop.requested or groups.is_solved):
            raise
        return None
    if not parts:
        return {}
    metrics = loss_metrics(parts) | group_metrics(groups_of(collector))
    metrics["optim/lr"] = float(scheduler.get_last_lr()[0])
    metrics["optim/grad_norm"] = fmean(norms)
    return metrics


def steps_alone(
    cfg: Settings, loss: GRPOLoss, optimizer: Optimizer, collector: DVLACollector
) -> Generator[tuple[list[tuple[int, int, TensorDictBase]], float], None, None]:
    """One optimizer step for each minibatch, in this process: its losses, and its gradient norm."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for batch in collector.replay_buffer:
        batch = batch.to(cfg.device)
        normaliser = loss.normaliser(batch)
        parts: list[tuple[int, int, TensorDictBase]] = []
        # Gradients of micro-batches add up to that of the minibatch.
        for part in micro_batches(batch, cfg.optim.micro_batch_size, loss):
            losses = loss(part, normaliser=normaliser)
            sum(value for key, value in losses.items() if key.startswith("loss_")).backward()
            parts.append((len(part), len(batch), losses.detach().cpu()))
        max_norm = cfg.optim.max_grad_norm or math.inf
        norm = clip_grad_norm_(parameters, max_norm, error_if_nonfinite=True)
        optimizer.step()
        optimizer.zero_grad()
        yield parts, float(norm)


def micro_batches(
    batch: TensorDictBase, size: int | None, loss: GRPOLoss
) -> Sequence[TensorDictBase]:
    """Parts of a minibatch of at most ``size`` rows: of whole rollouts, if the loss needs them."""
    if not loss.needs_whole_rollouts:
        return batch.split(size or len(batch))
    parts = deal_rollouts(batch[NUM_DECISIONS_KEY].flatten().tolist(), 1, 0, size)
    return batch.split([part.stop - part.start for part in parts])


def publish(collector: DVLACollector, ranks: LearnerRanks | None) -> None:
    """Publish the weights, gathered one by one where several ranks have them."""
    if ranks is None:
        collector.update_policy_weights_()
    else:
        with ranks.weights() as weights:
            collector.update_policy_weights_(weights)


def begin_evaluation(
    collector: DVLACollector, episodes: Sequence[EpisodeSpec], *, num_videos: int = 0
) -> Evaluation | None:
    """Play episodes greedily, but for quarantined tasks; ``None`` if there are no others.

    The frames of ``num_videos`` of them are kept, if the environment observes any.
    """
    if IMAGE_KEY not in collector.memory.environment.rows.keys(include_nested=True):
        num_videos = 0
    groups = groups_of(collector)
    with groups.lock:  # no task is quarantined meanwhile
        played = [spec for spec in episodes if spec.task not in groups.quarantined]
        if len(played) < len(episodes):
            tasks = ", ".join(sorted(groups.quarantined))
            log(
                f"not evaluated: {len(episodes) - len(played)} episodes, for {tasks} is quarantined"
            )
        return collector.evaluate(played, num_frames_episodes=num_videos) if played else None


def result_of(evaluation: Evaluation) -> EvaluationResult | None:
    """The outcome of an evaluation beside training, or ``None`` if it failed, and why."""
    try:
        return evaluation.result()
    except RuntimeError as error:
        log(f"an evaluation failed and is left out; training goes on. {error}")
        return None
