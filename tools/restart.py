"""``callboard restart``: an engine is drained and its process started anew; other processes at once, with ``--now``."""

import argparse
import asyncio
import sys

from . import drain
from .errors import CliError
from .launcher_calls import RestartNode, call_launcher, launcher_of, launchers_of
from .named import engine_named, entries_of
from .running import open_fleet


def run(arguments: argparse.Namespace) -> int:
    """Restart one process of the fleet. Raises CliError."""
    fleet = open_fleet(arguments.fleet, keys=arguments.keys)
    name = arguments.node
    if not arguments.now:
        entries = entries_of(fleet)
        kind = next((entry.kind for entry in entries if entry.name == name), "")
        if kind == "kv_manager":
            raise CliError(f"{name} is a KV manager, and its cache would be lost: restart it with --now")
        if kind == "router":
            raise CliError(f"{name} is a router, which is not drained: restart it with --now")
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
    if not arguments.now:
        try:
            outcome = asyncio.run(drain.drain(fleet, name, drain.shown()))
        except KeyboardInterrupt:
            print(f"\n{name} was not restarted, and goes on draining: {drain.AFTERWARDS.format(name=name)}")
            return 130
        print(outcome.sentence(), flush=True)
    call_launcher(launcher, RestartNode(name), lambda text: print(text, file=sys.stderr, flush=True))
    print(f"{name} was restarted{'' if arguments.now else ', and serves again'}.", flush=True)
    return 0
