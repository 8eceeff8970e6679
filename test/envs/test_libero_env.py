# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""LiberoChunkEnv on the real simulator: decisions, scenes, cameras."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torchrl.envs import RewardSum, StepCounter, TransformedEnv
from torchrl.envs.utils import check_env_specs

from torchrl_dvla.envs.libero_env import LiberoChunkEnv
from torchrl_dvla.envs.libero_scene import LiberoScene
from torchrl_dvla.envs.libero_setup import hash_init_state, libero_tasks, load_init_states

pytestmark = pytest.mark.libero

SUITE, TASK = "libero_goal", 3  # has fixtures: cabinet and stove are placed anew at each reset
FAST = {"camera_height": 32, "camera_width": 32, "shadows": False, "msaa": False}


@pytest.fixture(scope="module")
def env():
    env = LiberoChunkEnv(SUITE, TASK, chunk_size=4, max_episode_steps=10, **FAST)
    yield env
    env.close()


def reset(env, seed: int, init_state_id: int | None = None):
    env.set_seed(seed)
    if init_state_id is None:
        return env.reset()
    return env.reset(TensorDict({"init_state_id": torch.tensor([init_state_id])}))


def scene_of(env):
    """All the state that decides what happens next."""
    simulation = env.robosuite_env.sim
    data, model = simulation.data._data, simulation.model._model
    gripper = env.robosuite_env.robots[0].gripper
    parts = (
        *(data.qpos, data.qvel, data.qacc_warmstart, data.ctrl, model.site_rgba),
        *(model.body_pos, model.body_quat, gripper.current_action),
    )
    return np.concatenate([np.ravel(part) for part in parts])


def decide(env, td, chunk):
    td["vla_action", "chunk"] = chunk
    return env.step(td)["next"]


def constant_chunk(*action: float) -> torch.Tensor:
    return torch.tensor(action).expand(4, 7).contiguous()


STAY = constant_chunk(0, 0, 0, 0, 0, 0, -1)
LOWER = constant_chunk(0, 0, -1, 0, 0, 0, 1)


def test_specs_and_what_contradicts_them(env):
    check_env_specs(env)
    assert env.full_action_spec["vla_action", "chunk"].shape == (4, 7)
    td = reset(env, 0)
    assert td["observation", "image"].shape == (3, 32, 32)
    assert td["observation", "image"].dtype == torch.uint8
    assert td["observation", "state"].shape == (9,)
    assert td["language_instruction"] == "open the top drawer and put the bowl inside"
    assert not td["success"].item()
    td["vla_action", "chunk"] = torch.zeros(5, 7)
    with pytest.raises(ValueError, match=r"must have shape \[4, 7\], got \[5, 7\]"):
        env._step(td)
    with pytest.raises(ValueError, match="init_state_id must be from 0 to 49, or -1 to sample"):
        reset(env, 0, 50)


def test_chunks_are_executed_until_truncation(env):
    td = reset(env, 0)
    for decision in range(2):
        out = decide(env, td, STAY)
        assert env.num_env_steps == 4 * (decision + 1)
        assert out["action_is_pad"].tolist() == [False] * 4
        assert not out["done"].item()
        assert out["reward"].item() == 0
    out = decide(env, td, STAY)
    # 4 + 4 + 2 = 10 env steps
    assert env.num_env_steps == 10
    assert out["action_is_pad"].tolist() == [False, False, True, True]
    assert out["truncated"].item()
    assert out["done"].item()
    assert not out["terminated"].item()


def test_success_inside_the_chunk(env, monkeypatch):
    td = reset(env, 0)
    answers = iter([False, True])
    monkeypatch.setattr(env.robosuite_env, "_check_success", lambda: next(answers))
    out = decide(env, td, STAY)
    assert out["action_is_pad"].tolist() == [False, False, True, True]
    assert out["success"].item()
    assert out["terminated"].item()
    assert out["done"].item()
    assert not out["truncated"].item()
    assert out["reward"].item() == 1


def test_replan_interval(env, monkeypatch):
    monkeypatch.setattr(env, "replan_interval", 3)
    out = decide(env, reset(env, 0), STAY)
    assert env.num_env_steps == 3
    assert out["action_is_pad"].tolist() == [False, False, False, True]


def test_one_frame_per_decision(env, monkeypatch):
    num_drawn = []
    draw = env._renderer.draw
    monkeypatch.setattr(env._renderer, "draw", lambda: num_drawn.append(1) or draw())
    td = reset(env, 0, 7)
    assert len(num_drawn) == 1
    decide(env, td, STAY)
    assert len(num_drawn) == 2


