# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""How many decisions per second does the loop make on the toy task, beside TorchRL's own parts?

    python benchmarks/toy_throughput.py [--quick]

Every arrangement plays the same task on the same environment class, ``ToyChunkEnv``, with the same
policy (``TinyVLA``), collecting alone and then collecting and learning with the same gradient step
for every minibatch. Every other round learns first, so that no mode has the start-up of an
arrangement always before it:

ours        ``DVLACollector``: two workers, the policy in a process, pages, admission, lag 2.
recipe      the arrangement of TorchRL's VLA recipe (``_recipe.py``): process ``Collector`` on
            ``ParallelEnv``, one shared ``ProcessInferenceServer``, ``MCAdvantage`` replay, pause,
            update, sync.
async       ``AsyncBatchedCollector``.
sync        ``Collector`` in this process on ``SerialEnv``: collect, update, collect.

ratio_vs_recipe          ours over ``recipe``, collecting and learning.
ratio_vs_best_torchrl    ours over the best of ``async`` and ``sync``, likewise.
*_collect_only           the same ratios without learning.

The sizes are those of TorchRL's own toy configuration of its VLA recipe. ``--search recipe`` (or
``async``, ``sync``) measures the alternatives in ``SEARCH``; ``SETTINGS`` holds the best. The last
line of stdout is one JSON object.
"""

from __future__ import annotations

import functools
import os
import statistics
import sys
import time
import warnings
from typing import Any

import torch
from _machine import arguments, in_process, log, paired_ratio, report, spread
from _recipe import Recipe, Update, weights
from tensordict import NonTensorStack, TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.collectors import AsyncBatchedCollector, Collector
from torchrl.envs import EnvBase, ParallelEnv, SerialEnv, ToyVLAEnv, TransformedEnv
from torchrl.envs.transforms import Compose, ExcludeTransform, StepCounter
from torchrl.envs.utils import ExplorationType
from torchrl.modules.vla import TinyVLA

from torchrl_dvla import DVLACollector, GroupConfig, PooledReplayBuffer, WorkerConfig
from torchrl_dvla.envs import ToyChunkEnv
from torchrl_dvla.modules import tiny_token_policy

ACTION_DIM, CHUNK_SIZE, IMAGE_SIZE, MAX_DECISIONS = 2, 4, 16, 6
GROUP_SIZE, GROUPS_PER_UPDATE, MINIBATCH = 4, 8, 64
#: Share of the collected decisions that a uniform policy's groups with contrast hold, measured in
#: this task. Arrangements without groups learn from this share of what they collect.
LEARNED_SHARE = 0.6
#: Of a stretch of time; of the recipe's start beyond its first decision.
SECONDS, SETTLE_S = 2.0, 8.0
#: Decisions of one update.
UPDATE_DECISIONS = GROUP_SIZE * GROUPS_PER_UPDATE * MAX_DECISIONS // 2

Settings = dict[str, Any]
SETTINGS: dict[str, Settings] = {
    "ours": {},
    "recipe": {"num_collectors": 1, "envs_per_collector": 8, "server_timeout": 0.01},
    "async": {"num_envs": 8, "transport": "auto", "max_batch_size": 64},
    "sync": {"num_envs": 64, "batched_env": "serial"},
}
SEARCH: list[tuple[str, Settings]] = [
    *[
        ("recipe", {"num_collectors": c, "envs_per_collector": e, "server_timeout": t})
        for c, e in ((1, 1), (1, 4), (1, 8), (1, 16), (2, 2), (2, 8))
        for t in (0.01, 0.001)
    ],
    *[("async", {"num_envs": n, "transport": "auto", "max_batch_size": 64}) for n in (2, 4, 8, 16)],
    *[("async", {"num_envs": 16, "transport": "driver", "envs_per_worker": e}) for e in (4, 8)],
    *[("sync", {"num_envs": n, "batched_env": "serial"}) for n in (8, 32, 64)],
    ("sync", {"num_envs": 4, "batched_env": "parallel"}),
]


# -- the task --------------------------------------------------------------------------------------
class GroupedToyChunkEnv(ToyChunkEnv):
    """``ToyChunkEnv`` with the group ids that TorchRL's arrangement reads off the data.

    ``DVLACollector`` seeds every reset and knows its groups by itself; ``ToyVLAEnv`` replays a
    target ``group_repeats`` times and says which group it is, and so does this one.
    """

    def __init__(self, *, group_repeats: int, group_id_offset: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.group_repeats, self.group_id_offset = group_repeats, group_id_offset
        spec = ToyVLAEnv(
            action_dim=2, state_dim=4, success_steps=2, group_repeats=1
        ).observation_spec["group_id"]
        self.observation_spec["group_id"] = spec

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> TensorDict:
        out = super()._reset(tensordict, **kwargs)
        return out.set("group_id", self._group_id.clone())

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        return super()._step(tensordict).set("group_id", self._group_id.clone())


def make_chunk_env() -> ToyChunkEnv:
    """What ``DVLACollector`` runs."""
    return ToyChunkEnv(action_dim=ACTION_DIM, chunk_size=CHUNK_SIZE, image_size=IMAGE_SIZE)


def make_rival_env(worker_idx: int, *, text: bool = True) -> EnvBase:
    """The environment of TorchRL's arrangements.

    Args:
        worker_idx (int): sets the seed and the group ids apart.

    Keyword Args:
        text (bool): whether the instruction stays in the data. ``AsyncBatchedCollector`` takes its
            fast ways only where all leaves are tensors; :class:`TextlessPolicy` puts the string
            back.
    """
    env = GroupedToyChunkEnv(
        action_dim=ACTION_DIM,
        chunk_size=CHUNK_SIZE,
        image_size=IMAGE_SIZE,
        seed=worker_idx,
        group_repeats=GROUP_SIZE,
        group_id_offset=worker_idx * 10**6,
    )
    dropped = () if text else (ExcludeTransform("language_instruction"),)
    return TransformedEnv(env, Compose(StepCounter(max_steps=MAX_DECISIONS), *dropped))


def make_policy() -> TinyVLA:
    """A policy whose lazy layers are there; it samples where the context asks for it."""
    torch.manual_seed(0)
    policy = tiny_token_policy(ACTION_DIM, CHUNK_SIZE, vocab_size=64, hidden_dim=128)
    with torch.no_grad():
        policy(observations(1))
    return policy


class TextlessPolicy(TensorDictModuleBase):
    """The same policy for data without strings: it adds the one instruction of the task itself."""

    def __init__(self) -> None:
        super().__init__()
        self.policy = make_policy()
        self.in_keys = [key for key in self.policy.in_keys if key != "language_instruction"]
        self.out_keys = list(self.policy.out_keys)
        self._texts: dict[int, NonTensorStack] = {}

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        size = tensordict.batch_size[0]
        if size not in self._texts:
            self._texts[size] = observations(size)["language_instruction"]
        tensordict.set("language_instruction", self._texts[size])
        return self.policy(tensordict).exclude("language_instruction")


def observations(batch_size: int) -> TensorDict:
    """A batch of what the policy reads."""
    texts = NonTensorStack(*["push the T-shaped block onto the target"] * batch_size)
    return TensorDict(
        {
            "observation": {
                "image": torch.zeros(batch_size, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8),
                "state": torch.zeros(batch_size, 2 * ACTION_DIM),
            },
            "language_instruction": texts,
        },
        batch_size=[batch_size],
    )


# -- the arrangements ------------------------------------------------------------------------------
class Arrangement:
    """Something that collects and learns, in stretches of time; a context manager."""

    def __init__(self, policy: TinyVLA) -> None:
        self.update = Update(policy)
        self._num_decisions = 0

    def num_decisions(self) -> int:
        """Decisions collected so far."""
        return self._num_decisions

    def _run(self, seconds: float, *, learn: bool) -> None:
        """Take the data; learn from it and give the weights away, or do nothing with it."""
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s:
            self._take_batch(learn)

    collect_for = functools.partialmethod(_run, learn=False)
    learn_for = functools.partialmethod(_run, learn=True)


class Ours(Arrangement):
    """``DVLACollector``."""

    def __init__(self, *, envs_per_worker: int = 32, num_workers: int = 2) -> None:
        policy = make_policy()
        super().__init__(policy)
        self.collector = DVLACollector(
            make_chunk_env,
            policy,
            replay_buffer=PooledReplayBuffer(batch_size=MINIBATCH),
            group=GroupConfig(
                group_size=GROUP_SIZE,
                groups_per_update=GROUPS_PER_UPDATE,
                max_policy_lag=2,
                max_no_signal_groups=10**9,
            ),
            workers=WorkerConfig(
                num_workers=num_workers,
                envs_per_worker=envs_per_worker,
                max_decisions=MAX_DECISIONS,
            ),
        )

    def __enter__(self) -> Ours:
        self.collector.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.collector.shutdown()

    def num_decisions(self) -> int:
        return int(self.collector.stats()["frames"])

    def num_calls(self) -> int:
        """Policy calls so far."""
        return int(self.collector.stats().get("collector/inference_batches", 0))

    def _take_batch(self, learn: bool) -> None:
        for batch in self.collector.replay_buffer:
            if learn:
                self.update(batch)
        self.collector.update_policy_weights_()


def make_recipe(**settings: Any) -> Recipe:
    """The arrangement of TorchRL's VLA recipe on the toy task."""
    return Recipe(
        make_rival_env,
        make_policy,
        Update,
        group_size=GROUP_SIZE,
        minibatch=MINIBATCH,
        update_decisions=LEARNED_SHARE * UPDATE_DECISIONS,
        return_bounds=(0.05, 0.95),
        **settings,
    )


