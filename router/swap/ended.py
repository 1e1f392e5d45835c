"""What a router's process leaves behind that a script has ended: who it was, for the next start to judge.

The file is begun anew by every start. Where the process ends by the watchdog's hand it says which version it was; where
code in C never returned, it has what faulthandler wrote, in which only the script's path and line can be found.
"""

import logging
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from callboard.actors.route_protocol import ScriptText

log = logging.getLogger("callboard.router")

MOST_BYTES = 1 << 20
_NAMED = re.compile(r"^script (\d{1,9}) line (\d{1,9})$", re.MULTILINE)
_MAIN = re.compile(r"^main (0x[0-9a-f]+)$", re.MULTILINE)
_THREAD = re.compile(r"^(?:Current thread|Thread) (0x[0-9a-f]+).*:\n((?:  .*\n?)*)", re.MULTILINE)
_FRAME = re.compile(r'^  File "(.*)", line (\d{1,9}) in ', re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Ended:
    """Why a router's process ended. ``number`` is the version's, where that is known."""

    number: int | None
    line: int | None
    frames: tuple[tuple[str, int], ...] = ()
    """Files and lines of what its main thread ran, innermost first, the files as faulthandler writes them."""

    def text_of(self, texts: Iterable[ScriptText]) -> tuple[ScriptText, int] | None:
        """Return which of some versions it was, and its line; of several with one path the first."""
        for text in texts:
            if self.number is not None:
                if text.number == self.number:
                    return text, self.line or 1
                continue
            path = text.path.encode("ascii", "backslashreplace").decode()
            for file, line in self.frames:
                if file == path:
                    return text, line
        return None

    def where(self) -> str:
        """Return where it was, for people."""
        if self.number is not None:
            return f"in version {self.number}, at line {self.line}"
        return "; ".join(f"{file}:{line}" for file, line in self.frames[:3]) or "nobody knows where"


def write_ended(file: IO[bytes], number: int, line: int) -> None:
    """Note which version ends this process."""
    file.write(f"script {number} line {line}\n".encode())


def read_ended(path: str) -> Ended | None:
    """Return what the process before this one was ended by; None if it was by nothing of the kind."""
    try:
        with Path(path).open("rb") as file:
            text = file.read(MOST_BYTES).decode(errors="replace")
    except OSError:
        return None
    if named := _NAMED.search(text):
        return Ended(int(named[1]), int(named[2]))
    main = _MAIN.search(text)
    if main is None:
        return None
    for thread in _THREAD.finditer(text):
        if thread[1] == main[1]:
            return Ended(None, None, tuple((frame[1], int(frame[2])) for frame in _FRAME.finditer(thread[2])))
    return None


def forget_ended(path: str) -> None:
    """Remove the file, once it was judged."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        log.warning("%s cannot be removed: %s", path, error)
