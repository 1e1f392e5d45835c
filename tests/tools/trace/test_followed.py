"""How far a node has been read: whatever breaks and whatever is lost, each record is told once or counted as lost."""

import random

import msgspec
import pytest

from callboard.actors.trace_protocol import TRACER, Moment, Records
from callboard.bus import Address
from callboard.bus.taps import NO_BODY, NO_FACTS, SPAN, Row, TapRecord, Trace
from callboard.tools.trace.followed import Followed

AT_ONCE = 20


class Side:
    """A node with a small ring, what waits there for its follower, and the follower's end of it."""

    def __init__(self, rng: random.Random, *, with_past: bool) -> None:
        self.rng, self.with_past = rng, with_past
        self.trace = Trace(keep=rng.randrange(1, 12))
        self.followed = Followed(Address("n", "ipc:///n", TRACER))
        self.waiting: list[Row] = []
        self.past: list[list[Row]] = []
        self.num_waiting_lost = self.num_made = self.num_lost = self.num_before = 0
        self.told: list[int] = []
        self.is_attached = False

    def make(self) -> None:
        self.num_made += 1
        request_id = f"r{self.num_made // self.rng.randrange(1, 20)}"
        time = float(self.num_made)
        row = (SPAN, time, time, "a", "", "", "work", request_id, self.num_made, 0, 0, 0, 0.0, "", NO_FACTS, NO_BODY)
        self.trace.add(row)
        if self.is_attached and len(self.waiting) < 30:
            self.waiting.append(row)
        elif self.is_attached:
            self.num_waiting_lost += 1

    def attach(self) -> None:
        asks_past = self.with_past or bool(self.followed.attached_to)
        moment = Moment(self.num_made + 0.5, 0.0, "host", "incarnation")
        self.followed.begin(moment, with_past=asks_past)
        rows = [row for each in self.trace.request_ids() for row in self.trace.of(each)] if asks_past else []
        self.num_before = self.trace.num_made - len(rows)
        self.past = [rows[begin : begin + AT_ONCE] for begin in range(0, len(rows) or 1, AT_ONCE)]
        self.waiting, self.num_waiting_lost, self.is_attached = [], 0, True

    def deliver(self) -> None:
        if self.past:
            rows, lost, is_past = self.past.pop(0), 0, True
        else:
            if self.followed.is_in_past:
                self.num_lost += self.followed.end_past()
            rows, self.waiting = self.waiting[:AT_ONCE], self.waiting[AT_ONCE:]
            lost, is_past = (0 if self.waiting else self.num_waiting_lost), False
            self.num_waiting_lost -= lost
        self.followed.attached_to = self.followed.incarnation
        records = tuple(msgspec.convert(row, TapRecord) for row in rows)
        batch = Records(records, is_past, lost, 0, self.num_before if is_past else 0)
        self.told += [record.span for record in self.followed.take(batch)]
        self.num_lost += self.followed.num_lost
        self.followed.num_lost = 0


@pytest.mark.parametrize("with_past", [True, False])
def test_each_record_is_told_once_or_counted_as_lost(with_past: bool) -> None:
    for seed in range(300):
        rng = random.Random(seed)
        side = Side(rng, with_past=with_past)
        for _ in range(rng.randrange(20)):
            side.make()
        num_early = side.num_made if not with_past else side.trace.num_made - len(ring(side))
        side.attach()
        while side.past or side.followed.is_in_past:  # What is lost before all of the past was told, nobody can count.
            side.deliver()
        has_lost = False
        for _ in range(rng.randrange(400)):
            if rng.random() < 0.7:
                side.make()
            elif rng.random() < 0.85:
                side.deliver()
                has_lost = has_lost or side.num_lost > 0
            elif side.followed.attached_to:
                side.attach()  # The link broke: what was under way is gone.
        side.attach()
        while side.past or side.waiting or side.followed.is_in_past:
            side.deliver()
        assert len(side.told) == len(set(side.told)), seed
        num_told = len([span for span in side.told if span > num_early or with_past])
        if not has_lost:
            assert num_told + side.num_lost == side.num_made - num_early, seed
        else:  # Some that a node had dropped for us were still in its ring: told after all.
            assert num_told + side.num_lost >= side.num_made - num_early, seed


def ring(side: Side) -> list[Row]:
    return [row for each in side.trace.request_ids() for row in side.trace.of(each)]


def test_another_process_of_that_name_is_told_from_its_begin() -> None:
    side = Side(random.Random(1), with_past=True)
    side.attach()
    for _ in range(5):
        side.make()
    while side.past or side.waiting:
        side.deliver()
    before = list(side.told)
    side.followed.begin(Moment(0.0, 0.0, "host", "another"), with_past=True)
    again = tuple(msgspec.convert(row, TapRecord) for row in ring(side))
    assert [record.span for record in side.followed.take(Records(again, True))] == [row[8] for row in ring(side)]
    assert side.followed.end_past() == 0
    assert before
