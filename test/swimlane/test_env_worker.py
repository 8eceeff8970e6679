# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The worker's environments, driven in this process."""

from __future__ import annotations

import contextlib
import functools
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import Pipe
from typing import ClassVar

import cloudpickle
import pytest
import torch
from tensordict import NonTensorData, NonTensorStack, TensorDict
from torchrl.data import Binary, Bounded, Categorical, Composite, NonTensor, Unbounded
from torchrl.envs import (
    EnvBase,
    MultiAction,
    RewardSum,
    SerialEnv,
    StepCounter,
    TransformedEnv,
)
from torchrl.envs.custom import ToyVLAEnv

from torchrl_dvla.data import decision_layout
from torchrl_dvla.envs import ToyChunkEnv
from torchrl_dvla.memory import EnvironmentPool
from torchrl_dvla.swimlane import env_worker, messages
from torchrl_dvla.swimlane.env_worker import EnvWorker, describe_env, run_env_worker
from torchrl_dvla.swimlane.messages import Refused, RefusedError, Reset, ResetDone, Step, StepDone
from torchrl_dvla.testing import CountingChunkEnv

make_env = functools.partial(CountingChunkEnv, chunk_size=4, max_env_steps=10)
STATE = ("observation", "state")


def step(env_index, row, next_row):
    """A command about pages in their first lease."""
    return Step(env_index, row, generation=0, next_row=next_row, next_generation=0)


def reset(env_index, init_state_id, row):
    return Reset(env_index, "default", 3, init_state_id, row, generation=0)


def layout_of(env):
    specs = describe_env(env)
    observation = {key: (shape, dtype) for key, shape, dtype in specs.observation}
    return decision_layout(observation, chunk_size=specs.chunk_size, action_dim=specs.action_dim)


class OneByOne(EnvWorker):
    """A worker that takes one command at a time, and raises what it refuses."""

    def reset(self, command):
        return self._only(super().reset([command]))

    def step(self, command):
        return self._only(super().step([command]))

    @staticmethod
    def _only(events):
        [event] = events
        if isinstance(event, Refused):
            raise RefusedError(event.reason)
        return event


@contextlib.contextmanager
def working(make, num_envs=1, rows_per_page=4):
    """A worker with a page for each of its environments, and the rows."""
    with EnvironmentPool(layout_of(make()), num_envs, rows_per_page) as pool:
        for _ in range(num_envs):
            pool.lease("w")
        worker = OneByOne({"default": make}, num_envs)
        worker.use_pool(pool.worker_view())
        yield worker, pool.rows
        worker.close()


@pytest.fixture
def worker_and_rows():
    with working(make_env, num_envs=2) as worker_and_rows:
        yield worker_and_rows


def test_observations_land_in_the_rows_that_were_named(worker_and_rows):
    worker, rows = worker_and_rows
    scene = make_env().scene(3, 1)
    assert worker.reset(reset(0, 1, row=6)) == ResetDone(0, make_env().instruction)
    assert rows["observation", "image"][6, 0, 0, 0] == scene.scene_id
    rows["vla_action", "chunk"][6] = torch.tensor(scene.target)
    assert worker.step(step(0, row=6, next_row=2)) == StepDone(0, False, False, 0.0, 4)
    assert rows["observation", "image"][2, :, 0, 0].tolist() == [scene.scene_id, 1, 4]
    rows["vla_action", "chunk"][2] = torch.tensor(scene.target)
    # 6 right steps of 10 are a success: it comes with the second step of the second chunk.
    assert worker.step(step(0, row=2, next_row=3)) == StepDone(0, True, True, 1.0, 2)
    assert rows["action_is_pad"][2].tolist() == [False, False, True, True]
    assert rows["next", "terminated"][2] and not rows["next", "truncated"][2]


def test_two_environments_of_one_worker_do_not_mix(worker_and_rows):
    worker, rows = worker_and_rows
    with pytest.raises(RuntimeError, match="must be reset"):
        worker.step(step(0, row=0, next_row=1))
    worker.reset(reset(0, 1, row=0))
    worker.reset(reset(1, 2, row=4))
    env = make_env()
    rows["vla_action", "chunk"][0] = torch.tensor(env.scene(3, 1).target)
    # One ends with its time, for it has no next row; the other goes on.
    assert worker.step(step(1, row=4, next_row=-1)) == StepDone(1, True, False, 0.0, 4)
    assert worker.step(step(0, row=0, next_row=1)) == StepDone(0, False, False, 0.0, 4)
    assert rows["next", "truncated"][:5, 0].tolist() == [False] * 4 + [True]
    assert rows["next", "done"][4] and not rows["next", "terminated"][4]
    assert rows["observation", "image"][1, :, 0, 0].tolist() == [env.scene(3, 1).scene_id, 1, 4]
    worker.reset(reset(1, 2, row=4))
    worker.step(step(1, row=4, next_row=5))
    worker.step(step(0, row=1, next_row=2))
    assert rows["observation", "image"][2, 0, 0, 0] == env.scene(3, 1).scene_id
    assert rows["observation", "image"][5, 0, 0, 0] == env.scene(3, 2).scene_id


