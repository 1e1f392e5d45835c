"""``callboard trace explain``: where the time of one request went.

Records are read twice where they may be many: first to choose the request, then for what belongs to it.
"""

import argparse
import asyncio
import difflib
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from callboard.bus import BusError
from callboard.bus.taps import ENDED, SPAN
from callboard.router.spans import request_of
from callboard.tools.bus_client import visitor, why_not
from callboard.tools.errors import CliError
from callboard.tools.running import open_fleet

from .event import Event
from .past import Past, bare_id, collect, resolve
from .story import Story, assemble, root_ids

NUM_NEAR = 3


@dataclass(slots=True)
class Seen:
    """What is known of a request at a glance. ``seconds`` and ``end`` are None while it is not over."""

    begin: float
    last: float
    """Its last record: what is given back late comes after its end."""
    seconds: float | None = None
    end: float | None = None
    is_http: bool = False


@dataclass(slots=True)
class Source:
    """Records that can be read again, and which nodes could not be asked."""

    read: Callable[[], Iterable[Event]]
    where: str
    now: float | None = None
    """On the reader's clock; None where nothing goes on."""
    missing: dict[str, str] = field(default_factory=dict)
    damage: Callable[[], str] = str
    """Return what is wrong with a recording, once it has been read; empty if nothing."""


def run(arguments: argparse.Namespace) -> int:
    """Print one request's explanation. Raises CliError."""
    is_partial = arguments.partial
    source = from_file(arguments.source, is_partial=is_partial) if arguments.source else from_fleet(arguments)
    if arguments.request and arguments.slowest:
        raise CliError("give a request or --slowest, not both")
    story = pick(source, arguments.request or "", is_slowest=arguments.slowest)
    if damage := source.damage():
        print(f"callboard: {damage}", file=sys.stderr)
    from . import explained

    if arguments.json:
        import msgspec

        found = explained.as_json(story, missing=source.missing)
        print(msgspec.json.format(msgspec.json.encode(found)).decode())
        return 0
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = 500
    explained.print_text(story, console, missing=source.missing, now=source.now)
    return 0


def from_fleet(arguments: argparse.Namespace) -> Source:
    """Return what the nodes of a running fleet remember. Raises CliError."""
    fleet = open_fleet(arguments.fleet, keys=arguments.keys)

    async def ask() -> tuple[Past, float]:
        async with visitor(fleet) as node:
            return await collect(node, fleet), node.clock.now()

    try:
        past, now = asyncio.run(ask())
    except BusError as error:
        raise why_not(fleet, error) from None
    return Source(lambda: past.events, f'fleet "{fleet.state.name}"', now, past.missing)


def from_file(path: str, *, is_partial: bool = False) -> Source:
    """Return a recording's records, with ``is_partial`` what is whole of a damaged one. Raises CliError."""
    from .recording import read_recording

    recording = read_recording(path, is_partial=is_partial)
    return Source(lambda: recording.events, f"the recording {path}", damage=lambda: recording.whole.damage)


# ---- which request -----------------------------------------------------------------------------------------------


def pick(source: Source, wanted: str, *, is_slowest: bool = False) -> Story:
    """Return the story of a request: by its id or how it begins, the slowest, or the last that is over.

    Raises CliError where there is none.
    """
    seen = requests_in(source.read())
    if not seen:
        raise CliError(f"{source.where} knows of no request yet")
    request_id = named(wanted, seen, source.where) if wanted else chosen(seen, is_slowest=is_slowest)
    events = (event for event in source.read() if request_of(event.record.request_id) == request_of(request_id))
    return assemble(events)[request_id]


def requests_in(events: Iterable[Event]) -> dict[str, Seen]:
    """Return all requests that records tell of."""
    found: dict[str, Seen] = {}
    kept = list(_light(events, found))
    roots = root_ids(kept)
    joined: dict[str, Seen] = {}
    for request_id, each in found.items():
        root = roots.get(request_id, request_of(request_id))
        known = joined.setdefault(root, each)
        if known is not each:
            known.begin, known.last = min(known.begin, each.begin), max(known.last, each.last)
            if not known.is_http and each.seconds is not None:
                known.seconds = max(known.seconds or 0.0, each.seconds)
                known.end = max(known.end or each.last, each.end or each.last)
    return joined


def _light(events: Iterable[Event], found: dict[str, Seen]) -> Iterator[Event]:
    """Note what each record says of its request; yield those that say which requests clients asked for."""
    for event in events:
        record = event.record
        if not record.request_id:
            continue
        seen = found.get(record.request_id)
        if seen is None:
            seen = found[record.request_id] = Seen(event.time, event.time)
        seen.begin, seen.last = min(seen.begin, event.begin or event.time), max(seen.last, event.time)
        is_http = record.what == SPAN and record.name == "http"
        if is_http or (record.what == ENDED and record.name == "Generate" and not seen.is_http):
            seen.seconds, seen.end, seen.is_http = event.time - event.begin, event.time, is_http
        if is_http:
            yield event


def named(wanted: str, seen: dict[str, Seen], where: str) -> str:
    """Return the request that is meant, by its id, a sequence's id, or how it alone begins. Raises CliError."""
    begun = [each for each in seen if each.startswith(wanted) or bare_id(each).startswith(wanted)]
    if begun or request_of(wanted) in seen:
        return resolve(wanted, seen)
    near = difflib.get_close_matches(wanted, seen, NUM_NEAR, cutoff=0.75)
    remedy = f"do you mean {' or '.join(near)}?" if near else f"{len(seen)} are known, and this one may be too long ago"
    unknown = f"{where} has no" if where.startswith("the recording") else "no node remembers a"
    raise CliError(f'{unknown} request "{wanted}": {remedy}')


def chosen(seen: dict[str, Seen], *, is_slowest: bool) -> str:
    """Return the request that took longest, or the last to end, or of those under way the last one."""
    over = {request_id: each.seconds for request_id, each in seen.items() if each.seconds is not None}
    if is_slowest and over:
        return max(over, key=lambda request_id: over[request_id])
    ends = {request_id: each.end for request_id, each in seen.items() if each.end is not None}
    return max(ends or seen, key=lambda request_id: ends.get(request_id, seen[request_id].last))
