"""Requests as Chrome trace events, for Perfetto and chrome://tracing: who did what when, and arrows for messages.

A process a node, a thread an actor. Slices of a thread must nest, and an actor does many things at once: what does
not fit goes to further threads of the actor (``decode #2``). The
format: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

import importlib.metadata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, BinaryIO

import msgspec

from callboard.actors.protocol import Entry

from .cast import asker, cast_of
from .story import Span, Story

TICKS_PER_S = 8_000_000
"""Times are whole eighths of a microsecond: as floats of microseconds and as nanoseconds they are exact, so that what
nests in one unit nests in the other."""
FIRST_TID = 1001
"""Above all process ids: a thread with its process's id would be taken for the main one."""

Event = dict[str, Any]
Track = tuple[str, str]
"""A node, and an actor in it."""


@dataclass(slots=True, eq=False)
class _Slice:
    span: Span
    parent: "_Slice | None"
    track: Track
    name: str
    begin: int
    end: int
    story: int
    is_open: bool
    enter: int = 0
    """The place of its begin among all events, where times are equal; ``leave``: of its end."""
    leave: int = 0
    lane: int = 0


def write(stories: Sequence[Story], file: BinaryIO, *, entries: Sequence[Entry] = (), fleet: str = "") -> None:
    """Write the requests as one JSON object, an event a line."""
    encode = msgspec.json.Encoder().encode
    head = {"displayTimeUnit": "ms", "otherData": _about(stories, fleet)}
    file.write(encode(head)[:-1] + b',\n"traceEvents": [\n')
    separator = b""
    for event in events(stories, entries):
        file.write(separator + encode(event))
        separator = b",\n"
    file.write(b"\n]}\n")


def events(stories: Sequence[Story], entries: Sequence[Entry] = ()) -> Iterator[Event]:
    """Return all events: names first, then what happened in the order of time, in microseconds from the first."""
    slices = _slices(stories)
    _lay_out(slices)
    pids, tids, names = _tracks(slices, stories, entries)
    yield from names
    at: list[tuple[int, int, Event]] = []
    for each in slices:
        where = {"pid": pids[each.track[0]], "tid": tids[each.track, each.lane]}
        begun = {"name": each.name, "cat": each.span.category or each.span.kind, **where, "args": _arguments(each)}
        at.append((each.begin, each.enter, {"ph": "B", "ts": _us(each.begin), **begun}))
        at.append((each.end, each.leave, {"ph": "E", "ts": _us(each.end), "name": each.name, **where}))
    at += _flows(slices, pids, tids)
    at.sort(key=lambda each: each[:2])
    yield from (event for _, _, event in at)


def _us(ticks: int) -> float:
    return ticks * (1e6 / TICKS_PER_S)


def _about(stories: Sequence[Story], fleet: str) -> dict[str, Any]:
    version = importlib.metadata.version("callboard")
    about: dict[str, Any] = {"made_by": f"callboard {version}", "num_requests": len(stories)}
    if fleet:
        about["fleet"] = fleet
    if stories:
        about["clock_error_us"] = max(story.clock_error_s for story in stories) * 1e6
        first = min(stories, key=lambda story: story.begin)
        if first.wall:
            about["begin"] = datetime.fromtimestamp(first.wall, UTC).isoformat()
    return about


# ---- slices ------------------------------------------------------------------------------------------------------


def _slices(stories: Sequence[Story]) -> list[_Slice]:
    zero = min((span.begin for story in stories for span in story.spans), default=0.0)
    slices: list[_Slice] = []
    place = 0

    def enter(span: Span, parent: _Slice | None, number: int, last: float) -> None:
        nonlocal place
        end = span.begin if span.is_tell and span.end is None else last if span.end is None else span.end
        is_open = span.end is None and not span.is_tell
        track = _track(span, parent)
        begin = round((span.begin - zero) * TICKS_PER_S)
        over = max(begin, round((end - zero) * TICKS_PER_S))
        made = _Slice(span, parent, track, _name(span), begin, over, number, is_open, enter=place)
        slices.append(made)
        # Three places: its begin, the flow that arrives in it or leaves from it, and (below) its end.
        place += 2
        for child in span.children:
            enter(child, made, number, last)
        made.leave = place + 1
        place += 2

    for number, story in enumerate(stories):
        for root in story.roots:
            enter(root, None, number, story.last)
    return slices


def _track(span: Span, parent: _Slice | None) -> Track:
    if span.kind == "bus" and parent is not None:
        return parent.track
    return span.node, asker(span)


def _name(span: Span) -> str:
    if span.kind == "http":
        return f"request {span.request_id}"
    if span.kind == "call":
        return f"{span.name} → {span.actor}"
    return span.name


def _arguments(each: _Slice) -> dict[str, Any]:
    span = each.span
    arguments: dict[str, Any] = {"request": span.request_id, **span.facts}
    if span.kind == "call":
        arguments |= {"to": span.actor, "num_bytes": span.num_bytes}
        if span.num_items:
            arguments["num_items"] = span.num_items
    if span.error:
        arguments["error"] = span.error
    if each.is_open:
        arguments["is_open"] = True
    if span.error_s:
        arguments["clock_error_us"] = span.error_s * 1e6
    return arguments


# ---- where they go -----------------------------------------------------------------------------------------------