class NamingEnv(CountingChunkEnv):
    """Says by a hash which initial state it plays: 100 and its id."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.observation_spec["init_state_hash"] = Unbounded((1,), dtype=torch.int64)

    def _observe(self, *args, **kwargs):
        out = super()._observe(*args, **kwargs)
        return out | {"init_state_hash": 100 + out["init_state_id"]}


def test_the_hash_of_the_initial_state_comes_with_the_reset():
    with working(functools.partial(NamingEnv, chunk_size=4, max_env_steps=10)) as (worker, _):
        assert worker.reset(reset(0, 7, row=0)).init_state_hash == 107
        assert worker.reset(reset(0, 8, row=0)).init_state_hash == 108
    # of a batch, that of each entry; -1 where the environment does not say
    batch = TensorDict({"init_state_hash": torch.tensor([[5], [6], [7]])}, [3])
    assert env_worker._hashes(batch, [2, 0]) == [7, 5]
    assert env_worker._hashes(TensorDict({}, [3]), [2, 0]) == [-1, -1]
    assert env_worker._hashes(TensorDict({}), None) == [-1]


class BufferedEnv(CountingChunkEnv):
    """Draws into one buffer, step after step, as a renderer does; the buffer may be shared."""

    def __init__(self, *, buffer=None, **kwargs):
        super().__init__(**kwargs)
        self._buffer = torch.zeros(3, *self.image_size, dtype=torch.uint8)
        self._buffer = self._buffer if buffer is None else buffer

    def _observe(self, success, num_executed):
        out = super()._observe(success, num_executed)
        out["observation"]["image"] = self._buffer.copy_(out["observation"]["image"])
        return out


@pytest.mark.parametrize("is_shared", [False, True])
def test_what_a_step_returns_is_written_before_the_next_step(is_shared):
    one = torch.zeros(3, 16, 16, dtype=torch.uint8) if is_shared else None
    factory = functools.partial(BufferedEnv, buffer=one, chunk_size=4, max_env_steps=40)
    scenes = [factory().scene(3, 1).scene_id, factory().scene(3, 2).scene_id]
    with working(factory, num_envs=2, rows_per_page=8) as (worker, rows):
        images = rows["observation", "image"][:, :2, 0, 0]  # scene, number of the decision
        for env_index in range(2):
            row = 8 * env_index
            worker.reset(reset(env_index, 1 + env_index, row=row))
            assert images[row].tolist() == [scenes[env_index], 0], "a reset is written at once"
        for number in range(4):
            row, other = number, 8 + number
            worker.step(step(0, row, next_row=row + 1))
            worker.step(step(1, other, next_row=other + 1))
        assert images[1:5].tolist() == [[scenes[0], number] for number in range(1, 5)]
        assert images[9:13].tolist() == [[scenes[1], number] for number in range(1, 5)]


class WrongEnv(CountingChunkEnv):
    """Returns something else than it should at every step."""

    def __init__(self, wrong, **kwargs):
        super().__init__(**kwargs)
        self.wrong = wrong

    def _step(self, tensordict):
        out = super()._step(tensordict)
        for key, value in self.wrong.items():
            out.pop(key)
            if value is not None:
                out.set(key, value)
        return out


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"reward": torch.tensor([torch.nan])}, "reward must be finite, got tensor\\(\\[nan\\]\\)"),
        ({"reward": torch.ones(1).double() * 1e39}, r"must be finite, got tensor\(\[1.0000e\+39\]"),
        ({"reward": NonTensorData("one")}, "reward must be finite, got NonTensorData"),
        ({"reward": None}, "'reward', .* must have the shape of their specs, got another, or none"),
        ({"reward": torch.tensor([complex(0, torch.nan)])}, "reward must be finite, got tensor"),
        ({"reward": torch.ones(2)}, "'reward', .* shape of their specs, .*\\[1\\].* of size 2"),
        ({"success": None}, "'success' must be one torch.bool, got None"),
        ({"success": torch.tensor([0.5])}, r"'success' must be one torch.bool, got tensor\(\[0.5"),
        ({"action_is_pad": torch.zeros(3).bool()}, r"must be \[4\] torch.bool, got \[3\]"),
        ({"observation": torch.zeros(4)}, r"'image'\) must be in what is written, got none"),
        ({STATE: torch.full((4,), torch.inf)}, r"must be finite, got \[inf, inf"),
        ({STATE: torch.zeros(9)}, r"must be \[4\] torch.float32 .*got \[9\]"),
        ({"language_instruction": NonTensorData(["a", "list"])}, "must be a string, got list"),
        ({"language_instruction": NonTensorStack("a", "b")}, "a string, got NonTensorStack"),
    ],
)
def test_what_no_learner_may_see_is_refused_by_name_and_ends_the_rollout(wrong, message):
    factory = functools.partial(WrongEnv, wrong, chunk_size=4, max_env_steps=10)
    with working(factory) as (worker, _):
        worker.reset(reset(0, 1, row=0))
        where = ".* environment 0 of task 'default', at step 1 of the rollout"
        with pytest.raises(RefusedError, match=message + where):
            worker.step(step(0, row=0, next_row=1))
        with pytest.raises(RuntimeError, match="must be reset before it is stepped"):
            worker.step(step(0, row=0, next_row=1))
        assert worker.reset(reset(0, 1, row=0)).env_index == 0, "it goes on"


def test_a_wrong_shape_inside_of_a_step_is_not_put_down_to_the_reward(worker_and_rows):
    worker, _ = worker_and_rows
    worker.reset(reset(0, 1, row=0))
    worker._open[0].built.env._step = lambda _: torch.zeros(6).view(4)
    with pytest.raises(RuntimeError, match=r"^shape '\[4\]' is invalid for input of size 6"):
        worker.step(step(0, row=0, next_row=1))


def test_an_instruction_that_changes_travels_with_the_step():
    wrong = {"language_instruction": NonTensorData("turn back")}
    factory = functools.partial(WrongEnv, wrong, chunk_size=4, max_env_steps=12)
    with working(factory) as (worker, _):
        assert worker.reset(reset(0, 1, row=0)).instruction == make_env().instruction
        assert worker.step(step(0, row=0, next_row=1)).instruction == "turn back"
        assert worker.step(step(0, row=1, next_row=2)).instruction is None, "it stays"


def test_rows_of_pages_that_are_not_leased_are_refused():
    worker = OneByOne({"default": make_env}, num_envs=1)
    with pytest.raises(RuntimeError, match="use_pool must be called before reset"):
        worker.reset(reset(0, 1, row=0))
    with EnvironmentPool(layout_of(make_env()), num_pages=2, rows_per_page=2) as pool:
        worker.use_pool(pool.worker_view())
        with pytest.raises(RuntimeError, match="Row 0 .* page 0, which is free"):
            worker.reset(reset(0, 1, row=0))
        first, second = pool.lease("w"), pool.lease("w")
        worker.reset(Reset(0, "default", 3, 1, row=0, generation=first.generation))
        before = pool.rows.clone()
        pool.seal([first], num_rows=1)
        # The collector's mistake: the chunk of a sealed row is still to be executed.
        with pytest.raises(RuntimeError, match="Row 0 .* page 0, which is sealed"):
            worker.step(Step(0, 0, first.generation, 2, second.generation))
        pool.free([second])
        assert pool.lease("other").generation == second.generation + 1
        with pytest.raises(RuntimeError, match="Row 2 .* page 1, which is leased anew"):
            worker.reset(Reset(0, "default", 3, 1, row=2, generation=second.generation))
        assert (pool.rows == before).all(), "a refused write changes nothing"
        pool.check()
    worker.close()


class CountedEnv(ToyVLAEnv):
    """Observes its padding, but is not chunked."""

    def __init__(self):
        super().__init__()
        self.observation_spec["action_is_pad"] = Categorical(2, dtype=torch.bool, shape=(4,))


def make_with(change):
    """The counting environment with other specs."""
    env = make_env()
    env.set_spec_lock_(False)
    change(env)
    return env


def observe(key, spec):
    return lambda: make_with(lambda env: env.observation_spec.__setitem__(key, spec))


def put(name, **specs):
    return lambda: make_with(lambda env: setattr(env, name, Composite(**specs)))


def act(spec):
    return put("full_action_spec", vla_action=Composite(chunk=spec))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: None, "must return a TorchRL environment, got NoneType"),
        (observe(STATE, Unbounded(4, dtype=torch.bfloat16)), "'state.*bfloat16"),
        (
            observe(("observation", "note"), NonTensor(shape=())),
            r"\('observation', 'note'\) of NonTensor.*id in a table",
        ),
        (observe(STATE, Unbounded((0, 3))), r"'state.*positive sizes, got \[0, 3\]"),
        (observe(STATE, Unbounded((-1, 3))), r"'state.*static shape.*\[-1, 3\]"),
        (observe("observation", Composite()), "group of tensors under 'observation'"),
        (observe("action_mask", Binary(8)), r"under 'observation', got .*mask.*RenameTransform"),
        (
            observe(STATE, Unbounded(4, device="meta")),
            "on the CPU, where .*'state'.* on meta. .*Cast",
        ),
        (put("observation_spec", observation=Unbounded(4)), "group of tensors under 'observation'"),
        (put("full_reward_spec", pay=Unbounded(1)), "one 'reward' at the root"),
        (put("full_done_spec", done=Binary(3)), "one 'done' at the root"),
        (act(Unbounded(())), r"floating point \[chunk_size, action_dim\], got \[\]"),
        (act(Unbounded((4, 2), dtype=torch.int64)), r"floating .*\[4, 2\] torch.int64"),
        (act(Bounded(1.0, torch.nan, (4, 2))), r"low <= high, got \[1.0"),
        # what would be learned from wrongly
        (ToyVLAEnv, "Wrap a single-step environment in torchrl_dvla.envs.ChunkEnv"),
        (
            lambda: TransformedEnv(ToyVLAEnv(), MultiAction.from_vla()),
            r"observes 'action_is_pad' .* got none: .*ChunkEnv, without MultiAction",
        ),
        (
            lambda: TransformedEnv(
                TransformedEnv(CountedEnv(), MultiAction.from_vla(stack_rewards=False)),
                StepCounter(4),
            ),
            "stack_rewards of MultiAction must be True, got False: .*ChunkEnv",
        ),
    ],
)
def test_environments_that_no_row_can_hold_are_refused_by_name(make, message):
    assert "language_instruction" in list(make_env().observation_spec)  # it has a side table
    describe_env(make_env())
    with pytest.raises((TypeError, ValueError), match=message):
        describe_env(make())


# -- numbered initial states, bounds of actions ---------------------------------------------------
def twice(env):
    inner = TransformedEnv(env, StepCounter())
    return TransformedEnv(inner, RewardSum(), auto_unwrap=False)


class ForgetfulEnv(TransformedEnv):
    """A wrapper that does not pass the tensordict of a reset on."""

    def _reset(self, tensordict=None, **kwargs):
        return super()._reset(None, **kwargs)


make_undeclared = put("state_spec")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (make_env, None),
        (lambda: TransformedEnv(make_env(), StepCounter()), None),
        (lambda: twice(make_env()), None),
        (make_undeclared, "task 'default' must declare 'init_state_id' in its state_spec to start"),
        (lambda: TransformedEnv(make_undeclared(), StepCounter()), "must declare 'init_state_id'"),
        (lambda: ForgetfulEnv(make_env(), StepCounter()), "the 1 that was asked for, got -1 from"),
    ],
)
def test_the_initial_state_that_is_asked_for_is_played_or_refused(make, message):
    with working(make) as (worker, rows):
        worker.reset(reset(0, -1, row=0))  # any of them may sample
        assert describe_env(make()).has_init_states == (message is None or "asked" in message)
        if message is not None:
            with pytest.raises(RefusedError, match=message):
                worker.reset(reset(0, 1, row=0))
        else:
            worker.reset(reset(0, 1, row=0))
            image = rows["observation", "image"]
            assert image[0, 0, 0, 0] == make_env().scene(3, 1).scene_id
            worker.step(step(0, row=0, next_row=1))
            assert image[1, :, 0, 0].tolist()[:2] == [make_env().scene(3, 1).scene_id, 1]


class RecordingEnv(CountingChunkEnv):
    """Keeps the chunks that it is given."""

    chunks: ClassVar[list] = []

    def _step(self, tensordict):
        self.chunks.append(tensordict["vla_action", "chunk"].tolist())
        return super()._step(tensordict)


class ClosingEnv(CountingChunkEnv):
    """Says when it is closed."""

    closed: ClassVar[list] = []

    def __init__(self, name):
        super().__init__(chunk_size=4, max_env_steps=10)
        self._name = name

    def close(self, *, raise_if_closed=True):
        self.closed.append(self._name)
        super().close(raise_if_closed=raise_if_closed)


def test_the_environment_of_the_task_played_last_is_closed_for_another():
    ClosingEnv.closed.clear()
    names = ("a", "b", "c")
    worker = EnvWorker({n: functools.partial(ClosingEnv, n) for n in names}, 2, max_tasks=2)
    first = worker.build(0, "a")
    worker.build(0, "b")
    worker.build(1, "c")
    worker.build(1, "b")
    assert ClosingEnv.closed == [], "two tasks each"
    worker.build(0, "c")
    assert ClosingEnv.closed == ["b"]
    assert worker.build(0, "a") is first, "whose turn came next"
    worker.build(0, "b")
    assert ClosingEnv.closed == ["b", "a"]
    worker.close()
    assert sorted(ClosingEnv.closed) == ["a", "b", "b", "b", "c", "c"]


@pytest.mark.parametrize(("max_tasks", "num_built"), [(1, 30), (5, 20), (8, 14), (9, 12), (10, 10)])
def test_tasks_in_turn_find_most_of_what_is_kept(max_tasks, num_built):
    built = []
    factories = {
        str(task): lambda task=task: built.append(task) or ClosingEnv(task) for task in range(10)
    }
    worker = EnvWorker(factories, 1, max_tasks=max_tasks)
    for group in range(30):
        worker.build(0, str(group % 10))
    worker.close()
    assert len(built) == num_built


def test_an_environment_with_a_rollout_under_way_is_not_closed():
    ClosingEnv.closed.clear()
    factories = {n: functools.partial(ClosingEnv, n) for n in ("a", "b")}
    with EnvironmentPool(layout_of(factories["a"]()), 1, rows_per_page=4) as pool:
        pool.lease("w")
        worker = OneByOne(factories, 1, max_tasks=1)
        worker.use_pool(pool.worker_view())
        worker.reset(Reset(0, "a", 0, 1, 0, generation=0))
        worker.build(0, "b")
        assert ClosingEnv.closed == []
        worker._open[0] = None
        worker.close()


@pytest.mark.parametrize("bounds", [Bounded(-1.0, 1.0, (4, 1)), Unbounded((4, 1))])
def test_actions_outside_of_the_action_spec_are_clipped_and_counted(bounds):
    def make():
        env = RecordingEnv(action_dim=1, chunk_size=4, max_env_steps=6, required_fraction=1.0)
        env.set_spec_lock_(False)
        env.full_action_spec = Composite(vla_action=Composite(chunk=bounds))
        return env

    RecordingEnv.chunks.clear()
    with working(make) as (worker, rows):
        worker.reset(reset(0, 1, row=0))
        written = torch.tensor([[0.5], [1.0], [-7.0], [1e30]])
        rows["vla_action", "chunk"][:2] = written
        events = [worker.step(step(0, row, next_row=row + 1)) for row in range(2)]
        is_bounded = float(bounds.space.high.max()) == 1.0
        executed = [[0.5], [1.0], [-1.0], [1.0]] if is_bounded else written.tolist()
        assert RecordingEnv.chunks == [executed, executed]
        # Of the second chunk two env steps are executed, within the bounds.
        assert [event.num_clipped for event in events] == [2 * is_bounded, 0]
        assert torch.equal(rows["vla_action", "chunk"][0], written), "what the policy wrote"


@pytest.fixture
def serve():
    """Serves an environment factory from a thread, and gives the pipe to it."""
    workers = []

    def start(factory, num_envs=2):
        ours, theirs = Pipe()
        args = (theirs, cloudpickle.dumps({"default": factory}), "default", num_envs)
        workers.append(ThreadPoolExecutor(1).submit(run_env_worker, *args))
        return ours

    yield start
    for worker in workers:
        assert isinstance(worker.exception(60), SystemExit | None)


@pytest.fixture
def pool():
    with EnvironmentPool(layout_of(make_env()), num_pages=2, rows_per_page=4) as pool:
        pool.lease("w"), pool.lease("w")
        yield pool


@pytest.mark.parametrize("send_after_s, num_messages", [(1e6, 1), (0.0, 2)])
def test_cheap_events_share_a_message_and_long_ones_do_not(
    monkeypatch, serve, pool, send_after_s, num_messages
):
    monkeypatch.setattr(env_worker, "_SEND_AFTER_S", send_after_s)
    ours = serve(make_env)
    assert ours.recv() == describe_env(make_env())
    ours.send(messages.UsePool(pool.worker_view()))
    ours.send(messages.WorkerCommands([], [reset(0, 0, row=0)]))
    assert ours.recv().events == [ResetDone(0, make_env().instruction)]
    ours.send(messages.WorkerCommands([step(0, row=0, next_row=1)], [reset(1, 1, row=4)]))
    received = [ours.recv() for _ in range(num_messages)]
    events = [event for message in received for event in message.events]
    assert events == [StepDone(0, False, False, 0.0, 4), ResetDone(1, make_env().instruction)]
    assert [name for message in received for name, _, _ in message.spans] == ["step", "reset"]
    ours.send(messages.Stop())
    with pytest.raises(EOFError):
        ours.recv()


class BreakingEnv(CountingChunkEnv):
    """Returns NaN in one scene, and raises in another."""

    def _observe(self, success, num_executed):
        out = super()._observe(success, num_executed)
        if self.num_decisions and self.current_scene == self.scene(3, 2):
            out["observation"]["state"][0] = torch.nan
        if self.num_decisions and self.current_scene == self.scene(3, 3):
            raise OSError("the simulator is gone")
        return out


def test_a_failure_is_not_put_down_to_the_environments_before_it(monkeypatch, serve, pool):
    monkeypatch.setattr(env_worker, "_SEND_AFTER_S", 1e6)  # a busy machine sends no sooner
    ours = serve(functools.partial(BreakingEnv, chunk_size=4, max_env_steps=10))
    ours.recv()
    ours.send(messages.UsePool(pool.worker_view()))
    ours.send(messages.WorkerCommands([], [reset(0, 1, row=0), reset(1, 2, row=4)]))
    assert len(ours.recv().events) == 2
    ours.send(messages.WorkerCommands([step(0, row=0, next_row=1), step(1, row=4, next_row=5)], []))
    done, refused = ours.recv().events
    assert done == StepDone(0, False, False, 0.0, 4)
    assert isinstance(refused, Refused) and refused.env_index == 1
    assert "'state') must be finite" in refused.reason, "its rollout ends, not the worker"
    ours.send(messages.WorkerCommands([], [reset(1, 3, row=4)]))
    assert len(ours.recv().events) == 1
    ours.send(messages.WorkerCommands([step(0, row=1, next_row=2), step(1, row=4, next_row=5)], []))
    assert [event.env_index for event in ours.recv().events] == [0]
    failure = ours.recv()
    assert isinstance(failure, messages.Failed) and "the simulator is gone" in failure.traceback
    assert pool.rows["observation", "image"][[1, 5], 1, 0, 0].tolist() == [1, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (act(Unbounded((2, 2))), r"\('vla_action', 'chunk'\) .*\[4, 2\].*, got .*\[2, 2\]"),
        (observe(STATE, Unbounded(9)), r"\('observation', 'state'\) .*\[4\].*, got .*\[9\]"),
        (observe(("observation", "pose"), Unbounded(3)), r"'pose'\) None, got .*\[3\]"),
    ],
)
def test_an_environment_of_another_task_must_fit_the_rows(worker_and_rows, change, message):
    worker, _ = worker_and_rows
    worker._factories = {"other": change}
    with pytest.raises(RefusedError, match=f"^All env.*{message}.* task 'other', at the reset"):
        worker.reset(reset(0, 1, row=0)._replace(task="other"))


# -- batched environments -------------------------------------------------------------------------
class Clocks(EnvBase):
    """Three clocks in one environment: an episode of seed ``s`` ends after ``s`` env steps.

    Its state is ``[s, t]``, its reward the number of env steps, its words name it. From 20 on it
    returns NaN after ``s - 20`` env steps.
    """

    def __init__(self, size=3):
        super().__init__(batch_size=[size])
        flag, one = Categorical(2, dtype=torch.bool, shape=(size, 1)), Unbounded((size, 1))
        ids = Unbounded((size, 1), dtype=torch.int64)
        self.observation_spec = Composite(
            observation=Composite(state=Unbounded((size, 2)), shape=(size,)),
            language_instruction=NonTensor((size,), example_data=""),
            success=flag.clone(),
            action_is_pad=Categorical(2, dtype=torch.bool, shape=(size, 4)),
            init_state_id=ids,
            shape=(size,),
        )
        chunk = Composite(chunk=Bounded(0.5, 1.0, (size, 4, 1)), shape=(size,))
        self.full_action_spec = Composite(vla_action=chunk, shape=(size,))
        self.reward_spec = one
        self.full_done_spec = Composite(done=flag, terminated=flag.clone(), shape=(size,))
        self.state_spec = Composite(seed=ids.clone(), init_state_id=ids.clone(), shape=(size,))
        self.seeds, self.time = torch.zeros(size, 1).long(), torch.zeros(size, 1).long()
        #: Resets and steps: which episodes they were for, and the first action of each chunk.
        self.calls = []

    def _set_seed(self, seed):
        raise AssertionError("each episode has a seed of its own")

    def _observe(self, executed):
        late = (self.seeds > 20) & (self.time >= self.seeds - 20)
        state = torch.cat([self.seeds, self.time], -1).float()
        texts = NonTensorStack(*[f"clock {int(seed)}" for seed in self.seeds])
        over = self.time >= self.seeds
        return TensorDict(
            {
                "observation": {"state": state.masked_fill(late, torch.nan)},
                "language_instruction": texts,
                "success": over,
                "done": over.clone(),
                "terminated": over.clone(),
                "action_is_pad": torch.arange(4) >= executed,
                "init_state_id": self.ids.clone(),
            },
            self.batch_size,
        )

    def _reset(self, tensordict):
        is_reset = tensordict.get("_reset", torch.ones(*self.batch_size, 1, dtype=torch.bool))
        self.calls.append(("reset", is_reset.flatten().tolist()))
        self.seeds = torch.where(is_reset, tensordict["seed"], self.seeds)
        self.ids = tensordict["init_state_id"]
        self.time = torch.where(is_reset, 0, self.time)
        return self._observe(torch.full((*self.batch_size, 1), 4)).set("done", self.time < 0)

    def _step(self, tensordict):
        chunk = tensordict["vla_action", "chunk"]
        mask = tensordict.get("_step", torch.ones(self.batch_size, dtype=torch.bool))
        self.calls.append((mask.tolist(), chunk[:, 0, 0].tolist()))
        executed = (self.seeds - self.time).clamp(0, 4)  # also of those that take no step
        self.time = self.time + executed
        return self._observe(executed).set("reward", executed.float())


def clock(env_index, seed, row):
    return Reset(env_index, "default", seed, -1, row, generation=0)


@pytest.fixture
def clocks():
    """A worker of two batched environments of three rollouts, and the rows, four a rollout."""
    layout = decision_layout({STATE: ((2,), torch.float32)}, chunk_size=4, action_dim=1)
    with EnvironmentPool(layout, num_pages=6, rows_per_page=4) as pool:
        for _ in range(6):
            pool.lease("w")
        worker = EnvWorker({"default": Clocks}, num_envs=2)
        worker.use_pool(pool.worker_view(), num_rollouts=3)
        pool.rows["vla_action", "chunk"].fill_(0.75)
        yield worker, pool
        worker.close()


def test_specs_of_a_batched_environment_are_those_of_one_rollout():
    specs = describe_env(Clocks())
    assert specs.observation == ((STATE, (2,), torch.float32),)
    assert (specs.chunk_size, specs.action_dim, specs.num_rollouts) == (4, 1, 3)
    assert describe_env(make_env()).num_rollouts == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ToyChunkEnv(batch_size=[2, 2]), r"one batch dimension, got batch_size \[2, 2\]"),
        (
            lambda: SerialEnv(2, make_env),
            r"batch size \[2\] must declare 'seed' .*ChunkEnv\(Serial",
        ),
    ],
)
def test_batched_environments_that_cannot_be_seeded_apart_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        describe_env(make())


def test_one_step_serves_the_rollouts_of_a_batched_environment(clocks):
    worker, pool = clocks
    rows, state = pool.rows, pool.rows[STATE]
    assert worker.reset([clock(0, 9, 0), clock(1, 6, 4), clock(2, 9, 8)]) == [
        ResetDone(0, "clock 9"),
        ResetDone(1, "clock 6"),
        ResetDone(2, "clock 9"),
    ]
    assert state[[0, 4, 8]].tolist() == [[9, 0], [6, 0], [9, 0]]
    assert worker.step([step(0, 0, 1), step(1, 4, 5), step(2, 8, 9)]) == [
        StepDone(index, False, False, 4.0, 4) for index in range(3)
    ]
    assert state[[1, 5, 9]].tolist() == [[9, 4], [6, 4], [9, 4]]
    # The second ends in the middle of its chunk, the third may take no further decision.
    assert worker.step([step(0, 1, 2), step(1, 5, 6), step(2, 9, -1)]) == [
        StepDone(0, False, False, 4.0, 4),
        StepDone(1, True, True, 2.0, 2),
        StepDone(2, True, False, 4.0, 4),
    ]
    assert state[[2, 6, 10]].tolist() == [[9, 8], [0, 0], [0, 0]], "no rows after an end"
    assert rows["next", "reward"][[0, 1, 4, 5, 8, 9], 0].tolist() == [4, 4, 4, 2, 4, 4]
    assert rows["next", "terminated"][[1, 5, 9], 0].tolist() == [False, True, False]
    assert rows["next", "truncated"][[1, 5, 9], 0].tolist() == [False, False, True]
    assert rows["next", "done"][[1, 5, 9], 0].tolist() == [False, True, True]
    assert rows["next", "success"][[1, 5, 9], 0].tolist() == [False, True, False]
    assert rows["action_is_pad"][[1, 5]].sum(-1).tolist() == [0, 2]


def test_finished_rollouts_begin_anew_while_the_others_wait_between_two_decisions(clocks):
    worker, pool = clocks
    state = pool.rows[STATE]
    worker.reset([clock(0, 9, 0), clock(2, 4, 8)])  # the first reset is one of all
    env = worker.build(0, "default").env
    assert env.calls == [("reset", [True] * 3)]
    # Nobody plays the second: it takes no step, or one of zeros within the bounds.
    assert [event.done for event in worker.step([step(0, 0, 1), step(2, 8, 9)])] == [False, True]
    assert env.calls[-1] == ([True, False, True], [0.75, 0.5, 0.75])
    assert worker.reset([clock(1, 7, 4), clock(2, 5, 8)]) == [
        ResetDone(1, "clock 7"),
        ResetDone(2, "clock 5"),
    ]
    assert env.calls[-1] == ("reset", [False, True, True])
    assert state[[1, 4, 8]].tolist() == [[9, 4], [7, 0], [5, 0]], "seeds of their own"
    events = worker.step([step(0, 1, 2), step(1, 4, 5), step(2, 8, 9)])
    assert [event.num_env_steps for event in events] == [4, 4, 4]
    assert env.calls[-1][0] == [True, True, True]
    assert state[[2, 5, 9]].tolist() == [[9, 8], [7, 4], [5, 4]]
    events = worker.step([step(0, 2, 3), step(1, 5, 6), step(2, 9, 10)])
    assert [(event.done, event.num_env_steps) for event in events] == [(True, 1), (True, 3)] + [
        (True, 1)
    ]


def test_what_no_learner_may_see_ends_the_rollout_alone_of_a_batch(clocks):
    worker, pool = clocks
    worker.reset([clock(3, 9, 12), clock(4, 24, 16), clock(5, 9, 20)])
    before, refused, after = worker.step([step(3, 12, 13), step(4, 16, 17), step(5, 20, 21)])
    assert (before, after) == tuple(StepDone(index, False, False, 4.0, 4) for index in (3, 5))
    assert refused.env_index == 4
    assert "must be finite, got [nan, nan]" in refused.reason
    assert refused.reason.endswith(
        "It came from rollout 1 of environment 1 of task 'default', at step 1 of the rollout."
    )
    assert pool.rows[STATE][[13, 21]].tolist() == [[9, 4], [9, 4]]
    assert len(worker.step([step(3, 13, 14), step(5, 21, 22)])) == 2
    with pytest.raises(RuntimeError, match="must be reset"):
        worker.step([step(4, 16, 17)])
    # Its next one begins with a NaN.
    first, second = worker.reset([clock(3, 9, 12), clock(4, 20, 16)])
    assert first == ResetDone(3, "clock 9") and isinstance(second, ResetDone)


def test_a_reset_is_refused_for_the_rollout_alone_of_a_batch(clocks):
    worker, _ = clocks
    worker.reset([clock(0, 9, 0)])
    events = worker.reset([clock(0, 9, 0), clock(1, 9, 4)._replace(init_state_id=4)])
    assert events == [ResetDone(0, "clock 9"), ResetDone(1, "clock 9")]
    worker.build(0, "default").env._observe = lambda executed: Clocks._observe(
        worker.build(0, "default").env, executed
    ).set("init_state_id", torch.full((3, 1), 7))
    done, refused = worker.reset([clock(0, 9, 0), clock(1, 9, 4)._replace(init_state_id=4)])
    assert done == ResetDone(0, "clock 9")
    assert "'init_state_id' must be the 4 that was asked for, got 7" in refused.reason
    assert "rollout 1 of environment 0 of task 'default', at the reset" in refused.reason


def test_a_batch_writes_no_page_that_is_not_leased(clocks):
    worker, pool = clocks
    worker.reset([clock(0, 9, 0), clock(1, 9, 4)])
    page = pool.state(1)
    before = pool.rows.clone()
    pool.reclaim("w")
    with pytest.raises(RuntimeError, match="Row 0 must lie in a leased page"):
        worker.step([step(0, 0, 1), step(1, 4, 5)])
    assert page and (pool.rows == before).all()


def test_environments_of_another_batch_size_are_refused_by_name(clocks):
    worker, _ = clocks
    worker._factories = {"default": Clocks, "other": functools.partial(Clocks, 2)}
    [refused] = worker.reset([clock(0, 9, 0)._replace(task="other")])
    assert "the first one's batch size, 3, got 2" in refused.reason
    assert "of task 'other', at the reset" in refused.reason


def test_commands_for_one_environment_are_executed_together(clocks):
    worker, _ = clocks
    worker._factories = {"default": Clocks, "other": Clocks}
    resets = [clock(5, 9, 20), clock(0, 9, 0), clock(2, 9, 8), clock(1, 9, 4)]
    resets[3] = resets[3]._replace(task="other")
    indices = [[command.env_index for command in some] for some in worker.together(resets)]
    assert indices == [[5], [0, 2], [1]]
    for some in worker.together(resets):
        worker.reset(some)
    steps = [step(0, 0, 1), step(1, 4, 5), step(2, 8, 9), step(5, 20, 21)]
    indices = [[command.env_index for command in some] for some in worker.together(steps)]
    assert indices == [[0, 2], [1], [5]]
