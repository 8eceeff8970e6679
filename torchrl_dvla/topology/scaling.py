# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What a run is predicted to do on more nodes, and with larger policies, than there are here."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from torchrl_dvla.collectors import InferenceConfig, WorkerConfig
from torchrl_dvla.data import GroupConfig
from torchrl_dvla.memory import format_bytes
from torchrl_dvla.modules.training_memory import USABLE_SHARE, TrainingMemory
from torchrl_dvla.topology.cluster import ClusterSpec, GPUSpec, NodeSpec
from torchrl_dvla.topology.cost_model import LaneCosts
from torchrl_dvla.topology.planning import plan_run
from torchrl_dvla.topology.simulation import SimulatedRun, simulate_run
from torchrl_dvla.validation import Count, NonNegative, Positive, check, check_fields

__all__ = ["MEANINGS", "Assumptions", "Prediction", "predict", "predict_policy", "with_efficiency"]

#: Slots of a node's weight store.
_NUM_SLOTS = 3
#: Width of the transformer over its number of layers, and 12 width² parameters a layer.
_ASPECT = 128
#: Bytes that one layer keeps while it is computed anew, in bfloat16 numbers of the width a token.
_LAYER_NUMBERS = 17


#: What each assumption means.
MEANINGS = {
    "gpus_per_node": "GPUs of a node",
    "gpu_bytes": "memory of a GPU",
    "host_bytes": "main memory of a node",
    "gpu_flops": "bf16 operations a second of a GPU (H100 SXM)",
    "achieved": "share of them that is achieved",
    "gpu_bytes_per_s": "bytes/s of a GPU's memory",
    "link_bytes_per_s": "bytes/s between GPUs of a node, one direction",
    "network_bytes_per_s": "bytes/s between nodes, one direction",
    "host_link_bytes_per_s": "bytes/s between a GPU and main memory",
    "hop_s": "seconds of a message between nodes",
    "env_s": "GPU seconds of simulation a decision (fit to D-VLA)",
    "env_bytes": "memory of a sampling GPU that its environments take",
    "rollouts_per_gpu": "rollouts at once on a sampling GPU",
    "decisions_per_rollout": "decisions of a rollout",
    "tokens": "tokens of a policy call a decision",
    "passes": "forward passes that learning a row is worth",
    "trained_share": "share of the parameters that is trained",
    "row_bytes": "bytes of a decision's row",
}


