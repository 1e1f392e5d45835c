"""What commands ask of a fleet's launcher while it runs: a line of JSON over a socket in its run directory, and lines
of JSON back. The directory is its user's alone (0700), and so is the socket.
"""

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec

from .errors import CliError
from .running import RunningFleet, running_fleets

SOCKET = "launcher.sock"
MOST_BYTES = 64 * 1024
"""Of a line."""
TIMEOUT_S = 600.0
"""Silence of a launcher that starts a process: models are loaded, perhaps converted."""


class AddEngines(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Start ``count`` more engines like one that is there, each with a name and a device of its own."""

    like: str
    name: str | None = None
    device: str | None = None
    count: int = 1
    taken: tuple[str, ...] = ()
    """Names that others of the fleet have, perhaps on other machines."""


class RestartNode(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """End a process in order and start it again."""

    name: str


class KeepEngine(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Have an engine that is started again come up so; None leaves it as it is."""

    name: str
    roles: tuple[str, ...] | None = None
    is_draining: bool | None = None


Call = AddEngines | RestartNode | KeepEngine


class Said(msgspec.Struct, frozen=True):
    """A line of the launcher's: a step on the way, or the end. ``names`` are those of what was started."""

    kind: Literal["step", "done", "failed"]
    text: str = ""
    names: tuple[str, ...] = ()
    exit_code: int = 0


def launcher_of(fleet: RunningFleet, node: str) -> RunningFleet | None:
    """Return the launcher on this machine whose process ``node`` is; None if it is started elsewhere."""
    for each in launchers_of(fleet):
        if any(found.name == node for found in each.state.nodes):
            return each
    return None


def launchers_of(fleet: RunningFleet) -> list[RunningFleet]:
    """Return the launchers on this machine that are of a fleet: its own, and those of hosts that have joined it."""
    state = fleet.state
    found = running_fleets()
    return [each for each in found if (each.state.name, each.state.directory) == (state.name, state.directory)]


def call_launcher(fleet: RunningFleet, call: Call, on_step: Callable[[str], None] = lambda text: None) -> Said:
    """Ask a launcher on this machine, and return what it says at the end. Raises CliError with its sentence."""
    path = fleet.folder / SOCKET
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as line:
            line.settimeout(TIMEOUT_S)
            line.connect(str(path))
            line.sendall(msgspec.json.encode(call) + b"\n")
            with line.makefile("rb") as answers:
                for answer in answers:
                    said = msgspec.json.decode(answer, type=Said)
                    if said.kind == "step":
                        on_step(said.text)
                        continue
                    if said.kind == "failed":
                        raise _failure(said)
                    return said
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise CliError(f"the launcher of fleet {fleet.state.title} does not answer at {path} ({reason})") from None
    except msgspec.MsgspecError:
        raise CliError(f"the launcher of fleet {fleet.state.title} speaks otherwise: is it of this version?") from None
    raise CliError(f"the launcher of fleet {fleet.state.title} ended before it was done")


def _failure(said: Said) -> CliError:
    error = CliError(said.text)
    error.exit_code = said.exit_code
    return error


def socket_path(folder: Path) -> Path:
    """Return where the launcher of a run directory listens."""
    return folder / SOCKET
