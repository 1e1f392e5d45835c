"""How far is the bus from raw ZeroMQ, and from what people would use instead?

Every side has a server and a client, each in a process of its own: clients stay on one core, servers on another (a
broker on the cores that are left, or on both). All asyncio sides run uvloop at both ends, reuse their connections,
log nothing, carry the same 280 characters in a message (about 300 bytes with its envelope), and are measured by the
same loops (``_bus_load.py``); each side's file in ``_bus_peers`` says what it does and why that is its best. Every
latency has two wake-ups of another core in it, as between processes that work at the same time.

Rounds alternate: in each, every measure is taken of all sides one after the other, and a ratio is of the same
measure in the same round. Goals are medians of these ratios, with their range. Events come from 64 streams: in
``steps`` every stream gets one in each pass of the server's loop, as the steps of an engine give them; in ``free``
producers run freely, and give way after every 8 events, as polite coroutines do (floor and limit have nobody to give
way to). CPU is of all processes of a side, kernel and threads included.
"""

import contextlib
import os
import signal
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from _bus_load import STREAMS as NUM_STREAMS
from _bus_load import Measured, Order
from _bus_results import (
    COROUTINES,
    FASTAPI,
    FLOOR,
    GRPC,
    GRPC_BATCHED,
    GRPC_ONE,
    LIMIT,
    NATS,
    PLAIN,
    RAW,
    STREAMS,
    goals,
    rate,
    rows,
)
from _bus_sides import Side, cores, start_all, what_lacks
from _report import arguments, report
from rich.console import Console
from rich.progress import Progress

SIDES = ("floor", "limit", "callboard", "grpc", "fastapi", "nats")
BUSY_LOAD = 0.5
WARM_UP_S = 0.2
WARM_UP_EVENTS = 200
"""Events of each stream."""


@dataclass
class Measure:
    """One thing measured of one side, and what it gave in each round."""

    side: str
    row: str
    name: str
    """Only measures of the same name are compared."""
    kind: str = ""
    """The side's own word for how it does it."""
    count: int = WARM_UP_EVENTS
    rounds: list[Measured] = field(default_factory=list)

    def take(self, side: Side, seconds: float) -> Measured:
        measure = {"tokens": "latency", "steps": "events", "free": "events"}.get(self.name, self.name)
        return side.measure(Order(measure, self.kind, seconds, self.count))

    def warm_up(self, side: Side, seconds: float) -> None:
        """Measure unseen, and learn how many events fill the time."""
        self.count = max(1, int(rate(self.take(side, min(seconds, WARM_UP_S))) * seconds / NUM_STREAMS))


def measures() -> list[Measure]:
    """Return all there is to measure, those that are compared close together."""
    return [
        Measure("floor", FLOOR, "tokens", "tokens"),
        Measure("floor", FLOOR, "latency"),
        Measure("callboard", PLAIN, "latency", "plain"),
        Measure("callboard", PLAIN, "tokens", "tokens"),
        Measure("callboard", COROUTINES, "latency", "coroutine"),
        Measure("grpc", GRPC, "latency"),
        Measure("fastapi", FASTAPI, "latency"),
        Measure("nats", NATS, "latency"),
        Measure("limit", LIMIT, "requests"),
        Measure("floor", FLOOR, "requests"),
        Measure("callboard", PLAIN, "requests", "plain"),
        Measure("callboard", COROUTINES, "requests", "coroutine"),
        Measure("grpc", GRPC, "requests"),
        Measure("fastapi", FASTAPI, "requests"),
        Measure("nats", NATS, "requests"),
        Measure("limit", RAW, "free", "raw"),
        Measure("floor", FLOOR, "free"),
        Measure("limit", LIMIT, "free"),
        Measure("callboard", STREAMS, "free", "free"),
        Measure("grpc", GRPC, "free", "free"),
        Measure("grpc", GRPC_BATCHED, "free", "batched free"),
        Measure("grpc", GRPC_ONE, "free", "one free"),
        Measure("fastapi", FASTAPI, "free", "free"),
        Measure("nats", NATS, "free", "free"),
        Measure("callboard", STREAMS, "steps", "steps"),
        Measure("grpc", GRPC, "steps", "steps"),
        Measure("grpc", GRPC_BATCHED, "steps", "batched steps"),
        Measure("grpc", GRPC_ONE, "steps", "one steps"),
        Measure("fastapi", FASTAPI, "steps", "steps"),
        Measure("nats", NATS, "steps", "steps"),
    ]


def run(sides: dict[str, Side], rounds: int, seconds: float, console: Console) -> list[Measure]:
    """Warm everything up, then take every measure in every round, in turn forwards and backwards."""
    taken = [measure for measure in measures() if measure.side in sides]
    # Drawn between measures only: a thread that draws would take time from what is measured.
    with Progress(console=console, transient=True, auto_refresh=False) as progress:
        task = progress.add_task("", total=(rounds + 1) * len(taken))
        for number in range(rounds + 1):
            where = f"round {number} of {rounds}" if number else "warm-up"
            if not console.is_terminal:
                console.print(where)
            for measure in taken if number % 2 == 0 else reversed(taken):
                progress.update(task, description=f"{where}: {measure.row}, {measure.name}", refresh=True)
                if number == 0:
                    measure.warm_up(sides[measure.side], seconds)
                else:
                    measure.rounds.append(measure.take(sides[measure.side], seconds))
                progress.advance(task)
    return taken


def main() -> None:
    options = arguments(
        __doc__ or "",
        rounds={"type": int, "default": 15, "help": "rounds of all sides (15)"},
        seconds={"type": float, "default": 0.5, "help": "the length of one measure (0.5)"},
        sides={"default": ",".join(SIDES), "help": f"which sides to run ({','.join(SIDES)})"},
        unpinned={"action": "store_true", "help": "leave all processes to the system's scheduler"},
    )
    rounds, seconds = (3, 0.2) if options.quick else (options.rounds, options.seconds)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # What is up is ended on the way out.
    console = Console(stderr=True)
    wanted = options.sides.split(",")
    if unknown := set(wanted) - set(SIDES):
        sys.exit(f"there is no side {', '.join(sorted(unknown))}: the sides are {', '.join(SIDES)}")
    for name in wanted:
        if lacks := what_lacks(name):
            console.print(f"{name} is left out: {lacks}")
    where = cores(is_pinned=not options.unpinned)
    console.print(f"{where}; {rounds} rounds, {seconds} s a measure")
    if (load := os.getloadavg()[0]) > BUSY_LOAD:
        console.print(f"this machine is busy (load {load:.1f}): sides that need more processor time lose more by it")
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        sides = start_all([name for name in wanted if not what_lacks(name)], Path(folder), where, stack)
        taken = run(sides, rounds, seconds, console)
    rounds_of = {(measure.row, measure.name): measure.rounds for measure in taken}
    report("bus", rows(rounds_of), goals(rounds_of), options.json)


if __name__ == "__main__":
    main()
