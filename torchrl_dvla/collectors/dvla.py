# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The collector of one machine."""

from __future__ import annotations

import atexit
import contextlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, Protocol

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl._utils import seed_generator
from torchrl.collectors import BaseCollector
from torchrl.weight_update import WeightSyncScheme

from torchrl_dvla.collectors.configs import InferenceConfig, WorkerConfig
from torchrl_dvla.collectors.evaluation import Evaluation
from torchrl_dvla.collectors.loop import CollectionLoop
from torchrl_dvla.collectors.metrics import CollectionCounters, WeightTelemetry
from torchrl_dvla.collectors.validation import (
    build_policy,
    check_episodes,
    check_state,
    check_tasks,
    check_updater,
    env_factories,
    match_policy,
    plan_memory,
    warn_of_misfits,
)
from torchrl_dvla.data import (
    EpisodeSpec,
    GroupConfig,
    GroupQueue,
    InitStateSchedule,
    InstructionTable,
    PooledReplayBuffer,
)
from torchrl_dvla.data.schema import INSTRUCTION_ID_KEY, INSTRUCTION_KEY
from torchrl_dvla.memory import DualPool, Plan
from torchrl_dvla.saved_state import form_of, require_form
from torchrl_dvla.swimlane import EnvProcesses, InferenceProcess, Timeline
from torchrl_dvla.swimlane.env_worker import require_init_states
from torchrl_dvla.swimlane.messages import EnvSpecs
from torchrl_dvla.validation import Count, check
from torchrl_dvla.weight_update import AsyncWeightUpdater, WeightReader

__all__ = ["DVLACollector", "Loop", "SamplingLanes"]

EnvFactory = Callable[[], Any] | str

_log = logging.getLogger("torchrl_dvla")


class SamplingLanes(Protocol):
    """Environments that a collector has started: here, or on the nodes of a cluster."""

    #: What all of them agree on.
    specs: EnvSpecs
    #: The task whose environment has told them.
    first_task: str


class Loop(Protocol):
    """What a collector needs of its loop: :class:`CollectionLoop`, or one over several nodes."""

    seed: int
    error: BaseException | None

    @property
    def num_batches(self) -> list[int]:
        """Counts that the seeds of sampled tokens follow from; a resumed run sets them."""

    def start(self) -> None:
        """Begin, in a thread of its own."""

    def stop(self, grace_s: float | None = None) -> None:
        """End it and all that it runs on."""

    def add_evaluation(self, evaluation: Evaluation) -> None:
        """Queue an evaluation, from any thread."""


