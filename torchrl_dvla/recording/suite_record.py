# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Record of the evaluation of a suite: every episode as it ends, and the table of all of them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar, NamedTuple

from torchrl_dvla.differences import differences, join_some
from torchrl_dvla.recording.recorder import check_writable
from torchrl_dvla.recording.report import SuccessRate
from torchrl_dvla.recording.run_lock import RunLock
from torchrl_dvla.recording.training_scenes import SceneOverlap
from torchrl_dvla.saved_state import COUNT, Number, require_form

__all__ = ["EpisodeKey", "EpisodeRecord", "SuiteRecord", "SuiteReport"]


class EpisodeKey(NamedTuple):
    """Which episode of a suite: it is played once.

    Args:
        rendering (str): how its frames are drawn.
        task_id (int): index in the suite.
        init_state_id (int): index of the benchmark's init state.
    """

    rendering: str
    task_id: int
    init_state_id: int


@dataclass(frozen=True)
class EpisodeRecord:
    """How an episode went.

    Args:
        rendering, task_id, init_state_id: which it was, see :class:`EpisodeKey`.
        init_state_hash (str): of the state that it started from, 16 hexadecimal digits.
        success (bool): whether the task was solved.
        num_env_steps (int): its length.
        duration_s (float): from its reset to its end; it waits for others in a batch.
    """

    rendering: str
    task_id: int
    init_state_id: int
    init_state_hash: str
    success: bool
    num_env_steps: int
    duration_s: float

    FORM: ClassVar[dict[str, Any]] = {
        "rendering": str,
        "task_id": COUNT,
        "init_state_id": COUNT,
        "init_state_hash": str,
        "success": bool,
        "num_env_steps": COUNT,
        "duration_s": Number(0),
    }

    @property
    def key(self) -> EpisodeKey:
        """Which episode it was."""
        return EpisodeKey(self.rendering, self.task_id, self.init_state_id)


