"""What records must be like when all is quiet: every call that began has ended, once, and phases follow each other."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import pairwise

from callboard.bus import TapRecord
from callboard.bus.taps import ANSWERED, ENDED, RECEIVED, SENT, SPAN

from .world import World

TELLS = ("Finish", "Give", "Seal")
PHASES = ("compute", "decode", "paused", "prefill", "queue")
CLOSE_S = 1e-9
"""Sums of floats are not exact."""


def not_whole(world: World) -> Iterator[str]:
    """Yield what is wrong with the records of requests, at every node that is up."""
    for machine in world.machines.values():
        if machine.node is None:
            continue
        trace = machine.node.trace
        kept = {request_id: [TapRecord(*row) for row in trace.of(request_id)] for request_id in trace.request_ids()}
        if sum(map(len, kept.values())) < trace.num_made:
            continue  # It has forgotten some.
        for request_id, records in kept.items():
            for problem in (*_calls(records), *_phases(records)):
                yield f"records: {machine.name}, {request_id}: {problem}"


def _calls(records: list[TapRecord]) -> Iterator[str]:
    calls: dict[int, list[TapRecord]] = defaultdict(list)
    for record in records:
        if record.what != SPAN:
            calls[record.span].append(record)
    for of_call in calls.values():
        count, name = Counter(record.what for record in of_call), of_call[0].name
        if count[SENT] > 1 or count[RECEIVED] > 1:
            yield f"{name} was sent {count[SENT]} times and received {count[RECEIVED]} times"
        if name not in TELLS and (count[ENDED] != count[SENT] or count[ANSWERED] != count[RECEIVED]):
            yield f"{name} was sent {count[SENT]}, ended {count[ENDED]} times, " + (
                f"received {count[RECEIVED]}, answered {count[ANSWERED]} times"
            )


def _phases(records: list[TapRecord]) -> Iterator[str]:
    phases: dict[int, list[TapRecord]] = defaultdict(list)
    for record in records:
        if record.what == SPAN:
            if record.time < record.begin:
                yield f"{record.name} ended {record.begin - record.time} s before it began"
            if record.name in PHASES:
                phases[record.parent].append(record)
    for of_call in phases.values():
        of_call.sort(key=lambda record: (record.begin, record.time))
        for before, after in pairwise(of_call):
            if after.begin < before.time - CLOSE_S:
                yield f"{after.name} began {before.time - after.begin} s before the end of {before.name}"
