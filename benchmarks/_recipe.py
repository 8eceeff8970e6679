# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The arrangement of TorchRL's VLA recipe, built from the parts of TorchRL 0.14.1."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import multiprocessing as mp
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import EnvBase, ParallelEnv
from torchrl.envs.utils import ExplorationType
from torchrl.modules.inference_server import (
    InferenceServerConfig,
    MPTransport,
    PolicyClientModule,
    ProcessInferenceServer,
)
from torchrl.objectives.llm import MCAdvantage

from torchrl_dvla.objectives import GRPOLoss

_CAPACITY = 10_000


class Recipe:
    """The arrangement of TorchRL's VLA recipe.

    A process ``Collector`` whose workers own a ``ParallelEnv`` and call one shared
    ``ProcessInferenceServer`` through ``PolicyClientModule``; every finished trajectory goes
    through ``MCAdvantage`` into the replay buffer; when there is enough the collector is paused,
    the policy updated, unfinished groups are dropped and the weights sent to the server.

    Args:
        make_env (Callable): environment of a worker's number, with group ids; picklable.
        make_policy (Callable): the policy, here and in the server; picklable.
        make_update (Callable): the gradient step on a policy, as :attr:`update`.

    Keyword Args:
        group_size (int): rollouts of a group.
        minibatch (int): decisions of one gradient step.
        update_decisions (int): decisions in the buffer that begin an update.
        return_bounds (tuple, optional): mean returns of the groups that are kept.
        num_collectors (int): collector processes.
        envs_per_collector (int): environments of each, a process a piece.
        server_timeout (float): seconds that the server waits for requests.
        worker_metadata (bool): environments describe themselves when they start, so that none is
            built for that alone; needs ``ParallelEnv`` without buffers.

    Raises:
        RuntimeError: from each way to spend time, if a collector process has died. TorchRL's
            collector, running free, says nothing then: the counts just stand still.
    """

    def __init__(
        self,
        make_env: Callable[[int], EnvBase],
        make_policy: Callable[[], Any],
        make_update: Callable[[Any], Any],
        *,
        group_size: int,
        minibatch: int,
        update_decisions: float,
        return_bounds: tuple[float, float] | None,
        num_collectors: int,
        envs_per_collector: int,
        server_timeout: float,
        worker_metadata: bool = False,
    ) -> None:
        context = mp.get_context("spawn")
        self._policy, self._envs_per_collector = make_policy(), envs_per_collector
        self._update_decisions = update_decisions
        self._transport = MPTransport(ctx=context, use_manager=True)
        clients = [self._transport.client() for _ in range(num_collectors)]
        self._server = ProcessInferenceServer(
            policy_factory=make_policy,
            transport=self._transport,
            server_config=InferenceServerConfig(
                max_batch_size=1, min_batch_size=1, timeout=server_timeout, collect_stats=True
            ),
            policy_device=torch.device("cpu"),
            output_device=torch.device("cpu"),
            mp_context=context,
        ).start()
        self._buffer = TensorDictReplayBuffer(
            storage=LazyTensorStorage(_CAPACITY, device="cpu"),
            batch_size=minibatch,
            consume_after_n_samples=1,
        )
        self._advantage = MCAdvantage(
            grpo_size=group_size,
            prompt_key="group_id",
            trajectory_return="sum",
            keep_return_bounds=return_bounds,
        )
        self._buffer.append_transform(self._advantage)
        self._collector = Collector(
            [
                functools.partial(
                    ParallelEnv,
                    envs_per_collector,
                    [
                        functools.partial(make_env, k * envs_per_collector + n)
                        for n in range(envs_per_collector)
                    ],
                    mp_start_method="spawn",
                    device="cpu",
                    metadata_from_workers=worker_metadata,
                )
                for k in range(num_collectors)
            ],
            backend="process",
            policy=None,
            policy_factory=[
                functools.partial(
                    PolicyClientModule,
                    client,
                    in_keys=self._policy.in_keys,
                    out_keys=[*self._policy.out_keys, "policy_version"],
                    max_inflight=1,
                )
                for client in clients
            ],
            frames_per_batch=envs_per_collector,
            total_frames=-1,
            replay_buffer=self._buffer,
            trajs_per_batch=1,
            traj_format="cat",
            exploration_type=ExplorationType.RANDOM,
            policy_device="cpu",
            env_device="cpu",
            storing_device="cpu",
            trust_policy=True,
            sync=False,
            num_threads=1,
            num_sub_threads=1,
        )
        self.update = make_update(self._policy)
        #: Seconds inside of updates, from the request to pause until the collector goes on.
        self.update_s = 0.0

    def __enter__(self) -> Recipe:
        self._collector.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._collector.shutdown()
        self._server.shutdown()
        self._transport.close()

    def num_decisions(self) -> int:
        """Decisions taken so far: the server answers one request for all rows of a worker."""
        return int(self._server.stats()["requests"]) * self._envs_per_collector

    def collect_for(self, seconds: float) -> None:
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s:
            self._check_alive()
            time.sleep(0.05)

    def learn_for(self, seconds: float) -> None:
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s:
            self._learn_if_ready()

    def learn_once(self) -> None:
        """Wait for enough data and make one update; all is at rest for a moment when it ends."""
        while not self._learn_if_ready():
            pass

    def _learn_if_ready(self) -> bool:
        self._check_alive()
        self._sync_writes()
        if len(self._buffer) < self._update_decisions:
            time.sleep(0.01)
            return False
        start_s = time.monotonic()
        with self._collector.pause():
            while len(self._buffer):
                self.update(self._buffer.sample())
            self._advantage.clear_queues()
            self._collector.map_fn("replay_buffer._transform[0].clear_queues")
            self._collector.map_fn("reset")
            self._server.update_model_weights(weights(self._policy))
        self.update_s += time.monotonic() - start_s
        return True

    def _check_alive(self) -> None:
        dead = [process.pid for process in self._collector.procs if not process.is_alive()]
        if dead:
            raise RuntimeError(f"collector processes {dead} have died: see their traceback above")

    def _sync_writes(self) -> None:
        # The workers write the shared storage; the sampler of this process has to be told.
        seen, count = getattr(self, "_seen", 0), int(self._buffer.write_count)
        if count > seen:
            rows = torch.arange(max(seen, count - 10_000), count).remainder(10_000)
            self._buffer.mark_update(rows)
            self._seen = count


class Update:
    """The gradient step that every arrangement takes for each minibatch.

    The learning rate is so small that the policy stays what it is: all arrangements play episodes
    of the same lengths throughout.
    """

    def __init__(self, policy: torch.nn.Module) -> None:
        self._loss = GRPOLoss(policy)
        trained = [p for p in policy.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(trained, lr=1e-9)
        #: Decisions that were learned from.
        self.num_learned = 0

    def __call__(self, batch: TensorDictBase) -> None:
        self._loss(batch)["loss_objective"].backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.num_learned += len(batch)


def weights(policy: torch.nn.Module) -> TensorDict:
    """A copy of the weights, as the servers take them."""
    return TensorDict.from_module(policy).data.detach().clone()