@pytest.mark.parametrize("init_state_id", [3, -1, None])
def test_group_shares_its_scene_whatever_came_before(env, init_state_id: int | None):
    first = reset(env, 21, init_state_id)
    scene = scene_of(env)
    future = decide(env, first.clone(), LOWER)
    # another life in between: other seed, gripper closed, arm pushed down
    td = reset(env, 22, 4)
    for _ in range(2):
        decide(env, td, LOWER)
    assert not np.array_equal(scene_of(env), scene)
    again = reset(env, 21, init_state_id)
    assert np.array_equal(scene_of(env), scene)
    assert (again["observation"] == first["observation"]).all()
    assert (decide(env, again, LOWER)["observation"] == future["observation"]).all()


def test_the_hash_is_that_of_the_init_state_and_of_no_other_scene(env):
    states = load_init_states(libero_tasks(SUITE)[TASK])
    # fixtures are placed by the seed, and are no part of it
    for seed, index in ((3, 0), (4, 0), (3, 7)):
        td = reset(env, seed, index)
        assert int(td["init_state_hash"]) == hash_init_state(states[index])
    assert decide(env, td, STAY)["init_state_hash"] == td["init_state_hash"]
    sampled = [int(reset(env, seed)["init_state_hash"]) for seed in (3, 4, 3)]
    assert sampled[0] == sampled[2] != sampled[1]
    assert not {*sampled} & {hash_init_state(state) for state in states}


def test_init_state_arrives_through_transforms(env):
    inner = TransformedEnv(env, StepCounter())
    wrapped = TransformedEnv(inner, RewardSum(), auto_unwrap=False)
    check_env_specs(wrapped)
    for index in (0, 1):
        expected = reset(env, 3, index)["observation"]
        td = reset(wrapped, 3, index)
        assert (td["observation"] == expected).all() and int(td["init_state_id"]) == index
    assert int(reset(wrapped, 3)["init_state_id"]) == -1


def test_seed_moves_the_fixtures_of_an_init_state(env):
    model = env.robosuite_env.sim.model._model
    cabinet = env.robosuite_env.obj_body_id["wooden_cabinet_1"]
    reset(env, 1, 0)
    place = model.body_pos[cabinet].copy()
    reset(env, 2, 0)
    shift = np.abs(model.body_pos[cabinet] - place).max()
    assert 1e-6 < shift < 0.03


def test_sampled_scenes_differ_settle_and_are_unsolved(env):
    table = env.init_states
    num_positions = env.robosuite_env.sim.model._model.nq
    seen = []
    for seed in range(3):
        td = reset(env, seed, -1)
        assert not td["success"].item()
        assert env._scene.is_settled()
        qpos = env.robosuite_env.sim.data._data.qpos.copy()
        # far from each benchmark state: the arm is the same, the objects are not
        distance = np.abs(table[:, 1 : 1 + num_positions] - qpos).max(axis=1).min()
        assert distance > 1e-3
        seen.append(qpos)
    assert np.abs(seen[0] - seen[1]).max() > 1e-3
    assert np.abs(seen[1] - seen[2]).max() > 1e-3


OBJECTS = ("libero_object", 1)  # six objects that can change places, and a basket


@pytest.fixture(scope="module")
def shuffled():
    env = LiberoChunkEnv(*OBJECTS, chunk_size=4, settle_steps=0, shuffle_objects=True, **FAST)
    yield env
    env.close()


def positions(env) -> dict[str, np.ndarray]:
    simulation = env.robosuite_env.sim
    objects = env.robosuite_env.objects_dict
    return {
        name: simulation.data.get_joint_qpos(each.joints[0])[:3].copy()
        for name, each in objects.items()
    }


@pytest.mark.parametrize("init_state_id", [7, -1])
def test_shuffled_objects_exchange_their_places_by_the_seed(shuffled, init_state_id):
    plain = LiberoChunkEnv(*OBJECTS, chunk_size=4, settle_steps=0, **FAST)
    try:
        targets, scenes = set(), []
        for seed in range(8):
            reset(plain, seed, init_state_id)
            before = positions(plain)
            td = reset(shuffled, seed, init_state_id)
            after = positions(shuffled)
            assert sorted(tuple(p[:2]) for p in before.values()) == sorted(
                tuple(p[:2]) for p in after.values()
            )
            assert np.array_equal(before["basket_1"], after["basket_1"])  # the destination
            assert all(before[name][2] == after[name][2] for name in before)
            scene = scene_of(shuffled)
            again = reset(shuffled, seed, init_state_id)
            assert np.array_equal(scene, scene_of(shuffled))
            assert again["init_state_hash"] == td["init_state_hash"]
            targets.add(
                min(before, key=lambda k: np.abs(before[k][:2] - after["cream_cheese_1"][:2]).sum())
            )
            scenes.append(int(td["init_state_hash"]))
        assert len(targets) > 2 and "basket_1" not in targets
        assert len(set(scenes)) == 8
    finally:
        plain.close()


