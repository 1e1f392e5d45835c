"""``callboard logs``: what the processes of a fleet have written, of one that runs, or of the last that failed."""

import argparse
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path

from .errors import CliError
from .kept_logs import find_kept
from .log_lines import LogFile, LogLine, Printer, chooser, merged
from .running import find_fleet

POLL_S = 0.2

Write = Callable[[LogLine], None]


def run(arguments: argparse.Namespace) -> int:
    """Print the logs of a fleet, or follow them until it ends; or list them."""
    if arguments.failed:
        folder = find_kept(arguments.fleet)
        name = folder.name
    else:
        fleet = find_fleet(arguments.fleet)
        folder, name = fleet.logs, fleet.state.name
    known = names_in(folder)
    for wanted in arguments.name:
        if wanted not in known:
            raise CliError(f'fleet "{name}" has no log "{wanted}" on this machine; there are {", ".join(known)}')
    if arguments.list:
        print("\n".join(known))
        return 0
    chosen = list(dict.fromkeys(arguments.name))
    is_wanted = chooser(level=arguments.level, request_id=arguments.request)
    write = _json_writer() if arguments.json else _text_writer(chosen or known)
    files = {each: LogFile(folder / f"{each}.log") for each in chosen or known}
    lines: Iterable[LogLine] = filter(is_wanted, merged(files.values(), is_final=not arguments.follow))
    num_lines = 0
    for line in deque(lines, arguments.tail) if arguments.tail is not None else lines:
        write(line)
        num_lines += 1
    sys.stdout.flush()
    if arguments.request is not None and not num_lines and not arguments.follow:
        words = "requests that are served write none: see callboard trace explain"
        print(f"callboard: nobody has logged a line of request {arguments.request}; {words}", file=sys.stderr)
    if arguments.follow and not arguments.failed:
        _follow(folder, files, write, is_wanted, is_all=not chosen)
        print(f"fleet {name} has ended", file=sys.stderr)
    return 0


def names_in(folder: Path) -> list[str]:
    """Return who has a log there."""
    return sorted(path.stem for path in folder.glob("*.log"))


def _follow(
    folder: Path, files: dict[str, LogFile], write: Write, is_wanted: Callable[[LogLine], bool], *, is_all: bool
) -> None:
    """Print what is added, also by processes that come later if ``is_all``, until the fleet ends."""
    pause = threading.Event()
    is_there = True
    while is_there:
        pause.wait(POLL_S)
        is_there = folder.exists()
        for name in names_in(folder) if is_all else ():
            files.setdefault(name, LogFile(folder / f"{name}.log"))
        for line in filter(is_wanted, merged(files.values(), is_final=not is_there)):
            write(line)
        sys.stdout.flush()


def _text_writer(names: list[str]) -> Write:
    # One node's name on every line says nothing.
    width = max(map(len, names), default=0) if len(names) > 1 else 0
    has_color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    printer = Printer(width=width, has_color=has_color)
    return lambda line: print(printer(line))


def _json_writer() -> Write:
    out = sys.stdout.buffer

    def write(line: LogLine) -> None:
        out.write(line.as_json() + b"\n")
        out.flush()

    return write
