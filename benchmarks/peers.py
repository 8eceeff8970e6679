# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""How many decisions per second does the loop learn from, beside other libraries?

    python benchmarks/peers.py [--quick] [--search ROW|all]

One toy environment (``peers/environment.py``: images of 64x64, a step that computes for 2 ms) and
one network (``peers/network.py``), trained by each library with its own best fit of algorithm.
Every decision is learned from twice, in minibatches of 128, in float32, on the CPU. A decision is
one env step here, so ``C`` cores allow ``500 C`` decisions/s at most, if all else were free.

Each library has a virtual environment of its own, which this script makes the first time in
``$XDG_CACHE_HOME/torchrl_dvla/peers`` (``~/.cache`` where that variable is unset; 7 GB), and a
script under ``peers/``. A run is a process of it: start, warm-up, and a stretch of whole updates of
which alone decisions count. Repeats are interleaved, every other one backwards.

decisions_per_s      learned from, by row; ``share_of_env_limit`` is its share of ``500 C``.
cpu_ms_per_decision  CPU time of all processes of a row for each of them.
ratio                ours over each row, within each repeat.
spread               ours over the fastest other row of each repeat.
share_of_others      CPU time that processes of neither this script nor its rows took, over that
                     of the machine, in the worst run. Rates are worth nothing where it is large.
failed               rows whose library cannot be installed or run, with the reason.

``--search`` measures the alternatives in ``ROWS``, one setting after another from the constants
there, and keeps what is faster; the result has all that it measured. The last line of stdout is one
JSON object.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _machine import arguments, log, paired_ratio, report, spread

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PINS = ROOT / "requirements" / "constraints.txt"
TORCH, TORCH_CPU_INDEX = "torch==2.13.0", "https://download.pytorch.org/whl/cpu"
REPEATS, WARM_UP_S, SECONDS = 5, 3.0, 12.0
QUICK_REPEATS, QUICK_SECONDS = 2, 6.0
SEARCH_SECONDS, SEARCH_PASSES = 8.0, 2
#: Of a run beyond its stretch: start, warm-up, a slow update, the end.
PATIENCE_S = 180.0
#: That what a script leaves behind has to end by itself.
GRACE_S = 5.0
#: What each library's virtual environment holds beside PyTorch; ours holds what the package needs.
LIBRARIES: dict[str, tuple[str, ...]] = {
    "ours": (),
    "torchrl": ("torchrl==0.14.1", "tensordict==0.14.3", "gymnasium==1.4.0"),
    "sample_factory": ("sample-factory==2.1.1",),
    "stable_baselines3": ("stable-baselines3==2.9.2",),
    "rllib": ("ray[rllib]==2.60.0",),
}
#: Those whose further packages are pinned by the project's own constraints.
PINNED = ("ours", "torchrl")


@dataclass(frozen=True)
class Row:
    """A library's script with its settings.

    Args:
        library (str): whose virtual environment.
        script (str): under ``peers/``.
        settings (dict): those that are measured, and from which the search starts.
        search (dict): alternatives of each setting, in the order in which they are tried.
    """

    library: str
    script: str
    settings: dict[str, Any]
    search: dict[str, tuple[Any, ...]]


