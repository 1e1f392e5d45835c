"""Records as they are told to people and programs: with the names that users know, and what their call was about.

A record of an end does not repeat what was asked, and a KV manager is asked on behalf of an engine that people know by
name. So calls are remembered from their first record to their last, a bounded number of them.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import msgspec

from callboard.actors import protocol
from callboard.actors.trace_protocol import TRACER
from callboard.bus import Ask, Stream, Tell
from callboard.bus.taps import ANSWERED, ENDED, RECEIVED, SENT, SPAN, decode_facts

from .event import Event
from .story import VERBS, verb_of

CLIENT = "client"
MOST_CALLS = 20_000
MOST_RESERVATIONS = 2_000
NO_FACTS: dict[str, Any] = {}
MESSAGES = frozenset(
    verb_of(each.__name__)
    for each in vars(protocol).values()
    if isinstance(each, type) and issubclass(each, Ask | Stream | Tell)
)
"""All that Callboard's own actors send each other."""


@dataclass(slots=True)
class Told:
    """One record. ``source`` asks ``target`` (of a phase: does it, and there is no target)."""

    event: Event
    verb: str
    source: str
    target: str
    facts: dict[str, Any]
    asked: dict[str, Any]
    """What the call's message said: the same as ``facts`` where this is that message."""
    took_s: float | None
    """Of what ends here."""
    depth: int
    """How many calls deep, for those of a request: 0 is the client's, 1 a sub-request."""
    is_begin: bool = False
    """The first that is known of a call."""
    is_end: bool = False
    """The last that will be known of a call, or a phase."""

    @property
    def request_id(self) -> str:
        return self.event.record.request_id

    @property
    def error(self) -> str:
        return self.event.record.error


@dataclass(slots=True)
class _Call:
    source: str
    target: str
    facts: dict[str, Any]
    depth: int
    is_asker_told: bool
    """The asking node tells of it too."""


class Reader:
    """Turns events, in the order of their times, into what is told. ``nodes``: whose records come at all."""

    def __init__(self, nodes: Callable[[], Collection[str]]) -> None:
        self.verbs: set[str] = set()
        self.actors: set[str] = set()
        """All names that occurred, while ``collects_names``."""
        self.collects_names = True
        self._nodes = nodes
        self._calls: dict[int, _Call] = {}
        self._reservations: dict[str, str] = {}
        """By id, the engine that a reservation is for."""

    def read(self, event: Event) -> Told | None:
        """Return what a record tells; None for those that watching itself makes."""
        record = event.record
        if record.actor == TRACER:
            return None
        told = self._phase(event) if record.what == SPAN else self._call(event)
        if self.collects_names:
            self.verbs.add(told.verb)
            self.actors |= {told.source, told.target}
        return told

    def engine_of(self, reservation: str) -> str:
        """Return the engine that a reservation is for; empty where that was not seen."""
        return self._reservations.get(reservation, "")

    def _phase(self, event: Event) -> Told:
        record = event.record
        facts = _facts(record.facts)
        parent = self._calls.get(record.parent)
        depth = parent.depth + 1 if parent else 0 if record.name == "http" else 1
        took = event.time - event.begin
        # The client is nobody's actor: what it asked for is known of by the frontend alone.
        source, target = (CLIENT, record.actor) if record.name == "http" else (record.actor, "")
        return Told(event, record.name, source, target, facts, NO_FACTS, took, depth, is_end=True)

    def _call(self, event: Event) -> Told:
        record, verb = event.record, verb_of(event.record.name)
        facts = _facts(record.facts)
        call = self._calls.get(record.span)
        if call is None or record.what == SENT:
            call = self._remember(event, verb, facts)
        is_begin = record.what == SENT or (record.what == RECEIVED and not call.is_asker_told)
        took = None if record.what in (SENT, RECEIVED) else event.time - event.begin
        is_end = record.what == ENDED or (record.what == ANSWERED and not call.is_asker_told)
        if record.what == ENDED:
            self._calls.pop(record.span, None)
            if verb == "prep_recv" and isinstance(reservation := facts.get("reservation"), str):
                self._reservations[reservation] = call.target
                if len(self._reservations) > MOST_RESERVATIONS:
                    del self._reservations[next(iter(self._reservations))]
        return Told(
            *(event, verb, call.source, call.target, facts, call.facts, took, call.depth),
            is_begin=is_begin,
            is_end=is_end,
        )

    def _remember(self, event: Event, verb: str, facts: dict[str, Any]) -> _Call:
        record = event.record
        is_asking = record.what in (SENT, ENDED)
        is_first = record.what in (SENT, RECEIVED)
        engine = facts.get("engine", "") if verb in VERBS and is_first else ""
        parent = self._calls.get(record.parent)
        depth = parent.depth + 1 if parent else 0 if verb == "generate" else 1 if verb in VERBS else 2
        call = _Call(
            record.source or (event.node if is_asking else record.peer),
            engine or record.actor,
            facts if is_first else NO_FACTS,
            depth,
            is_asking or record.peer in self._nodes(),
        )
        if is_first:
            self._calls[record.span] = call
            if len(self._calls) > MOST_CALLS:  # Those whose end was lost.
                del self._calls[next(iter(self._calls))]
        return call


def _facts(raw: msgspec.Raw) -> dict[str, Any]:
    try:
        return decode_facts(raw)
    except msgspec.DecodeError:
        return {}
