"""Which fleets run: their run directories, and the state file in each, written by the launcher and read by everybody.

A fleet is found by its name: ``$XDG_RUNTIME_DIR/callboard/NAME``, or ``/tmp/callboard-UID/NAME``. What a host has
brought into a fleet that runs elsewhere is beside it, at ``NAME@HOST``.
"""

import asyncio
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from callboard.actors.kept_logs import keep_logs
from callboard.actors.run_dir import clear_run_dir, is_locked, remove_run_dir, try_lock
from callboard.actors.supervisor import NodeState
from callboard.bus import Address
from callboard.bus.liveness import process_start

from .endpoints import CONTROL
from .errors import CliError, FleetRuns, NoSuchFleet
from .kept_logs import kept_at

if TYPE_CHECKING:
    from callboard.bus.keys import FleetKeys

STATE = "state.json"
DEFAULT_NAME = "default"
_ADDRESS = re.compile(r"((?P<name>[^@]+)@)?(?P<endpoint>tcp://([^/\[\]:]+|\[[0-9A-Fa-f:.]+\]):(?P<port>\d{1,5}))")
LINGER_S = 15.0
"""How long the processes of a killed launcher may take to end."""


class FleetState(msgspec.Struct, frozen=True):
    """What the launcher says of its fleet."""

    name: str
    state: str
    launcher_pid: int
    launcher_start: int
    directory: Address
    url: str | None = None
    models: tuple[str, ...] = ()
    fleet_file: str | None = None
    nodes: tuple[NodeState, ...] = ()
    keys: str | None = None
    """The directory of the keys it was started with; nothing secret is written down here."""
    host: str = ""
    """The name of the joined host, where this is one: the fleet's control node is elsewhere."""

    @property
    def title(self) -> str:
        """What tells it from all others of this machine: NAME, or NAME@HOST."""
        return f"{self.name}@{self.host}" if self.host else self.name


@dataclass(frozen=True, slots=True)
class RunningFleet:
    """A fleet whose launcher lives."""

    folder: Path
    state: FleetState
    keys_folder: Path | None = None
    """Where this command was told to look for the fleet's keys, if it was."""
    is_remote: bool = False
    """It was given by its address: there is no run directory, and nothing is known but the directory's address."""

    @property
    def logs(self) -> Path:
        return self.folder / "logs"

    @property
    def keys_at(self) -> Path | None:
        """Where this command looks for the fleet's keys; None for a fleet without."""
        return self.keys_folder or (None if self.state.keys is None else Path(self.state.keys))

    def keys(self) -> "FleetKeys | None":
        """Return the fleet's keys, None for a fleet without. Raises CliError where they cannot be read."""
        folder = self.keys_at
        if folder is None:
            return None
        from callboard.bus.keys import KEY_FILE, FleetKeys, KeysError

        try:
            return FleetKeys.read(folder, self.state.name)
        except KeysError as error:
            if not (folder / KEY_FILE).exists():  # A new one, which the error speaks of, would not be the fleet's.
                path = folder / KEY_FILE
                sentence = f"there is no key file {path}: copy the fleet's there, or name its directory with --keys DIR"
                raise CliError(sentence) from None
            raise CliError(f"{error}, or name the directory of the fleet's keys with --keys DIR") from None

    def why_refused(self) -> str:
        """Return why the fleet takes another key than ``keys``, and what to do."""
        name = self.state.name
        if self.is_remote:
            at = self.state.directory.endpoint
            if self.keys_folder is None:
                return f"the fleet at {at} wants its keys: name their directory with --keys DIR"
            return f'the key in {self.keys_folder} is not that of a fleet "{name}" at {at}: both must be right'
        if self.state.keys is None:
            return f'fleet "{name}" runs without keys: leave --keys out'
        return (
            f'the key in {self.keys_at} is not the one fleet "{name}" was started with: name the directory of that one '
            "with --keys DIR, or start the fleet anew"
        )


def runtime_root() -> Path:
    """Return the directory of all run directories, made 0700 if need be. Raises CliError if it is somebody else's."""
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if runtime and os.access(runtime, os.W_OK | os.X_OK):
        root = Path(runtime) / "callboard"
    else:
        root = Path(f"/tmp/callboard-{os.getuid()}")
    try:
        root.mkdir(mode=0o700, exist_ok=True)
        found = root.lstat()
    except OSError as error:
        raise CliError(f"cannot make {root}: {error.strerror}; set XDG_RUNTIME_DIR to a directory of yours") from None
    if found.st_uid != os.getuid() or found.st_mode & 0o077 or not root.is_dir() or root.is_symlink():
        raise CliError(f"{root} is not private to you (0700): remove it, or set XDG_RUNTIME_DIR")
    return root


