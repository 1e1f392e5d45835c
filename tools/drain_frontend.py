"""Emptying one of several frontends before it is restarted: the others accept connections, and its requests go on."""

from callboard.actors.frontend_protocol import CannotDrain, DrainFrontend
from callboard.actors.protocol import Entry
from callboard.bus import BusError

from .bus_client import ask
from .errors import CliError
from .running import RunningFleet

DRAIN_S = 3600.0
"""The longest that its requests are waited for: each has a deadline of its own."""


def drain_frontend(fleet: RunningFleet, entry: Entry) -> None:
    """Have a frontend answer what it has, and take nothing new; say so. Raises CliError."""
    print(f"{entry.name} leaves new connections to the others, and answers what it has.", flush=True)
    try:
        drained = ask(fleet, entry.address, DrainFrontend(), timeout=DRAIN_S)
    except CannotDrain as error:
        raise CliError(f"{error}: restart it with --now") from None
    except BusError as error:
        raise CliError(f"{entry.name} was not restarted, because it does not answer ({error}): try --now") from None
    num = drained.num_requests
    print(f"{entry.name} has answered what it had: {num} request{'' if num == 1 else 's'}.", flush=True)
