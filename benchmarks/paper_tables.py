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

Three more checks: the same with other rates, what the 8-GPU figures say about the rate by
themselves, and how much slower two nodes would have to make the learner. The last line of stdout is
one JSON object.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
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
#: Policy, GPUs, learning GPUs, steps/s.
FITTED = [("pi0.5", 8, 4, 147.0), ("pi0.5", 8, 2, 237.0), ("OpenVLA-OFT", 8, 4, 156.0)]
PREDICTED = [
    ("pi0.5", 16, 8, 336.04),
    ("pi0.5", 16, 4, 376.00),
    ("OpenVLA-OFT", 16, 8, 250.90),
    ("OpenVLA-OFT", 16, 4, 154.23),
]
Case = tuple[str, int, int, float]


def predict(case: Case, rollout_s: float, tflops: float) -> float:
    """Steps per second of the planner."""
    name, num_gpus, learning, _ = case
    policy = POLICIES[name]
    costs = LaneCosts(
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
    gpus = tuple(GPUSpec("GPU") for _ in range(8))
    nodes = tuple(NodeSpec(f"node {k}", 128, 2**40, gpus=gpus) for k in range(num_gpus // 8))
    # Environments enough for every GPU: how many the paper's 8-GPU runs had is not known.
    workers = WorkerConfig(envs_per_worker=384)
    plan = plan_run(
        ClusterSpec(nodes), costs, workers=workers, num_workers=1, num_learner_gpus=learning
    )
    return plan.decisions_per_s


def misfit(rollout_s: float, tflops: float) -> float:
    """Root mean square of the logarithms of predicted over reported."""
    errors = [math.log(predict(case, rollout_s, tflops) / case[-1]) for case in FITTED]
    return math.sqrt(sum(error**2 for error in errors) / len(errors))


def fit(tflops: float) -> float:
    """Seconds of a rollout GPU beside the policy call."""
    return min((1e-4 * k for k in range(20, 400)), key=lambda seconds: misfit(seconds, tflops))


def table(rollout_s: float, tflops: float) -> list[dict[str, Any]]:
    rows = []
    for case in FITTED + PREDICTED:
        found = predict(case, rollout_s, tflops)
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


def gains(rows: list[dict[str, Any]], key: str) -> dict[str, float]:
    """Steps/s of 3:1 over 1:1 on 16 GPUs, by policy."""
    found = {(row["policy"], row["split"]): row[key] for row in rows if row["gpus"] == 16}
    return {name: round(found[name, "3:1"] / found[name, "1:1"], 2) for name in POLICIES}


def main() -> None:
    args = arguments(__doc__, "nothing: it takes a second")
    rows = table(fit(PEAK * ACHIEVED), PEAK * ACHIEVED)
    for row in rows:
        print(*row.values(), sep="\t")
    rates = {}
    for share in SHARES:
        rollout_s = fit(PEAK * share)
        others = table(rollout_s, PEAK * share)
        rates[share] = {
            "rollout_ms": round(1e3 * rollout_s, 1),
            "misfit_8_gpus": round(misfit(rollout_s, PEAK * share), 3),
            "gain_of_3_to_1": gains(others, "planned"),
            "errors_16_gpus": [row["error"] for row in others if row["gpus"] == 16],
        }
        print(share, rates[share])
    errors = [abs(row["error"]) for row in rows if not row["fitted"]]
    result = {
        "num_free": 1,
        "num_fitted": len(FITTED),
        "num_predicted": len(PREDICTED),
        "rollout_ms": round(1e3 * fit(PEAK * ACHIEVED), 1),
        "tflop": {name: [round(p.call, 2), round(p.learn, 2)] for name, p in POLICIES.items()},
        "mean_error_16_gpus": round(sum(errors) / len(errors), 3),
        "largest_error_16_gpus": max(errors),
        "gain_of_3_to_1": {key: gains(rows, key) for key in ("reported", "planned")},
        "table": rows,
        "by_share_of_peak": rates,
    }
    report("paper_tables", result, args.quick)


if __name__ == "__main__":
    main()
