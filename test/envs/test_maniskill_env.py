# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""ManiSkillChunkEnv: against ManiSkill's own environment, and its batch on a stand-in."""

from __future__ import annotations

import os
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torchrl.envs.utils import check_env_specs

from torchrl_dvla.envs import ManiSkillChunkEnv, maniskill_env
from torchrl_dvla.envs.maniskill_expert import PickCubeExpert, PickCubeScene, record_pick_cube

CHUNK, SIZE = ("vla_action", "chunk"), 32


@pytest.fixture(scope="module")
def env():
    with pytest.MonkeyPatch.context() as patch:
        for name in ("VK_ICD_FILENAMES", "LP_NUM_THREADS"):
            if name not in os.environ:
                patch.setenv(name, "")  # so that it is restored
                patch.delenv(name)
        env = ManiSkillChunkEnv("PickCube-v1", camera_height=SIZE, camera_width=SIZE)
        yield env
        env.close()


@pytest.fixture(scope="module")
def stock(env):
    """ManiSkill's own environment, which draws at every env step."""
    from mani_skill.utils.wrappers import FlattenRGBDObservationWrapper

    stock = gym.make(
        "PickCube-v1",
        obs_mode="rgb",
        num_envs=1,
        sim_backend="physx_cpu",
        render_backend="cpu",
        control_mode="pd_ee_delta_pose",
        sensor_configs={"shader_pack": "minimal", "width": SIZE, "height": SIZE},
    )
    yield FlattenRGBDObservationWrapper(stock, rgb=True, depth=False, state=True)
    stock.close()


def reset(env, seed):
    env.set_seed(seed)
    return env.reset()


def decide(env, td, chunk):
    td[CHUNK] = chunk
    return env.step(td)["next"]


def expert_actions(env, seed):
    """What solves the scene of ``seed``, ``[L, 7]``."""
    reset(env, seed)
    expert, actions, done = PickCubeExpert(), [], False

    def act():
        action = expert.act(PickCubeScene.read(env.maniskill_env))
        actions.append(torch.as_tensor(action, dtype=torch.float32))
        return action

    while not done:
        done = bool(env.step_with(act)["done"])
    return torch.stack(actions)


def random_actions(seed):
    return 2 * torch.rand(56, 7, generator=torch.Generator().manual_seed(seed)) - 1


@pytest.mark.maniskill
def test_specs(env):
    check_env_specs(env)
    td = reset(env, 0)
    assert td["observation", "image"].shape == (3, SIZE, SIZE)
    assert td["language_instruction"] == "pick up the red cube and move it to the green goal"
    assert env.full_action_spec[CHUNK].shape == (8, 7) and env.max_episode_steps == 50
    assert not td["action_is_pad"].any() and not td["success"]
    # 9 joints, their velocities, grasped or not, pose of the gripper, position of the goal
    assert td["observation", "state"].shape == (9 + 9 + 1 + 7 + 3,)
    goal = env.maniskill_env.goal_site.pose.p[0]
    assert (td["observation", "state"][-3:] == goal).all()
    td[CHUNK] = torch.zeros(5, 7)
    with pytest.raises(ValueError, match=r"must have shape \[8, 7\], got \[5, 7\]"):
        env._step(td)


@pytest.mark.maniskill
@pytest.mark.parametrize(("seed", "is_solved"), [(4, False), (3, True)])
def test_decisions_are_those_of_maniskills_own_environment(env, stock, seed, is_solved):
    actions = expert_actions(env, seed) if is_solved else random_actions(seed)
    num_env_steps = len(actions) if is_solved else 50
    padding = torch.zeros(56 - len(actions), 7)
    chunks = torch.cat([actions, padding]).reshape(7, 8, 7)
    td, (theirs, _) = reset(env, seed), stock.reset(seed=seed)
    executed, frames = 0, []
    for chunk in chunks:
        assert (td["observation", "image"].movedim(0, 2) == theirs["rgb"][0]).all()
        assert (td["observation", "state"] == theirs["state"][0]).all()
        frames.append(td["observation", "image"])
        td = decide(env, td, chunk)
        for action in chunk:
            theirs, _, terminated, truncated, info = stock.step(action)
            executed += 1
            if terminated or truncated:
                break
        assert td["success"] == info["success"] == td["reward"]
        assert (td["terminated"], td["truncated"]) == (terminated, truncated)
        assert td["action_is_pad"].sum() == 8 * len(frames) - executed
        if td["done"]:
            break
    assert (td["observation", "image"].movedim(0, 2) == theirs["rgb"][0]).all()
    assert (td["observation", "state"] == theirs["state"][0]).all()
    assert td["success"] == is_solved and executed == num_env_steps
    assert td["action_is_pad"].sum() > 0  # both end inside a chunk: at success, at the limit
    assert not (frames[0] == td["observation", "image"]).all()


