"""Records as a fleet makes them, without one: for tests of what reads them. Seconds, on one clock."""

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec

from callboard.bus.taps import ANSWERED, ENDED, NO_BODY, NO_FACTS, RECEIVED, SENT, SPAN, TapRecord
from callboard.tools.trace.event import Event

HOP_S = 0.0002
"""How long a message is under way."""
NODE_OF = {"frontend": "control", "main": "control"}
"""Actors in a node that is not named after them."""


def facts_of(values: dict[str, Any]) -> msgspec.Raw:
    return msgspec.Raw(msgspec.msgpack.encode(values)) if values else NO_FACTS


@dataclass
class Call:
    """A call under way: ``received`` is when it is at the actor that serves it."""

    name: str
    actor: str
    source: str
    span: int
    sent: float
    received: float


@dataclass
class Writer:
    """Writes one request's events; ``ids`` gives span ids, unique among all writers that share it."""

    request_id: str
    ids: Iterator[int]
    events: list[Event] = field(default_factory=list)
    wall_s: float = 1.7e9

    def _add(self, what: int, actor: str, source: str, name: str, time: float, begin: float, **more: Any) -> None:
        at_caller = what in (SENT, ENDED)
        here = source if at_caller else actor
        node = NODE_OF.get(here, here)
        peer = NODE_OF.get(actor, actor) if at_caller else NODE_OF.get(source, source)
        record = TapRecord(
            what,
            time,
            begin,
            actor,
            source if at_caller else "",
            peer if source else "",
            name,
            more.get("request_id") or self.request_id,
            more["span"],
            more.get("parent", 0),
            more.get("num_bytes", 0),
            more.get("num_items", 0),
            more.get("first", 0.0),
            more.get("error", ""),
            facts_of(more.get("facts", {})),
            NO_BODY,
        )
        self.events.append(Event(node, record, time, begin, record.first, 0.0, time + self.wall_s))

    def call(self, name: str, actor: str, source: str, at: float, parent: int, **facts: Any) -> Call:
        """SENT and RECEIVED."""
        made = Call(name, actor, source, next(self.ids), at, at + HOP_S)
        size = 120 + 4 * int(facts.get("num_tokens", 0))
        self._add(SENT, actor, source, name, at, 0.0, span=made.span, parent=parent, num_bytes=size, facts=facts)
        self._add(RECEIVED, actor, source, name, made.received, 0.0, span=made.span, num_bytes=size)
        return made

    def end(self, call: Call, at: float, *, error: str = "", items: int = 0, first: float = 0.0, **facts: Any) -> float:
        """ANSWERED at ``at``, and ENDED; returns when."""
        end, more = at + HOP_S, {"error": error, "num_items": items, "span": call.span}
        self._add(ANSWERED, call.actor, call.source, call.name, at, call.received, num_bytes=90, **more)
        size = 30 * items or 90
        more |= {"first": first, "facts": facts, "num_bytes": size}
        self._add(ENDED, call.actor, call.source, call.name, end, call.sent, **more)
        return end

    def span(self, name: str, actor: str, begin: float, end: float, parent: int, **more: Any) -> int:
        """A SPAN; a category and an error among ``facts`` go where they belong."""
        span = more.pop("span", 0) or next(self.ids)
        error = more.pop("error", "")
        self._add(SPAN, actor, "", name, end, begin, span=span, parent=parent, error=error, facts=more)
        return span


@dataclass(frozen=True)
class Shape:
    """What a request is like, and how fast it is served."""

    num_prompt_tokens: int = 312
    num_cached_tokens: int = 16
    num_tokens: int = 32
    queue_s: float = 0.004
    prefill_s: float = 0.25
    decode_s: float = 0.055
    """Per token."""
    wait_blocks_s: float = 0.0
    error: str = ""
    """The engine that decodes fails with this after half of its tokens."""
    prefill: str = "prefill"
    decode: str = "decode"
    senders: str = "kv-cpu0"
    receivers: str = "kv-cpu1"
    model: str = "smollm2-135m"


