"""One version of a router's script: loaded once, counted, and judged by its last requests."""

import hashlib
from collections import OrderedDict, deque

import msgspec

from callboard.actors.route_protocol import RouteChange, RouteRecord, ScriptText, VersionReport
from callboard.router.script import Script
from callboard.router.spans import request_of

from .background_work import BackgroundWork

NUM_LAST = 20
"""Requests by which a version is judged."""


class Version:
    """What a router knows of one version. The script's state lives as long as this."""

    def __init__(self, text: ScriptText, script: Script) -> None:
        self.text = text
        self.script = script
        self.num_requests = 0
        self.num_failures = 0
        self.num_in_flight = 0
        self.is_rolled_back = False
        self.last_error = ""
        self.work: BackgroundWork | None = None
        self._last: deque[bool] = deque(maxlen=NUM_LAST)
        self._failed: OrderedDict[str, str] = OrderedDict()

    @property
    def number(self) -> int:
        """Its number."""
        return self.text.number

    def ended(self, request_id: str, *, is_failure: bool) -> int:
        """Count what ran to its end, or failed by the script's fault; return the failures among the last requests.

        What fails of one request is one failure, whatever attempts and sequences it has.
        """
        request_id = request_of(request_id)
        if is_failure and request_id in self._failed:
            return sum(self._last)
        if is_failure:
            self._failed[request_id] = self.last_error
            self.num_failures += 1
            if len(self._failed) > NUM_LAST:
                self._failed.popitem(last=False)
        self._last.append(is_failure)
        return sum(self._last)

    def failure_of(self, request_id: str) -> str:
        """Return the script's traceback if a request is among the last that failed, else nothing."""
        return self._failed.get(request_of(request_id), "")

    def judged(self) -> tuple[int, int]:
        """Return how many of its last requests failed, and how many that were."""
        return sum(self._last), len(self._last)

    def begin_anew(self) -> None:
        """Forget by what it was judged: it becomes active again."""
        self._last.clear()
        self.is_rolled_back = False

    def report(self, *, with_source: bool) -> VersionReport:
        """Return what is told of it."""
        return VersionReport(
            self.text if with_source else without_source(self.text),
            self.script.version,
            self.num_requests,
            self.num_failures,
            self.num_in_flight,
            self.is_rolled_back,
            self.last_error,
            () if self.work is None else self.work.reports(),
        )


def report_of(text: ScriptText, *, with_source: bool) -> VersionReport:
    """Return what is told of a version that is remembered, and not loaded."""
    version = hashlib.sha256(text.source.encode()).hexdigest()[:12]
    return VersionReport(text if with_source else without_source(text), version, 0, 0, 0, False)


def without_source(text: ScriptText) -> ScriptText:
    """Return the same without its text."""
    return msgspec.structs.replace(text, source="")


def without_sources(change: RouteChange) -> RouteChange:
    """Return the same without its texts."""
    return msgspec.structs.replace(
        change,
        active=without_source(change.active),
        trial=None if change.trial is None else without_source(change.trial),
        before=None if change.before is None else without_source(change.before),
    )


def record_of(change: RouteChange) -> RouteRecord:
    """Return a change as the history keeps it."""
    return RouteRecord(
        change.epoch,
        change.id,
        change.what,
        change.active.number,
        None if change.trial is None else change.trial.number,
        change.share,
        None if change.before is None else change.before.number,
        change.by,
        change.at,
        change.why,
    )
