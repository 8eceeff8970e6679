# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

import functools
import os
import runpy
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torchrl.data import Bounded, Categorical, Composite, Unbounded
from torchrl.envs import (
    EnvBase,
    GymWrapper,
    MultiAction,
    ParallelEnv,
    RenameTransform,
    SerialEnv,
    ToyVLAEnv,
    TransformedEnv,
    check_env_specs,
)

from torchrl_dvla.collectors.validation import env_factories
from torchrl_dvla.envs import ChunkEnv
from torchrl_dvla.envs.chunk_env import make_chunk_env
from torchrl_dvla.swimlane.env_worker import describe_env

from .batches import CHUNK, play_alike, reset_some

ENDS, CUT = "terminated", "truncated"
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "gym_env.py"
Reach = runpy.run_path(str(EXAMPLE))["Reach"]


class Clock(gym.Env):
    """The state counts env steps, each is rewarded with its number, and any may be the solution."""

    def __init__(
        self, ends_at=99, solved_at=99, limit=99, image_shape=(4, 6, 3), info="is_success"
    ):
        self.info = info
        self.ends_at, self.solved_at, self.limit = ends_at, solved_at, limit
        self.image = np.arange(72, dtype=np.uint8).reshape(image_shape)
        spaces = {
            "camera": gym.spaces.Box(0, 255, image_shape, np.uint8),
            "state": gym.spaces.Box(0, 99, (1,), np.float64),
            "goal": gym.spaces.Box(0, 99, (1, 2), np.int64),
        }
        self.observation_space = gym.spaces.Dict(spaces)
        self.action_space = gym.spaces.Box(np.float32([-1, -2]), np.float32([1, 2]))

    def _observe(self):
        return {"camera": self.image, "state": np.array([self.t * 1.0]), "goal": np.array([[7, 8]])}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self._observe(), {}

    def step(self, action):
        self.t += 1
        info = {self.info: self.t == self.solved_at}
        return self._observe(), float(self.t), self.t >= self.ends_at, self.t >= self.limit, info


def renamed_env():
    base = TransformedEnv(GymWrapper(Clock(solved_at=1)), RenameTransform(["goal"], ["g"]))
    return clock_env(base, state_key=["state", "g"], image_key="camera")


def vector_env():
    mode = gym.vector.AutoresetMode.DISABLED
    return gym.vector.SyncVectorEnv([Clock] * 2, autoreset_mode=mode)


clock_env = functools.partial(ChunkEnv, chunk_size=4, state_key="state")


def decide(env, td, chunk=None):
    td[CHUNK] = torch.zeros(env.full_action_spec[CHUNK].shape) if chunk is None else chunk
    return env.step(td)["next"]


@pytest.mark.parametrize(
    ("make", "is_solved"),
    [
        (lambda: clock_env(Clock(solved_at=1), image_key="camera"), True),
        (renamed_env, True),
        (lambda: clock_env("Pendulum-v1", state_key="observation", success="done"), False),
        (lambda: ChunkEnv(ToyVLAEnv(2, 4, success_steps=2), chunk_size=4), False),
    ],
    ids=["gymnasium", "transformed", "id", "torchrl"],
)
def test_specs(make, is_solved):
    env = make()
    check_env_specs(env)
    specs = describe_env(env)
    assert specs.chunk_size == env.chunk_size and specs.has_success
    assert decide(env, env.reset())["success"] == is_solved
    env.close()
    assert env.base_env.is_closed


