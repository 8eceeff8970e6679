# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""A script that leaves its collector without ``shutdown()``, one way or another.

python leaving_script.py built|end|raise
"""

from __future__ import annotations

import sys

from torchrl_dvla import DVLACollector, GroupConfig, PooledReplayBuffer, WorkerConfig


def main(way: str) -> None:
    # Here, for pytest looks for doctests in this file, without a script's path.
    from counting_task import make_env, make_policy

    collector = DVLACollector(
        make_env,
        make_policy(),
        replay_buffer=PooledReplayBuffer(batch_size=16, timeout_s=60.0),
        group=GroupConfig(group_size=3, groups_per_update=2),
        workers=WorkerConfig(num_workers=1, max_decisions=4),
    )
    if way == "built":
        return
    collector.start()
    for _ in collector.replay_buffer:
        if way == "raise":
            raise ValueError("the user's own mistake")


if __name__ == "__main__":
    main(sys.argv[1])
