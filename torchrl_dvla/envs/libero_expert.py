# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Demonstrations of the scripted expert in the environment that policies are trained in."""

from __future__ import annotations

import numpy as np
import torch
from tensordict import TensorDict

from torchrl_dvla.data.demonstrations import Demonstration, DemonstrationInfo
from torchrl_dvla.data.schema import INIT_STATE_HASH_KEY, INIT_STATE_ID_KEY
from torchrl_dvla.envs.expert import ExpertConfig, ExpertScene, PickPlaceExpert
from torchrl_dvla.envs.expert_episode import ActionNoise, record_episode
from torchrl_dvla.envs.libero_env import LiberoChunkEnv

__all__ = ["record_demonstration"]


def record_demonstration(
    env: LiberoChunkEnv,
    *,
    seed: int,
    noise: ActionNoise | None = None,
    config: ExpertConfig | None = None,
) -> Demonstration:
    """Record one episode of the expert on a scene sampled by *seed*.

    Its labels are those of :func:`~torchrl_dvla.envs.expert_episode.record_episode`.

    Args:
        env (LiberoChunkEnv): the environment.

    Keyword Args:
        seed (int): decides scene, noise and the expert's second tries.
        noise (ActionNoise, optional): disturbance of what is executed. Defaults to none.
        config (ExpertConfig, optional): speeds and tolerances of the expert.

    Returns:
        The :class:`~torchrl_dvla.data.demonstrations.Demonstration`, successful or not.
    """
    env.set_seed(seed)
    observation = env.reset(TensorDict({INIT_STATE_ID_KEY: torch.tensor([-1])}, []))
    init_state_hash = observation[INIT_STATE_HASH_KEY]
    expert = PickPlaceExpert(ExpertScene(env.robosuite_env), config=config, seed=seed)
    rng = np.random.default_rng(seed)
    rows, success, num_env_steps = record_episode(
        env, observation, expert.act, noise=noise, rng=rng
    )
    info = DemonstrationInfo(
        instruction=str(env.instruction),
        task_suite=env.task_suite,
        task_id=env.task_id,
        seed=seed,
        success=success,
        num_env_steps=num_env_steps,
        init_state_hash=int(init_state_hash),
    )
    return Demonstration(rows, info)
