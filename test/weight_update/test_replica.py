# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Versions that another node's store gets as bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from torchrl_dvla.weight_update import WeightReplica, WeightStore, weight_digest


class Mixed(nn.Module):
    """Several dtypes, a tied weight, a frozen one, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(5, 3)
        self.b = nn.Linear(3, 5, bias=False)
        self.tied = self.a.weight
        self.narrow = nn.Parameter(torch.randn(7).to(torch.bfloat16))
        self.frozen = nn.Parameter(torch.randn(4), requires_grad=False)
        self.register_buffer("count", torch.arange(3))
        self.register_buffer("mask", torch.full((2,), -torch.inf))


def fill_with(sent):
    """What a chain fills a slot with."""

    def fill(parts, on_bucket):
        for part, values in zip(parts, sent, strict=True):
            np.copyto(part, values)
            on_bucket(part.data)

    return fill


def transfer(store, reader, replica):
    version, live, frozen = reader.pin_bytes()
    if replica.version < 0:
        replica.write_frozen(fill_with(frozen), weight_digest(frozen))
    replica.write(version, fill_with(live), weight_digest(live))
    reader.unpin()


@pytest.mark.parametrize("options", [{}, {"trainable_only": True}, {"num_slots": 4}])
def test_a_reader_of_the_replica_reads_what_the_learner_published(options):
    model, there = Mixed(), Mixed()
    store = WeightStore(model, first_version=3, **options)
    sender = store.reader("nodes")
    replica = WeightReplica(store.layout)
    assert replica.version == -1
    transfer(store, sender, replica)
    reader = replica.reader("inference")
    assert reader.adopt_into(there) == 3
    for step in range(4):
        with torch.no_grad():
            model.a.weight.add_(1.0)
            model.narrow.mul_(2.0)
            model.count += 1
        store.publish()
        transfer(store, sender, replica)
        assert reader.adopt_into(there) == 4 + step
        ours, theirs = model.state_dict(), there.state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    replica.close()
    store.close()


def test_a_replica_casts_as_the_store_did():
    model, there = nn.Linear(3, 2), nn.Linear(3, 2)
    store = WeightStore(model, transport_dtype=torch.bfloat16)
    sender = store.reader("nodes")
    replica = WeightReplica(store.layout)
    transfer(store, sender, replica)
    replica.reader("inference").adopt_into(there)
    assert torch.equal(there.weight, model.weight.to(torch.bfloat16).float())
    replica.close()
    store.close()


def test_bytes_that_are_not_the_learners_are_refused_and_change_nothing_that_is_visible():
    model = Mixed()
    store = WeightStore(model, trainable_only=True)
    sender = store.reader("nodes")
    version, live, frozen = sender.pin_bytes()
    replica = WeightReplica(store.layout)
    others = [live[0].copy(), *live[1:]]
    others[0][0] ^= 1
    digest = weight_digest(live)
    with pytest.raises(ValueError, match=r"Version 0 must have the learner's digest"):
        replica.write(version, fill_with(others), digest)
    assert replica.version == -1
    with pytest.raises(ValueError, match=r"What is frozen must have the learner's digest"):
        replica.write_frozen(fill_with(frozen), digest)
    replica.write_frozen(fill_with(frozen), weight_digest(frozen))
    replica.write(version, fill_with(live), digest)
    reader = replica.reader("inference")
    seen = reader.pin()[1]["a", "weight"].clone()
    with pytest.raises(ValueError, match="learner's digest"):
        replica.write(1, fill_with(others), digest)
    assert replica.version == 0 and torch.equal(reader.pin()[1]["a", "weight"], seen)
    with pytest.raises(ValueError, match="version must grow"):
        replica.write(version, fill_with(live), digest)
    with pytest.raises(RuntimeError, match="learner's store"):
        replica.publish()
    replica.close()
    store.close()