def _lay_out(slices: Iterable[_Slice]) -> None:
    """Give each slice a lane of its actor on which all slices nest.

    What a request does at an actor in one stretch of time stays together, on lanes that nobody else has meanwhile.
    """
    here: dict[tuple[Track, int], list[_Slice]] = defaultdict(list)
    for each in slices:
        here[each.track, each.story].append(each)
    stretches = [(key[0], stretch) for key, found in here.items() for stretch in _stretches(found)]
    busy_until: dict[Track, list[int]] = defaultdict(list)
    for track, stretch in sorted(stretches, key=lambda item: (item[1][0].begin, item[1][0].story, item[1][0].enter)):
        lanes = busy_until[track]
        free = [lane for lane, end in enumerate(lanes) if end < stretch[0].begin]
        end = max(each.end for each in stretch)
        for lane in range(max(each.lane for each in stretch) + 1):
            if lane == len(free):
                free.append(len(lanes))
                lanes.append(0)
            lanes[free[lane]] = end
        for each in stretch:
            each.lane = free[each.lane]


def _stretches(slices: list[_Slice]) -> Iterator[list[_Slice]]:
    """Split one request's slices at one actor where it did nothing; number the lanes within each stretch."""
    stretch: list[_Slice] = []
    end = 0
    stacks: list[list[_Slice]] = []
    for each in sorted(slices, key=lambda each: (each.begin, each.enter)):
        if stretch and each.begin > end:
            yield stretch
            stretch, stacks = [], []
        wanted = _lane_of_parent(each) if stretch else None
        order = sorted(range(len(stacks)), key=lambda lane: (lane != wanted, lane))
        each.lane = next((lane for lane in order if _fits(each, stacks[lane])), len(stacks))
        if each.lane == len(stacks):
            stacks.append([])
        stacks[each.lane].append(each)
        stretch.append(each)
        end = max(end, each.end)
    if stretch:
        yield stretch


def _lane_of_parent(each: _Slice) -> int | None:
    parent = each.parent
    while parent is not None and parent.track != each.track:
        parent = parent.parent
    return None if parent is None else parent.lane


def _fits(each: _Slice, stack: list[_Slice]) -> bool:
    """Return whether a slice nests on a lane. Drops what is over from the lane's stack."""
    while stack and (stack[-1].end, stack[-1].leave) < (each.begin, each.enter):
        stack.pop()
    if not stack:
        return True
    top = stack[-1]
    return (each.end, each.leave) < (top.end, top.leave) and _is_under(each, top)


def _is_under(each: _Slice | None, other: _Slice) -> bool:
    while each is not None:
        if each is other:
            return True
        each = each.parent
    return False


def _tracks(
    slices: Sequence[_Slice], stories: Sequence[Story], entries: Sequence[Entry]
) -> tuple[dict[str, int], dict[tuple[Track, int], int], list[Event]]:
    """Return the process ids of nodes, the thread ids of tracks and lanes, and the events that name them."""
    kinds = cast_of(stories, entries)
    rank = {actor: index for index, actor in enumerate(kinds)}
    used = sorted({(each.track, each.lane) for each in slices}, key=lambda use: (rank[use[0][1]], use[0], use[1]))
    pids: dict[str, int] = {}
    tids: dict[tuple[Track, int], int] = {}
    names: list[Event] = []
    errors = _clock_errors(slices)
    for track, lane in used:
        node, actor = track
        if node not in pids:
            pid = pids[node] = len(pids) + 1
            labels = kinds[actor].replace("_", " ")
            if errors[node]:
                labels += f", clock ± {errors[node] * 1e6:.0f} µs"
            for name, value in (("name", node), ("sort_index", pid), ("labels", labels)):
                names.append({"ph": "M", "pid": pid, "tid": 0, "name": f"process_{name}", "args": {name: value}})
        tid = tids[track, lane] = FIRST_TID + len(tids)
        title = actor if not lane else f"{actor} #{lane + 1}"
        for name, value in (("name", title), ("sort_index", tid)):
            names.append({"ph": "M", "pid": pids[node], "tid": tid, "name": f"thread_{name}", "args": {name: value}})
    return pids, tids, names


def _clock_errors(slices: Iterable[_Slice]) -> dict[str, float]:
    errors: dict[str, float] = defaultdict(float)
    for each in slices:
        errors[each.track[0]] = max(errors[each.track[0]], each.span.error_s)
    return errors


# ---- arrows ------------------------------------------------------------------------------------------------------


def _flows(
    slices: Sequence[_Slice], pids: dict[str, int], tids: dict[tuple[Track, int], int]
) -> Iterator[tuple[int, int, Event]]:
    """Return an arrow from each message's way to where it is served, and from there to the answer's way."""
    children: dict[int, dict[str, _Slice]] = defaultdict(dict)
    for each in slices:
        if each.parent is not None and each.parent.span.kind == "call" and each.span.kind in ("bus", "serve"):
            children[id(each.parent)][each.span.name if each.span.kind == "bus" else "serve"] = each
    number = 0
    for each in slices:
        ways = children.get(id(each), {})
        serve = ways.get("serve")
        if serve is None:
            continue
        sent = each if each.span.is_tell else ways.get("request")
        for begin, end in ((sent, serve), (serve, ways.get("answer"))):
            if begin is None or end is None:
                continue
            # A flow is bound to the slice that is innermost where it stands: right after a begin, right before an end.
            is_answer = begin is serve
            start = (begin.end, begin.leave - 1) if is_answer else (begin.begin, begin.enter + 1)
            arrival = end.begin, end.enter + 1
            if arrival < start:
                continue  # No clocks explain these records: an arrow would lead back in time.
            number += 1
            flow: Event = {"name": each.span.name, "cat": "answer" if is_answer else "request", "id": number}
            for ph, at, place in (("s", begin, start), ("f", end, arrival)):
                where = {"pid": pids[at.track[0]], "tid": tids[at.track, at.lane]}
                event = {"ph": ph, "ts": _us(place[0]), **flow, **where}
                yield *place, event if ph == "s" else {**event, "bp": "e"}