_WORKERS, _ENVS, _THREADS, _FRAMES = (1, 2, 3, 4), (1, 2, 4, 8, 16), (1, 2), (256, 512, 1024, 2048)
_MULTI = {
    "num_workers": _WORKERS,
    "envs_per_worker": _ENVS,
    "frames_per_batch": _FRAMES,
    "learner_threads": _THREADS,
}
_RLLIB = {
    "num_workers": _WORKERS,
    "envs_per_worker": _ENVS,
    "vectorize": ("sync", "async"),
    "train_batch_size": _FRAMES,
    "rollout_fragment_length": (16, 32, 64),
    "num_learners": (0, 1),
    "learner_threads": _THREADS,
}
#: The settings are those that ``--search all --quick`` found on two idle cores.
#: ``torchrl_async_batched``, whose 64 processes take minutes to start, was tried with each number
#: of workers and environments alone, ``rllib_appo`` without its last three alternatives.
ROWS: dict[str, Row] = {
    "ours": Row(
        "ours",
        "ours.py",
        {
            "num_workers": 3,
            "envs_per_worker": 2,
            "num_scenes": 32,
            "group_size": 8,
            "groups_per_update": 4,
            "max_policy_lag": 2,
            "max_batch_size": None,
            "max_wait_s": 0.0,
            "inference_threads": 1,
            "learner_threads": 1,
            "check_finite": True,
        },
        {
            "num_workers": _WORKERS,
            "num_scenes": (0, 4, 8, 16, 32),
            "envs_per_worker": _ENVS,
            "groups_per_update": (2, 4, 8, 16),
            "max_policy_lag": (0, 1, 2, 4),
            "max_wait_s": (0.0, 0.002, 0.01),
            "inference_threads": _THREADS,
            "learner_threads": _THREADS,
        },
    ),
    "torchrl_sync": Row(
        "torchrl",
        "torchrl_ppo.py",
        {
            "arrangement": "sync",
            "batched_env": "parallel",
            "num_workers": 8,
            "frames_per_batch": 2048,
            "learner_threads": 2,
        },
        {
            "batched_env": ("serial", "parallel"),
            "num_workers": (1, 2, 3, 4, 8),
            "frames_per_batch": _FRAMES,
            "learner_threads": _THREADS,
        },
    ),
    "torchrl_multi_sync": Row(
        "torchrl",
        "torchrl_ppo.py",
        {
            "arrangement": "multi_sync",
            "num_workers": 2,
            "envs_per_worker": 16,
            "frames_per_batch": 1024,
            "learner_threads": 1,
        },
        _MULTI,
    ),
    "torchrl_multi_async": Row(
        "torchrl",
        "torchrl_ppo.py",
        {
            "arrangement": "multi_async",
            "num_workers": 4,
            "envs_per_worker": 16,
            "frames_per_batch": 1024,
            "learner_threads": 1,
        },
        _MULTI,
    ),
    "torchrl_async_batched": Row(
        "torchrl",
        "torchrl_ppo.py",
        {
            "arrangement": "async",
            "transport": "auto",
            "num_workers": 8,
            "envs_per_worker": 8,
            "frames_per_batch": 1024,
            "max_batch_size": 64,
            "server_timeout": 0.01,
            "learner_threads": 1,
        },
        {
            "transport": ("auto", "driver"),
            "num_workers": (1, 2, 3, 4, 8),
            "envs_per_worker": _ENVS,
            "frames_per_batch": _FRAMES,
            "server_timeout": (0.001, 0.01),
            "learner_threads": _THREADS,
        },
    ),
    "sample_factory": Row(
        "sample_factory",
        "sample_factory_appo.py",
        {
            "async_rl": True,
            "num_workers": 4,
            "num_envs_per_worker": 16,
            "worker_num_splits": 1,
            "num_batches_per_epoch": 8,
            "num_batches_to_accumulate": 2,
            "policy_workers_per_policy": 1,
            "set_workers_cpu_affinity": False,
        },
        {
            "async_rl": (True, False),
            "num_workers": _WORKERS,
            "num_envs_per_worker": (2, 4, 8, 16),
            "worker_num_splits": (1, 2),
            "num_batches_per_epoch": (2, 4, 8),
            "policy_workers_per_policy": (1, 2),
            "set_workers_cpu_affinity": (False, True),
        },
    ),
    "stable_baselines3": Row(
        "stable_baselines3",
        "stable_baselines3_ppo.py",
        {"num_workers": 8, "n_steps": 256, "learner_threads": 1},
        {
            "num_workers": (1, 2, 3, 4, 8),
            "n_steps": (64, 128, 256, 512),
            "learner_threads": _THREADS,
        },
    ),
    "rllib_ppo": Row(
        "rllib",
        "rllib_ppo.py",
        {
            "algorithm": "ppo",
            "num_workers": 2,
            "envs_per_worker": 16,
            "vectorize": "sync",
            "train_batch_size": 2048,
            "rollout_fragment_length": 64,
            "num_learners": 0,
            "learner_threads": 2,
        },
        _RLLIB,
    ),
    "rllib_appo": Row(
        "rllib",
        "rllib_ppo.py",
        {
            "algorithm": "appo",
            "num_workers": 3,
            "envs_per_worker": 16,
            "vectorize": "sync",
            "train_batch_size": 256,
            "rollout_fragment_length": 16,
            "num_learners": 0,
            "learner_threads": 1,
        },
        _RLLIB,
    ),
}


