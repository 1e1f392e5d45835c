"""No effect is shown before its cause: the clocks of hosts are shifted, within what is not known of them.

A message is received after it was sent, and an ask's end is known after it was answered. Each such pair bounds how far
two clocks can be apart; together with the error of each they are difference constraints, and shortest paths
(Bellman-Ford) tell how far each clock may be shifted. The best known clocks are settled first, as near to where they
are as possible. What no constant shift explains (clocks drift; an error was too small) is clamped: an effect moves to
its cause, and takes along what would then be out of order on its node. What one clock alone contradicts is no matter
of clocks: a process was held up between telling and noting it.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

from callboard.bus.taps import ANSWERED, ENDED, RECEIVED, SENT

from .event import Event

Point = tuple[str, float]
"""A node, and a time on its (aligned) clock."""
Bounds = dict[tuple[str, str], float]
"""For (a, b): how much further than b a may be shifted, at most."""
TINY_S = 1e-9
"""Rounding: seconds since a machine's start have about this resolution."""


def in_order(events: list[Event]) -> list[Event]:
    """Return the records of a request with their nodes' clocks shifted until causes come first."""
    events = _noted_late(events)
    errors = {event.node: 0.0 for event in events}
    for event in events:
        errors[event.node] = max(errors[event.node], event.error_s)
    pairs = [pair for pair in causes(events) if errors[pair[0][0]] or errors[pair[1][0]]]
    if all(cause[1] <= effect[1] for cause, effect in pairs):
        return events
    shifts = shifts_of(pairs, errors, clocks_of(events))
    pairs = [((a, s + shifts[a]), (b, r + shifts[b])) for (a, s), (b, r) in pairs]
    moved = clamped(pairs, [(event.node, time + shifts[event.node]) for event in events for time in _times(event)])

    def at(node: str, time: float) -> float:
        if not time:
            return 0.0
        point = node, time + shifts[node]
        return moved.get(point, point[1])

    return [_moved(event, at(event.node, event.time), at(event.node, event.begin)) for event in events]


def _noted_late(events: list[Event]) -> list[Event]:
    """Return the records, those of answers no later than their callers heard of them on the very same clock."""
    heard = {
        event.record.span: event.time
        for event in events
        if event.record.what == ENDED and not event.error_s and is_told(event)
    }
    late = [
        event.record.what == ANSWERED and not event.error_s and event.time > heard.get(event.record.span, event.time)
        for event in events
    ]
    if not any(late):
        return events
    return [
        _moved(event, max(event.begin, heard[event.record.span]), event.begin) if is_late else event
        for event, is_late in zip(events, late, strict=True)
    ]


def causes(events: Sequence[Event]) -> list[tuple[Point, Point]]:
    """Return what came before what: each message's sending and receipt, each answer's sending and receipt."""
    known: dict[int, dict[int, Event]] = defaultdict(dict)
    for event in events:
        if event.record.what in (SENT, RECEIVED, ANSWERED, ENDED):
            known[event.record.span].setdefault(event.record.what, event)
    pairs: list[tuple[Point, Point]] = []
    for call in known.values():
        sent, received, answered, ended = (call.get(what) for what in (SENT, RECEIVED, ANSWERED, ENDED))
        sent_at = (sent.node, sent.time) if sent else (ended.node, ended.begin) if ended else None
        if sent_at and received:
            pairs.append((sent_at, (received.node, received.time)))
        elif sent_at and answered:
            pairs.append((sent_at, (answered.node, answered.begin)))
        if answered and ended and is_told(ended):
            pairs.append(((answered.node, answered.time), (ended.node, ended.time)))
    return [(cause, effect) for cause, effect in pairs if cause[1] and effect[1]]


def is_told(ended: Event) -> bool:
    """Return whether who asked heard of the end from who served: not when it left, or waited no longer."""
    error = ended.record.error
    return not error.startswith(("cancelled", "AskTimeout", "LinkLost", "ActorDied"))


def clocks_of(events: Sequence[Event]) -> dict[str, str]:
    """Return for each node the one that stands for its clock: nodes of one host were aligned by one offset."""
    found: dict[tuple[float, float], str] = {}
    clocks: dict[str, str] = {}
    for event in events:
        if event.node not in clocks:
            key = round(event.time - event.record.time, 7), event.error_s
            clocks[event.node] = found.setdefault(key, event.node)
    return clocks


def shifts_of(
    pairs: Sequence[tuple[Point, Point]], errors: Mapping[str, float], clocks: Mapping[str, str]
) -> dict[str, float]:
    """Return by how much to shift each node, within its error, so that no effect comes before its cause.

    Nodes of one clock are shifted together, unless that cannot be. Where no shifts can be, those which leave the
    least to clamp.
    """
    groups = [dict(clocks), {node: node for node in errors}]
    for group in groups:
        bounds = _bounds(pairs, group)
        limits = {clock: min(errors[node] for node in errors if group[node] == clock) for clock in group.values()}
        if all(bounds.get((clock, clock), 0.0) >= -TINY_S for clock in limits):
            shifts = _least(bounds, limits)
            if shifts is not None:
                return {node: shifts[group[node]] for node in errors}
    return _least_bad(_bounds(pairs, groups[0]), {clock: errors[clock] for clock in groups[0].values()}, groups[0])


