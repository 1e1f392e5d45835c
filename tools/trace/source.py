"""Where exports have their records from: a running fleet's rings, or a recording; and the requests chosen of them."""

import argparse
import asyncio
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from callboard.actors.protocol import Entry
from callboard.bus import BusError
from callboard.router.spans import request_of
from callboard.tools.bus_client import visitor, why_not
from callboard.tools.errors import CliError
from callboard.tools.running import open_fleet

from .event import Event
from .explain import named, requests_in
from .past import Past, collect
from .story import Story, assemble

MOST_REQUESTS = 1000
"""By default, of perfetto and html: the last ones. As many as a fleet remembers."""


@dataclass(slots=True)
class Source:
    """Records that can be read again, and what is known of the fleet they are of."""

    read: Callable[[], Iterable[Event]]
    where: str
    fleet: str
    entries: tuple[Entry, ...] = ()
    missing: dict[str, str] = field(default_factory=dict)
    """Nodes that could not be asked, and why."""


# ---- from where --------------------------------------------------------------------------------------------------


def source_of(arguments: argparse.Namespace) -> Source:
    """Return the records of a recording, or of a running fleet. Raises CliError."""
    if arguments.source is not None:
        return _from_file(arguments.source, is_partial=arguments.partial)
    fleet = open_fleet(arguments.fleet, keys=arguments.keys)

    async def ask() -> Past:
        async with visitor(fleet) as node:
            return await collect(node, fleet)

    try:
        past = asyncio.run(ask())
    except BusError as error:
        raise why_not(fleet, error) from None
    name = fleet.state.name
    return Source(lambda: past.events, f'fleet "{name}"', name, past.entries, past.missing)


def _from_file(path: str, *, is_partial: bool) -> Source:
    from .recording import Batch, FleetView, read_recording

    recording = read_recording(path, is_partial=is_partial)
    source = Source(tuple, f"the recording {path}", recording.header.fleet)

    def read() -> Iterator[Event]:
        for chunk in recording.chunks():
            if isinstance(chunk, Batch):
                yield from chunk.events()
            elif isinstance(chunk, FleetView):
                source.entries = chunk.entries

    source.read = read
    return source


# ---- which requests ----------------------------------------------------------------------------------------------


def stories_of(source: Source, wanted: Sequence[str], last: int) -> list[Story]:
    """Return the stories of the requests that are named, or of the last ones, the oldest first. Raises CliError.

    Records are read twice: first for which requests there are, then for those that are chosen.
    """
    seen = requests_in(source.read())
    if not seen:
        raise CliError(f"{source.where} knows of no request yet")
    if wanted:
        chosen = list(dict.fromkeys(named(each, seen, source.where) for each in wanted))
    else:
        chosen = sorted(seen, key=lambda request_id: seen[request_id].begin)[-last:]
    roots = {request_of(request_id) for request_id in chosen}
    found = assemble(event for event in source.read() if request_of(event.record.request_id) in roots)
    told = [found[request_id] for request_id in chosen if request_id in found]
    return sorted(told, key=lambda story: story.begin)
