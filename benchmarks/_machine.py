# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What benchmarks have in common: arguments, report, spread of repeats, processes of their own."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from typing import Any

_STARTED_S = time.monotonic()


def arguments(doc: str, quick: str, **options: Any) -> argparse.Namespace:
    """Command line of a benchmark.

    Args:
        doc (str): its docstring; the first line is the question.
        quick (str): what ``--quick`` does.
        **options: by name the default, or the type of an option without one; ``False`` is a flag.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help=quick)
    for name, default in options.items():
        flag = f"--{name.replace('_', '-')}"
        if default is False:
            parser.add_argument(flag, action="store_true")
        elif isinstance(default, type):
            parser.add_argument(flag, type=default)
        else:
            parser.add_argument(flag, type=type(default), default=default, help=f"{default}")
    return parser.parse_args()


def log(text: object) -> None:
    """Tell whoever waits; stdout is for the result."""
    print(f"{time.monotonic() - _STARTED_S:5.0f} s  {text}", file=sys.stderr, flush=True)


def report(benchmark: str, result: dict[str, Any], quick: bool, *packages: str) -> None:
    """Print the result as the last line of stdout: one JSON object."""
    result = {"benchmark": benchmark, **result, "machine": machine(*packages), "quick": quick}
    print(json.dumps(result))


def machine(*packages: str) -> dict[str, Any]:
    """The machine, its load, and the versions of ``packages`` beside torch and torchrl."""
    cpu = platform.processor()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            lines = [line for line in file if line.startswith("model name")]
        cpu = lines[0].split(":", 1)[1].strip() if lines else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "torchrl", *packages)},
    }


def spread(values: Iterable[float], digits: int = 2) -> dict[str, float]:
    """Median and range of the repeats."""
    values = list(values)
    return {
        "median": round(statistics.median(values), digits),
        "min": round(min(values), digits),
        "max": round(max(values), digits),
    }


def paired_ratio(ours: Iterable[float], theirs: Iterable[float]) -> dict[str, float]:
    """Median and range of the ratio within one repeat: a slow moment slows both sides."""
    return spread(a / b for a, b in zip(ours, theirs, strict=True))


def env_steps_per_s(runs: list[dict[str, Any]]) -> list[float]:
    """Rate of each run of a simulator."""
    return [run["env_steps"] / run["total_s"] for run in runs]


def env_step_summary(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Rates of the runs of a simulator, and the median seconds of a reset."""
    found = spread(env_steps_per_s(runs))
    return {
        "env_steps_per_s": found.pop("median"),
        **found,
        "reset_s": round(statistics.median(run["reset_s"] for run in runs), 3),
    }


def memory_bytes(field: str, mapping: str = "") -> int:
    """A field of this process's memory map, summed over the mappings of that name."""
    total, is_wanted = 0, False
    with open(f"/proc/self/{'smaps' if mapping else 'smaps_rollup'}") as file:
        for line in file:
            if not line.split()[0].endswith(":"):  # the head of a mapping
                is_wanted = mapping in line
            elif is_wanted and line.startswith(f"{field}:"):
                total += int(line.split()[1]) * 1024
    return total


def in_process(target: Callable[..., Any], *args: Any) -> Any:
    """Call ``target(*args)`` in a fresh process, which may start others."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(target, *args).result()
