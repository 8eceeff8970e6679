# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The collector of one machine."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.collectors import BaseCollector
from torchrl.envs import EnvBase
from torchrl.weight_update import WeightSyncScheme

from torchrl_dvla.collectors.checks import (
    check_episodes,
    check_frames,
    check_pages,
    check_policy,
    check_state,
    check_tasks,
    check_updater,
)
from torchrl_dvla.collectors.configs import (
    GroupConfig,
    InferenceConfig,
    SchedulerConfig,
    WorkerConfig,
)
from torchrl_dvla.collectors.coordinator import Coordinator
from torchrl_dvla.collectors.counters import CollectionCounters
from torchrl_dvla.collectors.evaluation import Evaluation
from torchrl_dvla.collectors.group_path import GroupPath
from torchrl_dvla.collectors.lane_starter import LaneStarter
from torchrl_dvla.collectors.matching import match_policy
from torchrl_dvla.collectors.schedule import EpisodeSpec, InitStateSchedule
from torchrl_dvla.collectors.sizing import make_plan
from torchrl_dvla.collectors.tuning import attach_tuner, check_movable
from torchrl_dvla.collectors.weight_telemetry import WeightTelemetry
from torchrl_dvla.data import PooledReplayBuffer
from torchrl_dvla.data.schema import INSTRUCTION_ID_KEY, INSTRUCTION_KEY
from torchrl_dvla.memory import EnvironmentPool
from torchrl_dvla.swimlane import SamplingLane, Timeline
from torchrl_dvla.weight_update import AsyncWeightUpdater

__all__ = ["DVLACollector"]

EnvFactory = Callable[[], EnvBase]


