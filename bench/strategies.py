"""Which strategy is best for which work, and how far does `adaptive` stay behind it?

Two engines of a core each, and one with both cores, serve a small model of random weights: small, so that 500 requests
stand behind each P99 within minutes, and large enough that engines take most of all processor time (what all the others
take is told). Router, KV managers and engines are the production actors in processes of their own, over ipc; the client
is another process. Requests arrive as a Poisson process whether or not earlier ones were answered, and all times count
from when a request was due. Strategies take turns within a round, meet the same arrivals and lengths, and run on the
same engines; between them the router's script is swapped, and the engines' roles are set.

Each block begins with an idle fleet and ends with its last answer, and all of its requests count.

First each mix is calibrated: what data parallelism finishes at most (16 clients that wait for their answers), then the
token budget that suits data parallelism, 1P1D and one engine on both cores best at 0.8 of that. Every other strategy
runs with data parallelism's. Rates are shares of that most.

Intervals (95%) are bootstrapped over rounds and runs of consecutive requests, ratios over pairs (_strategies/
intervals.py). The run ends after --minutes and tells what it has; called again it goes on, until every round is done.
"""

import asyncio
import contextlib
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import uvloop
from _report import arguments, machine
from _strategies.fleet import running_fleet
from _strategies.load import running_load
from _strategies.measure import Cell, Measurer, plan
from _strategies.mixes import MIXES
from _strategies.model import Shape, make_model
from _strategies.records import Records, Setup
from _strategies.strategies import digests_of, strategies_here
from _strategies.verdict import tell

from callboard.tools.machine import claim_port

BUDGETS = (96, 256, 1024)
POOL_TOKENS = 1 << 17
"""Of each KV manager: whatever waits fits in."""
ROUTED_AT_ONCE = (1, 8)


class Clock:
    """What is left of the time, and what is said on the way."""

    def __init__(self, minutes: float) -> None:
        self._begin = time.monotonic()
        self._limit_s = 60 * minutes

    def is_over(self) -> bool:
        """Return whether nothing more is to be begun."""
        return time.monotonic() - self._begin > self._limit_s

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self._begin:5.0f} s  {text}", file=sys.stderr, flush=True)


async def measure(folder: Path, records: Records, cells: list[Cell], options: Any, clock: Clock) -> None:
    """Start the fleet and measure what is lacking, until it is done or the time is over."""
    setup = records.setup
    strategies = {cell.strategy.name: cell.strategy for cell in cells}.values()
    mixes = {cell.mix.name: cell.mix for cell in cells}.values()
    make_model(setup.shape, folder / "model", is_simulated=setup.is_simulated)
    fleet_options: dict[str, Any] = {
        "pool_tokens": POOL_TOKENS,
        "port": claim_port("127.0.0.1", 0),
        "is_simulated": setup.is_simulated,
    }
    async with (
        running_fleet(folder, folder / "model", setup.budgets, **fleet_options) as fleet,
        running_load(folder) as load,
    ):
        measurer = Measurer(fleet, load, records, clock.say)
        clock.say("the fleet is up")
        await measurer.warm_up(strategies, next(iter(mixes)))
        for mix in mixes:
            await measurer.calibrate(mix)
        clock.say(f"{measurer.seconds_of(cells) / 60:.1f} minutes of arrivals are left to measure")
        for number in range(options.rounds):
            if clock.is_over():
                break
            if number == 0 or not options.quick:
                scale = 0.2 if options.quick else 1.0
                await measurer.compare_engines(number, scale)
                for at_once in ROUTED_AT_ONCE:
                    await measurer.compare_router(number, at_once, scale)
                await measurer.compare_frontend(number, next(iter(mixes)))
            for cell in (cell for cell in cells if cell.round == number):
                if clock.is_over():
                    break
                await measurer.measure(cell)
            clock.say(f"round {number + 1} of {options.rounds}: {measurer.seconds_of(cells) / 60:.1f} minutes are left")


async def run(records: Records, cells: list[Cell], options: Any) -> None:
    """Measure until the end, or until someone ends it: what was found by then counts."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, task.cancel)
    clock = Clock(options.minutes)
    with tempfile.TemporaryDirectory(prefix="callboard-bench-") as folder:
        try:
            await measure(Path(folder), records, cells, options, clock)
        except asyncio.CancelledError:
            clock.say("ended early: this is what there is")


def main() -> None:
    options = arguments(
        __doc__ or "",
        minutes={"type": float, "default": 15.0, "help": "end after so many (15)"},
        rounds={"type": int, "help": "rounds (5, quick 2)"},
        requests={"type": int, "help": "requests a block: rounds times these stand behind each P99 (100, quick 12)"},
        only={"metavar": "NAMES", "help": "strategies, with commas (all whose scripts ship)"},
        mixes={"metavar": "NUMBERS", "help": f"mixes, with commas (all: 0 to {len(MIXES) - 1})"},
        budgets={"metavar": "TOKENS", "help": f"token budgets to choose from ({','.join(map(str, BUDGETS))})"},
        hidden={
            "type": int,
            "default": Shape().hidden_size,
            "help": "the model's hidden size, in steps of 64 (%(default)s)",
        },
        keep={"metavar": "FILE", "help": "keep what was measured there, and go on from there"},
        fresh={"action": "store_true", "help": "begin anew, whatever is kept"},
        plot={"metavar": "FILE", "help": "draw a PNG there (needs matplotlib)"},
        simulated={"action": "store_true", "help": "engines that sleep instead of computing: to try this program"},
    )
    if options.quick:
        options.mixes, options.budgets = options.mixes or "0", options.budgets or "256"
    options.rounds = options.rounds or (2 if options.quick else 5)
    options.requests = options.requests or (12 if options.quick else 100)
    mixes = [MIXES[int(index)] for index in options.mixes.split(",")] if options.mixes else list(MIXES)
    strategies = strategies_here(options.only.split(",") if options.only else None)
    budgets = [int(budget) for budget in options.budgets.split(",")] if options.budgets else list(BUDGETS)
    heads = options.hidden // 64
    shape = Shape(hidden_size=options.hidden, num_heads=heads, num_kv_heads=2 if heads % 2 == 0 else 1)
    keep = Path(options.keep) if options.keep else None
    if keep is not None and options.fresh:
        keep.unlink(missing_ok=True)
    records = Records(
        keep, Setup(shape, budgets, options.requests, machine(), options.simulated, scripts=digests_of(strategies))
    )
    cells = plan(options.rounds, mixes, strategies, only_last=options.quick)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with contextlib.suppress(KeyboardInterrupt):
        uvloop.run(run(records, cells, options))
    tell(records, mixes, strategies, options)


if __name__ == "__main__":
    main()
