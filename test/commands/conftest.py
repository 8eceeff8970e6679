# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

import pytest

from torchrl_dvla.__main__ import main
from torchrl_dvla.recipes.dvla_grpo import train
from torchrl_dvla.recipes.dvla_grpo.settings import compose_settings
from torchrl_dvla.recording import GracefulStop

#: Small groups of the toy task, two updates, four held-out episodes.
SMALL = (
    "group.group_size=4", "group.groups_per_update=2", "workers.envs_per_worker=2",
    "optim.minibatch_size=32", "eval.num_episodes=4", "eval.every_minutes=null",
    "eval.num_videos=0", "train.num_updates=2", "train.max_minutes=null", "log.line_every_s=0",
)  # fmt: skip


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The folder of a run of the toy task that has ended; its path has a space."""
    runs = tmp_path_factory.mktemp("a run") / "my runs"
    train.train(compose_settings("toy", [*SMALL, f"log.dir='{runs}'"]), GracefulStop())
    (folder,) = (runs / "toy").iterdir()
    return folder


@pytest.fixture
def call(capsys):
    """The command line: its exit code, what it prints and what it complains about."""

    def call(*arguments):
        code = main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        return code, said.out, said.err

    return call
