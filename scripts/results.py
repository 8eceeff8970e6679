# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Results tables of the README and the guide, made from the raw results in ``docs/results``.

    python scripts/results.py [--check]             # make them anew, or say whether they are
    python scripts/results.py --keep PATH ...       # first keep outputs of benchmarks, folders of
                                                    # runs and of evaluations of a suite

``docs/results/rows.toml`` says what is in them. A row without its files is left out, and named.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import re
import statistics
import sys
import tomllib
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torchrl_dvla.recording import wilson_interval

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"
README, PAGE = ROOT / "README.md", ROOT / "docs" / "source" / "guide" / "results.md"
SPREAD = ("median", "min", "max")
MARKERS = "<!-- results -->\n", "<!-- end of results -->"
#: The folders of an absolute path, which are the machine's; its last name stays.
FOLDERS = re.compile(r"(?<![\w.:/])/(?:[\w.@+-]+/)*(?=[\w.@+-])")


# -- from a benchmark or a run to raw results ------------------------------------------------------
def keep(path: Path, results: Path = RESULTS) -> Path:
    """Keep a benchmark's output, or a run's or an evaluation's folder of this machine, as JSON."""
    if (path / "episodes.jsonl").is_file():
        return keep_evaluation(path, results)
    return keep_run(path, results) if path.is_dir() else keep_benchmark(path, results)


def keep_benchmark(file: Path, results: Path) -> Path:
    """The last line as it was printed, in place of an earlier one."""
    line = file.read_text().strip().splitlines()[-1]
    kept = results / "benchmarks" / f"{json.loads(line)['benchmark']}.json"
    kept.write_text(FOLDERS.sub("", line) + "\n")
    return kept


def keep_run(folder: Path, results: Path) -> Path:
    """Report, commands and curve of greedy success; another run of its seed is kept beside it."""
    report = json.loads((folder / "report.json").read_text())
    settings = (folder / "settings.yaml").read_text().splitlines()
    report["commands"] = [line[2:] for line in settings if line.startswith("# torchrl-dvla")]
    report["machine"] = this_machine()
    del report["checkpoint"]
    curve = ["evaluation,update,success_rate"]
    for file in sorted(folder.glob("scalars/eval*/success_rate.csv")):
        curve += [f"{file.parent.name},{point}" for point in file.read_text().split()]
    if len(curve) == 1:
        raise ValueError(f"{folder} must have its scalars as CSV. Run it with log.backend=csv.")
    kept = results / "runs" / f"{report['name'].replace(', seed ', '_seed')}.json"
    text = FOLDERS.sub("", json.dumps(report, indent=2)) + "\n"
    while kept.exists() and kept.read_text() != text:
        kept = kept.with_stem(f"{kept.stem}_again")
    kept.write_text(text)
    kept.with_name(f"{kept.stem}_success.csv").write_text("\n".join(curve) + "\n")
    return kept


def keep_evaluation(folder: Path, results: Path) -> Path:
    """Report of ``evaluate --suite``, by the name of its folder, in place of an earlier one."""
    report = json.loads((folder / "report.json").read_text())
    if not report["is_over"]:
        raise ValueError(f"{folder} must have all of its episodes. Call its command again.")
    report["machine"] = this_machine()
    kept = results / "evaluations" / f"{folder.resolve().name}.json"
    kept.write_text(FOLDERS.sub("", json.dumps(report)) + "\n")
    return kept


def this_machine() -> dict[str, Any]:
    """As benchmarks have it; the load of now says nothing of a run that is over."""
    sys.path.append(str(ROOT / "benchmarks"))
    from _machine import machine

    return {key: value for key, value in machine().items() if key != "load"}


# -- from raw results to values --------------------------------------------------------------------
def spread(values: Iterable[float]) -> dict[str, float]:
    """Median and range, as benchmarks have them."""
    values = list(values)
    return dict(zip(SPREAD, (statistics.median(values), min(values), max(values))))


