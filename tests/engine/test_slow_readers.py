"""A sequence that was preempted while tokens of it were still to be read: its reader comes first. On virtual time."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from fleet import Fleet, running_fleet

from callboard.actors.engine.simulated import SimulatedRunner, Simulation, simulated_tokens
from callboard.actors.protocol import Abort, SamplingParams, StartGenerate, Token
from callboard.bus import Ref, VirtualClock
from callboard.bus.testing import run_virtual
from callboard.bus.transports.inproc import InprocHub
from callboard.kv.tokens import pack_tokens

PROMPT = [2] * 16


def request(name: str, prompt: list[int], max_tokens: int) -> StartGenerate:
    return StartGenerate(name, 0, pack_tokens(prompt), SamplingParams(max_tokens=max_tokens, ignore_eos=True))


@asynccontextmanager
async def preempted(fleet: Fleet, engine: Ref) -> AsyncIterator[Any]:
    """Give the stream of a sequence of which nothing was read, and which lost its blocks to another one."""

    async def run_large() -> None:
        async with engine.stream(request("large", [1] * 16, 80), timeout=1000) as tokens:
            async for _ in tokens:
                pass

    large = asyncio.ensure_future(run_large())
    await asyncio.sleep(0.05)
    async with engine.stream(request("slow", PROMPT, 40), timeout=1000, credit=2) as tokens:
        scheduler = fleet.actors["e"].scheduler  # type: ignore[attr-defined]
        while not any(s.request_id == "slow" and s.is_paused for s in scheduler._order):
            await asyncio.sleep(0.01)
        while any(s.request_id == "slow" for s in scheduler._order):
            await asyncio.sleep(0.01)
        assert not large.done()
        yield tokens
    await large


def on_a_small_pool(story: Callable[[Fleet, Ref], Awaitable[None]]) -> None:
    async def main() -> None:
        async with running_fleet(
            layout=SimulatedRunner(Simulation()).layout,
            hub=InprocHub(),
            clock=VirtualClock(),
            engines=("e",),
            script="round_robin",
            num_blocks=6,
            max_buffered_tokens=8,
            simulated=Simulation(seconds_per_step=0.01),
        ) as fleet:
            await story(fleet, fleet.client.ref(fleet.actors["e"].ref.address))
            await fleet.assert_nothing_leaks()

    run_virtual(main)


def test_what_is_ready_is_read_while_the_sequence_waits_for_blocks() -> None:
    async def story(fleet: Fleet, engine: Ref) -> None:
        async with preempted(fleet, engine) as tokens:
            begin_s = asyncio.get_running_loop().time()
            read = [(await anext(tokens)).id for _ in range(8)]
            assert asyncio.get_running_loop().time() - begin_s < 0.01
            read += [token.id async for token in tokens]
            assert read == simulated_tokens(PROMPT, 40)

    on_a_small_pool(story)


def test_an_abort_ends_it_at_once() -> None:
    async def story(fleet: Fleet, engine: Ref) -> None:
        async with preempted(fleet, engine) as tokens:
            first = await anext(tokens)
            await engine.ask(Abort("slow"))
            begin_s = asyncio.get_running_loop().time()
            rest: list[Token] = [token async for token in tokens]
            assert asyncio.get_running_loop().time() - begin_s < 0.01
            assert rest[-1].finish_reason == "abort"
            assert [first.id, *(token.id for token in rest)] == simulated_tokens(PROMPT, 1 + len(rest))

    on_a_small_pool(story)
