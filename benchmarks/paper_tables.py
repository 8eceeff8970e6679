# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Does the planner, fitted on D-VLA's 8-GPU figures, predict its 16-GPU ones?

    python benchmarks/paper_tables.py [--quick]

Nothing is run: the figures are D-VLA's own (arXiv 2605.13276, steps/s), the plans ``plan_run``'s.
Three figures of 8 GPUs are fitted by one number, the seconds that a decision takes the GPU of a
rollout beside its policy call: simulation and everything else. What a policy call and the learning
of a row take follows from the architectures, in TFLOP, and from the rate of a GPU, which is given
as a share of an H100's peak:

pi0.5        a forward pass of PaliGemma on three images and 200 words; learned by the action expert
             alone, the vision-language model being frozen, so learning is one such pass as well.
OpenVLA-OFT  a forward pass of a 7B model on one image; learning is three of them: forward, again
             for gradient checkpointing, and backward to LoRA's weights.

Beside that stand other rates, each with a fit of its own, and other accounts of the work. ``shape``
says whether 3:1 helps pi0.5 and hurts OpenVLA-OFT on 16 GPUs. The last line of stdout is one JSON
object.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from _machine import arguments, report

from torchrl_dvla.collectors import WorkerConfig
from torchrl_dvla.topology import ClusterSpec, GPUSpec, LaneCosts, NodeSpec, plan_run

#: Dense bf16 peak of an H100 SXM, TFLOP/s; share of it that is taken as achieved.
PEAK, ACHIEVED = 989.0, 0.5
#: Shares that are tried beside.
SHARES = (0.3, 0.4, 0.45, 0.5, 0.6, 0.8, 1.0)


@dataclass(frozen=True)
class Policy:
    """Work of a policy in TFLOP, and its weights.

    Args:
        tokens, images (int): of the language model; of 256 patches.
        language, vision (float): parameters, in 1e9, without embeddings.
        passes (int): forward passes that learning a row is worth.
        expert (float): TFLOP of the action expert's denoising steps.
    """

    tokens: int
    images: int
    language: float
    vision: float
    passes: int
    expert: float = 0.0

    @property
    def call(self) -> float:
        return 2e-3 * (self.language * self.tokens + self.vision * 256 * self.images) + self.expert

    @property
    def learn(self) -> float:
        return self.passes * (self.call - self.expert) + 3 * self.expert


# openpi embeds three camera slots, used or not, and pads the prompt to 200; the expert of 0.31e9
# parameters takes 4 steps on 8 actions.
POLICIES = {
    "pi0.5": Policy(3 * 256 + 200, 3, 2.0, 0.41, 1, expert=2e-3 * 0.31 * 4 * 8),
    "OpenVLA-OFT": Policy(256 + 35 + 56, 1, 6.6, 0.73, 3),
}
#: What else the work may have been.
OTHER_ACCOUNTS = {
    "pi0.5 with one image": {"pi0.5": replace(POLICIES["pi0.5"], images=1, tokens=256 + 200)},
    "pi0.5 learned whole": {"pi0.5": replace(POLICIES["pi0.5"], passes=3)},
    "OpenVLA-OFT learned whole": {"OpenVLA-OFT": replace(POLICIES["OpenVLA-OFT"], passes=4)},
    "OpenVLA-OFT without checkpointing": {
        "OpenVLA-OFT": replace(POLICIES["OpenVLA-OFT"], passes=2)
    },
}
#: Policy, GPUs, learning GPUs, steps/s.
FITTED = [("pi0.5", 8, 4, 147.0), ("pi0.5", 8, 2, 237.0), ("OpenVLA-OFT", 8, 4, 156.0)]
PREDICTED = [
    ("pi0.5", 16, 8, 336.04),
    ("pi0.5", 16, 4, 376.00),
    ("OpenVLA-OFT", 16, 8, 250.90),
    ("OpenVLA-OFT", 16, 4, 154.23),
]
Case = tuple[str, int, int, float]
Policies = dict[str, Policy]