def disaggregated(request_id: str, at: float, shape: Shape = Shape(), ids: Iterator[int] | None = None) -> list[Event]:
    """One request through ``disaggregate``: prep_recv, remote_send, start_generate; in the order of time."""
    writer = Writer(request_id, ids or itertools.count(1))
    root, attempt = next(writer.ids), next(writer.ids)
    n, cached = shape.num_prompt_tokens, shape.num_cached_tokens
    writer.span("read", "frontend", at, at + 0.0002, root, category="frontend")
    writer.span("tokenise", "frontend", at + 0.0002, at + 0.0020, root, category="frontend")
    generate = writer.call("Generate", "main", "frontend", at + 0.0022, root, num_tokens=n, model=shape.model)
    t = generate.received + 0.0001
    begun = t

    prep = writer.call(
        "PrepRecv", shape.receivers, "main", t, attempt, num_tokens=n, end=n, engine=shape.decode, attempt=1
    )
    t = prep.received + 0.0003
    if shape.wait_blocks_s:
        waits = {"category": "queue", "for": "prep_recv", "num_blocks": 19}
        writer.span("blocks", shape.receivers, t, t + shape.wait_blocks_s, prep.span, **waits)
        t += shape.wait_blocks_s
    t = writer.end(prep, t, begin=cached, end=n, num_cached_tokens=cached, reservation="r1")

    t = _remote_send(writer, shape, t + 0.0001, attempt)
    first, end, error = _start_generate(writer, shape, t + 0.0001, attempt)

    release = writer.call("Release", shape.receivers, "main", end, attempt, reservation="r1")
    over = writer.end(release, release.received + 0.0001)
    names = {"script": "disaggregate", "version": "1", "number": 1, "options": "{}"}
    writer.span("attempt", "main", begun, over, generate.span, span=attempt, error=error, **names)
    over = writer.end(generate, over, items=shape.num_tokens, first=first + HOP_S, error=error)
    status = 500 if error else 200
    http = {"method": "POST", "path": "/v1/chat/completions", "status": status, "model": shape.model, "stream": True}
    http |= {"num_prompt_tokens": n, "num_sequences": 1, "trace_id": "0" * 32, "first_s": first + 0.0008}
    writer.span("write", "frontend", over, over + 0.0004, root, category="frontend")
    writer.span("http", "frontend", at, over + 0.0004, 0, span=root, error=error, **http)
    return sorted(writer.events, key=lambda event: event.time)


