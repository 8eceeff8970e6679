# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What recipes say in the terminal: errors by their message, and commands to go on with."""

from __future__ import annotations

import contextlib
import re
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from omegaconf import OmegaConf

from torchrl_dvla.validation import is_refusal

__all__ = [
    "SETTINGS_FILE",
    "command",
    "messages_only",
    "override",
    "resume_command",
    "shortened",
    "watch_command",
    "write_settings",
]

#: The settings of a run, in its folder.
SETTINGS_FILE = "settings.yaml"


@contextlib.contextmanager
def messages_only() -> Iterator[None]:
    """Errors that Hydra shows without a traceback, where a check's message says all.

    ``HYDRA_FULL_ERROR=1`` shows the traceback. Any other error keeps it.
    """
    try:
        yield
    except Exception as error:
        if not is_refusal(error):
            raise
        raise CompactHydraException(str(error)) from error


def command(name: str, *arguments: str) -> str:
    """A command line of this package, as it has to be typed in the working directory."""
    return shlex.join([*_python(), "-m", "torchrl_dvla", name, *arguments])


def override(name: str, value: str) -> str:
    """An override of a setting; Hydra would read more into some characters, ``=`` and commas.

    Examples:
        >>> override("log.dir", "runs"), override("log.dir", "lr=1, again")
        ('log.dir=runs', 'log.dir="lr=1, again"')
    """
    is_plain = re.fullmatch(r"[\w./+-]+", value)
    return f"{name}={value}" if is_plain else name + '="' + value.replace('"', '\\"') + '"'


def watch_command(run_folder: Path) -> str:
    """The command that shows a run in TensorBoard."""
    python, found = _python(), shutil.which("tensorboard")
    is_same = found is not None and Path(found).parent == Path(sys.executable).parent
    program = ["tensorboard"] if is_same else [*python, "-m", "tensorboard.main"]
    return shlex.join([*program, "--logdir", shortened(run_folder)])


def resume_command(run_folder: Path) -> str:
    """The command that goes on with a run, with its settings, see :func:`write_settings`."""
    folder = shortened(run_folder)
    name = Path(SETTINGS_FILE).stem
    resume = override("checkpoint.resume", folder)
    return command("train", "--config-dir", folder, "--config-name", name, resume)


def write_settings(settings: Mapping[str, Any], run_folder: Path) -> None:
    """Write the settings of a run into its folder, as a configuration to start from again.

    Its first lines are the commands that have started and resumed the run.
    """
    path, starts = run_folder / SETTINGS_FILE, []
    if path.is_file():
        starts = [line for line in path.read_text().splitlines() if line.startswith("# ")]
    if HydraConfig.initialized():
        words = shlex.join(["train", *_arguments(HydraConfig.get())])
        starts.append("# torchrl-dvla " + " ".join(words.split()))
    defaults = [{"common": "settings"}, "_self_"]
    text = OmegaConf.to_yaml({"defaults": defaults, **settings})
    path.write_text("".join(f"{line}\n" for line in starts) + text)


def _arguments(cfg: HydraConf) -> list[str]:
    """What was typed behind the command."""
    folders = [s.path for s in cfg.runtime.config_sources if s.provider == "command-line"]
    given = [word for path in folders for word in ("--config-dir", shortened(Path(path)))]
    return [*given, "--config-name", str(cfg.job.config_name), *cfg.overrides.task]


def shortened(path: Path) -> str:
    """A path relative to the working directory if it is below it."""
    path = path.absolute()
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _python() -> list[str]:
    """This interpreter, by its name where that finds it."""
    found = shutil.which("python")
    is_same = found is not None and Path(found).parent == Path(sys.executable).parent
    return ["python" if is_same else shortened(Path(sys.executable))]
