# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""``sft`` with a task whose episodes never end; each process of the pool says when one begins."""

from __future__ import annotations

import os
import threading

from torchrl_dvla.recipes.dvla_sft import train, utils


class HangingTask:
    """An environment that says that it is reset, and never answers."""

    def set_seed(self, seed):
        pass

    def reset(self, _):
        print(f"playing in process {os.getpid()}", flush=True)
        threading.Event().wait()


# Also in the processes of the pool, which import this program first.
utils.check_tasks = lambda cfg: None
utils.make_env = lambda cfg, task_id, recording: HangingTask()

if __name__ == "__main__":
    train.main()