@dataclass(frozen=True)
class Assumptions:
    """What a prediction rests on where nothing was measured; :meth:`lines` says it in words.

    The policy is a transformer in bfloat16, trained by AdamW with gradient checkpointing, fully
    sharded over the ranks.

    Raises:
        ValueError: for a number out of range.

    Examples:
        >>> Assumptions().gpus_per_node, len(Assumptions().lines()) == 18
        (8, True)
    """

    gpus_per_node: Count = 8
    gpu_bytes: Count = 80 * 2**30
    host_bytes: Count = 2 * 2**40
    gpu_flops: Positive = 989e12
    achieved: Positive = 0.5
    gpu_bytes_per_s: Positive = 3.35e12
    link_bytes_per_s: Positive = 450e9
    network_bytes_per_s: Positive = 400e9
    host_link_bytes_per_s: Positive = 50e9
    hop_s: NonNegative = 1e-4
    env_s: Positive = 0.0181
    env_bytes: Count = 8 * 2**30
    rollouts_per_gpu: Count = 32
    decisions_per_rollout: Count = 16
    tokens: Count = 1000
    passes: Positive = 4.0
    trained_share: Positive = 1.0
    row_bytes: Count = 400_000

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("achieved", "trained_share"):
            check(name, getattr(self, name), Positive)
            if getattr(self, name) > 1:
                raise ValueError(
                    f"{name} must be at most 1, got {getattr(self, name)}. Correct it."
                )

    def lines(self) -> list[str]:
        """Each of them: value, name, meaning."""
        return [
            f"{getattr(self, name):<12.6g}  {name:<22}  {text}" for name, text in MEANINGS.items()
        ]

    def node(self, name: str) -> NodeSpec:
        """A node of the cluster."""
        gpu = GPUSpec("GPU", self.gpu_bytes, self.link_bytes_per_s)
        return NodeSpec(
            name,
            num_cores=1,  # simulation, policy and learner are on GPUs
            memory_bytes=self.host_bytes,
            gpus=(gpu,) * self.gpus_per_node,
            network_bytes_per_s=self.network_bytes_per_s,
        )

    def num_layers(self, num_parameters: float) -> float:
        """Layers of the transformer."""
        return float((num_parameters / (12 * _ASPECT**2)) ** (1 / 3))

    def memory(self, num_parameters: float) -> TrainingMemory:
        """What training takes, over all ranks; a decision's activations, on one."""
        total, trained = int(num_parameters), int(self.trained_share * num_parameters)
        layers = self.num_layers(num_parameters)
        kept = 2 * self.tokens * _ASPECT * layers * (layers + _LAYER_NUMBERS)
        # Of the layers two are whole on each rank: the one that is computed, and the next one.
        whole = int(2 * 2 * num_parameters / max(2.0, layers))
        return TrainingMemory.of_parameters(
            2 * total, 2 * trained, trained, trained, fixed=whole, decision=int(kept)
        )

    def micro_batch(self, num_parameters: float, num_ranks: int) -> int:
        """Rows of the largest micro-batch of one rank; 0 if not even one fits."""
        memory = self.memory(num_parameters)
        left = USABLE_SHARE * self.gpu_bytes - memory.states / num_ranks - memory.fixed
        return max(0, int(left // memory.decision))

    def costs(self, num_parameters: float, num_ranks: int) -> LaneCosts:
        """Lane costs of a policy of that size, with so many ranks."""
        memory, rate = self.memory(num_parameters), self.gpu_flops * self.achieved
        row_s = 2 * num_parameters * self.tokens / rate
        per_rank = max(1, self.micro_batch(num_parameters, num_ranks))
        # The first node's GPUs write it to main memory; what other nodes have comes there first.
        publish_s = memory.trained / (self.gpus_per_node * self.host_link_bytes_per_s)
        if num_ranks > self.gpus_per_node:
            publish_s += memory.trained / self.network_bytes_per_s
        return LaneCosts(
            f"{num_parameters:.3g} parameters",
            env_step_s=self.env_s,
            env_steps_per_decision=1,
            decisions_per_rollout=self.decisions_per_rollout,
            call_row_s=row_s,
            learn_row_s=self.passes * row_s,
            row_bytes=self.row_bytes,
            version_bytes=memory.trained,
            # Each call reads the weights; where they are sharded, the GPUs read them together.
            call_s=memory.weights / self._shards(memory) / self.gpu_bytes_per_s,
            publish_s=publish_s,
            optimizer_steps_per_row=1 / (per_rank * num_ranks),
            env_device="cuda",
            policy_device="cuda",
        )

    def _shards(self, memory: TrainingMemory) -> int:
        """GPUs of a node that hold the policy's weights together."""
        return min(self.gpus_per_node, math.ceil(memory.weights / self._room()))

    def _room(self) -> float:
        return max(1.0, USABLE_SHARE * self.gpu_bytes - self.env_bytes)

    def problem(self, num_parameters: float, num_learner_gpus: int) -> str:
        """Why there is not enough memory, with a remedy; "" if there is."""
        memory, usable = self.memory(num_parameters), USABLE_SHARE * self.gpu_bytes
        if memory.weights > (held := self.gpus_per_node * self._room()):
            return (
                f"inference: {format_bytes(memory.weights)} of weights on the GPUs of one node, "
                f"which hold {format_bytes(held)} beside environments. More or larger GPUs a node."
            )
        if _NUM_SLOTS * memory.trained > (held := USABLE_SHARE * self.host_bytes):
            return (
                f"weight store: {_NUM_SLOTS} versions of {format_bytes(memory.trained)} in "
                f"{format_bytes(held)} of main memory. Train a part, or take larger nodes."
            )
        if not self.micro_batch(num_parameters, num_learner_gpus):
            rank = memory.states / num_learner_gpus + memory.fixed + memory.decision
            return (
                f"learner: {format_bytes(rank)} a rank on {num_learner_gpus} GPUs, which hold "
                f"{format_bytes(usable)}. More nodes, or train a part."
            )
        return ""


@dataclass(frozen=True)
class Prediction:
    """A simulated point; predicted, never measured.

    Args:
        policy (str): what is trained, or whose costs were simulated.
        num_nodes (int): nodes.
        run (SimulatedRun, optional): ``None`` if the point is not feasible.
        problem (str): why not.
        num_learner_gpus (int): GPUs that learn.
        max_policy_lag (int): the least beyond which a further one brings less than 1 %.
        efficiency (float, optional): rate a node, over that of the smallest feasible cluster.
        work_share (float, optional): share of all GPUs' time that is simulation, policy calls and
            learning; the rest is waiting and traffic.
    """

    policy: str
    num_nodes: int
    run: SimulatedRun | None = None
    problem: str = ""
    num_learner_gpus: int = 0
    max_policy_lag: int = 0
    efficiency: float | None = None
    work_share: float | None = None

    @property
    def rate(self) -> str:
        """Decisions a second, of which three digits are shown; empty if it is not feasible."""
        return "" if self.run is None else f"{float(f'{self.run.decisions_per_s:.3g}'):,.6g}"


def predict(
    policy: str,
    simulate: Callable[[int], SimulatedRun],
    *,
    num_nodes: int = 1,
    num_learner_gpus: int = 0,
    max_policy_lag: int | None = None,
    most: int = 8,
    bound: float = math.inf,
) -> Prediction:
    """The run with the least lag beyond which a further version of lag brings less than 1 %.

    Args:
        policy (str): for the result.
        simulate (Callable): the run with a lag.

    Keyword Args:
        num_nodes (int), num_learner_gpus (int): for the result.
        max_policy_lag (int, optional): the one that is simulated; no search.
        most (int): largest lag that is tried.
        bound (float): decisions a second that no lag exceeds; within 1 % of it the search ends.
    """
    lag = 1 if max_policy_lag is None else max_policy_lag
    run = simulate(lag)
    while max_policy_lag is None and lag < most and run.decisions_per_s < 0.99 * bound:
        further = simulate(lag + 1)
        if further.decisions_per_s < 1.01 * run.decisions_per_s:
            break
        lag, run = lag + 1, further
    return Prediction(policy, num_nodes, run, "", num_learner_gpus, lag)


def predict_policy(
    num_nodes: int,
    num_parameters: float,
    assumptions: Assumptions = Assumptions(),
    *,
    max_policy_lag: int | None = None,
    num_updates: int = 8,
    seed: int = 0,
) -> Prediction:
    """What a policy of that size is predicted to do on so many nodes, by assumptions alone.

    Whole nodes learn and whole nodes sample, in the split that the planner finds best. A sampling
    node plays two batched environments, each with half of its rollouts, which begin and end
    together. An update learns from one rollout of every environment, so it grows with the cluster.

    Args:
        num_nodes (int): nodes, at least two.
        num_parameters (float): of the policy.
        assumptions (Assumptions): hardware, simulation and policy.

    Keyword Args:
        max_policy_lag (int, optional): Defaults to the least that is as fast as any.
        num_updates (int): updates that are simulated.
        seed (int): see :func:`~torchrl_dvla.topology.simulation.simulate_run`.

    Raises:
        ImportError: without SimPy.
        ValueError: for numbers out of range.

    Examples:
        >>> found = predict_policy(8, 1e12)
        >>> found.run is None, found.problem[:43]
        (True, 'inference: 1.8 TiB of weights on the GPUs o')
    """
    check("num_nodes", num_nodes, Count)
    check("num_parameters", num_parameters, Positive)
    if num_nodes < 2:
        raise ValueError(
            f"num_nodes must be at least 2, got {num_nodes}. Whole nodes learn and whole nodes "
            "sample: for one, calibrate and use `torchrl-dvla plan`."
        )
    given, billions = assumptions, num_parameters / 1e9
    name = f"{billions:g} B" if billions < 1000 else f"{billions / 1000:g} T"
    num_gpus, nodes = given.gpus_per_node, tuple(map(given.node, map(str, range(num_nodes))))
    cluster, rollouts = ClusterSpec(nodes), given.rollouts_per_gpu * num_gpus
    workers = WorkerConfig(num_workers=1, envs_per_worker=rollouts)

    def group_of(count: int) -> GroupConfig:
        sampling = num_nodes - count
        return GroupConfig(group_size=max(2, rollouts // 2), groups_per_update=2 * sampling)

    def rate(count: int) -> float:
        return plan_run(
            cluster,
            given.costs(num_parameters, count * num_gpus),
            workers=workers,
            group=group_of(count),
            num_workers=1,
            num_learner_gpus=count * num_gpus,
        ).decisions_per_s

    problem = given.problem(num_parameters, (num_nodes - 1) * num_gpus)
    if problem:
        return Prediction(name, num_nodes, problem=problem)
    least = next(n for n in range(1, num_nodes) if not given.problem(num_parameters, n * num_gpus))
    best = max(_candidates(least, num_nodes, num_gpus, given, num_parameters), key=rate)
    costs = given.costs(num_parameters, best * num_gpus)

    def simulate(lag: int) -> SimulatedRun:
        return simulate_run(
            cluster,
            costs,
            workers=workers,
            inference=InferenceConfig(deterministic=False),
            group=replace(group_of(best), max_policy_lag=lag),
            num_learner_gpus=best * num_gpus,
            hop_s=given.hop_s,
            num_updates=num_updates,
            seed=seed,
        )

    found = predict(
        name,
        simulate,
        num_nodes=num_nodes,
        num_learner_gpus=best * num_gpus,
        max_policy_lag=max_policy_lag,
        bound=rate(best),
    )
    assert found.run is not None
    work_s = costs.sample_s + costs.call_seconds(given.rollouts_per_gpu / 2) + costs.learn_row_s
    share = found.run.decisions_per_s * work_s / cluster.num_gpus
    return replace(found, work_share=share)


def _candidates(
    least: int, num_nodes: int, num_gpus: int, given: Assumptions, num_parameters: float
) -> list[int]:
    """Learning nodes around the split at which sampling and learning take equally long."""
    costs = given.costs(num_parameters, least * num_gpus)
    learn_s = costs.learn_row_s
    if num_nodes > 2:
        moved = 3 * costs.version_bytes / given.network_bytes_per_s
        learn_s += moved / max(1, given.micro_batch(num_parameters, num_nodes * num_gpus // 2))
    sample_s = costs.sample_s + costs.call_seconds(given.rollouts_per_gpu / 2)
    even = num_nodes * learn_s / (learn_s + sample_s)
    around = {math.floor(even), math.ceil(even), math.ceil(even) + 1, least}
    return sorted({min(max(least, count), num_nodes - 1) for count in around})


def with_efficiency(predictions: list[Prediction]) -> list[Prediction]:
    """The same with the rate of each node over that in the smallest feasible cluster.

    Args:
        predictions (list of Prediction): of one policy, from few nodes to many.
    """
    feasible = [(each, each.run) for each in predictions if each.run is not None]
    if not feasible:
        return predictions
    first, run = feasible[0]
    base = run.decisions_per_s / first.num_nodes
    return [
        replace(each, efficiency=each.run.decisions_per_s / each.num_nodes / base)
        if each.run is not None
        else each
        for each in predictions
    ]