class DVLACollector(BaseCollector):
    """Collector of groups of rollouts that samples while the learner learns from earlier groups.

    Environment workers (sampling lane) write observations into shared pages; an inference process
    reads those rows, takes all waiting decisions in one policy call under the newest whole version
    of the weights, and writes them back; a complete group changes hands page by page into the
    replay buffer, from which the learner draws (gradient lane); :meth:`update_policy_weights_`
    publishes the result (distribution lane) without waiting for anyone.

    Staleness is bounded by admission: a group is begun only while it can be learned from within
    ``group.max_policy_lag`` versions, see :class:`~torchrl_dvla.data.GroupQueue`. Nothing that was
    sampled is discarded for its age.

    A worker that dies, raises, or hangs beyond its deadline is replaced and its rollouts are
    sampled again from the same initial state; so is an inference process that dies.

    Args:
        create_env_fn (Callable or str or Mapping): environment factory, the id of an environment of
            gymnasium, or several of both by task name. An environment of gymnasium or TorchRL that
            takes single actions is wrapped in :class:`~torchrl_dvla.envs.ChunkEnv`, with its
            defaults; one that speaks the decision-level schema (action ``("vla_action", "chunk")``
            ``[chunk, A]``, observation under ``"observation"``) is taken as it is.
            One of batch size ``[N]`` plays ``N`` rollouts, each begun from its ``"seed"`` in the
            tensordict of the reset.
        policy (TensorDictModuleBase, optional): the learner's policy; it writes
            ``("vla_action", "tokens")``, ``("vla_action", "log_probs")`` (one a token) and
            ``("vla_action", "chunk")``. Defaults to one of ``policy_factory``, as :attr:`policy`.

    Keyword Args:
        policy_factory (Callable, optional): builds the policy of the inference lane, in the lane,
            without lazy parameters. Defaults to sending ``policy`` there.
        replay_buffer (PooledReplayBuffer, optional): the buffer that the learner iterates; it is
            bound to the collector's pages. Defaults to one for ``for data in collector``, which
            needs no batch size.
        group (GroupConfig): groups and staleness.
        workers (WorkerConfig): the sampling lane.
        inference (InferenceConfig): the inference lane.
        weight_sync_schemes (dict, optional): ``{"policy": AsyncWeightUpdater()}``, the default.
        schedule (InitStateSchedule, optional): initial states of the groups. Defaults to scenes
            sampled by seed, task after task.
        memory (DualPool, optional): budgets of the environment pool and of the model pool. Defaults
            to what the plan, :attr:`plan`, finds useful.
        rows_per_page (int): decisions of one page of the environment pool. Half a page a rollout
            stays empty on average (:meth:`DualPool.plan` recommends a size).
        seed (int): seed of the initial states and of sampled tokens.

    Raises:
        ValueError: if an argument is out of range, if a budget cannot hold the groups of one
            update, or if policy and environment do not fit each other, or the schedule asks for
            numbered initial states that the environment does not declare.
        TypeError: if *replay_buffer* is another kind of buffer.
        RuntimeError: with the worker's traceback if an environment cannot be built.

    Examples:
        >>> from torchrl_dvla import DVLACollector, GroupConfig, PooledReplayBuffer, WorkerConfig
        >>> with DVLACollector(  # doctest: +SKIP
        ...     make_env,
        ...     policy,
        ...     replay_buffer=PooledReplayBuffer(batch_size=64),
        ...     group=GroupConfig(group_size=8, groups_per_update=4, max_policy_lag=1),
        ...     workers=WorkerConfig(num_workers=2, max_decisions=32),
        ... ) as collector:
        ...     for batch in collector.replay_buffer:  # the minibatches of one update
        ...         update(batch)
        ...     collector.update_policy_weights_()  # the update counts as learned
    """

    def __init__(
        self,
        create_env_fn: EnvFactory | Mapping[str, EnvFactory],
        policy: TensorDictModuleBase | None = None,
        *,
        policy_factory: Callable[[], TensorDictModuleBase] | None = None,
        replay_buffer: PooledReplayBuffer | None = None,
        group: GroupConfig = GroupConfig(),
        workers: WorkerConfig = WorkerConfig(),
        inference: InferenceConfig = InferenceConfig(),
        weight_sync_schemes: dict[str, WeightSyncScheme] | None = None,
        schedule: InitStateSchedule | None = None,
        memory: DualPool | None = None,
        rows_per_page: int = 4,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.total_frames = -1  # it collects without end
        check("group", group, GroupConfig)
        check("workers", workers, WorkerConfig)
        check("inference", inference, InferenceConfig)
        check("memory", memory, DualPool | None)
        rows_per_page = check("rows_per_page", rows_per_page, Count)
        seed = check("seed", seed, int)
        self._factories = env_factories(create_env_fn)
        self.schedule = schedule or InitStateSchedule(tuple(self._factories), seed=seed)
        check_tasks(self.schedule, self._factories)
        if policy is None:
            if policy_factory is None:
                raise ValueError("policy or policy_factory must be given, got neither.")
            policy = build_policy(policy_factory)
        self.policy, self._policy_factory = policy, policy_factory
        schemes = weight_sync_schemes or {"policy": AsyncWeightUpdater()}
        self._updater = check_updater(schemes)
        self._weight_sync_schemes, self._weight_updater = schemes, None
        self.group, self._workers, self._inference_config = group, workers, inference
        self._lockstep = inference.is_deterministic(group.max_policy_lag)
        self._seed, self._closed = seed, False
        self.replay_buffer = PooledReplayBuffer() if replay_buffer is None else replay_buffer
        if not issubclass(type(self.replay_buffer), PooledReplayBuffer):  # not a remote one either
            raise TypeError(
                "replay_buffer must be a PooledReplayBuffer of this process, got a "
                f"{type(self.replay_buffer).__name__}. Make a PooledReplayBuffer(batch_size=...)."
            )
        self.memory = DualPool() if memory is None else memory
        self.timeline = Timeline()
        self._publishing = self.timeline.track("distribution", "learner")
        self._weights = WeightTelemetry(self._updater, self.timeline)
        self._counters = CollectionCounters()
        self._instructions = InstructionTable()
        self._reader: WeightReader | None = None
        with contextlib.ExitStack() as undo:
            lanes = self._start_lanes(undo)
            specs = lanes.specs
            warn_of_misfits(policy, specs)
            #: The task whose environment has told its specs; those of others show in the workers.
            self._described = (lanes.first_task, specs)
            ids = self.schedule.init_state_ids or ()
            require_init_states(lanes.first_task, ids, specs.has_init_states)
            layout = match_policy(policy, specs)
            #: Sizes of the pools, see :class:`~torchrl_dvla.memory.Plan`.
            self.plan: Plan = plan_memory(
                self.memory,
                layout,
                group=group,
                workers=workers,
                rollouts_per_env=specs.num_rollouts,
                replay_buffer=self.replay_buffer,
                weight_bytes=self._updater.store_bytes(policy),
                rows_per_page=rows_per_page,
            )
            _log.info("Memory of the run:\n%s", self.plan)
            undo.callback(self.memory.close)
            self.memory.allocate(self.plan)
            undo.callback(self._updater.shutdown)
            self._updater.model_pool = self.memory.model
            self._updater.init_on_sender(model_id="policy", model=policy, num_workers=0)
            self._updater.connect()
            self._groups = GroupQueue(
                group,
                self.memory.environment,
                self.schedule,
                pages_per_rollout=self.plan.pages_per_group // group.num_candidates,
                version=self._updater.version,
            )
            self.replay_buffer.bind(
                self._groups,
                self._instructions,
                model_pool=self.memory.model,
                track=self.timeline.track("gradient", "learner"),
            )
            self._loop = self._make_loop(lanes)
            undo.pop_all()  # from here on shutdown() ends it all
        # A script that raises, or forgets shutdown(), ends in order all the same.
        atexit.register(self.shutdown)
        self._loop.start()

    def _start_lanes(self, undo: contextlib.ExitStack) -> SamplingLanes:
        """Environments that are ready; ``undo`` ends them if the collector cannot be built."""
        workers = self._workers
        processes = EnvProcesses(
            self._factories,
            workers.num_workers,
            envs_per_worker=workers.envs_per_worker,
            max_tasks=workers.max_tasks,
            num_threads=workers.num_threads,
            env_vars=workers.env_vars,
            start_method=workers.start_method,
        )
        undo.callback(processes.stop, workers.stop_timeout_s)
        processes.wait_ready(workers.start_timeout_s)
        return processes

    def _make_loop(self, lanes: Any) -> Loop:
        """The loop that samples in what :meth:`_start_lanes` has started."""
        return CollectionLoop(
            lanes,
            self._start_inference,
            self._groups,
            self._instructions,
            timeline=self.timeline,
            counters=self._counters,
            seed=self._seed,
            lockstep=self._lockstep,
            workers=self._workers,
            inference=self._inference_config,
            on_error=self._on_error,
        )

    def _start_inference(self) -> InferenceProcess:
        """An inference process on the newest weights; the one before it must be gone."""
        if self._reader is not None:
            self._updater.store.release(self._reader)
        self._reader = self._updater.reader("inference")
        policy, policy_factory = self.policy, self._policy_factory
        return InferenceProcess(
            (lambda: policy) if policy_factory is None else (lambda: build_policy(policy_factory)),
            self._reader,
            without=() if policy_factory else self._updater.store.provides(policy),
            num_threads=self._inference_config.num_threads,
            seed=self._seed,
            start_method=self._workers.start_method,
        )

    # -- lifecycle ------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to collect in the background.

        Raises:
            ValueError: if a hook is set: hooks are called around the items of ``for data in
                collector``, and the buffer's batches have none.
        """
        if self.pre_collect_hook is not None or self.post_collect_hook is not None:
            raise ValueError(
                "pre_collect_hook and post_collect_hook must be None to learn from the replay "
                "buffer, got one. They are called around the items of `for data in collector`."
            )
        self._begin()

    def _begin(self) -> None:
        self._require_running()
        if self._groups.paused:
            self.timeline.start()
            self._publishing.waiting("no_update")
            self._groups.set_paused(False)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Begin no new group inside this context; groups that have begun are finished."""
        self._require_open()
        was_paused = self._groups.paused
        self._groups.set_paused(True)
        try:
            yield
        finally:
            self._groups.set_paused(was_paused)

    def __enter__(self) -> DVLACollector:
        self._begin()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.shutdown()

    def shutdown(
        self,
        timeout: float | None = None,
        close_env: bool = True,
        raise_on_error: bool = True,
    ) -> None:
        """End all lanes and free both pools; safe to call twice.

        Args:
            timeout (float, optional): seconds that the workers get to end before they are killed.
                Defaults to ``workers.stop_timeout_s``.
            close_env (bool): must be ``True``: environments end with their workers.
            raise_on_error (bool): whether an error of the shutdown itself is raised. One of the
                lanes is raised where they are waited for.

        Raises:
            ValueError: if ``close_env`` is ``False``.
        """
        if not close_env:
            raise ValueError(
                "close_env must be True, got False. Environments live in the workers and end with "
                "them."
            )
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.shutdown)
        with contextlib.ExitStack() as steps:  # each is taken, whatever becomes of the others
            if not raise_on_error:
                steps.enter_context(contextlib.suppress(Exception))
            steps.callback(self.memory.close)
            steps.callback(self._updater.shutdown)
            steps.callback(self._groups.close, "the collector was shut down")
            steps.callback(self._groups.end, "the collector was shut down")
            steps.callback(self._loop.stop, timeout)

    def _on_error(self, error: BaseException) -> None:
        self._groups.end(f"the collection ended with an error:\n{error}", error)

    def _require_open(self) -> None:
        if self._closed:
            raise RuntimeError("The collector was shut down. Build a new one.")

    def _require_running(self) -> None:
        self._require_open()
        if self._loop.error is not None:
            raise RuntimeError(
                "The collection has ended with an error. Build a new collector."
            ) from self._loop.error

    # -- data -----------------------------------------------------------------------------------

    def iterator(self) -> Iterator[TensorDictBase]:
        """All rows of one update's groups at a time, ``[num_rows]``.

        Call :meth:`update_policy_weights_` once for each item. The hooks of
        :class:`~torchrl.collectors.BaseCollector` are called before and after each.

        Raises:
            RuntimeError: if the item before was not published.
        """
        self._begin()
        while True:
            if self.pre_collect_hook is not None:
                self.pre_collect_hook()
            if self._groups.in_hand:
                raise RuntimeError(
                    "The rows before must be learned from first: call update_policy_weights_() "
                    "after each update. Nothing newer can come until then."
                )
            groups = self._groups.wait_cohort(self.replay_buffer.timeout_s)
            pool = self.memory.environment
            data = pool.rows[torch.cat([group.row_index(pool) for group in groups])]
            ids = data.get(INSTRUCTION_ID_KEY)
            data.set(INSTRUCTION_KEY, self._instructions.stack(ids, data.batch_size))
            if self.post_collect_hook is not None:
                self.post_collect_hook(data)
            yield data

    def evaluate(
        self,
        episodes: Sequence[EpisodeSpec],
        *,
        greedy: bool = True,
        num_frames_episodes: int = 0,
    ) -> Evaluation:
        """Play ``episodes`` on the collector's own workers, before any new training rollout.

        In lockstep they are played between two cohorts. All episodes are played with a private copy
        of the weights that are newest when the evaluation begins, so training may go on meanwhile.
        If the inference process has to be restarted, the evaluation begins anew.

        Args:
            episodes (sequence of EpisodeSpec): what to play.

        Keyword Args:
            greedy (bool): take the most likely tokens instead of sampling.
            num_frames_episodes (int): episodes, from the first, whose camera images are kept.

        Returns:
            The evaluation; its ``result()`` waits.

        Raises:
            ValueError: for a task that is unknown or quarantined, or a numbered initial state of an
                environment that does not declare it.
        """
        evaluation = Evaluation(episodes, greedy=greedy, num_frames_episodes=num_frames_episodes)
        self._require_running()
        check_episodes(
            episodes,
            self._factories,
            self._groups.quarantined,
            num_frames_episodes,
            self.memory.environment,
        )
        ids = [spec.init_state_id for spec in episodes if spec.task == self._described[0]]
        require_init_states(self._described[0], ids, self._described[1].has_init_states)
        self._loop.add_evaluation(evaluation)
        return evaluation

    # -- weights --------------------------------------------------------------------------------

    @property
    def policy_version(self) -> int:
        """Version of the newest published weights; 0 before the first update."""
        return self._updater.version

    def update_policy_weights_(self, *args: Any, **kwargs: Any) -> None:
        """Publish the learner's weights: the policy version grows by one.

        The update in hand counts as learned. Takes the arguments of
        :meth:`torchrl.collectors.BaseCollector.update_policy_weights_`; without any, the weights
        of ``policy`` are published. Nobody is waited for.

        Raises:
            RuntimeError: if groups would become staler than ``max_policy_lag``; nothing is
                published then.
            ValueError: if the weights are not finite; the last version stays.
        """
        self._require_running()
        with self._publishing.span("publish"), self._groups.publishing() as publication:
            super().update_policy_weights_(*args, **kwargs)
            publication.version = self._updater.version
        self._publishing.waiting("no_update")
        self._weights.record()

    # -- state ----------------------------------------------------------------------------------

    def set_seed(self, seed: int, static_seed: bool = False) -> int:
        """Seed the initial states of the groups to come.

        Returns:
            int: the seed for the next collector, as TorchRL's; ``seed`` itself with
            ``static_seed``.
        """
        self._require_open()
        self.schedule.seed = self._seed = self._loop.seed = seed
        return seed if static_seed else int(seed_generator(seed))

    def stats(self) -> dict[str, Any]:
        """Totals and gauges by TensorBoard name; see the guide's page on metrics.

        Reading changes nothing. After :meth:`shutdown` the totals are still there; the pools are
        empty. Rates are for the reader to compute from two calls, as TorchRL's ``LoggerMonitor``
        does.
        """
        out: dict[str, Any] = {
            "frames": self._counters.totals["collector/decisions"],
            "policy_version": self.policy_version,
            **self._counters.stats(),
            **self.timeline.usage().scalars(),
        }
        out |= {f"memory/{key}": value for key, value in self.memory.stats().items()}
        out |= {f"buffer/{key}": value for key, value in self._groups.stats().items()}
        return out | self._weights.scalars(self.plan.row_bytes * out["frames"])

    def state_dict(self) -> OrderedDict[str, Any]:
        """Initial-state cursor, counters, seeds, unfinished groups and the replay buffer.

        All of it is of one instant, although collection goes on: each group is either stored in the
        buffer or among those that a resumed run begins anew. The learner calls it, between two
        minibatches; see ``replay_buffer.state_dict()``.

        Raises:
            RuntimeError: after :meth:`shutdown`.
        """
        with self._groups.lock:
            return OrderedDict(
                seed=self._seed,
                counters=self._counters.state_dict(),
                num_batches=list(self._loop.num_batches),
                buffer=self.replay_buffer.state_dict(),
            )

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` was taken; call it before :meth:`start`.

        The policy's present weights are published under the version of that time, so load the
        policy first; a checkpoint from before the first update publishes nothing, so there load it
        before the collector is built.

        Raises:
            RuntimeError: if a group was begun already.
            ValueError: if seed, groups or schedule differ from those that it was taken with, by
                name; if it does not hold the replay buffer, as older checkpoints do not; or if it
                is damaged. Nothing has changed then.
        """
        self._require_open()
        if self._groups.num_admitted:
            raise RuntimeError("load_state_dict must be called before start().")
        require_form({str: object}, state_dict, "collector")
        check_state(state_dict, self._seed)
        form = form_of(self.state_dict())
        form |= {"buffer": {str: object}, "counters": CollectionCounters.STATE_FORM}
        require_form(form, state_dict, "collector")
        self.replay_buffer.load_state_dict(state_dict["buffer"])
        self._counters.load_state_dict(state_dict["counters"])
        self._loop.num_batches[:] = state_dict["num_batches"]
        if self._groups.version > self._updater.version:
            self._updater.publish(version=self._groups.version)

    def enable_profile(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse TorchRL's profiler, which hooks into collectors that step in their own thread."""
        raise NotImplementedError(
            "enable_profile is not available here: rollouts run in processes of their own. The "
            "work of every lane is in collector.timeline; export_chrome_trace() writes it."
        )

    def receive_weights(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse to be sent weights: the collector is where the learner's are published."""
        raise NotImplementedError(
            "A DVLACollector receives no weights: its policy is the learner's, and the lanes adopt "
            "what is published. Call update_policy_weights_(weights)."
        )

    register_scheme_receiver = receive_weights

    @property
    def weight_updater(self) -> None:
        """``None``: weights travel by ``weight_sync_schemes``."""
        return None

    @weight_updater.setter
    def weight_updater(self, value: Any) -> None:
        raise NotImplementedError(
            f"weight_updater must be left alone, got a {type(value).__name__}. Pass "
            "weight_sync_schemes={'policy': AsyncWeightUpdater(...)} to the constructor."
        )

    def __getstate__(self) -> NoReturn:
        raise TypeError(
            "A DVLACollector cannot be pickled or copied: it owns processes and shared memory. Use "
            "state_dict(), or build another."
        )

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(tasks={list(self._factories)}, group={self.group}, "
            f"workers={self._workers.num_workers}x{self._workers.envs_per_worker})"
        )
