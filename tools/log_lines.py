"""The lines of a fleet's logs: read, merged by time, chosen from, and shown to people.

What is no line of ours (a library's words, a crash) keeps its place behind the line before it, and its text.
"""

import heapq
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

import msgspec

from callboard.actors.logs import LEVELS, Line

_COLORS = {"debug": "2", "info": "32", "warning": "33", "error": "31"}
_DIM, _END = "\x1b[2m", "\x1b[0m"
MOST_LINE = 1 << 20
"""Bytes of a line; a longer one is taken for several."""


@dataclass(frozen=True, slots=True)
class LogLine:
    """A line as it was written, and what it says, None where it is none of ours. ``time`` is seconds since 1970."""

    node: str
    time: float
    raw: bytes
    line: Line | None

    @property
    def text(self) -> str:
        """What was written, as characters."""
        return self.raw.decode(errors="replace")

    def as_json(self) -> bytes:
        """Return a line of JSON, whatever it was."""
        if self.line is not None:
            return self.raw
        return msgspec.json.encode({"node": self.node, "event": self.text})


class LogFile:
    """One node's log, read as far as it is written."""

    def __init__(self, path: Path) -> None:
        self.node = path.stem
        self._path = path
        self._file: BinaryIO | None = None
        self._rest = b""
        self._time = 0.0

    def lines(self, *, is_final: bool = True) -> Iterator[LogLine]:
        """Yield the lines that are new; if ``is_final``, also what is no whole line yet, and let go of the file."""
        for data in self._data():
            *whole, self._rest = (self._rest + data).split(b"\n")
            for raw in whole:
                yield self._line(raw)
            if len(self._rest) > MOST_LINE:
                yield self._line(self._rest)
                self._rest = b""
        if is_final:
            self.close()
            if self._rest:
                yield self._line(self._rest)
                self._rest = b""

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _data(self) -> Iterator[bytes]:
        if self._file is None:
            older = self._path.with_name(self._path.name + ".1")
            if older.exists():
                with older.open("rb") as file:
                    while data := file.read(1 << 16):
                        yield data
            try:
                self._file = self._path.open("rb")
            except OSError:
                return
        try:
            if self._path.stat().st_size < self._file.tell():
                self._file.seek(0)  # It has begun anew.
        except OSError:
            pass  # The fleet has ended; what is open can still be read.
        while data := self._file.read(1 << 16):
            yield data

    def _line(self, raw: bytes) -> LogLine:
        try:
            line = msgspec.json.decode(raw, type=Line) if raw.startswith(b"{") else None
            if line is not None:
                self._time = datetime.fromisoformat(line.time).timestamp()
        except (msgspec.MsgspecError, ValueError):
            line = None
        return LogLine(self.node, self._time, raw, line)


def merged(files: Iterable[LogFile], *, is_final: bool = True) -> Iterator[LogLine]:
    """Yield the lines of all ``files`` in the order of their times."""
    return heapq.merge(*(file.lines(is_final=is_final) for file in files), key=lambda line: line.time)


def chooser(*, level: str | None, request_id: str | None) -> Callable[[LogLine], bool]:
    """Return what says whether a line is wanted: at least of ``level``, of a request or a later sequence of it.

    A line that is none of ours has no request, and any level: it may be the last word of a process.
    """
    least = 0 if level is None else LEVELS.index(level)

    def is_wanted(line: LogLine) -> bool:
        if line.line is None:
            return request_id is None
        known = line.line.level
        if (LEVELS.index(known) if known in LEVELS else 0) < least:
            return False
        found = line.line.request_id
        return request_id is None or found == request_id or found.startswith(f"{request_id}.")

    return is_wanted


class Printer:
    """Makes lines readable. ``width``: of the longest node's name; 0 leaves the names out."""

    def __init__(self, *, width: int, has_color: bool) -> None:
        self._width = width
        self._has_color = has_color

    def __call__(self, shown: LogLine) -> str:
        line = shown.line
        node = f"{shown.node:<{self._width}} " if self._width else ""
        if line is None:
            return f"{self._dim(node + '| ') if node else ''}{_printable(shown.text)}"
        when = datetime.fromtimestamp(shown.time).strftime("%H:%M:%S.%f")[:-3]
        level = f"{line.level:<7}"
        if self._has_color:
            level = f"\x1b[{_COLORS.get(line.level, '0')}m{level}{_END}"
        who = line.actor or line.logger.removeprefix("callboard.")
        request = self._dim(f" [{_printable(line.request_id)}]") if line.request_id else ""
        text = f"{self._dim(when)} {node}{level} {self._dim(_printable(who) + ':')} {_printable(line.event)}{request}"
        error = "".join(f"\n    {_printable(part)}" for part in line.error.splitlines())
        return text + error

    def _dim(self, text: str) -> str:
        return f"{_DIM}{text}{_END}" if self._has_color else text


def _printable(text: str) -> str:
    """Return text that moves no cursor and changes no color."""
    return "".join(c if c.isprintable() or c == "\t" else repr(c)[1:-1] for c in text)


def last_lines(path: Path, count: int) -> list[str]:
    """Return the last lines of one log, readable; nothing if it cannot be read."""
    printer = Printer(width=0, has_color=False)
    return [text for line in LogFile(path).lines() for text in printer(line).splitlines()][-count:]
