"""Deadlines share timers, and are kept all the same."""

import asyncio

from callboard.bus.deadlines import NEVER_S, Deadlines
from callboard.bus.testing import run_virtual


class Call:
    def __init__(self) -> None:
        self.ended_at = -1.0

    def expire(self) -> None:
        assert self.ended_at < 0
        self.ended_at = asyncio.get_running_loop().time()


def test_nobody_ends_early_and_nobody_much_late() -> None:
    async def run() -> None:
        deadlines = Deadlines()
        await asyncio.sleep(0.0037)
        start = asyncio.get_running_loop().time()
        calls = {seconds: Call() for seconds in (-1.0, 0.0, 0.001, 0.0149, 1.0, 30.0, 99.999, 101.5, 9_999.0, 40_000.0)}
        for seconds, call in calls.items():
            assert deadlines.add(call, seconds) is not None
        await asyncio.sleep(50_000)
        for seconds, call in calls.items():
            late = call.ended_at - start - max(0.0, seconds)
            assert 0 <= late <= (0.011 if seconds <= 100 else 1.01 if seconds <= 10_000 else 101), seconds

    run_virtual(run)


def test_who_has_ended_does_not_expire_and_who_never_ends_has_no_timer() -> None:
    async def run() -> None:
        deadlines = Deadlines()
        ended, waiting, endless = Call(), Call(), Call()
        slot = deadlines.add(ended, 5)
        assert deadlines.add(waiting, 5) is slot, "one timer"
        assert slot is not None
        slot.pop(ended)
        assert deadlines.add(endless, float("inf")) is None
        assert deadlines.add(endless, 2 * NEVER_S) is None
        await asyncio.sleep(6)
        assert (ended.ended_at, endless.ended_at) == (-1.0, -1.0)
        assert waiting.ended_at > 5

    run_virtual(run)


def test_an_hour_of_asks_takes_few_timers() -> None:
    async def run() -> None:
        deadlines = Deadlines()
        for _ in range(10_000):
            deadlines.add(Call(), 3600)
            await asyncio.sleep(0.05)
        assert len(deadlines._slots) < 1000

    run_virtual(run)