@pytest.mark.parametrize(
    ("base", "settings", "decisions"),
    [
        # reward, success, executed env steps and end of each decision
        ({"ends_at": 5}, {}, [(10, False, 4, None), (5, False, 1, ENDS)]),
        ({"ends_at": 6, "solved_at": 6}, {}, [(10, False, 4, None), (11, True, 2, ENDS)]),
        ({"solved_at": 2, "limit": 3}, {}, [(6, True, 3, CUT)]),
        ({"solved_at": 4}, {"max_episode_steps": 5}, [(10, True, 4, None), (5, False, 1, CUT)]),
        ({"ends_at": 4}, {"replan_interval": 3}, [(6, False, 3, None), (4, False, 1, ENDS)]),
        ({"ends_at": 4}, {"max_episode_steps": 4}, [(10, False, 4, ENDS)]),
    ],
)
def test_a_decision_is_the_sum_of_the_env_steps_that_were_executed(base, settings, decisions):
    env = clock_env(Clock(**base), **settings)
    for _ in range(2):  # a reset starts anew
        td, total = env.reset(), 0
        for reward, success, num_executed, end in decisions:
            td = decide(env, td)
            total += num_executed
            assert (td["reward"], td["success"]) == (reward, success)
            assert td["observation", "state"] == total
            assert td["action_is_pad"].tolist() == [k >= num_executed for k in range(4)]
            assert {key for key in ("terminated", "truncated") if td[key]} == {end} - {None}
            assert td["done"] == (end is not None)


def test_returns_and_successes_are_those_of_the_single_steps():
    base, single = (gym.wrappers.TimeLimit(Reach(), 12) for _ in range(2))
    env = ChunkEnv(base, chunk_size=3)
    generator = torch.Generator().manual_seed(0)
    num_inside = num_solved = 0
    for seed in range(200):
        env.set_seed(seed)
        td, (observed, _) = env.reset(), single.reset(seed=seed)
        ours = theirs = 0.0
        over = False
        while not over:
            assert (td["observation", "image"].permute(1, 2, 0).numpy() == observed).all()
            chunk = torch.rand(3, 2, generator=generator) * 2 - 1
            for number, action in enumerate(chunk.numpy()):
                observed, reward, solved, truncated, _ = single.step(action)
                theirs, over = theirs + reward, solved or truncated
                num_inside += solved and number < 2
                if over:
                    break
            td = decide(env, td, chunk)
            ours += float(td["reward"])
            assert td["done"] == over
        assert ours == theirs == float(td["success"])
        num_solved += int(ours)
    assert num_solved > num_inside > num_solved / 2 > 10


@pytest.mark.parametrize("image_shape", [(4, 6, 3), (3, 4, 6)])
def test_cameras_and_state(image_shape):
    base, cameras = Clock(image_shape=image_shape), {"image_key": ["camera", "camera"]}
    settings = {"state_key": ["state", "goal"], "success": lambda td: td["reward"] > 1}
    env = ChunkEnv(base, chunk_size=2, **cameras, **settings)
    td = env.reset()
    assert td["observation", "state"].tolist() == [0.0, 7.0, 8.0]
    assert td["observation", "state"].dtype == torch.float32
    image = torch.arange(72, dtype=torch.uint8).view(image_shape)
    image = image.permute(2, 0, 1) if image_shape[2] == 3 else image
    assert torch.equal(td["observation", "image"], image)
    assert torch.equal(td["observation", "wrist_image"], image)
    assert decide(env, td)["success"], "the second env step is rewarded with 2"
    named = ChunkEnv(base, chunk_size=2, image_key={"top": "camera"}, success="terminated")
    assert list(named.reset()["observation"].keys()) == ["top"]
    spec = env.full_action_spec[CHUNK]
    assert spec.shape == (2, 2) and spec.dtype == torch.float32
    assert spec.space.low.tolist() == [[-1, -2]] * 2 and spec.space.high.tolist() == [[1, 2]] * 2


