"""``callboard trace export otlp``: requests' spans to an OpenTelemetry collector, as they finish or of the past.

By the OpenTelemetry SDK's exporter over HTTP, which also reads its own environment variables (headers, certificates,
compression, and the endpoint where none is given).
"""

import argparse
import asyncio
import contextlib
import logging
import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from callboard.bus import BusError
from callboard.bus.taps import ENDED, SPAN
from callboard.router.spans import request_of
from callboard.tools.bus_client import visitor, why_not
from callboard.tools.errors import CliError
from callboard.tools.running import RunningFleet, open_fleet

from .attach import Follower
from .ends import Ends
from .event import Event
from .notice import Notice
from .source import MOST_REQUESTS, source_of, stories_of
from .story import Story, assemble

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan

SETTLE_S = 1.0
"""Records of a request come from several nodes: what comes so long after its end still belongs to it."""
EVERY_S = 0.2
DRAIN_S = 0.5
"""How long what was under way when the end was asked for is still taken."""
MOST_OPEN = 10_000
"""Requests that are under way; beyond it the one that began first is no longer waited for."""
MOST_SPANS = 2000
"""In one message to the collector."""
TIMEOUT_S = 5.0
TRACES_PATH = "/v1/traces"


def run(arguments: argparse.Namespace) -> int:
    """Export the past of a fleet or a recording, or follow a fleet. Raises CliError."""
    if arguments.output is not None:
        raise CliError("otlp goes to a collector: give --endpoint URL, not a file")
    collector = Collector(arguments.endpoint)
    try:
        if arguments.source is not None or arguments.requests or arguments.no_follow:
            return _export_past(arguments, collector)
        return asyncio.run(_follow(arguments, collector))
    finally:
        collector.close()


class Collector:
    """Where spans go. Raises CliError for a URL that is none, and where the extra is missing."""

    def __init__(self, url: str | None) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        except ImportError:
            raise CliError('exporting to OpenTelemetry needs the extra "otel": pip install "callboard[otel]"') from None
        self.url = None if url is None else traces_url(url)
        self._said = _LastWords()
        self._logger = logging.getLogger("opentelemetry")
        self._logger.addHandler(self._said)
        self._was_propagating, self._logger.propagate = self._logger.propagate, False
        self._exporter = OTLPSpanExporter(endpoint=self.url, timeout=TIMEOUT_S)

    def send(self, spans: Sequence["ReadableSpan"]) -> str:
        """Send spans; return why they were not taken, or nothing. Blocks for TIMEOUT_S at most."""
        from opentelemetry.sdk.trace.export import SpanExportResult

        for at in range(0, len(spans), MOST_SPANS):
            self._said.text = ""
            if self._exporter.export(spans[at : at + MOST_SPANS]) is not SpanExportResult.SUCCESS:
                return self._said.text or "it did not say why"
        return ""

    def close(self) -> None:
        """End the connection."""
        self._exporter.shutdown()  # type: ignore[no-untyped-call]
        self._logger.removeHandler(self._said)
        self._logger.propagate = self._was_propagating

    def __str__(self) -> str:
        return f"the collector at {self.url}" if self.url else "the collector"


class _LastWords(logging.Handler):
    """Keeps why the exporter failed: it logs that, and returns only that it did."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text = record.getMessage().splitlines()[0][:300]


def traces_url(url: str) -> str:
    """Return where traces go: the URL as it is, or, of a URL without a path, where collectors take them."""
    try:
        parts = urlsplit(url)
        is_good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_good = False
    if not is_good:
        raise CliError(f'"{url}" is no URL of a collector: write for example --endpoint http://localhost:4318')
    return url if parts.path not in ("", "/") else parts._replace(path=TRACES_PATH).geturl()


# ---- the past ----------------------------------------------------------------------------------------------------


def _export_past(arguments: argparse.Namespace, collector: Collector) -> int:
    from .otlp_spans import is_sampled, spans_of

    source = source_of(arguments)
    last = MOST_REQUESTS if arguments.last is None else max(1, arguments.last)
    told = stories_of(source, arguments.requests, last)
    # What is asked for by name is wanted, sampled or not.
    sampled = [story for story in told if arguments.requests or is_sampled(story)]
    spans = [
        span for story in sampled for span in spans_of(story, fleet=source.fleet, prefix=arguments.service_name or "")
    ]
    for node, why in sorted(source.missing.items()):
        print(f"node {node} could not be asked, so what it knows is missing: {why}", file=sys.stderr)
    if why := collector.send(spans):
        raise CliError(f"{collector} did not take the spans: {why}")
    left_out = (
        f", {len(told) - len(sampled)} left out (their callers do not sample)" if len(told) > len(sampled) else ""
    )
    print(f"{len(spans):,} spans of {_requests(len(sampled))} exported{left_out}", file=sys.stderr)
    return 0


def _requests(number: int) -> str:
    return "1 request" if number == 1 else f"{number:,} requests"


# ---- as they finish ----------------------------------------------------------------------------------------------


class Finishing:
    """The records of requests until they are over. ``since``: what was over before is left out."""

    def __init__(self, since: float) -> None:
        self._since = since
        self._open: OrderedDict[str, list[Event]] = OrderedDict()
        """By the id without what may be a sequence's number: ``run.1`` may be a sequence, or what a client asked."""
        self._due: OrderedDict[str, float] = OrderedDict()
        """When those are looked at that are over, in that order."""
        self._told: OrderedDict[str, float] = OrderedDict()
        """Until when records are of the request that was told. An id may come again."""
        self.num_given_up = 0
        """Requests that were not waited for any longer."""

    def add(self, event: Event, now: float) -> None:
        """Take a record."""
        request_id = event.record.request_id
        stem = request_of(request_id)
        if not stem or event.time <= self._told.get(request_id, 0.0):
            return
        if (events := self._open.get(stem)) is None:
            events = self._open[stem] = []
            if len(self._open) > MOST_OPEN:
                self._due.pop(next(iter(self._open)), None)
                self._open.popitem(last=False)
                self.num_given_up += 1
        events.append(event)
        if not _is_end(event):
            return
        if event.time < self._since:
            self._forget(
                stem, {request_id, *(e.record.request_id for e in events if _is_of(e, request_id))}, event.time
            )
        else:
            self._due.pop(stem, None)
            self._due[stem] = now + SETTLE_S

    def take(self, now: float) -> list[Story]:
        """Return the requests that are over, and whose records have surely come."""
        due: list[Story] = []
        while self._due and next(iter(self._due.values())) <= now:
            stem, _ = self._due.popitem(last=False)
            over = [story for story in assemble(self._open[stem]).values() if story.end is not None]
            due += over
            last = max((story.last for story in over), default=0.0)
            self._forget(stem, {span.request_id for story in over for span in story.spans}, last)
        return due

    def _forget(self, stem: str, ids: set[str], last: float) -> None:
        left = [event for event in self._open[stem] if event.record.request_id not in ids]
        if left:
            self._open[stem] = left
        else:
            del self._open[stem]
        for request_id in ids:
            self._told.pop(request_id, None)
            self._told[request_id] = last + SETTLE_S
            if len(self._told) > MOST_OPEN:
                self._told.popitem(last=False)


