# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The inference engine on rows of a real pool, under a real weight store."""

from __future__ import annotations

from multiprocessing import Pipe

import cloudpickle
import pytest
import torch
from tensordict import NonTensorStack, TensorDict
from torch import nn

from torchrl_dvla.data import decision_layout
from torchrl_dvla.memory import EnvironmentPool
from torchrl_dvla.modules import tiny_token_policy
from torchrl_dvla.swimlane import InferenceEngine, InferenceProcess, batch_seed
from torchrl_dvla.swimlane.inference import run_inference
from torchrl_dvla.swimlane.messages import Failed, Infer, Inferred, UsePool
from torchrl_dvla.weight_update import WeightStore

NUM_BINS = 8


def make_policy() -> nn.Module:
    torch.manual_seed(0)
    policy = tiny_token_policy(2, 3, vocab_size=NUM_BINS, hidden_dim=8)
    image, state = torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.zeros(1, 4)
    observed = {"observation": {"image": image, "state": state}}
    observed["language_instruction"] = NonTensorStack("go")
    policy(TensorDict(observed, [1]))  # initialises the lazy layers
    return policy


def prefer(policy: nn.Module, token: int) -> None:
    """Make every logit but ``token``'s negligible."""
    with torch.no_grad():
        for parameter in policy.head.parameters():
            parameter.zero_()
        policy.head.bias.view(-1, NUM_BINS)[:, token] = 50.0


@pytest.fixture
def pool():
    observation = {
        ("observation", "image"): ((3, 8, 8), torch.uint8),
        ("observation", "state"): ((4,), torch.float32),
    }
    layout = decision_layout(observation, chunk_size=3, action_dim=2)
    with EnvironmentPool(layout, num_pages=2, rows_per_page=4) as pool:
        yield pool


@pytest.fixture
def rows(pool):
    return pool.rows


def infer(rows: list[int], **kwargs: bool) -> Infer:
    return Infer(
        rows=rows,
        instruction_ids=[0] * len(rows),
        new_instructions={0: "go"},
        greedy=kwargs.get("greedy", True),
        use_snapshot=kwargs.get("use_snapshot", False),
        seed=0,
    )


@pytest.fixture
def learner_and_engine(rows, device):
    policy = make_policy().to(device)
    prefer(policy, 2)
    with WeightStore(policy) as store:
        engine = InferenceEngine(make_policy().to(device), store.reader("engine"))
        engine.use_pool(rows)
        yield policy, store, engine
        engine.close()


def test_decisions_land_in_the_rows_asked_for_and_nowhere_else(rows, learner_and_engine):
    _, _, engine = learner_and_engine
    rows["vla_action", "tokens"].fill_(-1)
    rows["policy_version"].fill_(-1)
    assert engine.infer(infer([6, 1])) == 0
    written = rows["vla_action", "tokens"].flatten(1)
    assert (written[[1, 6]] == 2).all()
    assert (written[[0, 2, 3, 4, 5, 7]] == -1).all()
    assert rows["policy_version"].flatten().tolist() == [-1, 0, -1, -1, -1, -1, 0, -1]
    # Token 2 of 8 uniform bins over [-1, 1] is centred on -1 + 2.5 / 4.
    assert torch.allclose(rows["vla_action", "chunk"][6], torch.tensor(-0.375))
    assert torch.allclose(rows["vla_action", "log_probs"][6], torch.tensor(0.0), atol=1e-4)


def test_the_latest_version_is_adopted_between_batches(rows, learner_and_engine):
    policy, store, engine = learner_and_engine
    engine.infer(infer([0]))
    prefer(policy, 5)
    assert store.publish(policy) == 1
    assert engine.infer(infer([1])) == 1
    assert rows["vla_action", "tokens"][:2].flatten(1)[:, 0].tolist() == [2, 5]