def _bounds(pairs: Sequence[tuple[Point, Point]], clocks: Mapping[str, str]) -> Bounds:
    bounds: Bounds = {}
    for (a, cause), (b, effect) in pairs:
        key = clocks[a], clocks[b]
        bounds[key] = min(bounds.get(key, float("inf")), effect - cause)
    return bounds


def _least(bounds: Bounds, limits: Mapping[str, float]) -> dict[str, float] | None:
    """Return small shifts that keep all bounds and limits, or None where there are none."""
    limits = dict(limits)
    span = {clock: (-limit, limit) for clock, limit in limits.items()}
    shifts: dict[str, float] = {}
    for clock in sorted(limits, key=lambda clock: (limits[clock], clock)):
        reach = _reach(bounds, span)
        if reach is None:
            return None
        low, high = reach[clock]
        shifts[clock] = min(max(0.0, low), high)
        span[clock] = shifts[clock], shifts[clock]
    return shifts


def _reach(bounds: Bounds, span: Mapping[str, tuple[float, float]]) -> dict[str, tuple[float, float]] | None:
    """Return the least and the greatest shift of each clock that all others allow; None where there is none."""
    low = {clock: each[0] for clock, each in span.items()}
    high = {clock: each[1] for clock, each in span.items()}
    edges = [(a, b, bound) for (a, b), bound in bounds.items() if a != b]
    for _ in range(len(span) + 1):
        is_settled = True
        for a, b, bound in edges:
            if high[b] + bound < high[a] - TINY_S:
                high[a], is_settled = high[b] + bound, False
            if low[a] - bound > low[b] + TINY_S:
                low[b], is_settled = low[a] - bound, False
        if is_settled:
            break
    else:
        return None
    # A rounding error is no contradiction.
    if any(low[clock] > high[clock] + TINY_S * (len(span) + 1) for clock in span):
        return None
    return {clock: (min(low[clock], high[clock]), high[clock]) for clock in span}


def _least_bad(bounds: Bounds, limits: Mapping[str, float], clocks: Mapping[str, str]) -> dict[str, float]:
    """Return the shifts with which the worst effect comes as little before its cause as can be."""
    between = {key: bound for key, bound in bounds.items() if key[0] != key[1]}
    worst = max((-bound for bound in between.values()), default=0.0)
    enough, best = max(worst, 0.0), dict.fromkeys(limits, 0.0)
    too_little = 0.0
    for _ in range(40):
        slack = (enough + too_little) / 2
        shifts = _least({key: bound + slack for key, bound in between.items()}, limits)
        if shifts is None:
            too_little = slack
        else:
            enough, best = slack, shifts
    return {node: best[clock] for node, clock in clocks.items()}


# ---- what is left ------------------------------------------------------------------------------------------------


def clamped(pairs: Sequence[tuple[Point, Point]], points: Sequence[Point]) -> dict[Point, float]:
    """Return the times of those points that must move: effects to their causes, and what follows them on their node.

    Times only grow, as little as they can, and their order on each node stays.
    """
    if all(cause[1] <= effect[1] for cause, effect in pairs):
        return {}
    nodes: dict[str, list[float]] = defaultdict(list)
    for node, time in {*points, *(point for pair in pairs for point in pair)}:
        nodes[node].append(time)
    follows: dict[Point, list[Point]] = defaultdict(list)
    num_before: dict[Point, int] = {(node, time): 0 for node, times in nodes.items() for time in times}
    before_on_node = [((node, a), (node, b)) for node, times in nodes.items() for a, b in pairwise(sorted(times))]
    # What is inside out on one clock is no matter of clocks.
    for cause, effect in [*before_on_node, *(pair for pair in pairs if pair[0][0] != pair[1][0])]:
        follows[cause].append(effect)
        num_before[effect] += 1
    moved = {point: point[1] for point in num_before}
    ready = [point for point, number in num_before.items() if not number]
    while ready:  # Points on a circle (records that are wrong) are never ready, and stay.
        point = ready.pop()
        for effect in follows[point]:
            moved[effect] = max(moved[effect], moved[point])
            num_before[effect] -= 1
            if not num_before[effect]:
                ready.append(effect)
    return {point: time for point, time in moved.items() if time != point[1]}


def _times(event: Event) -> list[float]:
    return [time for time in (event.time, event.begin) if time]


def _moved(event: Event, time: float, begin: float) -> Event:
    if time == event.time and begin == event.begin:
        return event
    shift = time - event.time
    return replace(
        event,
        time=time,
        begin=begin,
        first=min(max(event.first + shift, begin), time) if event.first else 0.0,
        wall=event.wall + shift if event.wall else 0.0,
    )