class SuiteRecord:
    """Folder of an evaluation, which goes on where it was interrupted.

    A line is on the disk when :meth:`add` returns. A process that is killed leaves at worst half a
    line at the end, which is dropped, and that episode is played again.

    Args:
        folder (str or os.PathLike): made if missing; locked until :meth:`close`.
        settings (Mapping): what the outcome of an episode depends on, as plain data. Those of an
            evaluation that the folder holds already must be the same.

    Raises:
        ValueError: if the folder is in use, holds something else, or an evaluation with other
            settings; it names what differs.

    Examples:
        >>> import tempfile
        >>> episode = EpisodeRecord("benchmark", 3, 0, "0" * 16, True, 84, 9.5)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     record = SuiteRecord(folder, {"suite": "libero_object"})
        ...     record.add(episode)
        ...     record.close()
        ...     again = SuiteRecord(folder, {"suite": "libero_object"})
        ...     again.close()
        >>> again.episodes[EpisodeKey("benchmark", 3, 0)] == episode
        True
    """

    def __init__(self, folder: str | os.PathLike[str], settings: Mapping[str, Any]) -> None:
        self.folder = Path(folder).expanduser()
        self._settings_file = self.folder / "settings.json"
        self._require_ours()
        self._lock = RunLock(check_writable(self.folder, name="--out"))
        #: Those that have ended, in any order.
        self.episodes: dict[EpisodeKey, EpisodeRecord] = {}
        path = self.folder / "episodes.jsonl"
        try:
            self._compare(json.loads(json.dumps(settings)))
            self._read(path)
            self._file = path.open("ab")
        except BaseException:
            self._lock.release()
            raise

    def _require_ours(self) -> None:
        if not self.folder.is_dir() or self._settings_file.is_file():
            return
        names = sorted(path.name for path in self.folder.iterdir() if path.name != "owner")
        if names:
            raise ValueError(
                f"--out must be a new folder or that of an evaluation, got {str(self.folder)!r} "
                f"with {join_some(names, limit=4)} in it. Choose another one."
            )

    def _compare(self, settings: dict[str, Any]) -> None:
        if not self._settings_file.is_file():
            write_whole(self._settings_file, json.dumps(settings, indent=2) + "\n")
            return
        try:
            found = json.loads(self._settings_file.read_text(encoding="utf-8"))
            require_form({str: object}, found, "settings")
        except ValueError as error:
            raise ValueError(
                f"{str(self._settings_file)!r} must hold the settings of an evaluation, got "
                f"{error} Choose another folder."
            ) from error
        if problems := differences(_flat(found), _flat(settings)):
            raise ValueError(
                f"--out must be a new folder or that of the same evaluation, got "
                f"{str(self.folder)!r} of another one: {join_some(problems)}. Choose another "
                "folder, or the settings that it was begun with."
            )

    def _read(self, path: Path) -> None:
        data = path.read_bytes() if path.is_file() else b""
        whole = data[: data.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                entry = json.loads(line)
                require_form(EpisodeRecord.FORM, entry, "episode")
            except ValueError as error:
                raise ValueError(
                    f"{str(path)!r} must hold an episode on each line, got another line {number}: "
                    f"{error} Delete that line to play its episode again, or choose another folder."
                ) from error
            episode = EpisodeRecord(**entry)
            self.episodes[episode.key] = episode
        if len(whole) < len(data):
            os.truncate(path, len(whole))

    def add(self, episode: EpisodeRecord) -> None:
        """Write an episode that has ended."""
        self._file.write(json.dumps(asdict(episode)).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.episodes[episode.key] = episode

    def close(self) -> None:
        """Let the folder go."""
        self._file.close()
        self._lock.release()


def write_whole(path: Path, text: str) -> None:
    """Write a file, the old one or the new one at any moment."""
    unfinished = path.with_name(f".{path.name}")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in settings.items():
        nested = isinstance(value, dict) and value
        out |= _flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return out


@dataclass(frozen=True)
class SuiteReport:
    """Table of the evaluation of a suite, a line for each task, for each rendering.

    Args:
        policy (str): what was evaluated.
        suite (str): its name.
        instructions (Mapping): of each task that is part of it, by its index in the suite.
        num_episodes (int): init states of each task that are part of it, from the first.
        renderings (Mapping): what each is like, by name.
        protocol (str): how an episode is played, in a sentence.
        episodes (Mapping): those that have ended; others are left out.
        overlap (SceneOverlap): with the init states that the policy was trained from.
    """

    policy: str
    suite: str
    instructions: Mapping[int, str]
    num_episodes: int
    renderings: Mapping[str, str]
    protocol: str
    episodes: Mapping[EpisodeKey, EpisodeRecord]
    overlap: SceneOverlap

    def keys(self) -> list[EpisodeKey]:
        """All episodes of the evaluation, in the order in which they are played."""
        return [
            EpisodeKey(rendering, task_id, init_state_id)
            for rendering in self.renderings
            for task_id in self.instructions
            for init_state_id in range(self.num_episodes)
        ]

    def played(self, rendering: str, task_id: int) -> list[EpisodeRecord]:
        """Episodes of a task that have ended."""
        keys = (EpisodeKey(rendering, task_id, number) for number in range(self.num_episodes))
        return [self.episodes[key] for key in keys if key in self.episodes]

    @property
    def num_played(self) -> int:
        """Episodes of the evaluation that have ended."""
        return sum(key in self.episodes for key in self.keys())

    def mean(self, rendering: str) -> tuple[float, SuccessRate] | None:
        """Mean of the tasks' success rates, and the success of all their episodes together."""
        tasks = [
            found for task_id in self.instructions if (found := self.played(rendering, task_id))
        ]
        if not tasks:
            return None
        rates = [SuccessRate.of([episode.success for episode in found]) for found in tasks]
        every = [episode.success for found in tasks for episode in found]
        return fmean(rate.rate for rate in rates), SuccessRate.of(every)

    def rows(self, rendering: str) -> list[tuple[str, ...]]:
        """Head, tasks and mean of a rendering's table."""
        out: list[tuple[str, ...]] = [
            ("task", "success", "", "95 % interval", "env steps of a success", "s/episode")
        ]
        found: list[EpisodeRecord] = []
        for task_id, instruction in self.instructions.items():
            name, played = f"{task_id} {instruction}", self.played(rendering, task_id)
            found += played
            out.append((name, *_cells(played)) if played else (name, *["-"] * 5))
        mean = self.mean(rendering)
        if mean is not None:
            _, *rest = _cells(found)
            out.append(("mean over tasks", f"{100 * mean[0]:.1f} %", *rest))
        return out

    def _notes(self) -> list[str]:
        total = len(self.keys())
        of_tasks = f"{len(self.instructions)} task{'s' * (len(self.instructions) > 1)}"
        states = f"{self.num_episodes} init state{'s' * (self.num_episodes > 1)} each"
        notes = [f"{of_tasks}, {states}. {self.protocol}"]
        if self.num_played < total:
            notes.append(f"Not over: {self.num_played} of {total} episodes have been played.")
        notes.append(f"Training scenes: {self.overlap}")
        return notes

    def to_text(self) -> str:
        """The tables as aligned plain text."""
        lines = []
        for rendering, meaning in self.renderings.items():
            rows = self.rows(rendering)
            widths = [max(map(len, column)) for column in zip(*rows)]
            lines += [f"{self.suite}, {rendering} rendering ({meaning})"]
            lines += [
                "  ".join(f"{text:<{width}}" for text, width in zip(row, widths)).rstrip()
                for row in rows
            ]
            lines.append("")
        return "\n".join([*lines, *self._notes()])

    def to_markdown(self) -> str:
        """The same as Markdown."""
        lines = [f"# {self.suite}: {self.policy}", ""]
        for rendering, meaning in self.renderings.items():
            head, *rows = self.rows(rendering)
            lines += [f"## {rendering} rendering", "", f"{meaning[0].upper()}{meaning[1:]}.", ""]
            lines += [_line(head), "|" + "---|" * len(head), *map(_line, rows), ""]
        for note in self._notes():
            lines += [note, ""]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Figures, and every episode."""
        out: dict[str, Any] = {}
        for rendering in self.renderings:
            mean, tasks = self.mean(rendering), {}
            for task_id, instruction in self.instructions.items():
                played = self.played(rendering, task_id)
                tasks[str(task_id)] = {"instruction": instruction, **_figures(played)}
            every = [e for task_id in self.instructions for e in self.played(rendering, task_id)]
            out[rendering] = {
                "mean_success_rate": None if mean is None else mean[0],
                **_figures(every),
                "tasks": tasks,
            }
        evaluated = list(dict.fromkeys((key.task_id, key.init_state_id) for key in self.keys()))
        return {
            "policy": self.policy,
            "suite": self.suite,
            "is_over": self.num_played == len(self.keys()),
            "renderings": out,
            "training_scenes": {
                "verdict": self.overlap.verdict,
                "text": str(self.overlap),
                "num_known": self.overlap.num_known,
                "gaps": list(self.overlap.gaps),
                "evaluated_and_trained_from": [
                    {"task_id": evaluated[k][0], "init_state_id": evaluated[k][1]}
                    for k in self.overlap.found
                ],
            },
            "episodes": [asdict(self.episodes[k]) for k in self.keys() if k in self.episodes],
        }


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cells(played: Sequence[EpisodeRecord]) -> tuple[str, ...]:
    """Success, count, interval, mean length of a success, mean duration."""
    success = SuccessRate.of([episode.success for episode in played])
    low, high = success.interval
    lengths = [episode.num_env_steps for episode in played if episode.success]
    return (
        f"{100 * success.rate:.1f} %",
        f"{success.num_successes}/{success.num_episodes}",
        f"{100 * low:.1f}-{100 * high:.1f}",
        f"{fmean(lengths):.1f}" if lengths else "-",
        f"{fmean(episode.duration_s for episode in played):.1f}",
    )


def _figures(played: Sequence[EpisodeRecord]) -> dict[str, Any]:
    if not played:
        return {"num_successes": 0, "num_episodes": 0, "success_rate": None, "interval": None}
    success = SuccessRate.of([episode.success for episode in played])
    return {
        "num_successes": success.num_successes,
        "num_episodes": success.num_episodes,
        "success_rate": success.rate,
        "interval": list(success.interval),
    }
