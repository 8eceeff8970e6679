# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Say what the folder of a run holds: settings, success, checkpoints, and how to go on with it.

RUN is the folder that a run of `train` names at its beginning: runs/<name>/<time>_seed<seed>.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from torchrl_dvla.commands.saved_policy import describe_other, read_json
from torchrl_dvla.memory import format_bytes
from torchrl_dvla.recipes.terminal import (
    SETTINGS_FILE,
    command,
    resume_command,
    shortened,
    watch_command,
)
from torchrl_dvla.recording import RunLock, SuccessRate
from torchrl_dvla.saved_state import read_state


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What follows the command."""
    parser.add_argument("run_folder", metavar="RUN", help="folder of a run")


def run(args: argparse.Namespace) -> int:
    """Prints it."""
    folder = Path(args.run_folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(
            f"RUN must be the folder of a run, got {str(folder)!r}, which is none. Runs are in "
            "<log.dir>/<name>, log.dir being `runs` by default."
        )
    if not (folder / "owner").is_file():
        raise ValueError(
            f"RUN must be the folder of a run of `train`, got {str(folder)!r}: "
            f"{describe_other(folder)}"
        )
    folder = folder.absolute()
    checkpoints = sorted((folder / "checkpoints").glob("update-*/manifest.json"))
    owner = RunLock.owner_of(folder)
    rows = [("run", str(folder)), ("now", f"running: {owner}" if owner else "not running")]
    rows += _progress(folder, checkpoints, is_running=bool(owner))
    rows += [("checkpoint", _describe_checkpoint(path)) for path in checkpoints]
    if not checkpoints:
        rows.append(("checkpoint", "none"))
    rows += [("started by", words) for words in _starts(folder)]
    width = max(len(label) for label, _ in rows)
    for label, value in rows:
        print(f"{label:<{width}}  {value}")
    print()
    words = [("watch", watch_command(folder))]
    if checkpoints:
        words += [("evaluate", command("evaluate", shortened(folder)))]
        words += [("resume", resume_command(folder))]
    for label, value in words:
        print(f"{label:<{width}}  {value}")
    return 0


def _starts(folder: Path) -> list[str]:
    """The commands that have started and resumed the run; settings are in them."""
    path = folder / SETTINGS_FILE
    lines = path.read_text().splitlines() if path.is_file() else []
    return [line.removeprefix("# ") for line in lines if line.startswith("# ")]


def _progress(
    folder: Path, checkpoints: list[Path], *, is_running: bool
) -> Iterator[tuple[str, str]]:
    """Updates and success, by the report of a run that has ended, else by its last checkpoint."""
    report = read_json(folder / "report.json")
    if report and not is_running:
        state = dict(report)
        for name in ("before", "after"):
            state[name] = SuccessRate(**report[name]) if report[name] else None
    elif checkpoints:
        (file,) = checkpoints[-1].parent.glob("components/*-run/state.pt")
        state = dict(read_state(file))
        for name in ("before", "after"):
            state[name] = SuccessRate.of(state[name]) if state[name] else None
    else:
        yield "updates", "none saved yet"
        return
    ended = f", ended by {state['ended_by']}" if state["ended_by"] and not is_running else ""
    yield "updates", f"{state['num_updates']} in {state['training_s'] / 60:.1f} min{ended}"
    for name in ("before", "after"):
        yield f"success {name}", str(state[name] or "not evaluated")


def _describe_checkpoint(manifest: Path) -> str:
    size = sum(file.stat().st_size for file in manifest.parent.rglob("*") if file.is_file())
    created = read_json(manifest).get("created_at", "")
    when = datetime.fromisoformat(created).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    return f"{manifest.parent.name}, {when}, {format_bytes(size)}"
