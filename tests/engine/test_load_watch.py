"""An engine's load as it is told while it changes: at once what matters, seldom what does not, nothing for ever."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fleet import Fleet, running_fleet

from callboard.actors.engine.load_watch import MOST_TOLD, LoadWatch
from callboard.actors.engine.scheduler import Scheduler
from callboard.actors.engine.simulated import SimulatedRunner, Simulation
from callboard.actors.engine.throughput import Throughput
from callboard.actors.load_protocol import LoadReport, WatchLoad
from callboard.actors.protocol import SamplingParams
from callboard.bus import FOREVER, VirtualClock
from callboard.bus.testing import run_virtual

COSTS = Simulation(seconds_per_step=0.002, seconds_per_prefill_token=0.001)
LAYOUT = SimulatedRunner(COSTS).layout
PROMPT = list(range(100))


@asynccontextmanager
async def watched() -> AsyncIterator[tuple[Fleet, list[tuple[float, LoadReport]]]]:
    """Give a fleet of one engine, and what it tells with the time of each."""
    clock, heard = VirtualClock(), []
    async with running_fleet(
        layout=LAYOUT, engines=("e",), script="round_robin", clock=clock, simulated=COSTS, max_num_batched_tokens=20
    ) as fleet:
        engine = fleet.client.ref(fleet.actors["e"].ref.address)

        async def watch() -> None:
            async with engine.stream(WatchLoad(), timeout=FOREVER) as reports:
                async for report in reports:
                    heard.append((clock.now(), report))

        task = asyncio.ensure_future(watch())
        await asyncio.sleep(0.1)
        yield fleet, heard
        task.cancel()
        await asyncio.wait([task])


def test_a_request_is_told_of_as_it_comes_decodes_and_ends() -> None:
    async def main() -> None:
        async with watched() as (fleet, heard):
            begin_s = fleet.client.clock.now()
            await fleet.generate(PROMPT, SamplingParams(max_tokens=30, ignore_eos=True), request_id="r")
            end_s = fleet.client.clock.now()
            await asyncio.sleep(0.05)
            told = [(at_s, report) for at_s, report in heard if at_s >= begin_s]
            (came_s,) = (at_s for at_s, report in told if report.began)
            decodes_s = next(at_s for at_s, report in told if report.load.num_decoding)
            (left_s,) = (at_s for at_s, report in told if report.ended)
            # Five steps of 20 tokens, each 22 ms, then 29 of one token.
            assert (came_s, round(decodes_s - begin_s, 3)) == (begin_s, 0.11)
            assert left_s == end_s
            last = told[-1][1].load
            assert (last.num_running, last.num_waiting, last.num_generating, last.num_uncomputed_tokens) == (0, 0, 0, 0)

    run_virtual(main)


def test_what_does_not_matter_at_once_is_told_seldom() -> None:
    async def main() -> None:
        async with watched() as (fleet, heard):
            num_before = len(heard)
            await fleet.generate(PROMPT, SamplingParams(max_tokens=900, ignore_eos=True))
            # 1.8 s of decoding, in 899 steps: what grows is told with the pool, four times a second.
            assert len(heard) - num_before < 30

    run_virtual(main)


def test_the_parts_of_a_step_are_told_as_they_are() -> None:
    async def main() -> None:
        async with watched() as (fleet, heard):
            for length in (70, 71, 72):
                await fleet.generate([*range(length)], SamplingParams(max_tokens=30, ignore_eos=True))
            await asyncio.sleep(0.5)
            load = heard[-1][1].load
            assert abs(load.step_s - 0.002) < 0.0003
            assert abs(load.prefill_token_s - 0.001) < 0.0001
            assert 0.0 < load.prefill_share < 1.0

    run_virtual(main)


async def test_a_watcher_who_takes_nothing_is_told_everything_anew() -> None:
    scheduler = Scheduler(block_size=16, max_num_batched_tokens=64, max_num_seqs=4, max_model_len=64)
    watch = LoadWatch(VirtualClock(), scheduler, Throughput(), {})
    reports = watch.serve()
    assert (await anext(reports)).is_whole
    watch.began("stays")
    for number in range(MOST_TOLD):
        watch.began(f"r{number}")
        watch.ended(f"r{number}")
    report = await anext(reports)
    assert (report.is_whole, report.began, report.ended) == (True, ("stays",), ())
    watch.ended("stays")
    report = await anext(reports)
    assert (report.is_whole, report.began, report.ended) == (False, (), ("stays",))
    await reports.aclose()
