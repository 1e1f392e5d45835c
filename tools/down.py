"""``callboard down``: stop a fleet in order, and leave only when nothing of it is left."""

import argparse
import os
import select
import signal
import threading

from callboard.actors.protocol import ListEntries
from callboard.actors.run_dir import is_locked
from callboard.bus import BusError
from callboard.bus.liveness import process_start

from .bus_client import ask
from .errors import CliError
from .running import RunningFleet, find_fleet, running_fleets

PATIENCE_S = 60.0
LINGER_S = 15.0
ASK_S = 1.0


def run(arguments: argparse.Namespace) -> int:
    """Stop one fleet, or all."""
    fleets = running_fleets() if arguments.all else [find_fleet(arguments.fleet, is_any_host=False)]
    if not fleets:
        print("No fleet is running.")
    for fleet in fleets:
        state, hosts = fleet.state, _joined_hosts(fleet)
        stop_fleet(fleet)
        print(f"Host {state.host} has left fleet {state.name}." if state.host else f"Fleet {state.name} is stopped.")
        if hosts:
            what = "its processes wait" if len(hosts) == 1 else "their processes wait"
            print(f"Of {', '.join(hosts)}, {what} for the fleet to be started again: callboard down ends them there.")
    return 0


def _joined_hosts(fleet: RunningFleet) -> list[str]:
    """Return the hosts that are in the fleet from elsewhere, as far as that can be learnt at once."""
    if fleet.state.host or not fleet.state.directory.endpoint.startswith("tcp:"):
        return []
    try:
        entries = ask(fleet, fleet.state.directory, ListEntries(), timeout=ASK_S).entries
    except (BusError, CliError):
        return []
    return sorted({entry.host for entry in entries if entry.host})


def stop_fleet(fleet: RunningFleet) -> None:
    """Ask the launcher to end, kill it after PATIENCE_S, and wait for the last process. Raises CliError."""
    pid = fleet.state.launcher_pid
    try:
        watch = os.pidfd_open(pid)
    except ProcessLookupError:
        watch = None
    if watch is not None:
        try:
            if process_start(pid) == fleet.state.launcher_start:
                _end(watch)
        finally:
            os.close(watch)
    pause = threading.Event()
    for _ in range(int(LINGER_S / 0.05)):
        if not is_locked(fleet.folder):
            return
        pause.wait(0.05)
    raise CliError(f"processes of fleet {fleet.state.name} have not ended yet: see {fleet.folder}")


def _end(watch: int) -> None:
    for number, seconds in ((signal.SIGTERM, PATIENCE_S), (signal.SIGKILL, LINGER_S)):
        try:
            signal.pidfd_send_signal(watch, number)
        except ProcessLookupError:
            return
        if select.select([watch], [], [], seconds)[0]:
            return
