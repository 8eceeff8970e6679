# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""One line that says how far a run is."""

from __future__ import annotations

import math
import shutil
import sys
import time
from collections.abc import Mapping
from typing import TextIO

__all__ = ["ProgressBar"]


class ProgressBar:
    """A progress bar over updates or time, whichever budget runs out first.

    On a terminal the line is redrawn in place. Elsewhere (a log file, CI) a bar of carriage returns
    would be unreadable, so a fresh line is written at most every ``line_every_s`` seconds.

    Keyword Args:
        num_updates (int, optional): update budget.
        max_s (float, optional): time budget in seconds.
        start_update (int): updates already done by the run that is resumed. Defaults to 0.
        start_s (float): seconds already spent by it. Defaults to 0.
        file (TextIO, optional): where to write. Defaults to standard error.
        line_every_s (float): pause between lines where ``file`` is no terminal. Defaults to ``10``.

    Raises:
        ValueError: if neither budget is given.

    Examples:
        >>> import io
        >>> out = io.StringIO()
        >>> bar = ProgressBar(num_updates=4, file=out, line_every_s=0.0)
        >>> bar.update(1, {"env steps/s": 31.4, "lag": 0.5, "success": 0.25})
        >>> out.getvalue().startswith("[#####               ]  25 % | update 1/4 | ")
        True
    """

    _WIDTH = 20

    def __init__(
        self,
        *,
        num_updates: int | None = None,
        max_s: float | None = None,
        start_update: int = 0,
        start_s: float = 0.0,
        file: TextIO | None = None,
        line_every_s: float = 10.0,
    ) -> None:
        if num_updates is None and max_s is None:
            raise ValueError(
                "num_updates or max_s must be given, got None for both. A bar needs an end."
            )
        self._num_updates = num_updates
        self._max_s = max_s
        self._update = start_update
        self._start_s = time.monotonic() - start_s
        self._file = sys.stderr if file is None else file
        self._in_place = self._file.isatty()
        self._line_every_s = line_every_s
        self._last_s = -math.inf
        self._values: Mapping[str, float] = {}

    @property
    def elapsed_s(self) -> float:
        """Seconds of the whole run, those before a resume included."""
        return time.monotonic() - self._start_s

    @property
    def fraction(self) -> float:
        """How much of the tighter budget is spent, in ``[0, 1]``."""
        spent = [0.0]
        if self._num_updates is not None:
            spent.append(self._update / max(1, self._num_updates))
        if self._max_s is not None:
            spent.append(self.elapsed_s / max(1e-9, self._max_s))
        return min(1.0, max(spent))

    def update(self, update: int, values: Mapping[str, float]) -> None:
        """Show that ``update`` updates are done, and the newest figures."""
        self._update, self._values = update, values
        now = time.monotonic()
        if self._in_place or now - self._last_s >= self._line_every_s:
            self._last_s = now
            self._write()

    def message(self, text: str) -> None:
        """Write ``text`` on a line of its own, above the bar."""
        if self._in_place:
            self._file.write("\r\x1b[K")
        self._file.write(text + "\n")
        if self._in_place and self._values:
            self._write()
        self._file.flush()

    def close(self) -> None:
        """Show the last state and leave the line."""
        if self._values:
            self._write()
            if self._in_place:
                self._file.write("\n")
            self._file.flush()

    def line(self) -> str:
        """The text of the bar."""
        filled = int(self._WIDTH * self.fraction)
        updates = f"update {self._update}"
        if self._num_updates is not None:
            updates += f"/{self._num_updates}"
        clock = _clock(self.elapsed_s)
        if self._max_s is not None:
            clock += f" of {_clock(self._max_s)}"
        values = " | ".join(f"{name} {_number(value)}" for name, value in self._values.items())
        bar = f"[{'#' * filled:<{self._WIDTH}}]"
        return f"{bar} {100 * self.fraction:3.0f} % | {updates} | {clock} | {values}"

    def _write(self) -> None:
        line = self.line()
        if self._in_place:
            columns = shutil.get_terminal_size().columns
            self._file.write("\r\x1b[K" + line[: columns - 1])
        else:
            self._file.write(line + "\n")
        self._file.flush()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes:02d}:{rest:02d}"


def _number(value: float) -> str:
    if isinstance(value, int):
        return str(value)
    if not math.isfinite(value):
        return "-"
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.0f}"