# -- virtual environments --------------------------------------------------------------------------
def prepare(library: str) -> Path:
    """Interpreter of a library's virtual environment, made if it is not there as asked for.

    Raises:
        RuntimeError: if it cannot be installed; with pip's last words.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "torchrl_dvla" / "peers" / library
    python, stamp = folder / "bin" / "python", folder / "installed.json"
    wanted = list(LIBRARIES[library])
    if library == "ours":  # the checkout itself is on the path of its run
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        wanted = [*project["dependencies"], "gymnasium"]
    constraints = PINS if library in PINNED else None
    fingerprint = json.dumps(
        {
            "python": sys.version,
            "packages": [TORCH, *wanted],
            "constraints": constraints.read_text() if constraints else "",
        }
    )
    if stamp.exists() and stamp.read_text() == fingerprint:
        return python
    log(f"{library}: making {folder}")
    # Whatever is left of an attempt that was broken off goes: nothing else lies in this folder.
    _call([sys.executable, "-m", "venv", "--clear", str(folder)])
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    index = ["--index-url", TORCH_CPU_INDEX] if _wants_cuda(pip) else []
    _call([*pip, "--no-deps", *index, TORCH])
    pinned = ["--constraint", str(constraints)] if constraints else []
    _call([*pip, *pinned, TORCH, *wanted])
    stamp.write_text(fingerprint)
    return python


def _wants_cuda(pip: list[str]) -> bool:
    """Whether pip's own choice of PyTorch is a build that brings CUDA, as in scripts/setup.sh."""
    dry_run = ["--no-deps", "--dry-run", "--ignore-installed", "--report", "-"]
    wheel = json.loads(_call([*pip, *dry_run, TORCH]))["install"][0]["metadata"]
    requires = wheel.get("requires_dist") or []
    return any(re.match(r"(nvidia|cuda)[-_]", name) for name in requires if "extra ==" not in name)


def _call(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(_last_words(done.stderr))
    return done.stdout


def _last_words(text: str) -> str:
    """The last line, where an error says what it is."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it ended without a word"


# -- runs ------------------------------------------------------------------------------------------
def run(python: Path, row: Row, settings: dict[str, Any], seconds: float) -> dict[str, Any]:
    """One run of a row in a process of its own; nothing that it started is left.

    Raises:
        RuntimeError: if it fails or takes too long; with its last words.
    """
    asked = {"settings": settings, "warm_up_s": WARM_UP_S, "seconds": seconds}
    scratch = tempfile.mkdtemp(prefix="peers")
    environment = {
        **{key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        **({"PYTHONPATH": str(ROOT)} if row.library == "ours" else {}),
        "TMPDIR": scratch,
        # Of processes that are told nothing else; a learner's are its settings' matter.
        "OMP_NUM_THREADS": "1",
    }
    command = [str(python), str(HERE / "peers" / row.script), json.dumps(asked)]
    stdout, stderr = Path(scratch, "stdout"), Path(scratch, "stderr")
    try:
        # Files, for a process that outlives the script would hold a pipe open.
        with open(stdout, "w") as out, open(stderr, "w") as err:
            process = subprocess.Popen(
                command,
                cwd=scratch,
                env=environment,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
        try:
            process.wait(seconds + PATIENCE_S)
        finally:
            _end(process)
        lines = stdout.read_text(errors="replace").splitlines()
        lines = [line for line in lines if line.startswith('{"decisions_per_s"')]
        if not lines:
            raise RuntimeError(_last_words(stderr.read_text(errors="replace")))
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"it took more than {seconds + PATIENCE_S:.0f} s") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def _adopt_orphans() -> None:
    """Make this process the parent of those whose own parent ends (PR_SET_CHILD_SUBREAPER)."""
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of a run: children of this process, to which those of a killed one fall."""
    if process.poll() is None:
        process.kill()
        process.wait()
    # Trackers go last: they take away what the others have left in shared memory, and then end.
    for spared in (b"", b"resource_tracker", None):  # all of them, trackers, none
        end_s = time.monotonic() + GRACE_S
        while (left := _children()) and time.monotonic() < end_s:
            for pid, command in left.items():
                if spared is None or spared not in command:
                    os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, os.WNOHANG)
            time.sleep(0.05)


def _children() -> dict[int, bytes]:
    """Processes whose parent is this one, with their command lines; those that have ended too."""
    tasks = Path("/proc/self/task").glob("*/children")
    pids = [int(pid) for path in tasks for pid in path.read_text().split()]
    return {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in pids}