def of_benchmark(path: Path, options: str) -> dict[str, Any]:
    """What a benchmark found; ``reach`` is how many nodes keep an efficiency of 0.9, by policy."""
    found, reach = json.loads(path.read_text()), {}
    for policy, rows in itertools.groupby(found.get("predicted", ()), lambda row: row["policy"]):
        feasible = (row for row in rows if row["feasible"])
        for row in itertools.takewhile(lambda row: row["efficiency"] >= 0.9, feasible):
            reach[policy] = row["nodes"]
    command = f".venv/bin/python benchmarks/{path.stem}.py {options}".strip()
    policies = defaultdict(list)
    for policy, nodes in reach.items():
        policies[nodes].append(policy)
    by_nodes = "; ".join(f"{n:,} nodes with {', '.join(names)}" for n, names in policies.items())
    values = {"reach": by_nodes, "command": command}
    return {**found, **values, "machines": [found["machine"]]}


def of_runs(paths: list[Path]) -> dict[str, Any]:
    """What the runs of a configuration found, those of a seed again included."""
    runs, curves, num_looks = [json.loads(path.read_text()) for path in paths], [], []
    for path in paths:
        with open(path.with_name(f"{path.stem}_success.csv"), newline="") as file:
            points = list(csv.DictReader(file))
        looks = [point for point in points if point["evaluation"] == "eval_subset"]
        num_looks.append(len(looks))
        # without its start, a run that loses all at once would have no drop
        start = [point for point in points if point["update"] == "0"]
        curves.append([float(point["success_rate"]) for point in start + looks])
    drops = [[best - x for best, x in zip(itertools.accumulate(c, max), c)] for c in curves]
    whole = [run for run in runs if run["before"] and run["after"]]
    seeds = ",".join(sorted({run["name"].rpartition(" ")[2] for run in runs}, key=int))
    own = {re.sub(r" (seed=|log\.|--config-name libero\b)\S*", "", r["commands"][0]) for r in runs}
    if len(own) > 1:
        raise ValueError(f"Runs must differ in seeds alone, got {own}. Name others by name=NAME.")
    settings = own.pop().replace("torchrl-dvla train", "--multirun")
    worse = [sum(is_worse(**found) for found in run.get("tasks", {}).values()) for run in whole]
    num_broken = len(runs) - len(whole)
    broken_off = f", {num_broken} of them broken off" if num_broken else ""
    return {
        **{key: spread(run[key]["num_successes"] for run in whole) for key in ("before", "after")},
        **{key: spread(run[key] for run in runs) for key in ("num_env_steps", "num_episodes")},
        "num_scenes": whole[0]["after"]["num_episodes"],
        "minutes": spread(run["training_s"] / 60 for run in runs),
        "worst_drop": spread(max(drop, default=0.0) for drop in drops),
        "num_looks": spread(num_looks),
        "tasks_worse": spread(worse),
        "runs": f"{len(runs)} {'run' if len(runs) == 1 else 'runs'}{broken_off}, seeds {seeds}",
        "machines": [run["machine"] for run in runs],
        "command": f"make train ARGS='{settings} seed={seeds} log.backend=csv'",
    }


def of_evaluations(paths: list[Path]) -> dict[str, Any]:
    """Renderings of each evaluation, by the last word of its name: ``NAME_after``."""
    reports = {path.stem.rpartition("_")[2]: json.loads(path.read_text()) for path in paths}
    commands, num_scenes = set(), 0
    for report in reports.values():
        renderings = report["renderings"]
        found = next(iter(renderings.values()))
        num_scenes = found["num_episodes"]
        commands.add(
            f"torchrl-dvla evaluate POLICY --suite {report['suite']} --episodes "
            f"{num_scenes // len(found['tasks'])} --rendering {','.join(renderings)}"
        )
    if len(commands) > 1:
        raise ValueError(f"Evaluations of a row must differ in policies alone, got {commands}.")
    return {
        **{name: report["renderings"] for name, report in reports.items()},
        "num_scenes": num_scenes,
        "machines": [report["machine"] for report in reports.values()],
        "command": commands.pop(),
    }