class DVLACollector(BaseCollector):
    """Collects groups of rollouts while the learner learns from the groups before.

    Environment workers (sampling lane) write observations into shared pages; an inference lane
    reads those rows, takes all waiting decisions in one policy call under the newest whole version
    of the weights, and writes them back; a finished group changes hands page by page into the
    replay buffer, from which the learner draws (gradient lane); :meth:`update_policy_weights_`
    publishes the result (distribution lane) without waiting for anyone.

    Staleness is bounded by admission: a group is begun only while it can be learned from within
    ``group.max_policy_lag`` versions, see :class:`~torchrl_dvla.data.Admission`. Nothing that was
    sampled is discarded for its age.

    A worker that dies, raises, or hangs beyond its deadline is replaced and its rollouts are
    sampled again from the same initial state; so is an inference process that dies.

    Args:
        create_env_fn (Callable or Mapping): environment factory, or factories by task name. The
            environment speaks the decision-level schema: action ``("vla_action", "chunk")``
            ``[chunk, A]``, observation under ``"observation"``.
        policy (TensorDictModuleBase, optional): the learner's policy; it writes
            ``("vla_action", "tokens")``, ``("vla_action", "log_probs")`` (one a token) and
            ``("vla_action", "chunk")``. Defaults to one of ``policy_factory``, as :attr:`policy`.

    Keyword Args:
        policy_factory (Callable, optional): builds the policy of the inference lane, in the lane,
            without lazy parameters. Defaults to sending ``policy`` there.
        replay_buffer (Callable): builds the replay buffer when the layout of a row is known; called
            with ``pool``, ``admission`` and ``instructions``.
            ``functools.partial(PooledReplayBuffer, batch_size=64)`` is all it takes. The buffer is
            :attr:`replay_buffer` afterwards.
        group (GroupConfig): groups and staleness.
        workers (WorkerConfig): the sampling lane.
        inference (InferenceConfig): the inference lane.
        scheduler (SchedulerConfig, optional): let a scheduler move settings while the lanes run.
            Defaults to ``None``: they stay as they are.
        weight_sync_schemes (dict, optional): ``{"policy": AsyncWeightUpdater()}``, the default.
        schedule (InitStateSchedule, optional): initial states of the groups. Defaults to scenes
            sampled by seed, task after task.
        rows_per_page (int): decisions of one page of the environment pool. Half a page a rollout
            stays empty on average (:meth:`DualPool.plan` recommends a size).
        env_bytes (int or str, optional): byte budget of the environment pool. Defaults to what the
            lag bound can ever use.
        seed (int): seed of the initial states and of sampled tokens.

    Raises:
        ValueError: if an argument is out of range, if the budget cannot hold the groups of one
            update, or if policy and environment do not fit each other.
        RuntimeError: with the worker's traceback if an environment cannot be built.

    Examples:
        >>> from torchrl_dvla.collectors import DVLACollector, GroupConfig, WorkerConfig
        >>> from torchrl_dvla.data import PooledReplayBuffer
        >>> collector = DVLACollector(  # doctest: +SKIP
        ...     make_env,
        ...     policy,
        ...     replay_buffer=functools.partial(PooledReplayBuffer, batch_size=64),
        ...     group=GroupConfig(group_size=8, groups_per_update=4, max_policy_lag=1),
        ...     workers=WorkerConfig(num_workers=2, max_decisions=32),
        ... )
        >>> collector.start()  # doctest: +SKIP
        >>> for batch in collector.replay_buffer:  # doctest: +SKIP
        ...     update(batch)
        >>> collector.update_policy_weights_()  # doctest: +SKIP
        >>> collector.shutdown()  # doctest: +SKIP
    """

    def __init__(
        self,
        create_env_fn: EnvFactory | Mapping[str, EnvFactory],
        policy: TensorDictModuleBase | None = None,
        *,
        policy_factory: Callable[[], TensorDictModuleBase] | None = None,
        replay_buffer: Callable[..., PooledReplayBuffer],
        group: GroupConfig = GroupConfig(),
        workers: WorkerConfig = WorkerConfig(),
        inference: InferenceConfig = InferenceConfig(),
        scheduler: SchedulerConfig | None = None,
        weight_sync_schemes: dict[str, WeightSyncScheme] | None = None,
        schedule: InitStateSchedule | None = None,
        rows_per_page: int = 4,
        env_bytes: int | str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        tasks = create_env_fn if isinstance(create_env_fn, Mapping) else {"default": create_env_fn}
        self._factories = dict(tasks)
        self.schedule = schedule or InitStateSchedule(tuple(self._factories), seed=seed)
        check_tasks(self.schedule, self._factories)
        self.policy = policy = check_policy(policy, policy_factory)
        self._policy_factory = policy_factory
        self._workers, self._inference_config = workers, inference
        schemes = weight_sync_schemes or {"policy": AsyncWeightUpdater()}
        self._updater = updater = check_updater(schemes)
        self._weight_sync_schemes, self._weight_updater = schemes, None
        self._seed, self._closed = seed, False
        self.group = group
        self._deterministic = inference.is_deterministic(group.max_policy_lag)
        check_movable(scheduler, self._deterministic)
        self._scheduler_config = scheduler
        self.timeline = Timeline()
        self._last_reading = self.timeline.reading()
        self._publishing = self.timeline.track("distribution", "learner")
        self._weight_telemetry = WeightTelemetry(updater, self.timeline)
        self._counters = CollectionCounters()
        with contextlib.ExitStack() as undo:
            sampling = SamplingLane(
                self._factories,
                workers.num_workers,
                envs_per_worker=workers.envs_per_worker,
                num_threads=workers.num_threads,
                env_vars=workers.env_vars,
                start_method=workers.start_method,
                pin_workers=workers.pin_workers,
            )
            undo.callback(sampling.stop, workers.stop_timeout_s)
            layout = match_policy(policy, sampling.wait_ready(workers.start_timeout_s))
            self.plan = make_plan(layout, group, workers, rows_per_page, env_bytes)
            num_pages = self.plan.num_pages
            if env_bytes is None:  # evaluation episodes find room beside all admitted groups
                num_pages += self.plan.pages_per_group
            check_pages(self.plan, group, num_pages)
            self._pool = EnvironmentPool(layout, num_pages, rows_per_page)
            self._coordinator = self._build(sampling, replay_buffer, undo)
            self._coordinator.start()
            undo.pop_all()  # from here on shutdown() ends it all

    def _build(
        self,
        sampling: SamplingLane,
        replay_buffer: Callable[..., PooledReplayBuffer],
        undo: contextlib.ExitStack,
    ) -> Coordinator:
        self._groups = groups = GroupPath(
            self.group,
            self._pool,
            pages_per_rollout=self.plan.pages_per_group // self.group.num_candidates,
            schedule=self.schedule,
            replay_buffer=replay_buffer,
            counters=self._counters,
            evaluations_alone=self._deterministic,
        )
        self.replay_buffer, self._queue = groups.replay_buffer, groups.queue
        self.replay_buffer.track = self.timeline.track("gradient", "learner")
        undo.callback(self._updater.shutdown)
        self._updater.init_on_sender(model_id="policy", model=self.policy, num_workers=0)
        self._updater.connect()
        coordinator = Coordinator(
            sampling=sampling,
            start_inference=LaneStarter(
                self.policy,
                self._policy_factory,
                self._updater,
                self._inference_config,
                seed=self._seed,
                start_method=self._workers.start_method,
            ),
            pool=self._pool,
            queue=groups.queue,
            instructions=groups.instructions,
            on_rollout=groups.sink.add,
            abandon_group=groups.sink.abandon,
            timeline=self.timeline,
            counters=self._counters,
            seed=self._seed,
            lockstep=self._deterministic,
            workers=self._workers,
            inference=self._inference_config,
        )
        undo.callback(coordinator.batcher.stop)
        self._tuner = attach_tuner(
            self._scheduler_config,
            coordinator=coordinator,
            replay_buffer=self.replay_buffer,
            timeline=self.timeline,
            counters=self._counters,
        )
        coordinator.on_error = self._on_error
        groups.admission.add_listener(coordinator.wake)
        groups.admission.begin_only_if(lambda: self._updater.store.releaser.is_idle)
        self._updater.store.releaser.add_listener(groups.admission.reconsider)
        return coordinator

    # -- life -----------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to collect in the background."""
        self._require_running()
        self.timeline.start()
        self._publishing.waiting("no_update")
        self._admit(True)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Begin no new group inside this context; groups that have begun are finished."""
        was_admitting = self._queue.admitting.is_set()
        self._admit(False)
        try:
            yield
        finally:
            self._admit(was_admitting)

    def shutdown(
        self,
        timeout: float | None = None,
        close_env: bool = True,
        raise_on_error: bool = True,
    ) -> None:
        """End all lanes and free the environment pool; safe to call twice.

        The arguments are TorchRL's and change nothing: the lanes have deadlines of their own and
        always close their environments, and their error is raised where they are waited for.
        """
        del timeout, close_env, raise_on_error
        if self._closed:
            return
        self._closed = True
        self._coordinator.stop()
        self.replay_buffer.close(reason="the collector was shut down")
        self._updater.shutdown()
        self._pool.close()

    def _on_error(self, error: BaseException) -> None:
        self.replay_buffer.close(
            reason=f"the collection ended with an error:\n{error}", error=error
        )

    def _admit(self, admitting: bool) -> None:
        if admitting:
            self._queue.admitting.set()
        else:
            self._queue.admitting.clear()
        self._coordinator.wake()

    def _require_running(self) -> None:
        if self._closed:
            raise RuntimeError("The collector was shut down. Build a new one.")
        if self._coordinator.error is not None:
            raise RuntimeError(
                "The collection has ended with an error. Build a new collector."
            ) from self._coordinator.error

    # -- data -----------------------------------------------------------------------------------

    def iterator(self) -> Iterator[TensorDictBase]:
        """Yield all rows of one update's groups at a time, ``[num_rows]``.

        Call :meth:`update_policy_weights_` once for each item.
        """
        self.start()
        while True:
            update = iter(self.replay_buffer)
            next(update)  # waits for the groups
            groups = self.replay_buffer.cohort
            data = self._pool.rows[torch.cat([group.row_index(self._pool) for group in groups])]
            ids = data.get(INSTRUCTION_ID_KEY)
            data.set(INSTRUCTION_KEY, self._groups.instructions.stack(ids, data.batch_size))
            # The data is a copy: the groups count as learned, and the next publication is theirs.
            update.close()  # type: ignore[attr-defined]
            yield data

    def evaluate(
        self,
        episodes: Sequence[EpisodeSpec],
        *,
        greedy: bool = True,
        num_frames_episodes: int = 0,
    ) -> Evaluation:
        """Play ``episodes`` on the collector's own workers, before any new training rollout.

        All episodes are played with a private copy of the weights that are newest when the
        evaluation begins, so training may go on meanwhile. If the inference lane has to be
        restarted, the evaluation begins anew.

        Args:
            episodes (sequence of EpisodeSpec): what to play.

        Keyword Args:
            greedy (bool): take the most likely tokens instead of sampling.
            num_frames_episodes (int): episodes, from the first, whose camera images are kept.

        Returns:
            The evaluation; its ``result()`` waits.
        """
        evaluation = Evaluation(episodes, greedy=greedy, num_frames_episodes=num_frames_episodes)
        check_episodes(episodes, self._factories, self._queue.quarantined)
        check_frames(num_frames_episodes, self._pool)
        self._require_running()
        self._updater.finish()
        self._queue.add_evaluation(evaluation)
        self._coordinator.wake()
        return evaluation

    # -- weights --------------------------------------------------------------------------------

    @property
    def policy_version(self) -> int:
        """Version of the newest published weights; 0 before the first update."""
        return self._updater.version

    def update_policy_weights_(self, *args: Any, **kwargs: Any) -> None:
        """Publish the learner's weights: the policy version grows by one.

        Takes the arguments of :meth:`torchrl.collectors.BaseCollector.update_policy_weights_`;
        without any, the weights of ``policy`` are published. Nobody is waited for.
        """
        with self._publishing.span("publish"):
            super().update_policy_weights_(*args, **kwargs)
            if self._deterministic:
                self._updater.finish()  # else admission waits, not the learner
        self._publishing.waiting("no_update")
        self._weight_telemetry.record()
        self._groups.admission.advance()  # its listener wakes the coordinator

    # -- state ----------------------------------------------------------------------------------

    def set_seed(self, seed: int, static_seed: bool = False) -> int:
        """Seed the initial states of the groups to come."""
        del static_seed
        self.schedule.seed = self._seed = seed
        return seed

    def stats(self) -> dict[str, Any]:
        """Scalars by TensorBoard name; see the guide's page on metrics."""
        self._weight_telemetry.record()
        out: dict[str, Any] = self._counters.stats()
        reading = self.timeline.reading()
        out.update(reading.since(self._last_reading).scalars())
        self._last_reading = reading
        out.update({f"memory/{key}": value for key, value in self._pool.stats().items()})
        out.update({f"buffer/{key}": value for key, value in self.replay_buffer.stats().items()})
        out.update(self._tuner.stats() if self._tuner is not None else {})
        out["collector/groups_admitted"] = self._queue.num_groups_admitted
        data_bytes = self.plan.row_bytes * out.get("collector/decisions", 0)
        out.update(self._weight_telemetry.scalars(data_bytes))
        return out

    def state_dict(self) -> OrderedDict[str, Any]:
        """Initial-state cursor, counters, seeds, unfinished groups and the replay buffer.

        All of it is of one instant, although collection goes on: each group is either stored in the
        buffer or among those that a resumed run begins anew. The learner calls it, between two
        minibatches; see ``replay_buffer.state_dict()``.

        Raises:
            RuntimeError: after :meth:`shutdown`, which freed the stored rows.
        """
        if self._closed:
            raise RuntimeError(
                "state_dict() must be called before shutdown(), which frees the stored rows. Save "
                "the checkpoint first."
            )
        self._updater.finish()  # raises: weights that were refused are not worth keeping
        with self._queue.consistent:
            return OrderedDict(
                schedule=self.schedule.state_dict(),
                counters=self._counters.state_dict(),
                queue=self._queue.state_dict(),
                num_batches=list(self._coordinator.num_batches),
                buffer=self.replay_buffer.state_dict(),
            )

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` was taken; call it before :meth:`start`.

        Raises:
            RuntimeError: if a group was begun already.
            ValueError: if it does not hold the replay buffer, as older checkpoints do not.
        """
        if self._queue.num_groups_admitted:
            raise RuntimeError("load_state_dict must be called before start().")
        check_state(state_dict)
        self.schedule.load_state_dict(state_dict["schedule"])
        self._counters.load_state_dict(state_dict["counters"])
        self._queue.load_state_dict(state_dict["queue"])
        self._coordinator.num_batches[:] = state_dict["num_batches"]
        self.replay_buffer.load_state_dict(state_dict["buffer"])

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(tasks={list(self._factories)}, group={self.group}, "
            f"workers={self._workers.num_workers}x{self._workers.envs_per_worker}, "
            f"inference={self._inference_config.where!r})"
        )
