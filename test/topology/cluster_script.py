# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""A learner over two nodes that it starts itself; it prints the ids of all its processes.

python cluster_script.py wait|leave      and waits to be killed, or leaves without shutdown()
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from torchrl_dvla import GroupConfig, PooledReplayBuffer, TopologyAwareCollector, WorkerConfig
from torchrl_dvla.collectors import InferenceConfig
from torchrl_dvla.topology import NodePlacement, Placement


def descendants() -> list[int]:
    """Process ids of everything below this process, and of its sessions' orphans."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                parents[int(entry.name)] = int(fields[1])
            except OSError:
                continue
    found = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return sorted(found - {os.getpid()})


def main(way: str) -> None:
    # Here, for pytest looks for doctests in this file, without a script's path.
    from counting_nodes import make_env, make_policy

    workers = WorkerConfig(num_workers=1, max_decisions=4)
    nodes = [
        NodePlacement("localhost", workers, InferenceConfig(), learner=k == 0) for k in range(2)
    ]
    collector = TopologyAwareCollector(
        make_env,
        make_policy(),
        placement=Placement(tuple(nodes)),
        replay_buffer=PooledReplayBuffer(batch_size=16, timeout_s=120.0),
        group=GroupConfig(group_size=3, groups_per_update=2),
    )
    collector.start()
    for _ in range(2):
        for _ in collector.replay_buffer:
            pass
        collector.update_policy_weights_()
    print(json.dumps(descendants()), flush=True)
    if way == "wait":
        sys.stdin.read()  # until whoever has started it ends


if __name__ == "__main__":
    main(sys.argv[1])
