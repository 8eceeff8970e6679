# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""A run that test_resume.py kills and resumes; it tells on standard output what it learns from.

python resumable_run.py FOLDER NUM_UPDATES
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from torchrl.checkpoint import GlobalRNGState

from torchrl_dvla.collectors import DVLACollector, GroupConfig, InitStateSchedule, WorkerConfig
from torchrl_dvla.data import PooledReplayBuffer
from torchrl_dvla.objectives import GRPOLoss
from torchrl_dvla.recording import RunCheckpoints

SAVE_EVERY = 2


def tell(**what) -> None:
    print(json.dumps(what), flush=True)


def queue_of(state: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint says of the groups."""
    return dict(state["buffer"]["_groups"])


def main(folder: str, num_updates: int) -> None:
    # Here, for pytest looks for doctests in this file, without a script's path.
    from counting_task import make_env, make_initialised_policy

    policy = make_initialised_policy()
    loss = GRPOLoss(policy, entropy_coeff=0.03)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    generators = GlobalRNGState()
    checkpoints = RunCheckpoints(folder, policy=policy, optimizer=optimizer, rng=generators)
    resumed, update = checkpoints.latest(), 0
    if resumed is not None:
        update = checkpoints.load(resumed)["update"]
    collector = DVLACollector(
        {"left": make_env, "right": make_env},
        policy,
        replay_buffer=PooledReplayBuffer(batch_size=16, timeout_s=60.0),
        group=GroupConfig(group_size=3, groups_per_update=2, max_policy_lag=2),
        workers=WorkerConfig(num_workers=2, max_decisions=4),
        schedule=InitStateSchedule(("left", "right"), seed=3),
        seed=3,
    )
    checkpoints.register("collector", collector)
    if resumed is not None:
        checkpoints.load(resumed, ["rng", "collector"])
        tell(
            resumed=update,
            queue=queue_of(collector.state_dict()),
            version=collector.policy_version,
            random=torch.rand(2).tolist(),
        )
    collector.start()
    while update < num_updates:
        ids: set[int] = set()
        for batch in collector.replay_buffer:
            losses = loss(batch)
            (losses["loss_objective"] + losses["loss_entropy"]).backward()
            optimizer.step()
            optimizer.zero_grad()
            ids |= set(batch["rollout_id"].flatten().tolist())
        groups = collector.replay_buffer.cohort
        scenes = [list(group.spec[:2]) for group in groups]
        lag = collector.policy_version - min(group.first_policy_version for group in groups)
        collector.update_policy_weights_()
        update += 1
        tell(update=update, ids=sorted(ids), scenes=scenes, lag=lag)
        if update % SAVE_EVERY == 0:
            rng_state = generators.state_dict()
            path = checkpoints.save(update)
            (file,) = path.glob("components/*-collector/state.pt")
            state = torch.load(file, weights_only=True)
            queue = queue_of(state)
            stored = [group["spec"][:2] for group in queue.pop("groups")]
            random = torch.rand(2).tolist()
            generators.load_state_dict(rng_state)
            tell(saved=update, queue=queue, stored=stored, random=random)
    collector.shutdown()
    tell(ended=update)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