class Renders(gym.Env):
    """Observes numbers alone; the first pixel of its frames counts the calls of ``render()``."""

    render_mode = "rgb_array"
    observation_space = gym.spaces.Box(-1, 1, (3,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)

    def __init__(self, frames=None):
        self.num_frames, self.frames = 0, frames

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(3, np.float32), {"language_instruction": f"scene {seed}"}

    def step(self, action):
        return np.ones(3, np.float32), 0.0, False, False, {"success": np.float64(action[0])}

    def render(self):
        self.num_frames += 1
        frame = np.full((4, 6, 3), self.num_frames, np.uint8)
        return frame[::-1] if self.frames is None else self.frames  # as renderers do, upside down


class Observes(Renders):
    """Observes what it is given, by name."""

    render_mode = None

    def __init__(self, **observed):
        super().__init__()
        self.observed = {name: np.asarray(value) for name, value in observed.items()}
        spaces = {
            name: gym.spaces.Box(0, 255, value.shape, value.dtype)
            for name, value in self.observed.items()
        }
        self.observation_space = gym.spaces.Dict(spaces)

    def reset(self, *, seed=None, options=None):
        return dict(self.observed), super().reset(seed=seed)[1]

    def step(self, action):
        return dict(self.observed), *super().step(action)[1:]


FRAME = np.zeros((4, 6, 3), np.uint8)


@pytest.mark.parametrize(
    ("make", "observed"),
    [
        (Clock, {"image": [3, 4, 6], "state": [7.0, 8.0, 0.0]}),
        (Reach, {"image": [3, 16, 16]}),
        (Renders, {"image": [3, 4, 6], "state": [0.0, 0.0, 0.0]}),
        (lambda: gym.wrappers.AddRenderObservation(Renders()), {"image": [3, 4, 6]}),
        (
            lambda: Observes(image=FRAME, wrist_image=FRAME, is_success=np.float32([1])),
            {"image": [3, 4, 6], "wrist_image": [3, 4, 6]},
        ),
        (lambda: Observes(joints=np.float64([[1, 2]]), lamp=np.int64([3])), {"state": [1.0, 2, 3]}),
    ],
)
def test_what_is_observed_and_solved_by_default(make, observed):
    env = ChunkEnv(make())
    td = env.reset()["observation"]
    assert set(td.keys()) == set(observed)
    for name, expected in observed.items():
        assert (td[name].tolist() if name == "state" else list(td[name].shape)) == expected
    check_env_specs(env)


def test_chunks_are_as_long_as_the_policys_unless_it_is_said():
    env = ChunkEnv(Clock(ends_at=8))
    specs = describe_env(env)
    assert (specs.chunk_size, specs.action_dim, specs.action_bounds) == (-1, 2, (-2.0, 2.0))
    td = env.reset()
    for num_env_steps, is_pad in ((5, [False] * 5), (4, [False] * 3 + [True])):
        td = decide(env, td, torch.zeros(num_env_steps, 2))
        assert td["action_is_pad"].tolist() == is_pad
    assert td["terminated"] and td["reward"] == 6 + 7 + 8
    with pytest.raises(ValueError, match=r"shape \[-1, 2\], got \[4, 3\]"):
        decide(env, env.reset(), torch.zeros(4, 3))


def test_frames_are_rendered_once_a_decision():
    base = Renders()
    env = ChunkEnv(base, image_key={"top": "render"}, replan_interval=3)
    num_before = base.num_frames
    td = env.reset()
    assert list(td["observation"].keys()) == ["top"]
    assert td["observation", "top"].unique() == num_before + 1
    td = decide(env, td, torch.zeros(5, 2))
    assert td["observation", "top"].unique() == num_before + 2
    assert td["action_is_pad"].tolist() == [False] * 3 + [True] * 2


def test_words_and_success_of_the_info():
    env = ChunkEnv(Renders())
    for seed in (3, 4):
        env.set_seed(seed)
        td = env.reset()
        assert td["language_instruction"] == f"scene {seed}"
        for action in (0.0, 1.0):
            td = decide(env, td, torch.full((2, 2), action))
            assert td["language_instruction"] == f"scene {seed}" and td["success"] == action


def test_environments_that_are_chunked_are_left_alone(monkeypatch):
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    env = ChunkEnv(Clock())
    assert make_chunk_env(lambda: env) is env
    assert os.environ["MUJOCO_GL"] in ("egl", "osmesa"), "a worker has no display"
    assert isinstance(make_chunk_env(Clock), ChunkEnv)


def test_the_scene_follows_from_the_seed():
    first, second = ChunkEnv(Reach()), ChunkEnv(GymWrapper(Reach()))
    second.reset()
    images = []
    for env in (first, second):
        env.set_seed(7)
        images.append([env.reset()["observation", "image"].tolist() for _ in range(2)])
    assert images[0] == images[1] and images[0][0] != images[0][1]


class TaskEnv(ToyVLAEnv):
    """Numbered initial states, which its words name."""

    def __init__(self):
        super().__init__(2, 4, success_steps=2)
        self.state_spec = Composite(init_state_id=Unbounded((1,), dtype=torch.int64))

    def _reset(self, tensordict=None, **kwargs):
        no_id = torch.tensor([-1])
        number = no_id if tensordict is None else tensordict.get("init_state_id", no_id)
        self.instruction = f"task {int(number)}"
        return super()._reset(None, **kwargs).set("init_state_id", number)


def test_the_initial_state_reaches_the_base_environment():
    words = {"instruction": lambda td: f"go to {int(td['init_state_id'])}"}
    for settings, expected in (({}, "task 3"), (words, "go to 3")):
        env = ChunkEnv(TaskEnv(), chunk_size=4, **settings)
        td = env.reset(env.reset().empty().set("init_state_id", torch.tensor([3])))
        assert td["init_state_id"] == 3 and td["language_instruction"] == expected
        assert decide(env, td)["language_instruction"] == expected


@pytest.mark.parametrize(
    ("base", "settings", "message"),
    [
        (Clock, {"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
        (Clock, {"replan_interval": 5}, "replan_interval must be at most chunk_size=4"),
        (lambda: Clock, {}, "base_env must be an environment of TorchRL or gymnasium"),
        (lambda: ToyVLAEnv(batch_size=[2]), {}, r"size \[2\] must .* seed .*'seed' .*SerialEnv"),
        (lambda: ToyVLAEnv(batch_size=[2, 1]), {}, r"at most one batch dimension, got \[2, 1\]"),
        (lambda: ParallelEnv(2, ToyVLAEnv), {}, r"size \[2\] must .*: no ParallelEnv"),
        (vector_env, {}, r"size \[2\] must .* pass a SerialEnv"),
        (lambda: "CartPole-v1", {}, r"one action of real numbers \[A\], got 'action'"),
        (lambda: clock_env(Clock()), {}, "it is chunked already"),
        (
            Observes,
            {"state_key": None},
            r"what the policy observes, got neither. Its entries are .*'done' \[1\] bool",
        ),
        (
            lambda: Observes(wrist=FRAME, top=FRAME, state=np.float32([1])),
            {"state_key": None},
            r"which camera is which, got frames by \['top', 'wrist'\]. Name them: ChunkEnv\(env, "
            r"image_key={'image': 'top', 'wrist_image': 'wrist'}, state_key=\['observation'\]\)",
        ),
        (
            lambda: Observes(grey=np.zeros((4, 6), np.uint8)),
            {"state_key": None},
            r"uint8 \[H, W, 3\] .* got 'grey' \[4, 6\] uint8. Convert them in the base",
        ),
        (
            lambda: Observes(rgb=np.zeros((4, 6, 3), np.float32)),
            {"state_key": None},
            r"got 'rgb' \[4, 6, 3\] float32",
        ),
        (lambda: Renders([]), {"state_key": None}, "array from render.*, got list. Make .*_mode="),
        (
            lambda: TransformedEnv(GymWrapper(Clock()), MultiAction()),
            {},
            "Leave that transform out",
        ),
        (Clock, {"image_key": "rgb"}, "image_key must name a tensor .* got 'rgb'"),
        (Clock, {"image_key": "goal"}, r"uint8 \[H, W, 3\] .* got 'goal' \[1, 2\] int64"),
        (Clock, {"image_key": ["camera"] * 3}, "image_key must be a mapping"),
        (
            lambda: Clock(info="won"),
            {},
            r"got nothing by 'success'. Pass torchrl_dvla.envs.ChunkEnv.*of its info \['won'\]",
        ),
        (Clock, {"success": "solved"}, "success must give one flag .*, got nothing by 'solved'"),
        (
            Clock,
            {"success": lambda td: td["near"]},
            "success must not raise, got KeyError: .*near.*Correct the function .* Its entries are",
        ),
        (Clock, {"instruction": lambda td: td["task"]}, "instruction must not raise, got KeyError"),
        (Clock, {"instruction": ("task",)}, r"a string, got NoneType by \('task',\).* entries are"),
        (Clock, {"success": "goal"}, r"got \[1, 2\] by 'goal'"),
        (ToyVLAEnv, {"state_key": ("observation", "state")}, "'terminated' if .*entries .*'done'"),
        (Clock, {"instruction": 3}, "instruction must give a string, got int"),
    ],
)
def test_what_is_missing_is_named(base, settings, message):
    with pytest.raises((TypeError, ValueError), match=message):
        ChunkEnv(base(), **{"chunk_size": 4, "state_key": "state", **settings})


# -- batched --------------------------------------------------------------------------------------
class BatchedClock(EnvBase):
    """Three clocks of TorchRL: an episode of seed ``s`` ends with its ``s``-th env step."""

    def __init__(self, respects_step=True):
        super().__init__(batch_size=[3])
        self.respects_step = respects_step
        one, flag = Unbounded((3, 1)), Categorical(2, dtype=torch.bool, shape=(3, 1))
        self.observation_spec = Composite(state=one, success=flag, shape=(3,))
        self.state_spec = Composite(seed=Unbounded((3, 1), dtype=torch.int64), shape=(3,))
        self.action_spec = Bounded(-1.0, 1.0, (3, 2))
        self.reward_spec = one.clone()
        self.full_done_spec = Composite(done=flag.clone(), terminated=flag.clone(), shape=(3,))
        self.t, self.ends_at = torch.zeros(3, 1), torch.full((3, 1), 99.0)
        self.num_steps = 0

    def _set_seed(self, seed):
        raise AssertionError("each episode has a seed of its own")

    def _observe(self):
        over = self.t == self.ends_at
        flags = {key: over.clone() for key in ("success", "done", "terminated")}
        return TensorDict({"state": self.t.clone(), **flags}, [3])

    def _reset(self, tensordict):
        is_reset = torch.ones(3, 1, dtype=torch.bool)
        if tensordict is not None:
            is_reset = tensordict.get("_reset", is_reset)
            seeds = tensordict.get("seed", self.ends_at).float()
            self.ends_at = torch.where(is_reset, seeds, self.ends_at)
        self.t = torch.where(is_reset, 0.0, self.t)
        return self._observe()

    def _step(self, tensordict):
        mask = tensordict.get("_step", torch.ones(3, dtype=torch.bool))
        mask = mask if self.respects_step else torch.ones(3, dtype=torch.bool)
        self.num_steps += 1
        self.t = self.t + mask[:, None]
        return self._observe().set("reward", self.t.clone())


@pytest.mark.parametrize("respects_step", [True, False])
def test_each_episode_of_a_batch_ends_by_itself(respects_step):
    env = ChunkEnv(
        BatchedClock(respects_step), chunk_size=4, state_key="state", max_episode_steps=7
    )
    specs = describe_env(env)
    assert (specs.num_rollouts, specs.chunk_size, specs.action_dim) == (3, 4, 2)
    td = reset_some(env, env.reset(), [0, 1, 2], [2, 9, 5])
    td = env.step(td.set(CHUNK, torch.zeros(3, 4, 2)))["next"]
    # The first ends in the middle of its chunk: 1 + 2, against 1 + 2 + 3 + 4.
    assert td["reward"].tolist() == [[3], [10], [10]]
    assert td["observation", "state"].tolist() == [[2], [4], [4]], "its last one"
    assert td["action_is_pad"].sum(-1).tolist() == [2, 0, 0]
    assert td["terminated"].tolist() == td["success"].tolist() == [[True], [False], [False]]
    only_last = torch.tensor([False, False, True])
    td = reset_some(env, td, [0], [3])
    assert td["observation", "state"].tolist() == [[0], [4], [4]]
    td = env.step(td.set(CHUNK, torch.zeros(3, 4, 2)).set("_step", only_last))["next"]
    assert td["reward"].tolist() == [[0], [0], [5]]
    assert td["action_is_pad"].sum(-1).tolist() == [4, 4, 3]
    assert td["observation", "state"].tolist() == [[0], [4], [5]], "who takes no step stays"
    if respects_step:
        td = reset_some(env, td, [2], [99])
        td = env.step(td.set(CHUNK, torch.zeros(3, 4, 2)))["next"]
        assert td["terminated"].tolist() == [[True], [False], [False]]
        assert td["truncated"].tolist() == [[False], [True], [False]], "after 7 env steps"
        assert td["done"].tolist() == [[True], [True], [False]]
        assert td["reward"].tolist() == [[6], [5 + 6 + 7], [10]]


def test_a_batch_takes_no_env_step_when_all_of_its_episodes_are_over():
    base = BatchedClock()
    env = ChunkEnv(base, chunk_size=4, state_key="state")
    td = reset_some(env, env.reset(), [0, 1, 2], [1, 2, 2])
    before = base.num_steps
    env.step(td.set(CHUNK, torch.zeros(3, 4, 2)))
    assert base.num_steps == before + 2


class ReachState(Reach):
    observation_space = gym.spaces.Dict(
        {
            "image": Reach.observation_space,
            "state": gym.spaces.Box(-1, 1, (4,), np.float32),
        }
    )

    def draw(self):
        state = np.concatenate([self.position, self.goal]).astype(np.float32)
        return {"image": super().draw(), "state": state}


def words(td):
    return [f"reach from {float(x):.2f}" for x in td["observation"].reshape(-1, 4)[:, 0]]


@pytest.mark.parametrize(
    ("make_base", "settings"),
    [
        (lambda: GymWrapper(ReachState()), {"success": "terminated", "image_key": "image"}),
        (lambda: GymWrapper(ReachState()), {"success": lambda td: td["reward"] > 0}),
        (lambda: ToyVLAEnv(2, 4, success_steps=2, success_tol=0.5), {}),
    ],
    ids=["gymnasium", "callable", "torchrl"],
)
def test_a_batch_of_single_environments_plays_as_they_do(make_base, settings):
    if "success" in settings:
        settings = {"state_key": "observation", "max_episode_steps": 12, **settings}
        several = {"instruction": words}
        one = {"instruction": lambda td: words(td)[0]}
    else:
        several = one = {}
    batched = ChunkEnv(SerialEnv(3, make_base), chunk_size=3, **settings, **several)
    check_env_specs(batched)
    singles = [ChunkEnv(make_base(), chunk_size=3, **settings, **one) for _ in range(3)]
    generator = torch.Generator().manual_seed(0)
    num_over = play_alike(
        batched, singles, lambda td: torch.rand(3, 3, 2, generator=generator) * 2 - 1, 20
    )
    assert num_over >= 5
    for env in (batched, *singles):
        env.close()


def test_an_id_of_another_package(tmp_path, monkeypatch):
    (tmp_path / "reaching.py").write_text(
        "import gymnasium\n"
        "gymnasium.register('Reaching-v0', entry_point='test.envs.test_chunk_env:Clock')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        ValueError, match="base_env must be an id .*, got 'Reaching-v0'.*'package:Id'"
    ):
        ChunkEnv("Reaching-v0")
    for env in (
        ChunkEnv("reaching:Reaching-v0"),
        env_factories("reaching:Reaching-v0")["default"](),
    ):
        assert sorted(env.reset()["observation"].keys()) == ["image", "state"]