def test_there_must_be_something_to_shuffle(shuffled, monkeypatch):
    problem = shuffled.robosuite_env.parsed_problem
    of_two = [atom for atom in problem["initial_state"] if atom[1] in ("milk_1", "basket_1")]
    monkeypatch.setitem(problem, "initial_state", of_two)
    with pytest.raises(ValueError, match="^shuffle_objects must be False .* got 1. Choose another"):
        LiberoScene(shuffled.robosuite_env, shuffle_objects=True)


def test_consecutive_resets_follow_the_stream_of_the_seed(env):
    first, second = [], []
    for scenes in (first, second):
        env.set_seed(5)
        for _ in range(2):
            env.reset()
            scenes.append(scene_of(env))
    assert not np.array_equal(first[0], first[1])
    assert np.array_equal(first[0], second[0])
    assert np.array_equal(first[1], second[1])


def test_resets_leave_the_global_generator_alone(env):
    np.random.seed(9)
    expected = np.random.RandomState(9).uniform()
    reset(env, 0)
    assert np.random.uniform() == expected


@pytest.mark.timeout(600)
def test_scene_is_the_same_in_a_simulator_just_built_in_another_process(env, tmp_path, run_python):
    decide(env, reset(env, 32), LOWER)  # this one has a past
    code = f"""
import sys, numpy as np, torch
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_libero_env import FAST, SUITE, TASK, LiberoChunkEnv, reset, scene_of
env = LiberoChunkEnv(SUITE, TASK, chunk_size=4, **FAST)
td = reset(env, 33, 6)
np.savez({str(tmp_path / "scene.npz")!r}, scene=scene_of(env), image=td["observation", "image"])
"""
    run = run_python("-c", code)
    assert run.returncode == 0, run.stderr
    td = reset(env, 33, 6)
    with np.load(tmp_path / "scene.npz") as fresh:
        np.testing.assert_array_equal(scene_of(env), fresh["scene"])
        np.testing.assert_array_equal(td["observation", "image"].numpy(), fresh["image"])


def in_thread(call):
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(call).result(120)


def test_each_environment_renders_its_own_images(env):
    """robosuite 1.4 draws with the meshes of whichever environment was built last."""
    alone = reset(env, 2, 1)["observation", "image"]
    alone_next = decide(env, reset(env, 2, 1), LOWER)["observation", "image"]
    other = LiberoChunkEnv("libero_object", 0, chunk_size=4, cameras=("agentview",), **FAST)
    other_alone = reset(other, 0, 0)["observation", "image"]
    assert (other_alone.float() - alone.float()).abs().mean() > 5
    # interleaved, and from another thread
    td = reset(env, 2, 1)
    assert torch.equal(td["observation", "image"], alone)
    assert torch.equal(reset(other, 0, 0)["observation", "image"], other_alone)
    assert torch.equal(decide(env, td, LOWER)["observation", "image"], alone_next)
    threaded = in_thread(lambda: reset(other, 0, 0))
    assert torch.equal(threaded["observation", "image"], other_alone)
    other.close()
    # a closed neighbour takes nothing along
    assert torch.equal(reset(env, 2, 1)["observation", "image"], alone)
    assert torch.equal(in_thread(lambda: reset(env, 2, 1))["observation", "image"], alone)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task_suite": "libero_moon"}, "task_suite must be one of"),
        ({"cameras": ()}, "cameras must be a sequence of one or two names"),
        ({"cameras": "agentview"}, "cameras must be a sequence of one or two names"),
        ({"max_episode_steps": 0}, "max_episode_steps must be at least 1"),
        ({"max_mesh_faces": 0}, "max_mesh_faces must be at least 1"),
    ],
)
def test_bad_arguments_end_before_the_simulator_starts(arguments, message, monkeypatch):
    monkeypatch.setattr(LiberoChunkEnv, "_build_env", None)  # a TypeError if it were called
    with pytest.raises(ValueError, match=message):
        LiberoChunkEnv(**{"task_suite": SUITE, "task_id": TASK, **arguments})


def test_orientation_as_axis_and_angle(env):
    """Eight numbers of state: a rotation vector in place of a quaternion."""
    full = reset(env, 0, 0)["observation", "state"].double()
    other = LiberoChunkEnv(SUITE, TASK, chunk_size=4, orientation="axis_angle", **FAST)
    short = reset(other, 0, 0)["observation", "state"].double()
    assert other.observation_spec["observation", "state"].shape == short.shape
    other.close()
    assert (len(full), len(short)) == (9, 8)
    assert torch.equal(full[:3], short[:3]) and torch.equal(full[7:], short[6:])
    angle = short[3:6].norm()
    torch.testing.assert_close(torch.cos(angle / 2), full[6], atol=1e-6, rtol=0)
    torch.testing.assert_close(
        short[3:6] / angle * torch.sin(angle / 2), full[3:6], atol=1e-6, rtol=0
    )
    with pytest.raises(ValueError, match="orientation must be one of"):
        LiberoChunkEnv(SUITE, TASK, orientation="euler")
