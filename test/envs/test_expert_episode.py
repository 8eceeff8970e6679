# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Episodes of an expert: labels and disturbances by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from torchrl_dvla.envs.expert_episode import ActionNoise, chunk_labels


def test_labels_overlap_and_repeat_the_last_action():
    actions = np.arange(5.0)[:, None] * [1.0, 10.0]
    chunks, pad = chunk_labels(actions, chunk_size=4, interval=2)
    assert chunks.dtype == torch.float32
    assert chunks[..., 0].tolist() == [[0, 1, 2, 3], [2, 3, 4, 4], [4, 4, 4, 4]]
    assert chunks[1, :, 1].tolist() == [20, 30, 40, 40]
    assert pad.int().tolist() == [[0, 0, 0, 0], [0, 0, 0, 1], [0, 1, 1, 1]]


def test_a_push_lasts_and_spares_the_gripper():
    noise = ActionNoise(push=0.3, push_steps=6, jitter=0.0)
    drawn = [noise.sequence(15, np.random.default_rng(seed)) for seed in range(64)]
    assert drawn[0].shape == (15, 7)
    for sequence in drawn:
        assert (sequence[:6] == sequence[0]).all()
        assert (sequence[12:] == sequence[12]).all()
        assert (sequence[:, 6] == 0).all()
    # a third of the episodes is undisturbed, the others are pushed by 0.15 or 0.3
    still = sum(not sequence.any() for sequence in drawn)
    assert 10 <= still <= 34
    size = np.sqrt(np.mean([s[:, :3] ** 2 for s in drawn]))
    assert size == pytest.approx(0.3 * np.sqrt((0 + 0.25 + 1) / 3), rel=0.25)


def test_noise_does_not_depend_on_the_horizon():
    short, long = (ActionNoise().sequence(n, np.random.default_rng(3)) for n in (20, 160))
    assert short.any()
    assert (long[:20] == short).all()
