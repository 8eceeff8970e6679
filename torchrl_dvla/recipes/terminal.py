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
from collections.abc import Iterator
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException

from torchrl_dvla.validation import is_refusal

__all__ = [
    "command",
    "messages_only",
    "override",
    "resume_command",
    "shortened",
    "watch_command",
]


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


def resume_command(name: str, run_folder: Path, *, config_path: Path, config_name: str) -> str:
    """The command that goes on with a run, with the overrides that it was started with.

    Args:
        name (str): the command that runs the recipe.
        run_folder (Path): the folder of the run.

    Keyword Args:
        config_path (Path): the recipe's own folder of configurations.
        config_name (str): the configuration that it takes by default.
    """
    arguments = []
    if HydraConfig.initialized():
        cfg = HydraConfig.get()
        for source in cfg.runtime.config_sources:
            if source.provider == "main" and source.path != str(config_path):
                arguments += ["--config-path", shortened(Path(source.path))]
            elif source.provider == "command-line":
                arguments += ["--config-dir", shortened(Path(source.path))]
        if cfg.job.config_name != config_name:
            arguments += ["--config-name", str(cfg.job.config_name)]
        arguments += [o for o in cfg.overrides.task if not re.match(r"\+*checkpoint\.resume=", o)]
    return command(name, *arguments, override("checkpoint.resume", shortened(run_folder)))


def shortened(path: Path) -> str:
    """A path relative to the working directory if it is below it."""
    path = path.absolute()
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _python() -> list[str]:
    """This interpreter, by its name where that finds it."""
    found = shutil.which("python")
    is_same = found is not None and Path(found).parent == Path(sys.executable).parent
    return ["python" if is_same else shortened(Path(sys.executable))]