def _remote_send(writer: Writer, shape: Shape, at: float, attempt: int) -> float:
    n, cached = shape.num_prompt_tokens, shape.num_cached_tokens
    size = (n - cached) * 4096
    facts = {"num_tokens": n, "begin": cached, "end": n, "engine": shape.prefill, "reservation": "r1"}
    send = writer.call("RemoteSend", shape.senders, "main", at, attempt, **facts)
    opened = writer.call("OpenWrite", shape.receivers, shape.senders, send.received + 0.0001, send.span)
    t = writer.end(opened, opened.received + 0.0001)
    compute = writer.call("ComputeKv", shape.prefill, shape.senders, t, send.span, num_tokens=n, num_cached_tokens=0)
    t = compute.received
    queued = t + shape.queue_s
    computed = queued + shape.prefill_s
    writer.span("queue", shape.prefill, t, queued, compute.span, category="queue")
    steps = {"num_tokens": n - cached, "num_cached_tokens": cached, "num_steps": 1, "step_s": shape.prefill_s}
    writer.span("compute", shape.prefill, queued, computed, compute.span, category="compute", between_s=0.0, **steps)
    for part in range(5):
        begin = queued + shape.prefill_s * (part + 1) / 5
        pages = {"category": "send", "num_bytes": size // 5, "lane": "shm", "to": shape.receivers}
        pages |= {"layer_begin": part * 6, "layer_end": part * 6 + 6, "token_begin": cached, "token_end": n}
        writer.span("send", shape.senders, begin + 0.0002, begin + 0.0026, send.span, **pages)
    writer.end(compute, computed, items=6, first=queued + shape.prefill_s / 5)
    closed = writer.call("CloseWrite", shape.receivers, shape.senders, computed + 0.0027, send.span)
    t = writer.end(closed, closed.received + 0.0002)
    sent = {"num_bytes": size, "lane": "shm", "num_computed_tokens": n - cached, "num_reused_tokens": cached}
    sent |= {"queue_s": shape.queue_s, "compute_s": shape.prefill_s, "send_s": 0.012, "tail_s": 0.0026}
    return writer.end(send, t + 0.0001, **sent)


def _start_generate(writer: Writer, shape: Shape, at: float, attempt: int) -> tuple[float, float, str]:
    n = shape.num_prompt_tokens
    facts = {"num_tokens": n, "begin": n, "reservation": "r1", "attempt": 1}
    start = writer.call("StartGenerate", shape.decode, "main", at, attempt, **facts)
    admit = writer.call("Admit", shape.receivers, shape.decode, start.received + 0.0001, start.span, num_tokens=n)
    t = writer.end(admit, admit.received + 0.0002, num_cached_tokens=n)
    queued = t + shape.queue_s / 2
    first = queued + shape.decode_s
    writer.span("queue", shape.decode, t, queued, start.span, category="queue")
    steps = {"num_tokens": 1, "num_cached_tokens": n - 1, "num_steps": 1, "step_s": shape.decode_s, "between_s": 0.0}
    writer.span("prefill", shape.decode, queued, first, start.span, category="compute", **steps)
    num, error = shape.num_tokens, ""
    if shape.error:
        num, error = num // 2, shape.error
    last = first + shape.decode_s * (num - 1)
    steps = {"num_tokens": num - 1, "num_steps": num - 1, "step_s": last - first, "between_s": 0.0, "batch": 1.0}
    writer.span("decode", shape.decode, first, last, start.span, category="compute", error=error, **steps)
    end = writer.end(start, last + 0.0001, items=num, first=first + HOP_S, error=error)
    return first + HOP_S, end, error


def whole(request_id: str, at: float, shape: Shape = Shape(), ids: Iterator[int] | None = None) -> list[Event]:
    """One request through ``round_robin``: start_generate alone, on ``shape.decode``; in the order of time."""
    writer = Writer(request_id, ids or itertools.count(1))
    root, attempt = next(writer.ids), next(writer.ids)
    n, cached, engine = shape.num_prompt_tokens, shape.num_cached_tokens, shape.decode
    writer.span("read", "frontend", at, at + 0.0002, root, category="frontend")
    generate = writer.call("Generate", "main", "frontend", at + 0.001, root, num_tokens=n, model=shape.model)
    start = writer.call("StartGenerate", engine, "main", generate.received + 0.0001, attempt, num_tokens=n, attempt=1)
    admit = writer.call("Admit", shape.receivers, engine, start.received + 0.0001, start.span, num_tokens=n)
    t = writer.end(admit, admit.received + 0.0002, num_cached_tokens=cached)
    queued = t + shape.queue_s
    first = queued + shape.prefill_s
    last = first + shape.decode_s * (shape.num_tokens - 1)
    writer.span("queue", engine, t, queued, start.span, category="queue")
    steps = {"num_tokens": n - cached, "num_cached_tokens": cached, "num_steps": 1, "step_s": shape.prefill_s}
    writer.span("prefill", engine, queued, first, start.span, category="compute", between_s=0.0, **steps)
    num = shape.num_tokens - 1
    steps = {"num_tokens": num, "num_steps": num, "step_s": last - first, "between_s": 0.0, "batch": 1.0}
    writer.span("decode", engine, first, last, start.span, category="compute", **steps)
    end = writer.end(start, last + 0.0001, items=shape.num_tokens, first=first + HOP_S)
    names = {"script": "round_robin", "version": "1", "number": 1, "options": "{}"}
    writer.span("attempt", "main", generate.received, end, generate.span, span=attempt, **names)
    over = writer.end(generate, end, items=shape.num_tokens, first=first + 2 * HOP_S)
    http = {"method": "POST", "path": "/v1/completions", "status": 200, "model": shape.model, "stream": False}
    writer.span("http", "frontend", at, over + 0.0004, 0, span=root, num_prompt_tokens=n, num_sequences=1, **http)
    return sorted(writer.events, key=lambda event: event.time)


def load(num_requests: int, *, rate: float, at: float = 0.0, seed: int = 0) -> Iterator[Event]:
    """Requests of all kinds, ``rate`` a second, their events merged in the order of time."""
    rng, ids = random.Random(seed), itertools.count(1)
    waiting: list[Event] = []
    for index in range(num_requests):
        at += rng.expovariate(rate)
        shape = Shape(
            num_prompt_tokens=rng.randint(20, 900),
            num_cached_tokens=16 * rng.randint(0, 1),
            num_tokens=rng.randint(4, 48),
            queue_s=rng.expovariate(200),
            prefill_s=rng.uniform(0.02, 0.3),
            decode_s=rng.uniform(0.005, 0.03),
            wait_blocks_s=0.08 if rng.random() < 0.1 else 0.0,
            error="ActorDied: decode is dead" if rng.random() < 0.03 else "",
        )
        waiting += disaggregated(f"{rng.getrandbits(64):016x}", at, shape, ids)
        if index % 64 == 63 or index == num_requests - 1:
            waiting.sort(key=lambda event: event.time)
            cut = len(waiting)
            if index < num_requests - 1:  # What begins later may come before what has not ended yet.
                cut = next((i for i, event in enumerate(waiting) if event.time >= at), cut)
            yield from waiting[:cut]
            del waiting[:cut]


def again(events: list[Event], request_id: str, later_s: float) -> list[Event]:
    """The same as another request, so much later: much cheaper than a new one."""
    return [
        Event(
            event.node,
            msgspec.structs.replace(event.record, request_id=request_id),
            event.time + later_s,
            event.begin and event.begin + later_s,
            event.first and event.first + later_s,
        )
        for event in events
    ]
