"""What came of requests, out of the records: what was decided for each, how long it took, and what it moved.

The same code reads a recording and what a replay records, so that the two can be compared.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

from callboard.bus.taps import ANSWERED, ENDED, RECEIVED, SENT, SPAN, decode_facts
from callboard.tools.trace.event import Event

VERBS = {"PrepRecv": "prep_recv", "RemoteSend": "remote_send", "StartGenerate": "start_generate"}
LINGER_S = 15.0
"""How long after a request's end its last records are waited for: nodes tell in batches, and may be cut off a while."""


@dataclass(frozen=True, slots=True)
class Decision:
    """One verb that was called: of which engine, for which range of the prompt's tokens."""

    verb: str
    engine: str
    begin: int | None = None
    end: int | None = None

    def __str__(self) -> str:
        if self.begin is None and self.end is None:
            return f"{self.verb} {self.engine}"
        if self.end is None:
            return f"{self.verb} {self.engine} from {self.begin}"
        return f"{self.verb} {self.engine} [{self.begin or 0}, {self.end})"


@dataclass(slots=True)
class Outcome:
    """What came of one sequence. Times in seconds from when the router was asked; None: it was not recorded."""

    id: str
    time: float
    num_prompt_tokens: int = 0
    num_tokens: int = 0
    ttft_s: float | None = None
    jct_s: float | None = None
    num_bytes: int = 0
    """Of KV, moved between pools."""
    num_cached_tokens: int | None = None
    """Of the prompt, those that no engine had to compute."""
    error: str = ""
    decisions: tuple[Decision, ...] = ()
    """In the order they were taken."""

    @property
    def is_whole(self) -> bool:
        """Whether its end was recorded."""
        return self.jct_s is not None


@dataclass(slots=True)
class _Call:
    """A call of a verb in the making."""

    time: float
    parent: int
    decision: Decision


@dataclass(slots=True)
class _Group:
    """The records of one request, of all its sequences."""

    parents: dict[int, int] = field(default_factory=dict)
    generates: dict[int, Outcome] = field(default_factory=dict)
    verbs: dict[int, _Call] = field(default_factory=dict)
    num_bytes: dict[int, int] = field(default_factory=dict)
    """By the span of the remote_send."""
    computed: dict[int, int] = field(default_factory=dict)
    """Tokens that were computed, by the span that did so."""
    num_open: int = 0
    ended: float = 0.0

    def root_of(self, span: int) -> int | None:
        """Return the Generate that a call or span was done for."""
        for _ in range(64):
            if span in self.generates:
                return span
            parent = self.parents.get(span)
            if not parent:
                break
            span = parent
        return next(iter(self.generates)) if len(self.generates) == 1 else None

    def outcomes(self) -> Iterator[Outcome]:
        decisions: dict[int, list[tuple[float, Decision]]] = {}
        for call in self.verbs.values():
            if (root := self.root_of(call.parent)) is not None:
                decisions.setdefault(root, []).append((call.time, call.decision))
        for span, num_bytes in self.num_bytes.items():
            if (root := self.root_of(span)) is not None:
                self.generates[root].num_bytes += num_bytes
        computed: dict[int, int] = {}
        for span, count in self.computed.items():
            if (root := self.root_of(span)) is not None:
                computed[root] = computed.get(root, 0) + count
        for root, outcome in self.generates.items():
            taken = sorted(decisions.get(root, ()), key=itemgetter(0))
            outcome.decisions = tuple(decision for _, decision in taken)
            if root in computed:
                outcome.num_cached_tokens = max(0, outcome.num_prompt_tokens - computed[root])
            yield outcome


class Outcomes:
    """Fed with events, in about the order of their times; ``done`` has what came of each sequence, by its id."""

    def __init__(self) -> None:
        self.done: dict[str, Outcome] = {}
        self._groups: dict[str, _Group] = {}
        self._ended: dict[str, None] = {}

    def add(self, event: Event, *, sequence_id: str = "") -> None:
        """Take an event. ``sequence_id`` is the id that a Generate has itself, where it is known."""
        record = event.record
        if not record.request_id:
            return
        group = self._groups.get(record.request_id)
        if group is None:
            begins = record.name == "Generate" and record.what in (SENT, RECEIVED)
            if not begins and record.request_id in self.done:
                return
            group = self._groups[record.request_id] = _Group()
        if record.parent:
            group.parents[record.span] = record.parent
        if record.name == "Generate":
            self._add_generate(group, event, sequence_id)
        elif record.what == SENT and record.name in VERBS:
            group.verbs[record.span] = _Call(event.time, record.span, _decision(event))
        elif record.what == ENDED and record.name == "RemoteSend":
            facts = decode_facts(record.facts)
            group.num_bytes[record.span] = _int(facts.get("num_bytes")) or 0
        elif record.what == SPAN and record.name in ("prefill", "compute"):
            group.computed[record.span] = _int(decode_facts(record.facts).get("num_tokens")) or 0

    def _add_generate(self, group: _Group, event: Event, sequence_id: str) -> None:
        record = event.record
        outcome = group.generates.get(record.span)
        if outcome is None:
            outcome = group.generates[record.span] = Outcome(sequence_id or record.request_id, event.time)
            group.num_open += 1
        if sequence_id:
            outcome.id = sequence_id
        if record.what == SENT:
            outcome.time = event.time
            outcome.num_prompt_tokens = _int(decode_facts(record.facts).get("num_tokens")) or outcome.num_prompt_tokens
        elif record.what == ENDED or (record.what == ANSWERED and outcome.jct_s is None):
            if outcome.jct_s is None:
                group.num_open -= 1
                group.ended = max(group.ended, event.time)
                if not group.num_open:
                    self._ended[record.request_id] = None
            outcome.time, outcome.jct_s, outcome.error = event.begin, event.time - event.begin, record.error
            if record.what == ENDED:
                outcome.num_tokens = record.num_items
                outcome.ttft_s = event.first - event.begin if event.first else None
        self._finish(event.time)

    def _finish(self, now: float) -> None:
        """Make outcomes of what ended long ago, so that a long recording takes little memory."""
        while self._ended:
            request_id = next(iter(self._ended))
            group = self._groups.get(request_id)
            if group is not None and group.ended + LINGER_S > now:
                return
            del self._ended[request_id]
            if group is not None and not group.num_open:
                self._take(request_id)

    def _take(self, request_id: str) -> None:
        for outcome in self._groups.pop(request_id).outcomes():
            self.done[outcome.id] = outcome

    def finish(self) -> dict[str, Outcome]:
        """Return what came of all sequences, also of those that were not over."""
        for request_id in list(self._groups):
            self._take(request_id)
        self._ended.clear()
        return self.done


def _decision(event: Event) -> Decision:
    record = event.record
    facts: dict[str, Any] = decode_facts(record.facts)
    engine = record.actor if record.name == "StartGenerate" else str(facts.get("engine") or record.actor)
    return Decision(VERBS[record.name], engine, _int(facts.get("begin")), _int(facts.get("end")))


def _int(value: object) -> int | None:
    return value if type(value) is int else None
