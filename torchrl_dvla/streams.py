# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Standard streams of a run: whole lines above the progress bar, and readers that may go away."""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import sys
import threading
from multiprocessing.connection import Connection
from typing import Any

from tqdm import tqdm

__all__ = [
    "drop_unwritable_output",
    "share_terminal",
    "use_workers_output",
    "workers_output",
]

#: Seconds after which what a worker printed without an end of line is shown as a line.
_PARTIAL_S = 0.5
#: Seconds at the end of the run for what workers printed last.
_DRAIN_S = 1.0


class _LossyStream:
    """A text stream that drops what it cannot write."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _LineStream(_LossyStream):
    """A text stream that puts whole lines above the progress bars of tqdm.

    ``print`` and ``warnings`` write a line in pieces: a thread's pieces wait for the end of its
    line, so that neither a bar nor another thread gets in between. Without a bar, ``flush`` shows
    them as they are. What begins with a carriage return is a bar's own, and passes.
    """

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._pieces = threading.local()

    def write(self, text: str) -> int:
        if text.startswith("\r"):
            return super().write(text)
        lines, end, rest = (getattr(self._pieces, "text", "") + text).rpartition("\n")
        self._pieces.text = rest
        if end:
            with tqdm.external_write_mode(file=self):
                super().write(lines + end)
                super().flush()
        return len(text)

    def flush(self) -> None:
        # A bar has to be the last thing on its line: pieces go on waiting while there is one.
        if not vars(tqdm)["_instances"] and (rest := getattr(self._pieces, "text", "")):
            self._pieces.text = ""
            super().write(rest)
        super().flush()


def drop_unwritable_output() -> None:
    """Standard output and error that drop what they cannot write, instead of raising.

    Their reader may go at any time: ``| head``, a terminal that is closed, a disk that is full. No
    run may end for that, nor its exit code change by what is flushed at its end. A stream that was
    closed from the beginning, as by ``>&-``, becomes the null device.
    """
    _wrap_streams(_LossyStream)


def _wrap_streams(kind: type[_LossyStream]) -> None:
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, kind):
            setattr(sys, name, kind(stream or open(os.devnull, "w")))  # noqa: SIM115


#: Where workers write to, standard output and error, once the terminal is shared.
_outputs: tuple[Connection, ...] = ()


def share_terminal() -> None:
    """Standard streams for a program with a progress bar and processes of its own.

    Every line is whole and above the bar: what this process prints, warns or logs, and what its
    workers do, which get pipes for it. Nothing raises when the reader of the streams has gone, as
    with :func:`drop_unwritable_output`. Lasts until the process ends.
    """
    global _outputs
    _wrap_streams(_LineStream)
    if _outputs:
        return
    ends = []
    for name in ("stdout", "stderr"):
        source, target = multiprocessing.Pipe(duplex=False)
        thread = threading.Thread(
            target=_relay, args=(source, name), name=f"workers-{name}", daemon=True
        )
        thread.start()
        ends.append((target, thread))
    _outputs = tuple(target for target, _ in ends)

    @atexit.register
    def drain() -> None:
        for target, thread in ends:
            target.close()  # the last one, if the workers have ended
            thread.join(_DRAIN_S)


def workers_output() -> tuple[Connection, ...]:
    """What a process that is started hands to :func:`use_workers_output` there.

    Empty while this one's terminal is not shared: the process then writes to it directly.
    """
    return _outputs


def use_workers_output(outputs: tuple[Connection, ...]) -> None:
    """Make ``outputs`` the standard output and error of this process, which is a worker."""
    for number, (name, output) in enumerate(zip(("stdout", "stderr"), outputs, strict=False), 1):
        os.dup2(output.fileno(), number)
        output.close()
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w", closefd=False))  # noqa: SIM115
        # a line in one write, also by ``python -u``: others write into the same pipe
        getattr(sys, name).reconfigure(line_buffering=True, write_through=False)


def _relay(source: Connection, name: str) -> None:
    """Write the lines of the workers to this process's stream of that name, until all ended."""
    pending = b""
    while True:
        if pending and b"\r" not in pending and not source.poll(_PARTIAL_S):
            part, pending = pending + b"\n", b""
        else:
            part = os.read(source.fileno(), 1 << 16)
            if not part:
                break
            part, pending = pending + part, b""
        lines, end, pending = part.rpartition(b"\n")
        if end:
            getattr(sys, name).write(_last_states(lines.decode(errors="replace")) + "\n")
    if pending:
        getattr(sys, name).write(_last_states(pending.decode(errors="replace")) + "\n")


def _last_states(text: str) -> str:
    """Text without the earlier states of lines that were written over, as by a progress bar."""
    return "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n"))
