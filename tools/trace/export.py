"""``callboard trace export``: requests as other tools read them, from a running fleet's rings or from a recording."""

import argparse
import asyncio
import io
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

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


def run(arguments: argparse.Namespace) -> int:
    """Write what is asked for. Raises CliError."""
    if arguments.to == "otlp":
        from .otlp import run as run_otlp

        return run_otlp(arguments)
    if arguments.endpoint is not None:
        raise CliError(f"--endpoint is for otlp: name a file for {arguments.to} with -o FILE")
    if arguments.to != "mermaid" and arguments.output is None and sys.stdout.isatty():
        suffix = "html" if arguments.to == "html" else "json"
        raise CliError(f"this is much to print: name a file, as in -o trace.{suffix}")
    source = source_of(arguments)
    told = stories_of(source, arguments.requests, _last(arguments, 1 if arguments.to == "mermaid" else MOST_REQUESTS))
    file = io.BytesIO()
    if arguments.to == "perfetto":
        from . import perfetto

        perfetto.write(told, file, entries=source.entries, fleet=source.fleet)
    elif arguments.to == "html":
        from . import html

        file.write(html.page(told, entries=source.entries, fleet=source.fleet))
    else:
        from . import mermaid

        file.write("\n".join(mermaid.diagram(story, source.entries) for story in told).encode())
    _put(file.getbuffer(), arguments.output)
    _say(arguments, told, source)
    return 0


def _last(arguments: argparse.Namespace, default: int) -> int:
    if arguments.last is None:
        return default
    if not arguments.last:
        raise CliError("--last 0 leaves nothing to export: give for example --last 10")
    return int(arguments.last)


def _put(data: memoryview, path: str | None) -> None:
    """Write a file as a whole, or to standard output."""
    if path is None:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
        return
    whole = Path(path)
    if whole.exists() and not whole.is_file():  # Such as /dev/stdout.
        try:
            with whole.open("wb") as file:
                file.write(data)
        except OSError as error:
            raise CliError(f"cannot write {path}: {error.strerror}") from None
        return
    part = whole.with_name(f".{whole.name}.{os.getpid()}")
    try:
        _write(part, data)
        part.replace(whole)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise CliError(f"cannot write {path}: {error.strerror}") from None


def _write(path: Path, data: memoryview) -> None:
    with path.open("wb") as file:
        file.write(data)


def _say(arguments: argparse.Namespace, told: Sequence[Story], source: Source) -> None:
    """Say on standard error what was written, and what is not in it."""
    for node, why in sorted(source.missing.items()):
        print(f"node {node} could not be asked, so what it knows is missing: {why}", file=sys.stderr)
    if arguments.output is not None:
        number = "1 request" if len(told) == 1 else f"{len(told):,} requests"
        hint = {"perfetto": ": open it at https://ui.perfetto.dev", "html": ": open it in a browser"}
        print(f"{arguments.output}: {number}{hint.get(arguments.to, '')}", file=sys.stderr)


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