def test_a_snapshot_stays_while_training_goes_on(rows, learner_and_engine):
    policy, store, engine = learner_and_engine
    with pytest.raises(RuntimeError, match="needs a Snapshot"):
        engine.infer(infer([0], use_snapshot=True))
    assert engine.snapshot() == 0
    prefer(policy, 5)
    store.publish(policy)
    assert engine.infer(infer([0], use_snapshot=True)) == 0
    assert engine.infer(infer([1])) == 1
    assert rows["vla_action", "tokens"][:2].flatten(1)[:, 0].tolist() == [2, 5]
    assert engine.snapshot() == 1
    assert engine.infer(infer([0], use_snapshot=True)) == 1
    assert rows["vla_action", "tokens"][0, 0, 0] == 5
    engine.drop_snapshot()
    with pytest.raises(RuntimeError, match="needs a Snapshot"):
        engine.infer(infer([0], use_snapshot=True))


CHUNK, TOKENS, LOG_PROBS = (("vla_action", name) for name in ("chunk", "tokens", "log_probs"))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (CHUNK, torch.nan, r"chunk'\) of TinyVLA must be finite, got nan in 1 of 2 rows"),
        (CHUNK, -torch.inf, r"chunk'\) of TinyVLA must be finite, got -inf"),
        (LOG_PROBS, torch.nan, r"log_probs'\) of TinyVLA must be finite, got nan"),
        (LOG_PROBS, torch.inf, r"log_probs'\) of TinyVLA must be finite, got inf"),
        (LOG_PROBS, -torch.inf, r"log_probs'\) of TinyVLA must be finite, got -inf"),
        (TOKENS, -1, r"tokens'\) of TinyVLA must be finite, at least 0, at most 7, got -1 in 1"),
        (TOKENS, NUM_BINS, r"at least 0, at most 7, got 8 in 1 of 2 rows, first in row 1"),
        (TOKENS, 0.5, r"must write integers as .*tokens'\), got torch.float32 of TinyVLA"),
    ],
)
def test_decisions_that_nobody_may_execute_or_learn_are_refused(
    rows, learner_and_engine, key, value, message
):
    _, _, engine = learner_and_engine

    def spoil(policy, args, out):
        values = out[key].float() if isinstance(value, float) else out[key].clone()
        values[1, 0, 1] = value
        return out.set(key, values)

    engine._policy.register_forward_hook(spoil)
    rows["policy_version"].fill_(-1)
    with pytest.raises(ValueError, match=message):
        engine.infer(infer([6, 1]))
    assert (rows["policy_version"] == -1).all(), "nothing reaches a row"


def test_an_exception_in_the_policy_is_the_last_event():
    policy = make_policy()
    ours, theirs = Pipe()
    ours.send(infer([0]))  # no pool yet
    with WeightStore(policy) as store, pytest.raises(SystemExit):
        run_inference(theirs, cloudpickle.dumps(make_policy), store.reader("lane"), 0)
    message = ours.recv()
    assert isinstance(message, Failed) and "send UsePool first" in message.traceback


def test_a_call_depends_on_its_seed_and_on_nothing_before_it(rows, learner_and_engine):
    policy, store, engine = learner_and_engine
    with torch.no_grad():
        policy.head.bias.zero_()
    store.publish(policy)
    tokens = []
    for seed in (batch_seed(0, 3), 5, batch_seed(0, 3), batch_seed(0, 4)):
        engine.infer(infer([0, 1, 2, 3], greedy=False)._replace(seed=seed))
        tokens.append(rows["vla_action", "tokens"][:4].clone())
    assert (tokens[0] == tokens[2]).all()
    assert (tokens[0] != tokens[3]).any() and (tokens[0] != tokens[1]).any()


def test_the_process_takes_decisions_until_it_is_stopped(pool):
    policy = make_policy()
    prefer(policy, 2)
    with WeightStore(policy) as store:
        lane = InferenceProcess(lambda: policy, store.reader("lane"))
        try:
            lane.connection.send(UsePool(pool.worker_view()))
            lane.connection.send(infer([3]))
            message = lane.connection.recv()
            assert isinstance(message, Inferred) and message.policy_version == 0
            assert message.start_s <= message.end_s
            assert (pool.rows["vla_action", "tokens"][3] == 2).all()
        finally:
            lane.stop(60.0)
    assert lane.exit_description() == "exited with code 0"
