"""``callboard trace`` in a terminal: every actor a lane, every sub-request a bar, and in words what each did."""

import argparse
import asyncio
import sys
from collections.abc import Collection

from callboard.bus import BusError
from callboard.tools.bus_client import visitor, why_not
from callboard.tools.errors import CliError
from callboard.tools.running import RunningFleet, open_fleet
from callboard.tools.trace.attach import Follower
from callboard.tools.trace.commands import has_screen
from callboard.tools.trace.filters import Filter, filter_of

from .sources import Source, Told, remembered
from .wanted import Wanted

LAG_S = 0.15
"""Events come so late at most: nodes send them in batches, and they are held to be told in order (attach.py)."""


def run(arguments: argparse.Namespace) -> int:
    """Watch until the user leaves. Raises CliError."""
    if not has_screen():
        raise CliError("the live view needs a terminal, in UTF-8: use --format text or --format jsonl")
    asked = filter_of(arguments)
    if path := getattr(arguments, "source", None):
        from callboard.tools.trace.recording import read_recording

        recording = read_recording(path, is_partial=arguments.partial)
        return asyncio.run(_show(Told(path, recording.events), asked, arguments, is_live=False))
    fleet = open_fleet(arguments.fleet, keys=arguments.keys)
    return asyncio.run(_show_fleet(fleet, asked, arguments))


def wanted_of(asked: Filter) -> Wanted:
    """Return which requests the command line asks for."""
    return Wanted("", asked.request or "", asked.actor or "", asked.verb or "", asked.slower_s or 0.0, asked.errors)


async def _show_fleet(fleet: RunningFleet, asked: Filter, arguments: argparse.Namespace) -> int:
    async with visitor(fleet) as node:
        try:
            if arguments.no_follow:
                return await _show(await remembered(node, fleet), asked, arguments, is_live=False)
            async with Follower(node, fleet) as follower:
                code = await _show(follower, asked, arguments, is_live=True)
        except BusError as error:
            raise why_not(fleet, error) from None
    print(f"callboard: left {fleet.state.name}, which runs on", file=sys.stderr)
    return code


async def _show(source: Source, asked: Filter, arguments: argparse.Namespace, *, is_live: bool) -> int:
    from .app import LiveView

    def check(requests: Collection[str], actors: Collection[str], verbs: Collection[str]) -> Wanted:
        return wanted_of(asked.checked(requests=requests, actors=actors, verbs=verbs))

    wanted, last = wanted_of(asked), arguments.last
    app = LiveView(source, wanted=wanted, check=check, num_past=last, lag_s=LAG_S, is_live=is_live)
    await app.run_async()
    if app.refused is not None:
        raise app.refused
    return app.return_code or 0
