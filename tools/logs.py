"""``callboard logs``: what a process of a running fleet wrote."""

import argparse
import sys
import threading
from pathlib import Path
from typing import BinaryIO

from .errors import CliError
from .running import RunningFleet, find_fleet

POLL_S = 0.2


def run(arguments: argparse.Namespace) -> int:
    """List the logs, or print one, or follow it until the fleet ends."""
    fleet = find_fleet(arguments.fleet)
    names = sorted(path.stem for path in fleet.logs.glob("*.log"))
    if arguments.name is None:
        print("\n".join(names))
        return 0
    if arguments.name not in names:
        raise CliError(f'fleet "{fleet.state.name}" has no log "{arguments.name}"; there are {", ".join(names)}')
    path = fleet.logs / f"{arguments.name}.log"
    with path.open("rb") as file:
        _copy(file)
        if arguments.follow:
            _follow(file, path, fleet)
    return 0


def _copy(file: BinaryIO) -> None:
    while piece := file.read(1 << 16):
        sys.stdout.write(piece.decode(errors="replace"))
    sys.stdout.flush()


def _follow(file: BinaryIO, path: Path, fleet: RunningFleet) -> None:
    pause = threading.Event()
    while path.exists():
        pause.wait(POLL_S)
        _copy(file)
    print(f"fleet {fleet.state.name} has ended", file=sys.stderr)
