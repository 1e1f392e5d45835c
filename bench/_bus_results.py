"""What bench/bus.py makes of its rounds: rows of medians, and goals as ratios within a round."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from _bus_load import Measured
from _report import goal, median

PLAIN, COROUTINES, STREAMS = "Callboard, plain functions", "Callboard, coroutines", "Callboard, streams"
FLOOR, LIMIT, RAW = "floor", "limit", "limit, raw bytes"
GRPC, GRPC_BATCHED, GRPC_ONE = "grpc.aio", "grpc.aio, batched", "grpc.aio, one RPC"
FASTAPI, NATS = "FastAPI + aiohttp", "NATS"
ROWS = (FLOOR, LIMIT, RAW, PLAIN, COROUTINES, STREAMS, GRPC, GRPC_BATCHED, GRPC_ONE, FASTAPI, NATS)

Number = Callable[[Measured], float]


def p50_us(measured: Measured) -> float:
    return 1e6 * float(measured.p50_s)


def p99_us(measured: Measured) -> float:
    return 1e6 * float(measured.p99_s)


def rate(measured: Measured) -> float:
    return float(measured.num_messages / measured.seconds)


def cpu_us(measured: Measured) -> float:
    return 1e6 * float(measured.cpu_s / measured.num_messages)


COLUMNS: dict[str, tuple[str, Number]] = {
    "p50 us": ("latency", p50_us),
    "p99 us": ("latency", p99_us),
    "CPU us alone": ("latency", cpu_us),
    "p50 us 512 ids": ("tokens", p50_us),
    "requests/s": ("requests", rate),
    "CPU us request": ("requests", cpu_us),
    "events/s steps": ("steps", rate),
    "CPU us steps": ("steps", cpu_us),
    "events/s free": ("free", rate),
    "CPU us free": ("free", cpu_us),
}
"""Columns of the table, and the measure each is taken from. CPU is per message; alone is one request in flight."""

Rounds = dict[tuple[str, str], Sequence[Measured]]
"""What was measured in each round, by row and measure."""


def rows(rounds: Rounds) -> list[dict[str, Any]]:
    """Return the medians of all rounds, a row for each side or way of using it."""
    found = []
    for row in ROWS:
        cells: dict[str, Any] = {"side": row}
        for title, (measure, number) in COLUMNS.items():
            if (row, measure) in rounds:
                cells[title] = median([number(each) for each in rounds[row, measure]])
        if len(cells) > 1:
            found.append(cells)
    # The table takes its columns from the first row, in their order.
    titles = [title for title in COLUMNS if any(title in cells for cells in found)]
    return [{"side": cells["side"], **{title: cells.get(title) for title in titles}} for cells in found]


def goals(rounds: Rounds) -> list[dict[str, Any]]:
    """Return the goals whose sides were measured: medians of the ratios within each round."""
    found = []
    for name, number, (over, under), measures, limit in _wanted():
        first, second = measures if isinstance(measures, tuple) else (measures, measures)
        pairs = zip(rounds.get((over, first), ()), rounds.get((under, second), ()), strict=False)
        if ratios := [number(one) / number(other) for one, other in pairs]:
            found.append(goal(name, ratios, limit))
    return found


Wanted = tuple[str, Number, tuple[str, str], str | tuple[str, str], str]
"""A goal's name, its number, the rows and the measures (or one for both) that are divided, and what it should be."""


def _wanted() -> Iterator[Wanted]:
    for row, p50, requests in ((PLAIN, "<= 1.3", ">= 1.5"), (COROUTINES, "<= 1.5", ">= 1.0")):
        yield f"{row}: p50 over {FLOOR}", p50_us, (row, FLOOR), "latency", p50
        yield f"{row}: requests/s over {FLOOR}", rate, (row, FLOOR), "requests", requests
    # Floor and limit never give way to anybody: what runs freely is what compares.
    yield f"events/s over {FLOOR}", rate, (STREAMS, FLOOR), "free", ">= 5.0"
    yield f"events/s over {LIMIT}", rate, (STREAMS, LIMIT), "free", ">= 0.7"
    yield "p50 of 512 token ids over that of 300 bytes", p50_us, (PLAIN, PLAIN), ("tokens", "latency"), "<= 1.15"
    for peer, p50, requests, events in ((GRPC, ">= 3.5", ">= 16.0", ">= 30.0"), (NATS, ">= 1.3", ">= 3.0", ">= 20.0")):
        for row in (COROUTINES, PLAIN):
            yield f"{peer} over {row}: p50", p50_us, (peer, row), "latency", p50
            yield f"{row} over {peer}: requests/s", rate, (row, peer), "requests", requests
        for kind in ("free", "steps"):
            yield f"events/s ({kind}) over {peer}", rate, (STREAMS, peer), kind, events
    for peer in (GRPC_BATCHED, GRPC_ONE):
        for kind in ("free", "steps"):
            yield f"events/s ({kind}) over {peer}", rate, (STREAMS, peer), kind, ">= 3.0"
