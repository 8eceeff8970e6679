# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What the weights of one node report."""

from __future__ import annotations

import re

from torchrl_dvla.weight_update.store import WeightStore

__all__ = ["store_scalars"]


def store_scalars(store: WeightStore) -> dict[str, float]:
    """Scalars of both sides of a store; of one that is closed, what was known then.

    Args:
        store (WeightStore): the store.

    Returns:
        ``version``; of the learner's side ``num_publishes``, ``num_coalesced``, ``num_deferred``,
        ``num_refused``, ``published_bytes``, ``publish_stall_s`` (the last one),
        ``publish_stall_max_s`` and ``cast_error``; of each reader ``<reader>_adopt_p50_s``,
        ``<reader>_adopt_p99_s``, ``<reader>_skipped`` and ``<reader>_lag``.

    Examples:
        >>> from torch import nn
        >>> with WeightStore(nn.Linear(2, 1)) as store:
        ...     reader = store.reader("worker 0")
        ...     scalars = store_scalars(store)
        >>> scalars["version"], scalars["worker_0_lag"]
        (0, 1)
    """
    publish = store.stats()
    out: dict[str, float] = {
        "version": store.version,
        "num_publishes": publish.num_publishes,
        "num_coalesced": publish.num_coalesced,
        "num_deferred": publish.num_deferred,
        "num_refused": publish.num_refused,
        "published_bytes": publish.bytes_total,
        "publish_stall_s": publish.stall_last_s,
        "publish_stall_max_s": publish.stall_max_s,
        "cast_error": store.last_cast_error,
    }
    for name, adopted in store.adoption_stats().items():
        reader = re.sub(r"\W", "_", name)
        out[f"{reader}_adopt_p50_s"] = adopted.latency_p50_s
        out[f"{reader}_adopt_p99_s"] = adopted.latency_p99_s
        out[f"{reader}_skipped"] = adopted.num_skipped
        out[f"{reader}_lag"] = store.version - adopted.version
    return out
