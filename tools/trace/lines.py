"""``callboard trace`` as lines: the last requests, then messages as they happen, as text or as JSON.

``--format jsonl`` prints an object a line; new fields may be added. ``type`` is ``record`` or ``notice``. A record has

  wall      when it happened, ISO 8601 in UTC with microseconds; the reader's wall clock
  time_s    the same in seconds of the reader's monotonic clock; error_s: it is known to plus or minus this
  node      whose record it is
  what      sent, received, answered, ended (the four of a call), or span
  verb      the message or phase: prep_recv, remote_send, start_generate, generate, prefill, decode, ...
  from, to  who asks whom, engines by their names (actor: who is addressed on the bus); a span has only ``from``
  request   the request's id, ID.1 for its second sequence; absent where it belongs to none
  span, parent  16 hex digits: the call or span, and the one that it was done for; the same in all records of a call
  bytes     of the message or its answer; items: of a stream, at its end
  took_s    of an answered, an ended and a span; first_s: from its begin to its first item
  error     how it failed, ``cancelled`` where its caller left; absent where all is well
  facts     what the message, the answer or the actor says, by name

and a notice: wall, time_s, kind, node, text, and num_lost (records that were made and are not told here).
"""

import argparse
import asyncio
import heapq
import os
import shutil
import sys
from collections import deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from datetime import UTC, datetime
from operator import attrgetter
from typing import Any, Protocol

import msgspec

from callboard.actors.protocol import Entry
from callboard.bus import BusError, Node
from callboard.bus.taps import WHAT
from callboard.bus.tasks import cancel_all
from callboard.router.spans import request_of
from callboard.tools.bus_client import visitor, why_not
from callboard.tools.running import RunningFleet, open_fleet

from .attach import Follower
from .ends import Ends
from .event import Event
from .filters import Filter, filter_of
from .notice import Notice
from .past import collect
from .phrases import count
from .table import Table
from .told import Reader, Told
from .writing import Output

NUM_LAST = 10
MOST_PAST = 4096
"""Requests of the past that are looked through for those that a filter takes."""
MOST_IDS = 100_000
SETTLE_S = 0.5
_time_of = attrgetter("time")


class Format(Protocol):
    """How lines look."""

    def begin(self) -> str: ...

    def request(self, told: list[Told]) -> str:
        """Return what is shown of a request of the past; empty for nothing."""

    def item(self, told: Told) -> str:
        """Return the line of something that happened; empty for none."""

    def notice(self, notice: Notice) -> str: ...


class Text:
    """Lines for people."""

    def __init__(self, table: Table, entries: Callable[[], Iterable[Entry]]) -> None:
        self._table = table
        self._entries = entries

    def begin(self) -> str:
        return f"{self._table.cast(self._entries())}\n\n{self._table.header()}\n".lstrip("\n")

    def request(self, told: list[Told]) -> str:
        lines = "".join(map(self.item, told))
        return lines and lines + "\n"

    def item(self, told: Told) -> str:
        return self._table.line(told) + "\n" if self._table.is_shown(told) else ""

    def notice(self, notice: Notice) -> str:
        return self._table.notice(notice) + "\n"


class JsonLines:
    """Lines for programs."""

    def __init__(self) -> None:
        self._encode = msgspec.json.Encoder().encode

    def begin(self) -> str:
        return ""

    def request(self, told: list[Told]) -> str:
        return "".join(map(self.item, told))

    def item(self, told: Told) -> str:
        return self._encode(as_json(told)).decode() + "\n"

    def notice(self, notice: Notice) -> str:
        found = {"type": "notice", "wall": iso(notice.wall), "time_s": round(notice.time, 6), "kind": notice.kind}
        found |= {"node": notice.node} if notice.node else {}
        found |= {"num_lost": notice.num_lost} if notice.num_lost else {}
        return self._encode(found | {"text": notice.text}).decode() + "\n"


