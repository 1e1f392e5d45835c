"""Clocks of other hosts: how far off they are is measured, and what is claimed of it is true."""

import asyncio
import random
from pathlib import Path

import pytest
from following import make_record, place, watching

from callboard.actors.actor import start_actor, stop_actor
from callboard.actors.trace_protocol import TRACER
from callboard.actors.tracer import Tracer
from callboard.bus import Clock, Node
from callboard.tools.trace.clocks import NodeClock, Sample, measure
from callboard.tools.trace.past import collect

DRIFT = 80e-6


class SkewedClock(Clock):
    """A clock that was set at another time, and runs too fast."""

    def __init__(self, ahead_s: float, drift: float = 0.0) -> None:
        self.ahead_s, self.drift = ahead_s, drift
        self.began = super().now()

    def now(self) -> float:
        real = super().now()
        return real + self.ahead_s + (real - self.began) * self.drift


def test_the_true_offset_lies_within_the_error_however_clocks_drift_and_networks_dawdle() -> None:
    for seed in range(200):
        rng = random.Random(seed)
        ahead, drift = rng.uniform(-1e5, 1e5), rng.uniform(-100e-6, 100e-6)
        clock, now = NodeClock("here"), 1000.0
        for _ in range(rng.randrange(1, 40)):
            now += rng.uniform(0.1, 30)
            samples = []
            for _ in range(rng.randrange(1, 6)):
                asked, forth, back = now, rng.expovariate(1000), rng.expovariate(1000)
                said = asked + forth - ahead + (asked + forth) * drift
                now = asked + forth + back
                samples.append(Sample(asked, now, said))
            clock.take(samples, "there")
            for at in (now, now + rng.uniform(0, 100), max(1.0, now - rng.uniform(0, 500))):
                offset = clock.offset(at)
                assert abs(offset.seconds - (ahead - at * drift)) <= offset.error_s + 1e-9


def test_several_answers_bound_the_offset_closer_than_the_best_of_them() -> None:
    clock = NodeClock("here")
    clock.take([Sample(10.0, 10.010, 110.009)], "there")
    clock.take([Sample(10.1, 10.110, 110.101)], "there")
    assert clock.offset(10.1).error_s < 0.0015 < Sample(10.0, 10.010, 0).error_s


def test_a_clock_that_was_set_is_believed_anew() -> None:
    clock = NodeClock("here")
    clock.take([Sample(10.0, 10.001, 10.0)], "there")
    clock.take([Sample(20.0, 20.001, 50.0)], "there")
    offset = clock.offset(20.0)
    assert offset.seconds == pytest.approx(-30.0, abs=0.01)
    assert offset.error_s < 0.01


def test_the_same_host_has_the_same_clock_and_no_error() -> None:
    clock = NodeClock("here")
    clock.take([Sample(10.0, 10.002, 10.0015)], "here")
    assert (clock.offset(500.0).seconds, clock.offset(500.0).error_s) == (0.0, 0.0)


@pytest.mark.parametrize("ahead_s", [0.0, -86_400.0, 37.5, 0.05])
async def test_the_clock_of_a_node_is_measured_over_a_real_link(tmp_path: Path, ahead_s: float) -> None:
    theirs = SkewedClock(ahead_s, DRIFT if ahead_s else 0.0)
    async with Node("far", endpoint=f"ipc://{tmp_path}/far.sock", clock=theirs) as far, Node("near") as near:
        tracer = Tracer()
        await start_actor(far, TRACER, tracer)
        clock = NodeClock()
        for _ in range(3):
            moment = await measure(near, far.address_of(TRACER), clock)
            offset = clock.offset(near.clock.now())
            truth = near.clock.now() - theirs.now()
            assert abs(offset.seconds - truth) <= offset.error_s + 1e-4
            assert offset.error_s < 0.05
        assert moment.incarnation == far.incarnation
        assert clock.is_shared == (ahead_s == 0.0)
        await stop_actor(tracer)


async def test_what_nodes_with_other_clocks_remember_is_told_in_the_order_it_happened(tmp_path: Path) -> None:
    async with place(tmp_path) as made, Node("near", fleet="test") as near:
        nodes = [made.nodes["one"]]
        for name, ahead_s in (("two", -5000.0), ("three", 5000.0)):
            nodes.append(await made.start(name, clock=SkewedClock(ahead_s, DRIFT)))
        for step in range(30):
            make_record(nodes[step % 3], "r", step)
            await near.clock.sleep(0.01)
        past = await collect(near, made.directory)
        assert not past.missing
        assert [event.record.span for event in past.events] == list(range(30))
        assert {event.node: event.error_s > 0 for event in past.events} == {"one": False, "two": True, "three": True}
        assert all(abs(event.time - near.clock.now()) < 5 for event in past.events)


async def test_what_happens_on_nodes_with_other_clocks_is_told_in_order_and_with_its_error(tmp_path: Path) -> None:
    async with place(tmp_path) as made:
        nodes = [made.nodes["one"]]
        for name, ahead_s in (("two", -5000.0), ("three", 5000.0)):
            nodes.append(await made.start(name, clock=SkewedClock(ahead_s, DRIFT)))
        async with watching(made) as watcher:
            assert "; clocks of other hosts are known to" in watcher.notices[-1].text
            for step in range(30):
                make_record(nodes[step % 3], "r", step)
                await asyncio.sleep(0.01)
            await watcher.until(lambda each: len(each.events) == 30)
            assert [event.record.span for event in watcher.events] == list(range(30))
            now = nodes[0].clock.now()
            for event in watcher.events:
                assert now - 30 < event.time < now
                assert (event.error_s > 0) == (event.node != "one")
                assert event.error_s < 0.05