@pytest.mark.maniskill
def test_the_scene_follows_from_the_seed_after_any_history(env):
    chunks = random_actions(0)[:16].reshape(2, 8, 7)

    def play(seed):
        td = reset(env, seed)
        seen = [td["observation"].clone()]
        for chunk in chunks:
            td = decide(env, td, chunk)
            seen.append(td["observation"].clone())
        return seen

    first, other = play(7), play(8)
    expert_actions(env, 3)  # ends with the cube in the hand, which the next scene must not show
    again = play(7)
    assert all((a == b).all() for a, b in zip(first, again))
    assert not (first[0]["image"] == other[0]["image"]).all()
    # without a new seed there is a new scene, which follows from the last one
    scenes = []
    for _ in range(2):
        reset(env, 7)
        scenes.append(env.reset()["observation", "state"].clone())
    assert (scenes[0] == scenes[1]).all() and not (scenes[0] == first[0]["state"]).all()


@pytest.mark.maniskill
def test_draws_once_a_decision_what_was_asked_for(env, monkeypatch):
    drawn = []
    base = env.maniskill_env
    camera = base._sensors["base_camera"]
    monkeypatch.setattr(camera, "capture", lambda f=camera.capture: (drawn.append(1), f()))
    td = reset(env, 0)
    assert len(drawn) == 1
    decide(env, td, torch.zeros(8, 7))
    assert len(drawn) == 2


@pytest.mark.maniskill
def test_what_is_refused_names_what_there_is(env):
    with pytest.raises(ValueError, match="cameras must be among base_camera, got 'hand_camera'"):
        ManiSkillChunkEnv("PickCube-v1", cameras=["base_camera", "hand_camera"], camera_width=SIZE)
    with pytest.raises(ValueError, match="num_envs must be 1 without a CUDA device, got 4"):
        ManiSkillChunkEnv("PickCube-v1", num_envs=4)
    with pytest.raises(ValueError, match=r"control_mode must be .*got walk.*'pd_ee_delta_pose'"):
        ManiSkillChunkEnv("PickCube-v1", control_mode="walk")
    with pytest.raises(FileNotFoundError, match="Robot widowxai has assets available"):
        ManiSkillChunkEnv("PickCubeWidowXAI-v1", instruction="pick up the cube")