def as_json(told: Told) -> dict[str, Any]:
    """Return a record as ``--format jsonl`` prints it."""
    event, record = told.event, told.event.record
    found: dict[str, Any] = {
        "type": "record",
        "wall": iso(event.wall),
        "time_s": round(event.time, 6),
        "node": event.node,
        "what": WHAT[record.what],
        "verb": told.verb,
        "from": told.source,
    }
    if told.target:
        found |= {"to": told.target, "actor": record.actor}
    if record.request_id:
        found["request"] = record.request_id
    found["span"] = f"{record.span:016x}"
    if record.parent:
        found["parent"] = f"{record.parent:016x}"
    if record.num_bytes:
        found["bytes"] = record.num_bytes
    if record.num_items:
        found["items"] = record.num_items
    if told.took_s is not None:
        found["took_s"] = round(told.took_s, 6)
    if event.first:
        found["first_s"] = round(event.first - event.begin, 6)
    if event.error_s:
        found["error_s"] = round(event.error_s, 6)
    if record.error:
        found["error"] = record.error
    facts = dict(told.facts)
    if told.verb == "http" and isinstance(first := facts.pop("first_s", None), float):
        found["first_s"] = round(first - record.begin, 6)  # The frontend's clock: the others' ``first`` as a fact.
    return found | {"facts": facts} if facts else found


