# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""How many files and functions of the package does one decision pass, and how many one version?

    python benchmarks/path.py [--quick]

A small toy run (``ToyChunkEnv``, a tiny token policy, one worker, one inference process) is traced
with ``sys.setprofile`` in every process and thread: the learner's, the collection loop's, the
worker's and the inference process's. The hook reaches the processes through the factories of
environment and policy, which run there. Only steady state is recorded, in two kinds of windows
that a shared byte opens and closes:

decision   from the adoption of a version until the next is published: everything that the
           collection loop, the worker and the inference process do, and the learner's iteration of
           the replay buffer. Over all windows that is the path of a decision from the observation
           in its row to the learner's batch; admission, the end of rollouts and groups, and the
           look at the version, which every policy call takes, are part of it.
version    from the call of ``update_policy_weights_()`` until the inference process has adopted the
           version: what the learner does inside the call, and what the inference process does
           inside ``weight_update``, with the function that calls it. The end of the cohort, whose
           pages are freed in the same call, is the end of its decisions' path and counts there.

A function inside a function counts as the outer one. The lists go to stderr; the last line of
stdout is one JSON object:

files_per_decision, functions_per_decision
files_per_version, functions_per_version
"""

from __future__ import annotations

import functools
import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import numpy as np
import torch
from _machine import arguments, log, report

import torchrl_dvla
from torchrl_dvla import DVLACollector, PooledReplayBuffer
from torchrl_dvla.collectors import GroupConfig, InferenceConfig, WorkerConfig
from torchrl_dvla.envs import ToyChunkEnv
from torchrl_dvla.modules import tiny_token_policy

PACKAGE = Path(torchrl_dvla.__file__).parent
GROUP_QUEUE = f"{PACKAGE}/data/group_queue.py"
ENVS = 4
NOTHING, DECISION, VERSION, END = range(4)
WINDOWS = {DECISION: "decision", VERSION: "version"}

Functions = dict[str, set[tuple[str, str]]]


class Tracer:
    """Profile hook of a process or thread, which notes functions of the package by window.

    Args:
        folder (str): where windows are announced, and where what was found is left.
        role (str): of the process or thread.

    Keyword Args:
        below (str, optional): part of the package inside of which a version's functions are noted.
            By default none is.
    """

    def __init__(self, folder: str, role: str, *, below: str | None = None) -> None:
        self._path, self._below = Path(folder) / f"{role}.json", below
        # Through a memoryview: every event reads it.
        self.window = memoryview(np.memmap(Path(folder) / "window", dtype=np.uint8, mode="r+"))
        self._found: dict[str, set[CodeType]] = {name: set() for name in WINDOWS.values()}
        self._is_saved = False

    def __call__(self, frame: FrameType, event: str, arg: Any) -> None:
        window = self.window[0]
        if window == DECISION:
            self._found["decision"].add(frame.f_code)
            if event == "call" and frame.f_back is not None:  # a loop that was called long ago
                self._found["decision"].add(frame.f_back.f_code)
        elif window == VERSION and self._below is not None:
            self._note_version(frame, self._below)
        elif window == END and not self._is_saved:
            self._is_saved = True
            self.save()

    def _note_version(self, frame: FrameType, below: str) -> None:
        codes, current, is_inside = [], frame, False
        while current is not None:
            codes.append(current.f_code)
            if current.f_code.co_filename == GROUP_QUEUE:
                self._found["decision"].update(codes)
                return
            if current.f_code.co_filename.startswith(f"{PACKAGE}/{below}"):
                is_inside = True
            elif is_inside:  # the caller
                break
            current = current.f_back
        if is_inside:
            self._found["version"].update(codes)

    def functions(self) -> Functions:
        """Functions of the package, ``(file, name)``, by window."""
        return {
            window: {
                (code.co_filename[len(str(PACKAGE)) + 1 :], code.co_qualname.split(".<")[0])
                for code in codes
                if code.co_filename.startswith(f"{PACKAGE}/") and code.co_name != "<module>"
            }
            for window, codes in self._found.items()
        }

    def save(self) -> None:
        """Leave what was found, under its final name once it is whole."""
        found = {window: sorted(functions) for window, functions in self.functions().items()}
        part = self._path.with_suffix(".part")
        part.write_text(json.dumps(found))
        part.rename(self._path)


def make_env(folder: str) -> ToyChunkEnv:
    """The worker's environment; the hook comes along once for each process."""
    if sys.getprofile() is None:
        sys.setprofile(Tracer(folder, f"worker-{os.getpid()}"))
    return ToyChunkEnv(action_dim=2, chunk_size=4, image_size=16)


