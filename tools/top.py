"""``callboard top``: a running fleet's rates, latencies and pools, live, or once into a pipe."""

import argparse
import asyncio
import logging
import sys

import msgspec

from .running import RunningFleet, open_fleet
from .top_watch import FleetEnded, watching

WIDE = 200
"""Columns in a pipe: nothing is left out there."""


def run(arguments: argparse.Namespace) -> int:
    """Show a fleet until it ends or the user does. Raises CliError."""
    logging.getLogger("callboard").addHandler(logging.NullHandler())  # A broken link is said in the frame.
    fleet = open_fleet(arguments.fleet, keys=arguments.keys)
    try:
        if arguments.json:
            asyncio.run(_print_json(fleet, arguments.interval, is_once=arguments.once))
        elif arguments.once or not sys.stdout.isatty():
            asyncio.run(_print_once(fleet, arguments.interval, arguments.sort))
        else:
            from .top_app import TopApp

            app = TopApp(fleet, arguments.interval, arguments.sort)
            app.run()
            if app.error is not None:
                raise app.error
    except FleetEnded as end:
        print(f"callboard: {end}", file=sys.stderr)
        return end.exit_code
    return 0


async def _print_json(fleet: RunningFleet, interval_s: float, *, is_once: bool) -> None:
    async with watching(fleet, interval_s) as watcher:
        async for frame in watcher.frames():
            print(msgspec.json.encode(frame).decode(), flush=True)
            if is_once:
                return


async def _print_once(fleet: RunningFleet, interval_s: float, sort: str) -> None:
    from rich.console import Console

    from .top_view import view

    async with watching(fleet, interval_s) as watcher:
        async for frame in watcher.frames():
            width = None if sys.stdout.isatty() else WIDE
            Console(highlight=False, width=width).print(view(frame, sort=sort))
            return
