"""Swap the scripts of two routers under load, and look at what their clients saw: ``make swaps SWAPS=1000``."""

import argparse
import asyncio
import random
import sys
import tempfile
import time
from pathlib import Path

from tiny_models import tiny_model

from callboard.actors.route_protocol import GetRoutes, Routes
from callboard.bus import Node
from callboard.router.script import read_script
from callboard.router.swap.changer import Changer, Decide
from callboard.router.swap.swap import Target, swap
from callboard.tools.bus_client import list_entries, visitor

from .served import Served, quantile, served

ENGINES = {"p": ("prefill", "cpu:0"), "d": ("decode", "cpu:1")}
TWO_ROUTERS = "count = 2\n"
NUM_STREAMS = 8
SCRIPTS = ("disaggregate", "least_loaded")
PAUSE_S = 0.1
"""The longest between two swaps; less than a request takes."""


class Swaps:
    """Swaps of a fleet under load, and how long they took."""

    def __init__(self, fleet: Served) -> None:
        self.fleet = fleet
        self.seconds: list[float] = []
        self.versions: set[int] = set()
        """Those that requests have taken."""
        self._first = 0

    async def run(self, num_swaps: int, *, seed: int = 0, says: bool = False) -> None:
        """Keep the fleet busy and swap so many times; wait for the last request."""
        rng, stop = random.Random(seed), asyncio.Event()
        entries = await asyncio.to_thread(list_entries, self.fleet.running)
        load = asyncio.ensure_future(self.fleet.keep_busy(NUM_STREAMS, stop, seed=seed))
        try:
            async with visitor(self.fleet.running) as node:
                routers = [Target(each.name, node.ref(each.address)) for each in entries if each.kind == "router"]
                await self._until_all_stream()
                self._first = 1 + max([report.change.epoch for report in await self._ask(routers)])
                for number in range(num_swaps):
                    begin = time.monotonic()
                    swapped = await swap(node, routers, _decision(node, number))
                    self.seconds.append(time.monotonic() - begin)
                    assert not swapped.late
                    await self._look(routers)
                    if says:
                        print(f"\rswapped {number + 1} of {num_swaps}", end="", file=sys.stderr, flush=True)
                    await asyncio.sleep(rng.uniform(0, PAUSE_S))
                await asyncio.sleep(1.0)
                await self._look(routers)
        finally:
            stop.set()
            await load

    async def _until_all_stream(self) -> None:
        while sum(bool(answer.tokens) for answer in self.fleet.answers) < NUM_STREAMS:
            await asyncio.sleep(0.01)

    async def _ask(self, routers: list[Target]) -> list[Routes]:
        return [await router.ref.ask(GetRoutes()) for router in routers]

    async def _look(self, routers: list[Target]) -> None:
        for report in await self._ask(routers):
            versions = [each for each in report.versions if each.script.number >= self._first]
            self.versions |= {each.script.number for each in versions if each.num_requests}
            failed = {each.script.number: each.last_error for each in versions if each.num_failures}
            assert not failed, failed

    def report(self) -> str:
        """Say what was swapped, and what came of it."""
        answers = self.fleet.answers
        return (
            f"{len(self.seconds)} swaps of two routers under {NUM_STREAMS} streams, a swap took "
            f"{1000 * quantile(self.seconds, 0.5):.0f} ms (P99 {1000 * quantile(self.seconds, 0.99):.0f})\n"
            f"{len(answers)} requests with {sum(len(answer.tokens) for answer in answers)} tokens under "
            f"{len(self.versions)} versions, {sum(bool(answer.error) for answer in answers)} failed"
        )


def _decision(node: Node, number: int) -> Decide:
    """Return the next swap: mostly another script, now and then as a canary that is promoted, or a way back."""
    who = Changer(node.new_id, "swaps", node.clock.wall())
    text = read_script(SCRIPTS[number % 2])
    if number % 10 == 7:
        return who.try_script(text, share=50.0)
    if number % 10 == 8:
        return who.promote
    if number % 10 == 9:
        return who.roll_back(None)
    return who.set_script(text)


def main() -> int:
    """Run it as a command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--swaps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cbs", dir="/tmp") as folder:
        with served(Path(folder), ENGINES, script=SCRIPTS[0], more=TWO_ROUTERS) as fleet:
            swaps = Swaps(fleet)
            asyncio.run(swaps.run(arguments.swaps, seed=arguments.seed, says=True))
            print(f"\n{swaps.report()}")
            asyncio.run(fleet.assert_all_free())
        fleet.assert_answers_pass_oracle(tiny_model("llama3"))
    print("every request has ended with the right tokens, and every block is free or cached")
    return 0


if __name__ == "__main__":
    sys.exit(main())