def lane_costs(name: str, rollout_s: float, tflops: float, policies: Policies) -> LaneCosts:
    """A policy of the paper, whose environments simulate on GPUs."""
    policy = policies[name]
    return LaneCosts(
        name,
        env_step_s=rollout_s,
        env_steps_per_decision=1,
        decisions_per_rollout=16,
        call_row_s=policy.call / tflops,
        learn_row_s=policy.learn / tflops,
        row_bytes=1,
        version_bytes=1,
        env_device="cuda",
        policy_device="cuda",
    )


def predict(case: Case, rollout_s: float, tflops: float, policies: Policies) -> float:
    """Steps per second of the planner."""
    name, num_gpus, learning, _ = case
    costs = lane_costs(name, rollout_s, tflops, policies)
    gpus = tuple(GPUSpec("GPU") for _ in range(8))
    nodes = tuple(NodeSpec(f"node {k}", 128, 2**40, gpus=gpus) for k in range(num_gpus // 8))
    # Environments enough for every GPU: how many the paper's 8-GPU runs had is not known.
    workers = WorkerConfig(envs_per_worker=384)
    plan = plan_run(
        ClusterSpec(nodes), costs, workers=workers, num_workers=1, num_learner_gpus=learning
    )
    return plan.decisions_per_s


def misfit(rollout_s: float, tflops: float, policies: Policies) -> float:
    """Root mean square of the logarithms of predicted over reported."""
    logs = [math.log(predict(case, rollout_s, tflops, policies) / case[-1]) for case in FITTED]
    return math.sqrt(sum(value**2 for value in logs) / len(logs))


def fit(tflops: float, policies: Policies = POLICIES) -> tuple[float, float]:
    """Misfit, and the seconds of a rollout GPU beside the policy call."""
    return min((misfit(1e-4 * k, tflops, policies), 1e-4 * k) for k in range(20, 400))


def table(tflops: float, policies: Policies = POLICIES) -> list[dict[str, Any]]:
    _, rollout_s = fit(tflops, policies)
    rows = []
    for case in FITTED + PREDICTED:
        found = predict(case, rollout_s, tflops, policies)
        rows.append(
            {
                "policy": case[0],
                "gpus": case[1],
                "split": f"{(case[1] - case[2]) // case[2]}:1",
                "fitted": case in FITTED,
                "reported": case[3],
                "planned": round(found, 1),
                "error": round(found / case[3] - 1, 3),
            }
        )
    return rows


def summary(tflops: float, policies: Policies = POLICIES) -> dict[str, Any]:
    misfit_8_gpus, rollout_s = fit(tflops, policies)
    rows = table(tflops, policies)
    found = gains(rows, "planned")
    return {
        "rollout_ms": round(1e3 * rollout_s, 1),
        "misfit_8_gpus": round(misfit_8_gpus, 3),
        "gain_of_3_to_1": found,
        "errors_16_gpus": [row["error"] for row in rows if not row["fitted"]],
        "shape": found["pi0.5"] > 1 > found["OpenVLA-OFT"],
    }


def gains(rows: list[dict[str, Any]], key: str) -> dict[str, float]:
    """Steps/s of 3:1 over 1:1 on 16 GPUs, by policy."""
    found = {(row["policy"], row["split"]): row[key] for row in rows if row["gpus"] == 16}
    return {name: round(found[name, "3:1"] / found[name, "1:1"], 2) for name in POLICIES}


def main() -> None:
    args = arguments(__doc__, "nothing: it takes a second")
    tflops = PEAK * ACHIEVED
    rows = table(tflops)
    for row in rows:
        print(*row.values(), sep="\t")
    errors = [abs(row["error"]) for row in rows if not row["fitted"]]
    result = {
        "num_free": 1,
        "num_fitted": len(FITTED),
        "num_predicted": len(PREDICTED),
        "tflop": {name: [round(p.call, 2), round(p.learn, 2)] for name, p in POLICIES.items()},
        **summary(tflops),
        "gain_of_3_to_1": {key: gains(rows, key) for key in ("reported", "planned")},
        "mean_error_16_gpus": round(sum(errors) / len(errors), 3),
        "largest_error_16_gpus": max(errors),
        "table": rows,
        "by_share_of_peak": {share: summary(PEAK * share) for share in SHARES},
        "by_account": {
            name: summary(tflops, POLICIES | changes) for name, changes in OTHER_ACCOUNTS.items()
        },
    }
    report("paper_tables", result, args.quick)


if __name__ == "__main__":
    main()
