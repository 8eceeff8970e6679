# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Where the time goes: the timeline of the four lanes, as shares and as a trace for Perfetto.

Environment, policy and learner are given stated latencies that hold no core, so the overlap is
visible on any machine; the figures are emulated. Nothing but the collector is needed to record it.
Writes ``timeline.json``, which ui.perfetto.dev opens, and ``timeline.svg``, a picture of a second.
"""

from __future__ import annotations

import functools
import sys
import time
from pathlib import Path

from torchrl_dvla import DVLACollector, GroupConfig, PooledReplayBuffer, WorkerConfig
from torchrl_dvla.modules import tiny_token_policy
from torchrl_dvla.swimlane import draw_timeline, read_chrome_trace
from torchrl_dvla.testing import CountingChunkEnv, emulate_latency

STEP_S, DECIDE_S, LEARN_S = 0.02, 0.012, 0.1


def main(path: str = "timeline.json") -> None:
    policy = tiny_token_policy(2, 4, vocab_size=8, hidden_dim=1536)
    buffer = PooledReplayBuffer(batch_size=8)
    with DVLACollector(
        functools.partial(
            CountingChunkEnv, max_env_steps=16, required_fraction=0.5, step_latency_s=STEP_S
        ),
        emulate_latency(policy, DECIDE_S),
        replay_buffer=buffer,
        group=GroupConfig(group_size=4, groups_per_update=2, max_policy_lag=1),
        workers=WorkerConfig(num_workers=2, envs_per_worker=2, max_decisions=4),
    ) as collector:
        for _ in range(10):
            for _batch in buffer:
                time.sleep(LEARN_S)  # a learner on a device: the core is free
            collector.update_policy_weights_()
        usage = collector.timeline.usage()
    idle = usage.idle_shares()
    for lane, share in usage.shares().items():
        reasons = [f"{reason} {idle[of, reason]:.0%}" for of, reason in idle if of == lane]
        print(f"{lane:<13} busy {share:.0%}  idle: {', '.join(reasons)}")
    print(f"lanes overlap during {usage.overlap:.0%} of the busy time")
    print(f"critical lane: {usage.critical_lane}")
    collector.timeline.export_chrome_trace(path)
    picture = draw_timeline(read_chrome_trace(path), start_s=1.0, end_s=2.0)
    Path(path).with_suffix(".svg").write_text(picture)


if __name__ == "__main__":
    main(*sys.argv[1:])
