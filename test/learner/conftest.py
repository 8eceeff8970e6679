# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

import contextlib
import math

import pytest
import torch
from tensordict import TensorDict
from torchrl.envs.utils import ExplorationType, set_exploration_type

from torchrl_dvla.collectors.validation import match_policy
from torchrl_dvla.data import InstructionTable
from torchrl_dvla.data.instructions import InstructionTransform
from torchrl_dvla.learner import LearnerRanks
from torchrl_dvla.memory import EnvironmentPool
from torchrl_dvla.memory.row_access import RowFields
from torchrl_dvla.recipes.dvla_grpo import utils, validation
from torchrl_dvla.recipes.dvla_grpo.settings import compose_settings

NUM_ROWS = 12


class Learners:
    """Learners of any number of ranks on the same rows, of a tiny transformers policy."""

    def __init__(self, *overrides, name="toy"):
        self.cfg = compose_settings(name, [*overrides])
        policy = utils.make_policy(self.cfg)
        specs = validation.find_specs(self.cfg)
        self.pool = EnvironmentPool(match_policy(policy, specs), NUM_ROWS // 4)
        self.table = InstructionTable([utils.TOY_INSTRUCTION])
        self.num_decisions = torch.tensor([1, 2, 2, 3, 3, 3, 1, 1, 4, 4, 4, 4])
        rows, draw = self.pool.rows, torch.Generator().manual_seed(0)
        rows["observation", "image"].random_(256, generator=draw)
        rows["observation", "state"].uniform_(-1, 1, generator=draw)
        with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
            sampled = policy(self.read(torch.arange(NUM_ROWS)))
        for key in self.pool.layout:
            if key in sampled.keys(True, True) and key[0] != "observation":
                rows.set_(key, sampled.get(key))
        rows["advantage"].normal_(generator=draw)
        rows["action_is_pad"][3:5, 1:] = True
        rows["rollout_id"][:, 0] = torch.tensor([0, 1, 1, 2, 2, 2, 3, 4, 5, 5, 5, 5])
        for key in self.pool.layout:
            if key == "sample_log_prob" or key[-1] == "log_probs":
                rows.get(key).sub_(0.2 * torch.rand(rows.get(key).shape, generator=draw))

    def close(self):
        self.pool.close()

    def read(self, index):
        batch = RowFields(self.pool.rows, self.pool.layout).gather(index)
        batch.set("num_decisions", self.num_decisions[index].unsqueeze(-1))
        return InstructionTransform(self.table).forward(batch)

    def minibatches(self):
        """Rows of two minibatches; the second one has an odd number of them."""
        return [torch.tensor([7, 0, 3, 11, 4, 2]), torch.tensor([1, 9, 8, 5, 10])]

    def learn_alone(self, minibatches, policy=None, optimizer=None):
        """The loop of a single process; returns policy, optimizer and norms."""
        policy = policy or utils.make_policy(self.cfg)
        loss = utils.make_loss(self.cfg, policy)
        optimizer = optimizer or utils.make_adamw(self.cfg, loss.parameters())
        norms = []
        for index in minibatches:
            batch = self.read(index)
            losses = loss(batch, normaliser=loss.normaliser(batch))
            sum(value for key, value in losses.items() if key.startswith("loss_")).backward()
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            max_norm = self.cfg.optim.max_grad_norm or math.inf
            norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, max_norm)))
            optimizer.step()
            optimizer.zero_grad()
        return policy, optimizer, norms

    @contextlib.contextmanager
    def ranks(self, num_ranks, strategy, policy=None, **options):
        policy = policy or utils.make_policy(self.cfg)
        factory = utils.make_learner_factory(self.cfg)
        options = {"timeout_s": 120.0, **options}
        with LearnerRanks(
            factory, policy, num_ranks=num_ranks, strategy=strategy, **options
        ) as ranks:
            ranks.attach(self.pool, self.table)
            yield ranks

    def learn(self, ranks, minibatches):
        return [
            ranks.step(
                index,
                self.num_decisions[index],
                max_grad_norm=self.cfg.optim.max_grad_norm,
                micro_batch_size=self.cfg.optim.micro_batch_size,
                version=0,
            )
            for index in minibatches
        ]


def weights_of(ranks):
    with ranks.weights() as weights:
        return TensorDict({name: tensor.clone() for name, tensor in weights})


@pytest.fixture
def make_learners():
    made = []

    def make(*overrides, **options):
        made.append(Learners(*overrides, **options))
        return made[-1]

    yield make
    for learners in made:
        learners.close()