def read_state(folder: Path) -> FleetState | None:
    """Return the state of the fleet in ``folder``; None if there is none or its launcher is dead."""
    try:
        state = msgspec.json.decode((folder / STATE).read_bytes(), type=FleetState)
    except (OSError, msgspec.MsgspecError):
        return None
    return state if process_start(state.launcher_pid) == state.launcher_start and is_locked(folder) else None


def write_state(folder: Path, state: FleetState) -> None:
    """Replace the state file as a whole."""
    part = folder / f".{STATE}"
    part.write_bytes(msgspec.json.format(msgspec.json.encode(state)))
    part.replace(folder / STATE)


def running_fleets(*, keys: str | None = None) -> list[RunningFleet]:
    """Return all fleets of this user that run, by name. What a launcher left that was killed alone is removed.

    ``keys`` is the directory where their keys are, if not where they were started with.
    """
    keys_folder = None if keys is None else Path(keys).expanduser()
    folders = sorted(path for path in runtime_root().iterdir() if path.is_dir())
    found = []
    for folder in folders:
        if (state := read_state(folder)) is not None:
            found.append(RunningFleet(folder, state, keys_folder))
        elif (lock := try_lock(folder)) is not None:
            keep_logs(folder / "logs", kept_at(folder.name))
            remove_run_dir(folder)
            os.close(lock)
    return found


def find_fleet(name: str | None, *, keys: str | None = None, is_any_host: bool = True) -> RunningFleet:
    """Return the fleet of that name, or the only one that runs. Raises NoSuchFleet. ``keys``: see running_fleets.

    Where several hosts of one fleet are on this machine, any will do, unless ``is_any_host`` is not set.
    """
    fleets = running_fleets(keys=keys)
    choice = once_each(fleets) if is_any_host else fleets
    if name is None and len(choice) == 1:
        return choice[0]
    names = ", ".join(fleet.state.title for fleet in fleets)
    if not fleets:
        missing = "no fleet is running" if name is None else f'no fleet "{name}" is running'
        raise NoSuchFleet(f'{missing}: start one with "callboard up"')
    if name is None:
        raise NoSuchFleet(f"several fleets are running: name one of {names}")
    for fleet in (*(each for each in fleets if each.state.title == name), *once_each(fleets)):
        if name in (fleet.state.title, fleet.state.name):
            return fleet
    raise NoSuchFleet(f'no fleet "{name}" is running; running: {names}')


def once_each(fleets: list[RunningFleet]) -> list[RunningFleet]:
    """Return every fleet once: with its control node where that runs here, too, else as the first host that joined."""
    found: dict[str, RunningFleet] = {}
    for fleet in sorted(fleets, key=lambda each: each.state.host):
        found.setdefault(fleet.state.name, fleet)
    return [found[name] for name in sorted(found)]


def open_fleet(where: str | None, *, keys: str | None = None) -> RunningFleet:
    """Return the fleet of that name, or at ``NAME@tcp://HOST:PORT`` (its directory). Raises NoSuchFleet, CliError.

    An address alone is that of a fleet named "default". Nothing is dialled here.
    """
    if where is None or "://" not in where:
        return find_fleet(where, keys=keys)
    match = _ADDRESS.fullmatch(where)
    if match is None or int(match["port"]) > 65535:
        raise CliError(f'"{where}" is no address of a fleet: write for example "demo@tcp://10.0.0.1:7000"')
    name = match["name"] or DEFAULT_NAME
    directory = Address(CONTROL, match["endpoint"], "directory")
    state = FleetState(name, "at an address", 0, 0, directory)
    return RunningFleet(Path(), state, None if keys is None else Path(keys).expanduser(), is_remote=True)


async def claim_run_dir(name: str) -> tuple[Path, int]:
    """Make the run directory of fleet ``name``, emptied, and return it with its lock. Raises FleetRuns."""
    folder = runtime_root() / name
    attempts = int(LINGER_S / 0.1)
    for _ in range(attempts):
        lock = try_lock(folder)
        if lock is not None:
            keep_logs(folder / "logs", kept_at(name))
            clear_run_dir(folder)
            folder.chmod(0o700)  # It may have been there: sockets lie in it.
            (folder / "logs").mkdir(mode=0o700)
            return folder, lock
        if (state := read_state(folder)) is not None:
            hint = f'stop it with "callboard down {name}", or pass --name for a second one'
            if state.host:
                hint = f'stop it with "callboard down {name}", or pass --host with another name'
            what = f'"{state.host}" has joined fleet "{state.name}"' if state.host else f'a fleet "{name}" is running'
            raise FleetRuns(f"{what} already (launcher pid {state.launcher_pid}): {hint}")
        await asyncio.sleep(0.1)  # It is starting this very moment, or the rest of a killed one is ending.
    option = "--host" if "@" in name else "--name"
    raise FleetRuns(f'processes of an earlier fleet "{name}" have not ended yet: try again, or pass {option}')


def cache_dir() -> Path:
    """Return where converted models are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "callboard" / "models"
