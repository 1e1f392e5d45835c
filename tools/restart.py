"""``callboard restart``: engines and frontends are drained and started anew; others at once, with ``--now``."""

import argparse
import asyncio
import sys

from . import drain
from .drain_frontend import drain_frontend
from .errors import CliError
from .launcher_calls import RestartNode, call_launcher, launcher_of, launchers_of
from .named import engine_named, entries_of
from .running import open_fleet


def run(arguments: argparse.Namespace) -> int:
    """Restart one process of the fleet. Raises CliError."""
    fleet = open_fleet(arguments.fleet, keys=arguments.keys)
    name = arguments.node
    frontend = None
    if not arguments.now:
        entries = entries_of(fleet)
        entry = next((entry for entry in entries if entry.name == name), None)
        kind = "" if entry is None else entry.kind
        if kind == "kv_manager":
            raise CliError(f"{name} is a KV manager, and its cache would be lost: restart it with --now")
        if kind == "router":
            raise CliError(f"{name} is a router, which is not drained: restart it with --now")
        if entry is not None and kind == "frontend":
            if entry.address.node != name:
                sentence = f"{name} is the only frontend, in the control process, without which there is no fleet"
                raise CliError(f"{sentence}: stop and start the fleet instead")
            frontend = entry
        else:
            engine_named(fleet, name, entries)
    launcher = launcher_of(fleet, name)
    if launcher is None:
        entry = next((each for each in entries_of(fleet) if each.name == name), None)
        if entry is not None and entry.host:
            raise CliError(f"{name} runs on host {entry.host}: restart it there")
        here = launchers_of(fleet)
        if not here:
            raise CliError(f'no process of fleet "{fleet.state.name}" is started on this machine: restart {name} there')
        launcher = here[0]  # It knows the names of all that it starts, and says which is near.
    if frontend is not None:
        try:
            drain_frontend(fleet, frontend)
        except KeyboardInterrupt:
            print(f"\n{name} was not restarted, and accepts connections again.")
            return 130
    elif not arguments.now:
        try:
            outcome = asyncio.run(drain.drain(fleet, name, drain.shown()))
        except KeyboardInterrupt:
            print(f"\n{name} was not restarted, and goes on draining: {drain.AFTERWARDS.format(name=name)}")
            return 130
        print(outcome.sentence(), flush=True)
    call_launcher(launcher, RestartNode(name), lambda text: print(text, file=sys.stderr, flush=True))
    print(f"{name} was restarted{'' if arguments.now else ', and serves again'}.", flush=True)
    return 0