# -- measuring -------------------------------------------------------------------------------------
def search(name: str, python: Path, num_passes: int) -> dict[str, Any]:
    """Best settings of a row, one setting after another, and all rates measured."""
    row = ROWS[name]
    best, trials = dict(row.settings), dict[str, float]()

    def rate(settings: dict[str, Any]) -> float:
        key = json.dumps(settings)
        if key not in trials:
            try:
                trials[key] = run(python, row, settings, SEARCH_SECONDS)["decisions_per_s"]
            except RuntimeError as error:  # a combination that the library refuses
                log(f"{name} {settings}: {error}")
                trials[key] = 0.0
            log(f"{name} {settings}: {trials[key]:.0f}")
        return trials[key]

    for _ in range(num_passes):
        for setting, alternatives in row.search.items():
            candidates = [best, *({**best, setting: value} for value in alternatives)]
            best = max(candidates, key=rate)
    return {"best": best, "decisions_per_s": rate(best), "trials": trials}


def main() -> None:
    """Measure or search."""
    args = arguments(
        __doc__ or "",
        f"{QUICK_REPEATS} repeats of {QUICK_SECONDS:.0f} s; a search of one pass",
        search="",
    )
    names = list(ROWS) if args.search in ("", "all") else [args.search]
    _adopt_orphans()
    # Whoever ends this process means the runs too: SIGTERM unwinds, which ends the run under way.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    pythons: dict[str, Path] = {}
    failed: dict[str, str] = {}
    for library in dict.fromkeys(ROWS[name].library for name in names):
        try:
            pythons[library] = prepare(library)
        except RuntimeError as error:
            for name in names:
                if ROWS[name].library == library:
                    failed[name] = f"cannot be installed: {error}"
    names = [name for name in names if name not in failed]
    if args.search:
        num_passes = 1 if args.quick else SEARCH_PASSES
        found = {name: search(name, pythons[ROWS[name].library], num_passes) for name in names}
        report("peers_search", {"rows": found, "failed": failed}, args.quick)
        return

    seconds = QUICK_SECONDS if args.quick else SECONDS
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for number in range(QUICK_REPEATS if args.quick else REPEATS):
        for name in names[:: 1 if number % 2 == 0 else -1]:
            if name in failed:
                continue
            row = ROWS[name]
            try:
                runs[name].append(run(pythons[row.library], row, row.settings, seconds))
                log(f"{number} {name}: {runs[name][-1]}")
            except RuntimeError as error:
                failed[name] = f"repeat {number}: {error}"
                log(f"{name} failed: {failed[name]}")
    if "ours" in failed or len(failed) >= len(ROWS) - 1:
        raise RuntimeError(f"ours and one other row must run, got failures: {failed}.")
    runs = {name: found for name, found in runs.items() if name not in failed}
    rates = {name: [one["decisions_per_s"] for one in found] for name, found in runs.items()}
    ours = rates["ours"]
    others = {name: found for name, found in rates.items() if name != "ours"}
    every = [one for found in runs.values() for one in found]
    cores = os.cpu_count() or 1
    result = {
        "spread": paired_ratio(ours, [max(column) for column in zip(*others.values())]),
        "failed": failed,
        "fastest_other": max(others, key=lambda name: statistics.median(others[name])),
        "ratio": {name: paired_ratio(ours, found) for name, found in others.items()},
        "decisions_per_s": {name: spread(found, 1) for name, found in rates.items()},
        "share_of_env_limit": {
            name: spread(one["share_of_env_limit"] for one in found) for name, found in runs.items()
        },
        "cpu_ms_per_decision": {
            name: spread(1e3 * one["cpu_s"] / one["decisions"] for one in found)
            for name, found in runs.items()
        },
        "share_of_others": round(
            max(one["cpu_s_of_others"] / one["seconds"] / cores for one in every), 3
        ),
        "lanes": {
            lane: round(statistics.median(one["lanes"][lane] for one in runs["ours"]), 3)
            for lane in runs["ours"][0]["lanes"]
            if lane.endswith("_busy")
        },
        "settings": {name: row.settings for name, row in ROWS.items()},
        "versions": {name: found[-1]["versions"] for name, found in runs.items()},
    }
    report("peers", result, args.quick, "tensordict")


if __name__ == "__main__":
    main()