def is_worse(before: dict[str, int], after: dict[str, int]) -> bool:
    """Whether the success rate of a task fell below its 95 % interval from before."""
    low, _ = wilson_interval(before["num_successes"], before["num_episodes"])
    return after["num_successes"] / after["num_episodes"] < low


# -- from values to tables -------------------------------------------------------------------------
def filled(answer: str, values: dict[str, Any]) -> str:
    """Answer with its values: median and range of a spread, the names in what else has some."""

    def shown(match: re.Match[str]) -> str:
        value: Any = values
        for key in match[1].split("."):
            if key not in value:
                raise KeyError(
                    f"{match[0]} is not in the raw file. Measure it anew: {values['command']}"
                )
            value = value[key]
        if not isinstance(value, dict):
            return format(value, match[2])
        if not value.keys() >= {*SPREAD}:
            return ", ".join(value) or "none"
        median, low, high = (format(value[key], match[2]) for key in SPREAD)
        return median if low == high else f"{median} ({low} to {high})"

    return re.sub(r"\{([^{}:]+):?([^{}]*)\}", shown, " ".join(answer.split()))


def machine_name(machine: dict[str, Any]) -> str:
    """Cores and processor."""
    cpu = re.sub(r"\(R\)|\(TM\)| Processor| CPU", "", machine["cpu"])
    return f"{machine['cores']} cores, {cpu}"


def load_of(machine: dict[str, Any]) -> str:
    """The load beside a benchmark; runs were not asked for it."""
    return f", load {machine['load']}" if "load" in machine else ""


def table(page: Path, results: Path = RESULTS) -> tuple[str, list[str]]:
    """Table of a page in Markdown, and the files that further rows need.

    The README's has its raw files as links and its machines below; the guide's has a column of
    them, for it is built without the folder of the files.
    """
    is_readme = page == README
    titles = ["question", "answer", "command", *([] if is_readme else ["machine, raw file"])]
    lines, machines, missing = [titles, ["---"] * len(titles)], set[str](), list[str]()
    for row in tomllib.loads((results / "rows.toml").read_text())["row"]:
        files, folder = row["files"], row["files"].partition("/")[0]
        paths = sorted(results.glob(files))
        if is_readme and not row.get("readme"):
            continue
        if not paths:
            missing.append(files)
            continue
        options = row.get("options", "")
        if folder == "benchmarks":
            values = of_benchmark(paths[0], options)
        else:
            values = of_runs(paths) if folder == "runs" else of_evaluations(paths)
        answer = filled(row["answer"], values) + "; **quick run**" * values.get("quick", False)
        cells = [row["question"], answer, f"`{values['command']}`"]
        if is_readme:
            cells[1] += f" ([raw](docs/results/{files if folder == 'benchmarks' else folder}))"
            machines |= {machine_name(machine) for machine in values["machines"]}
        else:
            found = {f"{machine_name(m)}{load_of(m)}" for m in values["machines"]}
            cells.append(f"{' and '.join(sorted(found))}: `docs/results/{files}`")
        lines.append(cells)
    below = f"\nMeasured on: {'; '.join(sorted(machines))}.\n" if is_readme else ""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n" + below, missing


def with_table(text: str, made: str) -> str:
    """Text of a page, with the table between its markers."""
    (before, _), (_, after) = text.split(MARKERS[0]), text.split(MARKERS[1])
    return f"{before}{MARKERS[0]}\n{made}\n{MARKERS[1]}{after}"


def main() -> None:
    """Keep what is given; write or check the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--keep", nargs="+", type=Path, default=[], metavar="PATH")
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if there is need to")
    args = parser.parse_args()
    for path in args.keep:
        print(f"kept {keep(path).relative_to(ROOT)}")
    old = []
    for page in (README, PAGE):
        made, missing = table(page)
        text = with_table(page.read_text(), made)
        if text != page.read_text():
            old.append(page.name)
            if not args.check:
                page.write_text(text)
    print(f"rows left out, for want of {', '.join(dict.fromkeys(missing)) or 'nothing'}")
    print(f"{'not up to date' if args.check else 'made anew'}: {', '.join(old) or 'none'}")
    sys.exit(bool(args.check and old))


if __name__ == "__main__":
    main()
