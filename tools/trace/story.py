"""A request's story: its records of all nodes, as a tree of spans.

Records are lost (a ring is bounded, a node is killed), come twice, and come in any order. What is known is told: a
call that only one side noted is there with that side's times, a span whose parent is unknown is placed by time.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from callboard.bus.taps import ANSWERED, ENDED, RECEIVED, SENT, SPAN, decode_facts
from callboard.router.spans import request_of

from .causality import in_order, is_told
from .event import Event
from .span import CATEGORY_OF as CATEGORY_OF
from .span import SHORT_ASKS as SHORT_ASKS
from .span import VERBS as VERBS
from .span import Category as Category
from .span import Kind as Kind
from .span import Span as Span
from .span import Story as Story
from .span import is_tell as is_tell
from .span import verb_of as verb_of


def root_ids(events: Iterable[Event]) -> dict[str, str]:
    """Return the request of every sequence: ``ID`` for ``ID.1``, unless ``ID.1`` is itself what a client asked for."""
    ids: dict[str, None] = {}
    own = set()
    for event in events:
        record = event.record
        ids[record.request_id] = None
        if record.what == SPAN and record.name == "http":
            own.add(record.request_id)
    return {each: each if each in own else request_of(each) for each in ids if each}


def assemble(events: Iterable[Event]) -> dict[str, Story]:
    """Return the stories that records tell, by request id, the oldest first. Never raises for what is missing."""
    known = list(events)
    roots = root_ids(known)
    by_request: dict[str, dict[tuple[int, int, str], Event]] = defaultdict(dict)
    for event in known:
        record = event.record
        if root := roots.get(record.request_id):
            # The same record comes twice from a ring that is read while it is followed.
            by_request[root].setdefault((record.what, record.span, event.node), event)
    stories = [_story(request_id, in_order(list(found.values()))) for request_id, found in by_request.items()]
    return {story.request_id: story for story in sorted(stories, key=lambda story: story.begin)}


def _story(request_id: str, events: list[Event]) -> Story:
    by_id: dict[int, list[Event]] = defaultdict(list)
    for event in events:
        by_id[event.record.span].append(event)
    spans: list[Span] = []
    wanted: dict[int, tuple[Span, int]] = {}
    """By the span's id(): the span, and its parent's number, for those which have no parent yet."""
    hosts: dict[int, Span] = {}
    """What is done for a call or a span hangs here, by its number."""
    for number, found in by_id.items():
        made = _phase(number, found) if found[0].record.what == SPAN else _call(number, found)
        spans += made
        parents = [event.record.parent for event in found if event.record.parent]
        wanted[id(made[0])] = made[0], parents[0] if parents else 0
        served = [span for span in made if span.kind == "serve"]
        hosts[number] = served[0] if served else made[0]
    _link(wanted, hosts, spans)
    _gather_attempts(spans)
    spans.sort(key=_order)
    for span in spans:
        span.children.sort(key=_sibling_order)
    return _summary(request_id, spans, events)


def _order(span: Span) -> tuple[float, float]:
    return span.begin, -span.begin if span.end is None else -span.end


def _sibling_order(span: Span) -> tuple[float, float]:
    return span.begin, float("inf") if span.end is None else span.end


# ---- spans of one number -----------------------------------------------------------------------------------------


def _facts(raw: msgspec.Raw) -> dict[str, Any]:
    try:
        return decode_facts(raw)
    except msgspec.DecodeError:
        return {}


def _phase(number: int, found: list[Event]) -> list[Span]:
    """Return the span that an actor noted."""
    event = found[0]
    record = event.record
    facts = _facts(record.facts)
    is_http = record.name == "http"
    first = event.first
    if is_http and isinstance(first_s := facts.pop("first_s", 0.0), int | float) and first_s:
        first = first_s + (event.time - record.time)
    category = CATEGORY_OF.get(record.name, "")
    if isinstance(given := facts.pop("category", None), str) and given in Category.__args__:  # type: ignore[attr-defined]
        category = given  # type: ignore[assignment]
    num_bytes = facts.get("num_bytes", record.num_bytes)
    span = Span(
        *(number, None, "http" if is_http else "phase", record.name, category, record.actor, record.source, event.node),
        begin=min(event.begin, event.time),
        end=event.time,
        error=record.error,
        facts=facts,
        num_bytes=num_bytes if isinstance(num_bytes, int) else 0,
        first=first,
        request_id=record.request_id,
        error_s=event.error_s,
    )
    return [span]


def _call(number: int, found: list[Event]) -> list[Span]:
    """Return a call, and what is known of its being served and of its ways."""
    events = {event.record.what: event for event in found if event.record.what != SPAN}
    sent, received = events.get(SENT), events.get(RECEIVED)
    answered, ended = events.get(ANSWERED), events.get(ENDED)
    record = found[0].record
    name, actor = verb_of(record.name), record.actor
    asking, serving = sent or ended, received or answered
    request_id = record.request_id
    serve = None
    if serving is not None:
        begin = received.time if received else serving.begin
        serve = Span(
            *(_made_of(number, 1), None, "serve", name, "kv" if name in SHORT_ASKS else "", actor, "", serving.node),
            begin=begin,
            end=None if answered is None else max(begin, answered.time),
            error=answered.record.error if answered else "",
            request_id=request_id,
            error_s=serving.error_s,
            is_tell=is_tell(record.name),
        )
    if asking is None:
        assert serve is not None
        call_begin, call_end, node = serve.begin, serve.end, record.peer
    else:
        call_begin = sent.time if sent else asking.begin
        call_end = None if ended is None else max(call_begin, ended.time)
        node = asking.node
    facts: dict[str, Any] = {}
    for event in (sent, ended):
        if event is not None:
            facts |= _facts(event.record.facts)
    call = Span(
        *(number, None, "call", name, "", actor, asking.record.source if asking else "", node),
        begin=call_begin,
        end=call_end,
        error=ended.record.error if ended else serve.error if serve else "",
        facts=facts,
        num_bytes=(sent or received or found[0]).record.num_bytes + (ended.record.num_bytes if ended else 0),
        num_items=ended.record.num_items if ended else 0,
        first=ended.first if ended else 0.0,
        request_id=request_id,
        is_tell=is_tell(record.name),
        error_s=(asking or found[0]).error_s,
    )
    if call.is_tell:
        call.end = received.time if received and sent else None
    made = [call]
    ways = (("request", sent, received, 2), ("answer", answered, ended, 3))
    for way, begun, over, salt in ways:
        if begun is not None and over is not None and not call.is_tell and (over is not ended or is_told(over)):
            bus = Span(
                *(_made_of(number, salt), call, "bus", way, "bus", actor, call.source, over.node),
                begin=begun.time,
                end=max(begun.time, over.time),
                request_id=request_id,
                error_s=max(begun.error_s, over.error_s),
            )
            call.children.append(bus)
            made.append(bus)
    if serve is not None:
        serve.parent = call
        call.children.append(serve)
        made.append(serve)
    return made


def _made_of(number: int, salt: int) -> int:
    return (number * 0x9E3779B97F4A7C15 + salt * 0xBF58476D1CE4E5B9) & (2**63 - 1)


# ---- the tree ----------------------------------------------------------------------------------------------------


def _link(wanted: dict[int, tuple[Span, int]], hosts: dict[int, Span], spans: list[Span]) -> None:
    lost = []
    for span, number in wanted.values():
        host = hosts.get(number) if number else None
        if host is not None and not _is_under(host, span):
            span.parent = host
            host.children.append(span)
        elif span.kind != "http":
            lost.append(span)
    holders = [span for span in spans if _holds_others(span)]
    # Outer ones first: then whoever takes in another has its own place already.
    for span in sorted(lost, key=_order):
        host = _best_host(span, holders)
        if host is not None:
            span.parent = host
            host.children.append(span)


def _gather_attempts(spans: list[Span]) -> None:
    """Put what was done during a run of the script into that run: it is noted as done for the sequence."""
    for attempt in spans:
        host = attempt.parent
        if attempt.name != "attempt" or attempt.kind != "phase" or host is None:
            continue
        inside = [span for span in host.children if span.name not in ("attempt", "wait") and _encloses(attempt, span)]
        inside = [span for span in inside if span.kind != "bus" and not _is_under(attempt, span)]
        for span in inside:
            span.parent = attempt
        attempt.children += inside
        host.children = [span for span in host.children if span.parent is host]


def _is_under(span: Span | None, other: Span) -> bool:
    """Return whether a span is another, or below it. Records that are wrong could tell of a circle."""
    while span is not None:
        if span is other:
            return True
        span = span.parent
    return False


def _holds_others(span: Span) -> bool:
    if span.kind in ("http", "serve"):
        return True
    if span.kind == "call":
        return not span.is_tell and not any(child.kind == "serve" for child in span.children)
    return span.kind == "phase" and not span.category


def _best_host(span: Span, holders: list[Span]) -> Span | None:
    """Return the smallest span that a lost one could have been done for."""
    is_call = span.kind == "call"
    who = span.source if is_call else span.actor
    best, best_rank = None, (0, 0.0)
    for host in holders:
        if not _encloses(host, span) or _is_under(host, span):
            continue
        # Of a call whose asking side is lost, the asking node is known.
        fits = host.actor == who if who else is_call and host.kind != "http" and host.node == span.node
        if not fits and host.kind != "http":
            continue
        rank = (fits + 2 * (host.request_id == span.request_id), -_length(host))
        if best is None or rank > best_rank:
            best, best_rank = host, rank
    return best


def _encloses(host: Span, span: Span) -> bool:
    if host is span or host.begin > span.begin:
        return False
    if host.end is None:
        return True
    return host.end >= span.begin if span.end is None else host.end >= span.end


def _length(span: Span) -> float:
    return float("inf") if span.end is None else span.seconds


# ---- the whole ---------------------------------------------------------------------------------------------------


def _error(http: Span | None, generates: list[Span], whole: list[Span]) -> str:
    status = http.facts.get("status") if http else None
    is_good = isinstance(status, int) and status < 400
    candidates = whole if is_good else [*whole, *generates]
    error = next((span.error for span in candidates if span.error), "")
    return error or ("" if is_good or status is None else f"HTTP status {status}")


def _outermost(spans: list[Span]) -> list[Span]:
    """Return those inside of no other: what is done by a router that a script hands a request to is inside."""
    inner = set(map(id, spans))
    return [span for span in spans if not any(id(above) in inner for above in _above(span))]


def _above(span: Span) -> Iterator[Span]:
    while (parent := span.parent) is not None:
        yield parent
        span = parent


def _summary(request_id: str, spans: list[Span], events: list[Event]) -> Story:
    roots = [span for span in spans if span.parent is None]
    http = next((span for span in spans if span.kind == "http"), None)
    calls = [span for span in spans if span.kind == "call" and not span.is_tell]
    generates = _outermost([span for span in calls if span.name == "generate"])
    is_under_way = any(span.end is None for span in generates)
    whole = [http] if http else generates if generates and not is_under_way else roots
    begin = min(span.begin for span in whole)
    ends = [span.end for span in whole]
    end = None if None in ends else max(each for each in ends if each is not None)
    # A body that is sent whole does not say when its first token was there.
    streams = whole if http is None or http.facts.get("stream", True) else generates
    first = [span.first for span in streams if span.first] or [span.first for span in generates if span.first]
    attempts = _outermost([span for span in spans if span.name == "attempt"])
    facts: dict[str, Any] = {}
    notes: dict[str, str] = {}
    for attempt in attempts:
        facts |= attempt.facts
        notes |= {name[4:]: str(value) for name, value in attempt.facts.items() if name.startswith("why.")}
    told: dict[str, Any] = {}
    for span in [*generates, *([http] if http else [])]:
        told |= span.facts
    prompts = [told.get(name) for name in ("num_prompt_tokens", "num_tokens")]
    streamed = generates or [span for span in calls if span.name == "start_generate"]
    counted = [span.num_items for span in streamed if span.end is not None]
    anchor = min(events, key=lambda event: event.time)
    return Story(
        request_id=request_id,
        roots=roots,
        spans=spans,
        begin=begin,
        end=end,
        error=_error(http, generates, whole),
        ttft_s=min(first) - begin if first else None,
        jct_s=None if end is None else end - begin,
        num_prompt_tokens=next((each for each in prompts if isinstance(each, int)), None),
        num_tokens=sum(counted) if counted else None,
        script=attempts[-1].facts.get("script", "") if attempts else "",
        version=str(facts.get("version", "")),
        notes=notes,
        clock_error_s=max(event.error_s for event in events),
        sub_requests=sorted((span for span in calls if span.name in VERBS), key=_sibling_order),
        last=max(event.time for event in events),
        model=str(told.get("model", "")),
        options=str(facts.get("options", "")),
        wall=anchor.wall - (anchor.time - begin) if anchor.wall else 0.0,
    )