def iso(wall: float) -> str:
    """Return a wall time in ISO 8601, in UTC with microseconds."""
    return datetime.fromtimestamp(wall, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


class Lines:
    """Decides what is printed, in which order: of the past the last requests, each together; then what happens."""

    def __init__(
        self, wanted: Filter, style: Format, reader: Reader, *, last: int, actors: Callable[[], Iterable[str]]
    ) -> None:
        self._wanted = wanted
        self._format = style
        self._reader = reader
        self._last = last
        self._actors = actors
        self._most = MOST_PAST if wanted != Filter() else 2 * last + 16
        self._ids: dict[str, None] = {}
        self._requests: dict[str, list[Event]] = {}
        self._begins: list[tuple[float, str]] = []
        self.is_live = False
        """The past has been printed."""

    def remember(self, event: Event) -> None:
        """Take an event of the past; of too many requests the oldest is forgotten."""
        request_id = event.record.request_id
        if not request_id:
            return
        root = request_of(request_id)
        events = self._requests.get(root)
        if events is None:
            if len(self._ids) < MOST_IDS:
                self._ids[root] = None
            events = self._requests[root] = []
            heapq.heappush(self._begins, (event.time, root))
            if len(self._begins) > self._most:
                del self._requests[heapq.heappop(self._begins)[1]]
        events.append(event)

    def past(self) -> str:
        """Return the last requests, and be live from now on. Raises CliError for a filter that names nothing."""
        self.is_live = True
        told = []
        for events in self._requests.values():
            events.sort(key=_time_of)
        for events in sorted(self._requests.values(), key=lambda each: each[0].time):
            told.append([each for each in map(self._reader.read, events) if each is not None])
        known = {*self._actors(), *self._reader.actors}
        self._wanted = self._wanted.checked(requests=self._ids, actors=known, verbs=self._reader.verbs)
        shown: deque[str] = deque(maxlen=None if self._wanted.request else self._last)
        for request in told:
            if text := self._format.request([each for each in request if self._wanted.takes(each)]):
                shown.append(text)
        self._requests, self._begins, self._ids = {}, [], {}
        self._reader.collects_names = False
        return "".join(shown)

    def item(self, item: Event | Notice) -> str:
        """Return the line of what happens now; empty for none."""
        if isinstance(item, Notice):
            return self._format.notice(item)
        told = self._reader.read(item)
        return self._format.item(told) if told is not None and self._wanted.takes(told) else ""


# ---- the command ---------------------------------------------------------------------------------------------------


def run(arguments: argparse.Namespace) -> int:
    """Print until the reader has enough, or the fleet ends. Raises CliError."""
    wanted, fleet = filter_of(arguments), open_fleet(arguments.fleet, keys=arguments.keys)
    return asyncio.run(_run(fleet, wanted, arguments))


async def _run(fleet: RunningFleet, wanted: Filter, arguments: argparse.Namespace) -> int:
    async with visitor(fleet) as node:
        try:
            if arguments.no_follow:
                await _print_past(node, fleet, wanted, arguments)
            else:
                async with Follower(node, fleet, everything=arguments.all) as follower:
                    await _follow(follower, wanted, arguments)
        except BusError as error:
            raise why_not(fleet, error) from None
    return 0


async def _print_past(node: Node, fleet: RunningFleet, wanted: Filter, arguments: argparse.Namespace) -> None:
    past = await collect(node, fleet)
    nodes = {event.node for event in past.events}
    style, lines = _lines(wanted, arguments, lambda: nodes, lambda: past.entries)
    for event in past.events:
        lines.remember(event)
    text = lines.past()
    await Output(sys.stdout.fileno()).write(style.begin() + text if text else "")
    for name, why in past.missing.items():
        print(f"callboard: {name} could not be asked, so what it did is not shown: {why}", file=sys.stderr)
    if not text and arguments.last != 0:
        which = "no request yet" if wanted == Filter() else "no request with anything like that"
        print(f"callboard: fleet {fleet.state.name} remembers {which}", file=sys.stderr)


async def _follow(follower: Follower, wanted: Filter, arguments: argparse.Namespace) -> None:
    style, lines = _lines(wanted, arguments, lambda: follower.nodes, follower.entries.values)
    with Ends(with_keys=sys.stdout.isatty()) as ends:
        output = Output(sys.stdout.fileno())
        printing = asyncio.ensure_future(_print_all(follower, style, lines, output))
        ending = asyncio.ensure_future(ends.wait())
        try:
            await asyncio.wait((printing, ending), return_when=asyncio.FIRST_COMPLETED)
            if printing.done():
                await printing  # The fleet has ended, or something is wrong.
                return
            why = await ending
        finally:
            await cancel_all((printing, ending))
            await output.settle(SETTLE_S)
    if why == "pipe":
        raise BrokenPipeError
    lost = f"; {count(follower.num_lost, 'record')} lost" if follower.num_lost else ""
    print(f"callboard: left {follower.name}, which runs on{lost}", file=sys.stderr)


async def _print_all(follower: Follower, style: Format, lines: Lines, output: Output) -> None:
    async for batch in follower:
        text = []
        for item in batch:
            if lines.is_live:
                text.append(lines.item(item))
            elif isinstance(item, Event):
                lines.remember(item)
            elif item.kind != "following":
                text.append(lines.item(item))
            else:
                past = lines.past()
                waits = "" if past else "; waiting for requests"
                text += [style.begin(), past, lines.item(replace(item, text=item.text + waits))]
        await output.write("".join(text))


def _lines(
    wanted: Filter,
    arguments: argparse.Namespace,
    nodes: Callable[[], Collection[str]],
    entries: Callable[[], Iterable[Entry]],
) -> tuple[Format, Lines]:
    reader = Reader(nodes)
    style: Format = JsonLines()
    if arguments.format != "jsonl":
        is_terminal = sys.stdout.isatty()
        table = Table(
            reader,
            [entry.name for entry in entries()],
            has_colors=is_terminal and not os.environ.get("NO_COLOR"),
            is_ascii="utf" not in (sys.stdout.encoding or "").lower(),
            everything=arguments.all or wanted.verb is not None,  # What is named is shown, however small.
            width=shutil.get_terminal_size().columns if is_terminal else None,
        )
        style = Text(table, entries)
    last = NUM_LAST if arguments.last is None else arguments.last
    return style, Lines(wanted, style, reader, last=last, actors=lambda: [entry.name for entry in entries()])