@pytest.mark.maniskill
def test_expert_and_its_demonstrations(env):
    for seed in range(3):
        demo = record_pick_cube(env, seed=seed)
        assert demo.info.success and demo.info.num_env_steps < 30
        num_rows = -(-demo.info.num_env_steps // 8)
        assert demo.rows["observation", "image"].shape == (num_rows, 3, SIZE, SIZE)
        assert demo.rows["action_is_pad"].sum() == 8 * num_rows - demo.info.num_env_steps
        assert demo.rows["vla_action", "chunk"].abs().max() <= 1
        first = reset(env, seed)["observation", "image"]
        assert (demo.rows["observation", "image"][0] == first).all()


# -- the batch, on a stand-in for the GPU simulation -----------------------------------------------
class Clocks:
    """ManiSkill's interface to ``N`` clocks: the state of each is its seed and its time.

    A clock is solved at the time that its action names, and fails at 9.
    """

    def __init__(self, num_envs: int) -> None:
        self.num_envs, self.device = num_envs, torch.device("cpu")
        self.obs_mode = self._obs_mode = "rgb"
        self.single_action_space = gym.spaces.Box(-9, 9, (1,), np.float32)
        self._sensors = {name: SimpleNamespace(camera=1) for name in ("base_camera", "other")}
        self.time = torch.zeros(num_envs)
        self.seeds = torch.zeros(num_envs)
        self.reconfiguration_freq, self.scene = 0, SimpleNamespace(step=lambda: None)
        self.resets: list[tuple[list[int], list[int]]] = []
        self.solved = torch.zeros(num_envs, dtype=torch.bool)

    def get_info(self):
        return {"success": self.solved}

    def get_obs(self, info, unflattened):
        assert self._obs_mode == "rgb" and list(self._sensors) == ["base_camera"]
        frames = self.time.to(torch.uint8)[:, None, None, None].expand(-1, 4, 6, 3)
        agent = {"seed": self.seeds[:, None].clone(), "empty": torch.zeros(self.num_envs, 0)}
        extra = {"time": self.time.clone(), "solved": info["success"]}
        data = {name: {"rgb": frames} for name in self._sensors}
        return {"agent": agent, "extra": extra, "sensor_data": data}

    def reset(self, *, seed, options):
        assert self._obs_mode == "none" and len(seed) == self.num_envs
        index = options["env_idx"]
        self.resets.append((seed, index.tolist()))
        self.time[index], self.seeds[index], self.solved[index] = 0.0, float(seed[0]), False
        return {}, self.get_info()

    def step(self, action):
        assert self._obs_mode == "none" and action.shape == (self.num_envs, 1)
        self.time += 1
        self.solved = self.time == action[:, 0]
        ended = self.solved | (self.time == 9)
        return {}, None, ended, None, self.get_info()

    def close(self):
        pass


@pytest.fixture
def clocks(monkeypatch):
    base = Clocks(3)
    monkeypatch.setattr(maniskill_env, "_make", lambda task, num_envs, **kwargs: base)
    monkeypatch.setattr(maniskill_env, "_horizon", lambda task: 7)
    monkeypatch.setattr(maniskill_env, "validate_maniskill", lambda task, **kwargs: "wait")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return ManiSkillChunkEnv("Clocks-v1", num_envs=3, chunk_size=4)


def seeded(*seeds, reset=None):
    td = TensorDict({"seed": torch.tensor(seeds)[:, None]}, [3])
    return td if reset is None else td.set("_reset", torch.tensor(reset)[:, None])


def test_specs_of_a_batch(clocks):
    check_env_specs(clocks)
    assert clocks.full_action_spec[CHUNK].shape == (3, 4, 1)
    assert clocks.state_spec["seed"].shape == (3, 1)
    td = clocks.reset(seeded(5, 5, 6))
    assert td["observation", "image"].shape == (3, 3, 4, 6)
    assert td[1]["language_instruction"] == "wait"


def test_each_of_a_batch_has_the_scene_of_its_own_seed(clocks):
    td = clocks.reset(seeded(5, 5, 6))
    # by itself, and with a seed for each of the batch, so that none depends on another's
    resets = clocks.maniskill_env.resets
    assert resets == 2 * [([5] * 3, [0]), ([5] * 3, [1]), ([6] * 3, [2])]
    resets.clear()
    assert td["observation", "state"][:, 0].tolist() == [5, 5, 6]
    td = decide(clocks, td, torch.zeros(3, 4, 1))
    td = clocks.reset(td.update(seeded(8, 9, 10, reset=[False, True, False])))
    assert resets == [([9] * 3, [1])]
    resets.clear()
    # seed, time and success: the others go on
    assert td["observation", "state"].tolist() == [[5, 4, 0], [9, 0, 0], [6, 4, 0]]
    assert td["observation", "image"][:, 0, 0, 0].tolist() == [4, 0, 4]
    # without seeds they follow from set_seed
    clocks.set_seed(2**32 - 1)
    clocks.reset()
    assert [seed[0] for seed, _ in resets[:3]] == [2**32 - 1, 0, 1]


def test_a_decision_of_a_batch_ends_for_each_where_its_episode_ends(clocks):
    td = clocks.reset(seeded(0, 0, 0))
    # solved at 2; never; at 4
    td = decide(clocks, td, torch.tensor([2.0, 0.0, 4.0])[:, None, None].expand(3, 4, 1))
    assert td["success"].flatten().tolist() == [True, False, True]
    assert td["reward"].flatten().tolist() == [1.0, 0.0, 1.0]
    assert td["terminated"].flatten().tolist() == [True, False, True]
    assert (~td["action_is_pad"]).sum(1).tolist() == [2, 4, 4]
    td = clocks.reset(td.update(seeded(1, 1, 1, reset=[True, False, False])))
    assert not td["done"][0]
    # The first is at 0, the second at 4: it is truncated at 7; the third has ended and waits.
    td = decide(clocks, td, torch.zeros(3, 4, 1))
    assert td["truncated"].flatten().tolist() == [False, True, True]
    assert (~td["action_is_pad"]).sum(1).tolist() == [4, 3, 3]
    assert not td["terminated"].any() and not td["success"].any()


def test_a_batch_stops_when_all_its_episodes_have_ended(clocks):
    td = clocks.reset(seeded(0, 0, 0))
    td = decide(clocks, td, torch.tensor([1.0, 2.0, 2.0])[:, None, None].expand(3, 4, 1))
    assert clocks.maniskill_env.time.tolist() == [2, 2, 2]
    assert td["done"].all() and (~td["action_is_pad"]).sum(1).tolist() == [1, 2, 2]
