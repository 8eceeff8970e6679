# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Say what the folder of a run holds: settings, success, checkpoints, and how to go on with it.

RUN is the folder that a run of `train` names at its beginning: runs/<name>/<time>_seed<seed>.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import re
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from torchrl_dvla.commands.saved_policy import describe_other, read_json
from torchrl_dvla.memory import format_bytes
from torchrl_dvla.recipes.dvla_grpo.settings import CONFIG, compose_settings, flat, to_dict
from torchrl_dvla.recording import SuccessRate
from torchrl_dvla.saved_state import read_state

#: Settings that a configuration leaves open, and those of the sections that are made by an option.
_OPEN = re.compile(r"policy\.checkpoint$")
_SECTIONS = re.compile(r"(env|policy)\.|workers\.max_decisions$")
#: Those that say where a run is, not what it does.
_NOT_SHOWN = ("log.dir", "checkpoint.resume")
#: Texts that Hydra reads as they are.
_BARE = re.compile(r"[A-Za-z_/][\w./-]*")


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
    settings = _settings(folder, checkpoints)
    owner = _owner(folder)
    rows = [("run", str(folder)), ("now", f"running: {owner}" if owner else "not running")]
    rows += _progress(folder, checkpoints, is_running=bool(owner))
    rows += [("checkpoint", _describe_checkpoint(path)) for path in checkpoints]
    if not checkpoints:
        rows.append(("checkpoint", "none"))
    chosen, changed = _nearest(settings) if settings else ([], [])
    if settings:
        rows.append(("settings", f"{' '.join(chosen)}{', but' if changed else ''}"))
        rows += [("", text.removeprefix("++")) for text in changed]
    width = max(len(label) for label, _ in rows)
    for label, value in rows:
        print(f"{label:<{width}}  {value}")
    print()
    for label, words in _commands(folder, settings, [*chosen, *changed], bool(checkpoints)).items():
        print(f"{label:<{width}}  {words}")
    return 0


def _settings(folder: Path, checkpoints: list[Path]) -> dict[str, Any]:
    """The run's settings; empty if nothing says them."""
    path = folder / "settings.yaml"
    if path.is_file():
        data = yaml.safe_load(path.read_text())
        return data if isinstance(data, dict) else {}
    return dict(read_json(checkpoints[-1])["metadata"]["config"]) if checkpoints else {}


def _owner(folder: Path) -> str:
    """Who works in the folder; empty if nobody does. The run's lock is left as it is."""
    with (folder / "owner").open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return file.read().strip() or "another process"
        except OSError:  # a file system without locks
            return ""
    return ""


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


def _nearest(settings: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Arguments that choose the configuration with the fewest other settings, and these."""
    own, found = flat(settings), []
    env, policy = settings["env"], settings["policy"]
    options = {
        "env": "factory" if "_target_" in env else env["backend"],
        "policy": "factory" if "_target_" in policy else policy["kind"].removesuffix("_vla"),
    }
    for path in sorted(CONFIG.glob("*.yaml")):
        shipped = yaml.safe_load(path.read_text())
        defaults = {k: v for entry in shipped["defaults"][:-1] for k, v in entry.items()}
        groups = [f"{k}={v}" for k, v in options.items() if defaults[k] != v]
        # What is compared with each other has to come together, lest it be refused.
        is_given = _SECTIONS if groups else _OPEN
        given = {name: value for name, value in own.items() if is_given.match(name)}
        try:
            theirs = compose_settings(path.stem, [*groups, *_overrides(given)])
        except ValueError:  # settings of its own that are none of this environment
            continue
        files = {
            k: yaml.safe_load((CONFIG / k / f"{v}.yaml").read_text()) for k, v in options.items()
        }
        base = flat(to_dict(theirs)) | dict.fromkeys(given) | flat(files) | flat(shipped)
        names = [name for name in own if base.get(name) != own[name] and name not in _NOT_SHOWN]
        if not base.keys() - own.keys() - {"defaults"}:
            changed = _overrides({name: own[name] for name in names})
            found.append((["--config-name", path.stem, *groups], changed))
    return min(found, key=lambda each: len(each[0]) + len(each[1]))


def _overrides(settings: Mapping[str, Any]) -> list[str]:
    """As they are typed behind the command, whether a configuration has them already or not."""
    return [f"++{name}={_hydra_value(value)}" for name, value in settings.items()]


def _hydra_value(value: Any) -> str:
    """A value in the grammar of Hydra's overrides."""
    if isinstance(value, list):
        return f"[{','.join(map(_hydra_value, value))}]"
    if not isinstance(value, str):
        return json.dumps(value)
    if _BARE.fullmatch(value) and value.lower() not in ("null", "true", "false", "nan", "inf"):
        return value
    escaped = value.replace('\\"', '\\\\"').replace('"', '\\"')
    return f'"{escaped}"'


def _commands(
    folder: Path, settings: Mapping[str, Any], arguments: list[str], is_saved: bool
) -> dict[str, str]:
    """How to go on, as it can be pasted into a shell."""
    python = "python" if shutil.which("python") == sys.executable else sys.executable
    program = [python, "-m", "torchrl_dvla"]
    words = {"watch": [python, "-m", "tensorboard.main", "--logdir", str(folder)]}
    if is_saved:
        words["evaluate"] = [*program, "evaluate", str(folder)]
    if is_saved and settings:
        last = {"log.dir": settings["log"]["dir"], "checkpoint.resume": str(folder)}
        words["resume"] = [*program, "train", *arguments, *_overrides(last)]
    return {label: shlex.join(some) for label, some in words.items()}