def _is_of(event: Event, request_id: str) -> bool:
    return request_of(event.record.request_id) == request_id


def _is_end(event: Event) -> bool:
    """Return whether a request is over: the door says so, or, of one that came another way, who asked the router."""
    record = event.record
    if record.what == SPAN:
        return record.name == "http"
    return record.what == ENDED and record.name == "Generate" and not record.parent


class _Exporting:
    """Sends what is over, and says on standard error when the collector does not take it."""

    def __init__(self, collector: Collector, fleet: str, prefix: str) -> None:
        self._collector = collector
        self._where = fleet, prefix
        self.num_requests = self.num_spans = self.num_lost = 0
        self._is_failing = False

    async def send(self, stories: Sequence[Story]) -> None:
        from .otlp_spans import is_sampled, spans_of

        wanted = [story for story in stories if is_sampled(story)]
        fleet, prefix = self._where
        spans = [span for story in wanted for span in spans_of(story, fleet=fleet, prefix=prefix)]
        if not spans:
            return
        why = await asyncio.to_thread(self._collector.send, spans)
        if why:
            self.num_lost += len(wanted)
            if not self._is_failing:
                print(f"{self._collector} does not take spans: {why}", file=sys.stderr)
        else:
            self.num_requests += len(wanted)
            self.num_spans += len(spans)
            if self._is_failing:
                print(f"{self._collector} takes spans again, {self.num_lost} requests were lost", file=sys.stderr)
        self._is_failing = bool(why)


async def _follow(arguments: argparse.Namespace, collector: Collector) -> int:
    fleet = open_fleet(arguments.fleet, keys=arguments.keys)
    async with visitor(fleet) as node:
        follower = Follower(node, fleet)
        finishing = Finishing(node.clock.now())
        exporting = _Exporting(collector, fleet.state.name, arguments.service_name or "")
        try:
            await follower.__aenter__()
        except BusError as error:
            raise why_not(fleet, error) from None
        try:
            print(f"{_name(fleet)}: requests are exported as they finish, until Ctrl-C", file=sys.stderr)
            with Ends(with_keys=False) as ends:
                async with asyncio.TaskGroup() as group:
                    stop = asyncio.Event()
                    group.create_task(_send(finishing, exporting, node.clock.now, stop))
                    reading = group.create_task(_read(follower, finishing, node.clock.now))
                    ending = group.create_task(ends.wait())
                    await asyncio.wait((reading, ending), return_when=asyncio.FIRST_COMPLETED)
                    await asyncio.wait((reading,), timeout=DRAIN_S)
                    reading.cancel()
                    ending.cancel()
                    stop.set()
        finally:
            await follower.__aexit__(None, None, None)
        await exporting.send(finishing.take(float("inf")))
    lost = f"; {exporting.num_lost:,} were not taken" if exporting.num_lost else ""
    lost += f"; {finishing.num_given_up:,} never ended" if finishing.num_given_up else ""
    lost += f"; {follower.num_lost:,} records were lost" if follower.num_lost else ""
    print(f"{exporting.num_spans:,} spans of {_requests(exporting.num_requests)} exported{lost}", file=sys.stderr)
    return 0


def _name(fleet: RunningFleet) -> str:
    return f'fleet "{fleet.state.name}"'


async def _read(follower: Follower, finishing: Finishing, now: Callable[[], float]) -> None:
    async for batch in follower:
        for item in batch:
            if isinstance(item, Event):
                finishing.add(item, now())
            elif isinstance(item, Notice) and item.kind not in ("following", "came"):
                print(item.text, file=sys.stderr)


async def _send(finishing: Finishing, exporting: _Exporting, now: Callable[[], float], stop: asyncio.Event) -> None:
    while not stop.is_set():
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(EVERY_S):
                await stop.wait()
        await exporting.send(finishing.take(now()))