class AsyncBatched(Arrangement):
    """``AsyncBatchedCollector``: environments step while others wait for the policy server."""

    def __init__(self, *, num_envs: int, **kwargs: Any) -> None:
        policy = TextlessPolicy()
        super().__init__(policy.policy)
        slots = kwargs.get("transport") == "auto"  # this way the policy is built in its own process
        self._shipped = policy
        self._collector = AsyncBatchedCollector(
            [functools.partial(make_rival_env, k, text=False) for k in range(num_envs)],
            frames_per_batch=UPDATE_DECISIONS,
            env_backend="multiprocessing",
            exploration_type=ExplorationType.RANDOM,
            **({"policy_factory": TextlessPolicy} if slots else {"policy": policy}),
            **kwargs,
        )

    def __enter__(self) -> AsyncBatched:
        self._batches = iter(self._collector)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._collector.shutdown(raise_on_error=False)

    def _take_batch(self, learn: bool) -> None:
        batch = next(self._batches)
        self._num_decisions += batch.numel()
        if learn:
            _learn(self.update, batch)
            self._sync()

    def _sync(self) -> None:
        self._collector.update_policy_weights_(weights(self._shipped))


class Sync(AsyncBatched):
    """``Collector`` in this process, on a batched environment: collect, update, collect."""

    def __init__(self, *, num_envs: int, batched_env: str) -> None:
        policy = make_policy()
        Arrangement.__init__(self, policy)
        cls = {"serial": SerialEnv, "parallel": ParallelEnv}[batched_env]
        env = cls(num_envs, [functools.partial(make_rival_env, k) for k in range(num_envs)])
        self._collector = Collector(
            env,
            policy,
            frames_per_batch=max(1, UPDATE_DECISIONS // num_envs) * num_envs,
            total_frames=-1,
            exploration_type=ExplorationType.RANDOM,
        )

    def _sync(self) -> None:
        pass  # the collector calls the very policy that was updated


def _learn(update: Update, batch: TensorDictBase) -> None:
    """Learn from the share that the groups with contrast would hold."""
    batch = batch.reshape(-1)
    batch = batch[: int(LEARNED_SHARE * batch.numel())].exclude("next")
    if "language_instruction" not in set(batch.keys()):
        batch["language_instruction"] = observations(len(batch))["language_instruction"]
    if "action_is_pad" not in set(batch.keys()):
        batch["action_is_pad"] = torch.zeros(*batch.shape, CHUNK_SIZE, dtype=torch.bool)
    batch["advantage"] = torch.ones(*batch.shape, 1)
    for minibatch in batch.split(MINIBATCH):
        update(minibatch)


# -- measuring -------------------------------------------------------------------------------------
def run(
    family: str, settings: Settings, modes: tuple[str, str] = ("collect", "learn")
) -> dict[str, float]:
    """In a process of its own: build, warm up, measure both ways."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    with open(os.devnull, "w") as null:
        sys.stdout = null
        make = {"ours": Ours, "recipe": make_recipe, "async": AsyncBatched, "sync": Sync}[family]
        out: dict[str, float] = {}
        with make(**settings) as arrangement:
            while not arrangement.num_decisions():
                arrangement.collect_for(0.5)
            # The processes of a recipe import torch one beside the other on the same cores: its
            # first collectors are at work long before the last.
            arrangement.collect_for(SETTLE_S if family == "recipe" else 0.0)
            for mode in modes:
                spend = getattr(arrangement, f"{mode}_for")
                spend(0.2 * SECONDS)
                before, start_s = arrangement.num_decisions(), time.monotonic()
                learned = arrangement.update.num_learned
                calls = arrangement.num_calls() if family == "ours" else 0
                spend(SECONDS)
                decisions = arrangement.num_decisions() - before
                out[mode] = decisions / (time.monotonic() - start_s)
                if family == "ours":
                    out[f"{mode}_batch"] = decisions / (arrangement.num_calls() - calls)
                    if mode == "learn":
                        learned = arrangement.update.num_learned - learned
                        out["learned_share"] = learned / decisions
    return out


def main() -> None:
    args = arguments(__doc__, "one round", search=str)
    num_repeats = 1 if args.quick else 5
    if args.search:
        for settings in (settings for family, settings in SEARCH if family == args.search):
            found = in_process(run, args.search, settings)
            print(args.search, settings, found, flush=True)
        return
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in SETTINGS}
    for repeat in range(num_repeats):
        step = 1 if repeat % 2 == 0 else -1
        modes = ("collect", "learn")[::step]
        for name in list(SETTINGS)[::step]:
            found = in_process(run, name, SETTINGS[name], modes)
            runs[name].append(found)
            line = "  ".join(f"{key} {value:.2f}" for key, value in found.items())
            log(f"{repeat} {name:<14} {line}")

    def column(name: str, mode: str) -> list[float]:
        return [one[mode] for one in runs[name]]

    ratios = {}
    for suffix, mode in (("", "learn"), ("_collect_only", "collect")):
        ours, recipe = column("ours", mode), column("recipe", mode)
        best = [max(pair) for pair in zip(column("async", mode), column("sync", mode))]
        ratios[f"ratio_vs_recipe{suffix}"] = paired_ratio(ours, recipe)
        ratios[f"ratio_vs_best_torchrl{suffix}"] = paired_ratio(ours, best)
    result = {
        **{name: found["median"] for name, found in ratios.items()},
        "spread": ratios,
        "decisions_per_s": {
            name: {mode: spread(column(name, mode), 1) for mode in ("collect", "learn")}
            for name in SETTINGS
        },
        "mean_batch": round(statistics.median(column("ours", "learn_batch")), 1),
        "learned_share": round(statistics.median(column("ours", "learned_share")), 2),
        "settings": SETTINGS,
    }
    report("toy_throughput", result, args.quick, "tensordict")


if __name__ == "__main__":
    main()
