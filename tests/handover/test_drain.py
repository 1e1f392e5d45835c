"""An engine drains: routers hand over what runs there, no request ends by it, and it is told how far that is."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from fleet import Fleet, Generated, running_fleet
from swapping import change, changer, look

from callboard.actors.engine.door import Door
from callboard.actors.engine.simulated import SimulatedRunner, Simulation, simulated_tokens
from callboard.actors.move_protocol import GetLeaving, GetOccupied, Leaving, Occupied, SetDraining, SetRoles
from callboard.actors.protocol import SamplingParams
from callboard.bus import VirtualClock
from callboard.router.actor import RouterActor
from callboard.router.script import read_script

COSTS = Simulation(seconds_per_step=0.02, seconds_per_prefill_token=0.0005)
LAYOUT = SimulatedRunner(COSTS).layout
LOOK_S = 0.05


class DrainedFleet:
    """Eight streams over two decode engines and a prefill engine, one of which can be drained."""

    def __init__(self, fleet: Fleet, num_tokens: int) -> None:
        self.fleet = fleet
        self.num_tokens = num_tokens
        self.prompts = [[(31 * i + 7 * k) % 997 for k in range(30 + 11 * i)] for i in range(8)]
        self.streams: list[asyncio.Task[Generated]] = []

    def begin(self) -> None:
        self.streams = [asyncio.ensure_future(self.generate(prompt)) for prompt in self.prompts]

    async def generate(self, prompt: list[int]) -> Generated:
        return await self.fleet.generate(prompt, SamplingParams(max_tokens=self.num_tokens))

    async def drain(self, engine: str, *, is_on: bool = True) -> Occupied:
        return await self._engine(engine, SetDraining(is_on))

    async def occupied(self, engine: str) -> Occupied:
        return await self._engine(engine, GetOccupied())

    async def roles(self, engine: str, *roles: str) -> None:
        await self._engine(engine, SetRoles(roles))

    async def leaving(self, engine: str) -> Leaving:
        return await self.fleet.router.ask(GetLeaving(engine))

    async def until(self, engine: str, condition: Callable[[Leaving], bool], within_s: float = 5.0) -> Leaving:
        async with asyncio.timeout(within_s):
            while not condition(leaving := await self.leaving(engine)):
                await asyncio.sleep(LOOK_S)
        return leaving

    async def assert_all_is_right(self) -> None:
        for prompt, stream in zip(self.prompts, self.streams, strict=True):
            result = await stream
            assert result.tokens == simulated_tokens(prompt, self.num_tokens)
            assert result.finish_reason == "length"
            assert result.usage is not None
            assert result.usage.num_prompt_tokens == len(prompt)
            assert result.usage.num_computed_tokens + result.usage.num_cached_tokens == len(prompt)
        await self.fleet.assert_nothing_leaks()

    async def _engine(self, name: str, message):
        return await self.fleet.client.ref(self.fleet.actors[name].ref.address).ask(message)


@asynccontextmanager
async def drained_fleet(*engines: str, num_tokens: int = 60, **options) -> AsyncIterator[DrainedFleet]:
    given = {"script": "disaggregate", "simulated": COSTS, "clock": VirtualClock(), **options}
    async with running_fleet(layout=LAYOUT, engines=engines or ("p", "d1", "d2"), **given) as fleet:
        yield DrainedFleet(fleet, num_tokens)


async def test_a_drain_under_load_ends_no_request() -> None:
    async with drained_fleet() as run:
        run.begin()
        await asyncio.sleep(0.5)
        before = await run.drain("d1")
        assert before.is_draining
        assert before.num_sequences >= 3
        leaving = await run.until("d1", lambda leaving: leaving.is_known and not leaving.num_requests)
        assert (await run.occupied("d1")).num_sequences == 0
        assert leaving.num_moved == before.num_sequences
        assert leaving.num_bytes == sum(moved.num_bytes for moved in leaving.moves) > 0
        assert {(moved.source, moved.target) for moved in leaving.moves} == {("d1", "d2")}
        for moved in leaving.moves:
            assert moved.itl_s is not None
            assert moved.pause_s - moved.copy_s < 2 * COSTS.seconds_per_step
        await run.assert_all_is_right()


async def test_an_engine_that_drains_is_offered_to_nobody_until_it_serves_again() -> None:
    async with drained_fleet() as run:
        await run.drain("d1")
        await run.until("d1", lambda leaving: leaving.is_known)
        for prompt in run.prompts[:3]:
            await run.fleet.generate(prompt, SamplingParams(max_tokens=2))
        spans = [span for span in await run.fleet.sub_requests() if span.verb == "start_generate"]
        assert {span.actor for span in spans} == {"d2"}
        await run.drain("d1", is_on=False)
        await run.until("d1", lambda leaving: not leaving.is_known)
        await run.drain("d2")
        await run.until("d2", lambda leaving: leaving.is_known)
        await run.fleet.generate(run.prompts[3], SamplingParams(max_tokens=2))
        assert (await run.fleet.sub_requests())[-1].actor == "d1"


async def test_where_nobody_can_take_them_requests_finish_by_themselves() -> None:
    async with drained_fleet("p", "d1", num_tokens=20) as run:
        run.begin()
        await asyncio.sleep(0.5)
        await run.drain("d1")
        leaving = await run.until("d1", lambda leaving: leaving.is_known)
        assert (leaving.num_targets, leaving.num_moved) == (0, 0)
        assert leaving.num_requests > 0
        await run.assert_all_is_right()
        assert (await run.leaving("d1")).num_requests == 0


async def test_what_cannot_be_moved_yet_is_moved_as_soon_as_somebody_has_the_role() -> None:
    async with drained_fleet("p", "d1", num_tokens=100) as run:
        run.begin()
        await asyncio.sleep(0.5)
        await run.drain("d1")
        await asyncio.sleep(0.3)
        await run.roles("p", "prefill", "decode")
        leaving = await run.until("d1", lambda leaving: leaving.is_known and not leaving.num_requests)
        assert leaving.num_moved == 8
        await run.assert_all_is_right()


async def test_a_drain_that_is_undone_leaves_the_rest_where_it_is() -> None:
    async with drained_fleet() as run:
        run.begin()
        await asyncio.sleep(0.5)
        await run.drain("d1")
        await run.until("d1", lambda leaving: leaving.num_moved > 0)
        await run.drain("d1", is_on=False)
        await run.assert_all_is_right()


async def test_two_engines_drain_at_once() -> None:
    async with drained_fleet("p", "d1", "d2", "d3", num_tokens=120) as run:
        run.begin()
        await asyncio.sleep(0.6)
        await run.drain("d1")
        await run.drain("d2")
        for engine in ("d1", "d2"):
            leaving = await run.until(engine, lambda leaving: leaving.is_known and not leaving.num_requests)
            assert {moved.target for moved in leaving.moves} <= {"d2", "d3"}
        await run.assert_all_is_right()


async def test_a_target_without_room_is_tried_again_and_meanwhile_it_goes_on() -> None:
    async with drained_fleet("p", "d1", "d2", num_blocks=44, num_tokens=40) as run:
        run.begin()
        await asyncio.sleep(0.8)
        await run.drain("d1")
        await run.assert_all_is_right()


async def test_kv_that_a_draining_engine_computes_for_others_is_computed_to_its_end() -> None:
    async with drained_fleet("p1", "p2", "d1", num_tokens=10) as run:
        run.begin()
        await asyncio.sleep(0.03)
        before = await run.drain("p1")
        assert before.num_sends > 0
        await run.until("p1", lambda leaving: leaving.is_known and not leaving.num_requests)
        assert await run.occupied("p1") == Occupied(0, 0, is_draining=True)
        await run.assert_all_is_right()
        assert not [span for span in await run.fleet.sub_requests() if span.error]


async def test_each_of_several_routers_moves_what_it_reads() -> None:
    async with drained_fleet() as run:
        fleet, first = run.fleet, run.fleet.router
        node = await fleet.node("other")
        directory = node.ref(fleet.actors["directory"].ref.address)
        config = RouterActor.Config(name="second", script="disaggregate")
        second = await fleet.start(node, "second", RouterActor(config), directory)
        run.begin()
        await asyncio.sleep(0.3)
        fleet.router = second
        others = [asyncio.ensure_future(run.generate(prompt[::-1])) for prompt in run.prompts[:4]]
        await asyncio.sleep(0.3)
        await run.drain("d1")
        leavings = []
        for router in (first, second):
            fleet.router = router
            leavings.append(await run.until("d1", lambda leaving: leaving.is_known and not leaving.num_requests))
        assert all(leaving.num_moved for leaving in leavings)
        assert (await run.occupied("d1")).num_sequences == 0
        for prompt, other in zip(run.prompts[:4], others, strict=True):
            assert (await other).tokens == simulated_tokens(prompt[::-1], run.num_tokens)
        await run.assert_all_is_right()


async def test_engines_of_one_pool_hand_over_almost_no_bytes() -> None:
    async with drained_fleet(script="round_robin", is_shared=True) as run:
        run.begin()
        await asyncio.sleep(0.5)
        await run.drain("d1")
        leaving = await run.until("d1", lambda leaving: leaving.is_known and not leaving.num_requests)
        # Blocks change hands; what is copied are part-filled ones, once while it goes on and once when it is held.
        assert leaving.num_moved
        assert leaving.num_bytes < 4 * leaving.num_moved * LAYOUT.block_bytes
        await run.assert_all_is_right()


async def test_what_is_too_long_for_the_other_engine_is_tried_ever_less_often_and_finishes_where_it_is() -> None:
    async with drained_fleet("p", "d1", "d2", num_tokens=150) as run:
        run.fleet.actors["d2"].door = Door(COSTS.vocab_size, 32)
        run.begin()
        await asyncio.sleep(0.6)
        await run.drain("d1")
        leaving = await run.until("d1", lambda leaving: leaving.is_known and leaving.num_failed > 0)
        assert "takes at most" in leaving.why_not
        at_d1 = [stream for stream in run.streams if not stream.done()]
        await asyncio.wait(at_d1)
        leaving = await run.leaving("d1")
        # Within three seconds: after 0.5, 1.5 and 3.5 s.
        assert leaving.num_failed <= 3 * 8
        assert (await run.occupied("d1")).num_sequences == 0


async def test_a_shadow_is_not_compared_with_requests_that_a_drain_moves() -> None:
    async with drained_fleet() as run:
        router = run.fleet.actors["main"]
        assert isinstance(router, RouterActor)
        await change(run.fleet, changer().try_script(read_script("disaggregate"), share=None), router)
        run.begin()
        await asyncio.sleep(0.5)
        num_there = (await run.drain("d1")).num_sequences
        await run.until("d1", lambda leaving: leaving.is_known and not leaving.num_requests)
        await run.assert_all_is_right()
        shadow = (await look(run.fleet, router)).shadow
        assert shadow is not None
        assert shadow.num_moved == num_there > 0
        assert (shadow.num_compared, shadow.num_agreed) == (len(run.prompts) - num_there,) * 2
        assert shadow.differing == ()
