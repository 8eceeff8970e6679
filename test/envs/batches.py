# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Batched environments beside single ones of the same seeds."""

from __future__ import annotations

import torch

CHUNK = ("vla_action", "chunk")


def reset_some(env, td, indices, seeds):
    """Reset some episodes of a batch, each from a seed of its own."""
    is_reset = torch.zeros(*env.batch_size, 1, dtype=torch.bool)
    is_reset[indices] = True
    all_seeds = torch.zeros(*env.batch_size, 1, dtype=torch.int64)
    all_seeds[indices, 0] = torch.tensor(seeds)
    return env.reset(td.clone().set("seed", all_seeds).set("_reset", is_reset))


def play_alike(batched, singles, draw_chunk, num_decisions=12):
    """Play a batch and single environments alike, compare all that they return; returns how many
    episodes have ended.

    Args:
        batched (EnvBase): the batch.
        singles (list of EnvBase): one for each of its episodes.
        draw_chunk (Callable): draws chunks ``[N, chunk, A]`` for the tensordict of the batch.
        num_decisions (int): decisions.
    """
    seeds = list(range(5, 5 + len(singles)))
    td = reset_some(batched, batched.reset(), list(range(len(singles))), seeds)
    theirs = []
    for single, seed in zip(singles, seeds, strict=True):
        single.set_seed(seed)
        theirs.append(single.reset())
    num_over = 0
    for number in range(num_decisions):
        assert_alike(td, theirs)
        chunk = draw_chunk(td)
        td = batched.step(td.set(CHUNK, chunk))
        theirs = [
            single.step(its.set(CHUNK, chunk[index]))
            for index, (single, its) in enumerate(zip(singles, theirs, strict=True))
        ]
        assert_alike(td["next"], [its["next"] for its in theirs])
        td = batched.step_mdp(td)
        theirs = [single.step_mdp(its) for single, its in zip(singles, theirs, strict=True)]
        over = td["done"].flatten().nonzero().flatten().tolist()
        num_over += len(over)
        if over:  # they begin anew, the others go on
            td = reset_some(batched, td, over, [100 + number] * len(over))
        for index in over:
            singles[index].set_seed(100 + number)
            theirs[index] = singles[index].reset()
    return num_over


def assert_alike(td, theirs):
    for index, its in enumerate(theirs):
        mine = td[index]
        assert mine["language_instruction"] == its["language_instruction"]
        for key in its.exclude("language_instruction").keys(True, True):
            assert torch.equal(mine[key], its[key]), key