def make_policy(folder: str, policy: Any) -> Any:
    """The inference process's policy, which was sent along; the hook is set on the way."""
    sys.setprofile(Tracer(folder, f"inference-{os.getpid()}", below="weight_update"))
    return policy


def trace(folder: str, num_updates: int) -> dict[str, Functions]:
    """Functions by process and thread, over ``num_updates`` windows of each kind."""
    np.memmap(Path(folder) / "window", dtype=np.uint8, mode="w+", shape=(1,))
    policy = tiny_token_policy(2, 4, vocab_size=8, hidden_dim=16)
    learner = Tracer(folder, "learner", below="")  # told apart by what it does
    loop = Tracer(folder, "loop")
    threading.setprofile(loop)  # of the threads that the collector starts
    try:
        collector = DVLACollector(
            functools.partial(make_env, folder),
            policy,
            policy_factory=functools.partial(make_policy, folder, policy),
            replay_buffer=PooledReplayBuffer(batch_size=32, timeout_s=120.0),
            group=GroupConfig(4, groups_per_update=2, max_policy_lag=2, max_no_signal_groups=10**9),
            workers=WorkerConfig(num_workers=1, envs_per_worker=ENVS, max_decisions=6),
            inference=InferenceConfig(max_batch_size=ENVS),
        )
    finally:
        threading.setprofile(None)
    with collector:
        for update in range(2 + num_updates):  # the first two are not recorded
            window = DECISION if update >= 2 else NOTHING
            loop.window[0] = window
            sys.setprofile(learner if window else None)
            for _ in collector.replay_buffer:
                pass
            sys.setprofile(None)
            loop.window[0] = VERSION if window else NOTHING
            sys.setprofile(learner if window else None)
            collector.update_policy_weights_()
            sys.setprofile(None)
            wait_adopted(collector)
        loop.window[0] = END
    # The end of a process or thread is an event, too: by now all have left what they found.
    found = {
        path.stem.split("-")[0]: {
            window: {tuple(function) for function in functions}
            for window, functions in json.loads(path.read_text()).items()
        }
        for path in Path(folder).glob("*.json")
    }
    return found | {"learner": learner.functions()}


def wait_adopted(collector: DVLACollector) -> None:
    """Until the inference process decides with the newest version, if it decides at all."""
    deadline_s = time.monotonic() + 60.0
    while collector.stats()["weights/inference_lag"] > 0:
        if time.monotonic() > deadline_s:
            raise TimeoutError("The inference process has not adopted the version.")
        time.sleep(0.005)


def main() -> None:
    args = arguments(__doc__, "5 updates instead of 20")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    num_updates = 5 if args.quick else 20
    with tempfile.TemporaryDirectory() as folder:
        found = trace(folder, num_updates)
    figures: dict[str, int] = {}
    for window in WINDOWS.values():
        functions = set().union(*(roles[window] for roles in found.values()))
        files = sorted({file for file, _ in functions})
        figures[f"files_per_{window}"] = len(files)
        figures[f"functions_per_{window}"] = len(functions)
        log(f"\n{window}: {len(files)} files, {len(functions)} functions")
        for file in files:
            names = sorted(name for at, name in functions if at == file)
            roles = sorted(role for role in found if file in dict(found[role][window]))
            log(f"  {file} ({', '.join(roles)}): {', '.join(names)}")
    report("path", figures | {"updates": num_updates}, args.quick)


if __name__ == "__main__":
    main()
