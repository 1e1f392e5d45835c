"""``callboard add engine``: more engines like one that is there, while the fleet serves."""

import argparse
import sys
import time

from callboard.actors.protocol import Entry
from callboard.bus import BusError

from .bus_client import list_entries
from .errors import CliError
from .launcher_calls import AddEngines, Said, call_launcher, launcher_of, launchers_of
from .named import engine_named, entries_of
from .running import RunningFleet, open_fleet

LISTED_S = 10.0
POLL_S = 0.1


def run(arguments: argparse.Namespace) -> int:
    """Start them, and return when the routers can choose them. Raises CliError."""
    fleet = open_fleet(arguments.fleet, keys=arguments.keys)
    launcher = _launcher_for(fleet, arguments.like)
    taken = tuple(entry.name for entry in entries_of(fleet))
    call = AddEngines(arguments.like, arguments.name, arguments.device, arguments.count, taken)
    said = call_launcher(launcher, call, lambda text: print(text, file=sys.stderr, flush=True))
    for entry in _when_listed(fleet, said):
        roles = " and ".join(entry.roles) or "everything"
        manager = "" if entry.manager is None else f", with {entry.manager.actor}"
        print(f"{entry.name} serves {entry.model} on {entry.device}, for {roles}{manager}.", flush=True)
    return 0


def _launcher_for(fleet: RunningFleet, like: str) -> RunningFleet:
    """Return the launcher that is to start them: the one of the engine they are like. Raises CliError."""
    if (found := launcher_of(fleet, like)) is not None:
        return found
    here = launchers_of(fleet)
    entries = entries_of(fleet)
    if any(entry.name == like for entry in entries):
        host = engine_named(fleet, like, entries).host
        where = f"on host {host}" if host else "where the fleet was started"
        raise CliError(f"{like} runs {where}: add engines like it there")
    if not here:  # A name of the fleet file that is no engine's is for the launcher to know.
        engine_named(fleet, like, entries)
        raise CliError(f'no process of fleet "{fleet.state.name}" is started on this machine: add engines there')
    return here[0]


def _when_listed(fleet: RunningFleet, said: Said) -> list[Entry]:
    """Wait until the directory lists what was started; return the entries. Raises CliError."""
    until = time.monotonic() + LISTED_S
    while True:
        try:
            found = {entry.name: entry for entry in list_entries(fleet)}
        except BusError:
            found = {}
        if all(name in found for name in said.names):
            return [found[name] for name in said.names]
        if time.monotonic() >= until:
            raise CliError(f"{', '.join(said.names)} started, but the fleet's directory does not list them yet")
        time.sleep(POLL_S)
