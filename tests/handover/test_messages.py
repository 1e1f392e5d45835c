"""Each message of a hand-over at an engine: sent twice, too late, for what is not there, and never followed up."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from fleet import running_fleet

from callboard.actors.engine.simulated import SimulatedRunner, Simulation, simulated_tokens
from callboard.actors.move_protocol import (
    Freeze,
    GetOccupied,
    NotMovable,
    SendHeld,
    SendKv,
    SetDraining,
    SetRoles,
    Thaw,
)
from callboard.actors.protocol import (
    BadRequest,
    GetKvStats,
    ListEntries,
    PrepRecv,
    Release,
    SamplingParams,
    StartGenerate,
    Token,
)
from callboard.bus import VirtualClock
from callboard.kv.layout import BadRange, StaleReservation
from callboard.kv.tokens import pack_tokens

STEP_S = 0.02
LAYOUT = SimulatedRunner(Simulation()).layout
PROMPT = [(13 * k) % 997 for k in range(50)]
NUM_TOKENS = 30
EXPECTED = simulated_tokens(PROMPT, NUM_TOKENS)


class Decoding:
    """A sequence that decodes on engine ``d1``, as a router reads it; engine ``d2`` could take it."""

    def __init__(self, fleet: Any) -> None:
        self.fleet = fleet
        self.tokens: list[Token] = []

    async def read(self) -> None:
        engine = self.fleet.client.ref(self.fleet.actors["d1"].ref.address)
        message = StartGenerate("r", 0, pack_tokens(PROMPT), SamplingParams(max_tokens=NUM_TOKENS))
        async with engine.stream(message) as tokens:
            async for token in tokens:
                self.tokens.append(token)

    async def until(self, num_tokens: int) -> None:
        while len(self.tokens) < num_tokens:
            await asyncio.sleep(STEP_S / 4)

    async def ask(self, message: Any, engine: str = "d1") -> Any:
        return await self.fleet.client.ref(self.fleet.actors[engine].ref.address).ask(message)

    async def room(self, tokens: list[int]) -> Any:
        """Reserve room at the other engine for these tokens, but for the last one's KV."""
        message = PrepRecv("r/moving", 0, pack_tokens(tokens), len(tokens) - 1)
        return (await self.fleet.managers["kv-d2"].ask(message)).kv

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.tokens]


@asynccontextmanager
async def decoding(num_tokens: int = 4) -> AsyncIterator[Decoding]:
    costs = Simulation(seconds_per_step=STEP_S)
    async with running_fleet(layout=LAYOUT, engines=("d1", "d2"), clock=VirtualClock(), simulated=costs) as fleet:
        run = Decoding(fleet)
        reading = asyncio.ensure_future(run.read())
        await run.until(num_tokens)
        yield run
        await reading
        assert run.ids == EXPECTED
        await fleet.assert_nothing_leaks()


async def test_a_held_sequence_brings_no_token_until_it_is_let_go() -> None:
    async with decoding() as run:
        frozen = await run.ask(Freeze("r", 0, 5.0))
        await asyncio.sleep(1.0)
        assert frozen.position == len(run.tokens) < 8
        assert frozen.usage.num_computed_tokens == len(PROMPT)
        await run.ask(Thaw("r", 0))
        await run.ask(Thaw("r", 0))  # A repeat does nothing.
        await run.until(frozen.position + 5)


async def test_a_hold_ends_by_itself() -> None:
    async with decoding() as run:
        frozen = await run.ask(Freeze("r", 0, 1.0))
        await asyncio.sleep(0.9)
        assert len(run.tokens) == frozen.position
        await asyncio.sleep(0.3)
        assert len(run.tokens) > frozen.position


async def test_a_repeated_hold_lasts_anew() -> None:
    async with decoding() as run:
        first = await run.ask(Freeze("r", 0, 1.0))
        await asyncio.sleep(0.9)
        assert (await run.ask(Freeze("r", 0, 1.0))).position == first.position
        await asyncio.sleep(0.9)
        assert len(run.tokens) == first.position


async def test_a_hold_and_a_release_of_it_that_race_leave_it_going_on() -> None:
    async with decoding() as run:
        freezing = asyncio.ensure_future(run.ask(Freeze("r", 0, 60.0)))
        await asyncio.sleep(STEP_S / 10)  # It waits for the end of the step under way.
        await run.ask(Thaw("r", 0))
        with pytest.raises(NotMovable):
            await freezing


@pytest.mark.parametrize("message", [Freeze("r", 1, 1.0), Freeze("other", 0, 1.0)])
async def test_what_is_not_there_is_not_held(message: Freeze) -> None:
    async with decoding() as run:
        with pytest.raises(NotMovable, match="no such sequence"):
            await run.ask(message)
        await run.ask(Thaw("other", 0))


async def test_what_has_not_begun_to_decode_is_not_held() -> None:
    async with decoding(num_tokens=0) as run:
        await asyncio.sleep(STEP_S / 2)
        with pytest.raises(NotMovable, match="does not decode yet"):
            await run.ask(Freeze("r", 0, 1.0))


@pytest.mark.parametrize("seconds", [0.0, -1.0, 61.0, float("nan"), float("inf")])
async def test_nobody_is_held_for_ever(seconds: float) -> None:
    async with decoding() as run:
        with pytest.raises(BadRequest, match="at most 60 s"):
            await run.ask(Freeze("r", 0, seconds))


async def test_a_repeated_send_gets_the_answer_of_the_first() -> None:
    async with decoding() as run:
        tokens = PROMPT + run.ids
        kv = await run.room(tokens)
        message = SendKv("r", 0, kv, 0, len(tokens) - 1)
        first, second = await asyncio.gather(run.ask(message), run.ask(message))
        assert first == second == await run.ask(message)
        assert first.num_bytes == (len(tokens) - 1) * LAYOUT.token_bytes
        assert first.num_computed_tokens == 0
        await run.fleet.managers["kv-d2"].ask(Release(kv))


async def test_kv_that_is_not_there_yet_is_not_sent() -> None:
    async with decoding() as run:
        tokens = PROMPT + EXPECTED
        kv = await run.room(tokens)
        with pytest.raises(NotMovable, match="tokens is in place"):
            await run.ask(SendKv("r", 0, kv, 0, len(tokens) - 1))
        for begin, end in ((-1, 5), (7, 5)):
            with pytest.raises(NotMovable):
                await run.ask(SendKv("r", 0, kv, begin, end))
        await run.fleet.managers["kv-d2"].ask(Release(kv))


async def test_kv_of_other_tokens_is_not_taken() -> None:
    async with decoding() as run:
        tokens = [*PROMPT[:-1], 1, *run.ids]
        kv = await run.room(tokens)
        with pytest.raises(StaleReservation, match="another prompt"):
            await run.ask(SendKv("r", 0, kv, 0, len(tokens) - 1))
        await run.fleet.managers["kv-d2"].ask(Release(kv))


async def test_a_sequence_that_ends_while_it_is_sent_is_sent_whole() -> None:
    async with decoding(num_tokens=NUM_TOKENS - 1) as run:
        tokens = PROMPT + run.ids
        kv = await run.room(tokens)
        sent = await run.ask(SendKv("r", 0, kv, 0, len(tokens) - 1))
        assert sent.num_bytes == (len(tokens) - 1) * LAYOUT.token_bytes
        await run.fleet.managers["kv-d2"].ask(Release(kv))


async def test_a_manager_sends_nothing_of_what_it_does_not_know() -> None:
    async with decoding() as run:
        tokens = PROMPT + run.ids
        kv = await run.room(tokens)
        packed, end = pack_tokens(tokens[:-1]), len(tokens) - 1
        manager = run.fleet.managers["kv-d1"]
        with pytest.raises(NotMovable, match="given back"):
            await manager.ask(SendHeld("r", 0, "d1", "r/unknown", packed, pack_tokens(range(4)), kv, 0, end))
        with pytest.raises(BadRange):
            await manager.ask(SendHeld("r", 0, "d1", "r/unknown", packed, b"", kv, 0, end - 1))
        sequence = next(iter(run.fleet.actors["d1"]._generations))
        for table in (b"", b"abc", pack_tokens(range(100, 104)), pack_tokens([1, 1, 1, 1])):
            with pytest.raises(BadRequest):
                await manager.ask(SendHeld("r", 0, "d1", sequence, packed, table, kv, 0, end))
        await run.fleet.managers["kv-d2"].ask(Release(kv))
        assert not (await manager.ask(GetKvStats())).problems


async def test_what_an_engine_is_for_and_whether_it_drains_is_told_to_the_directory() -> None:
    async with decoding() as run:
        occupied = await run.ask(SetDraining(is_draining=True))
        assert (occupied.num_sequences, occupied.num_sends, occupied.is_draining) == (1, 0, True)
        await run.ask(SetRoles(("prefill", "prefill", "long")))
        await asyncio.sleep(0.1)
        directory = run.fleet.client.ref(run.fleet.actors["directory"].ref.address)
        entries = {entry.name: entry for entry in (await directory.ask(ListEntries())).entries}
        assert (entries["d1"].state, entries["d1"].roles) == ("draining", ("prefill", "long"))
        assert not (await run.ask(SetDraining(is_draining=False))).is_draining
        assert (await run.ask(GetOccupied())).num_sequences == 1
        for roles in (("",), ("x" * 65,), tuple(map(str, range(17)))):
            with pytest.raises(BadRequest):
                await run.ask(SetRoles(roles))
