"""hand_over: a running decode goes on at another engine, with its KV; a script reads one stream of tokens."""

import asyncio
from typing import Any

import pytest
from fleet import Fleet, Generated, running_fleet

from callboard.actors.engine.simulated import SimulatedRunner, Simulation, simulated_tokens
from callboard.actors.move_protocol import Depart, Freeze, Moved, SendKv
from callboard.actors.protocol import Generate, PrepRecv, SamplingParams, StartGenerate
from callboard.bus import ActorDied, UnknownActor, VirtualClock
from callboard.bus.transports.sim import SimHub
from callboard.kv.tokens import pack_tokens
from callboard.router.handover import SWITCH_S

COSTS = Simulation(seconds_per_step=0.02, seconds_per_prefill_token=0.001)
LAYOUT = SimulatedRunner(COSTS).layout
PROMPT = [(7 * i) % 997 for i in range(100)]

MOVING = """


async def route(request: Request, fleet: Fleet, *, at: str = "5", inline: bool = True):
    places = [int(each) for each in at.split(",")]
    engines = {e.name: e for e in fleet.engines}
    here, there = engines["d1"], engines["d2"]
    generation = here.start_generate(request)
    moves = []
    async for token in generation:
        yield token
        if token.position in places and token.finish_reason is None:
            moving = here.hand_over(request, there)
            if inline:
                fleet.moved.append(await moving)
            else:
                moves.append(asyncio.ensure_future(moving))
            here, there = there, here
    for move in moves:
        fleet.moved.append(await move)
"""


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> list[Moved]:
    """Return what the scripts' hand-overs returned: a script reaches the list as ``fleet.moved``."""
    from callboard.router.fleet import Fleet as SeenFleet

    found: list[Moved] = []
    monkeypatch.setattr(SeenFleet, "moved", found, raising=False)
    return found


def fleet_of(script: str, *engines: str, **options: Any) -> Any:
    given = {"layout": LAYOUT, "simulated": COSTS, "clock": VirtualClock(), **options.pop("given", {})}
    return running_fleet(engines=engines or ("d1", "d2"), script=script, options=options, **given)


async def generated(fleet: Fleet, num_tokens: int = 40, **options: Any) -> Generated:
    return await fleet.generate(PROMPT, SamplingParams(max_tokens=num_tokens), request_id="r", **options)


@pytest.mark.parametrize("is_shared", [False, True])
@pytest.mark.parametrize("inline", [True, False])
@pytest.mark.parametrize("at", ["0", "11", "12", "3,9,20,30"])
async def test_the_tokens_are_those_of_one_engine(
    write_script: Any, moved: Any, at: str, inline: bool, is_shared: bool
):
    given = {"is_shared": is_shared}
    async with fleet_of(write_script(MOVING), at=at, inline=inline, given=given) as fleet:
        result = await generated(fleet)
        assert result.tokens == simulated_tokens(PROMPT, 40)
        assert result.finish_reason == "length"
        assert len(moved) == len(at.split(","))
        assert [each.target for each in moved] == ["d2", "d1", "d2", "d1"][: len(moved)]
        await fleet.assert_nothing_leaks()
        spans = await fleet.sub_requests("r")
        assert not [span for span in spans if span.error]
        usage = result.usage
        assert usage is not None
        assert (usage.num_prompt_tokens, usage.num_computed_tokens, usage.num_cached_tokens) == (100, 100, 0)


TRYING = """
async def route(request: Request, fleet: Fleet):
    engines = {e.name: e for e in fleet.engines}
    async for token in engines["d1"].start_generate(request):
        yield token
        if token.position == 5:
            try:
                fleet.moved.append(await engines["d1"].hand_over(request, engines["d2"]))
            except Exception as error:
                fleet.moved.append(error)
"""

BESIDE = """
async def route(request: Request, fleet: Fleet):
    here, *others = fleet.engines
    moving = None
    async for token in here.start_generate(request):
        yield token
        if token.position == 5:
            moving = asyncio.ensure_future(here.hand_over(request, others[0]))
            moving.add_done_callback(lambda done: done.cancelled() or done.exception())
"""


class Client:
    """Reads one stream, with the time of each token."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.ids: list[int] = []
        self.times: list[float] = []

    async def read(self) -> None:
        message = Generate("r", "tiny", pack_tokens(PROMPT), SamplingParams(max_tokens=40))
        async with self.fleet.router.stream(message) as tokens:
            async for token in tokens:
                self.ids.append(token.id)
                self.times.append(asyncio.get_running_loop().time())

    async def until(self, num_tokens: int) -> None:
        while len(self.ids) < num_tokens:
            await asyncio.sleep(COSTS.seconds_per_step / 4)

    def longest_gap_s(self) -> float:
        return max(after - before for before, after in zip(self.times, self.times[1:], strict=False))


@pytest.mark.parametrize(("moment", "actor"), [(SendKv, "kv-d2"), (Freeze, "d2")])
async def test_a_hand_over_that_fails_costs_the_stream_a_step_or_two(
    moment: type, actor: str, write_script: Any, moved: Any
):
    async with fleet_of(write_script(TRYING)) as fleet:
        source, target = fleet.nodes["d1"], fleet.nodes[actor]
        struck: list[str] = []

        def strike(row: Any, message: Any) -> None:
            if isinstance(message, moment) and not struck:
                struck.append(actor)
                target.remove(actor)

        source.follow(strike, everything=True)
        client = Client(fleet)
        reading = asyncio.ensure_future(client.read())
        await client.until(20)
        assert isinstance(moved[0], UnknownActor | ActorDied)
        # It is counted where it is, and nothing is kept for it where it is not.
        router = fleet.actors["main"]
        assert (router.loads.num_own("d1"), router.loads.num_own("d2")) == (1, 0)
        assert actor == "kv-d2" or fleet.actors["kv-d2"].blocks.counts().num_reservations == 0
        await reading
        assert client.ids == simulated_tokens(PROMPT, 40)
        # The hold would have ended by itself much later.
        assert client.longest_gap_s() < 4 * COSTS.seconds_per_step


async def test_what_has_moved_is_counted_there_and_leaves_nothing_behind(write_script: Any, moved: Any):
    async with fleet_of(write_script(TRYING)) as fleet:
        heard: list[Any] = []
        fleet.nodes["d1"].follow(lambda row, message: heard.append(message), everything=True)
        client = Client(fleet)
        reading = asyncio.ensure_future(client.read())
        await client.until(20)
        router = fleet.actors["main"]
        assert isinstance(moved[0], Moved)
        assert [message for message in heard if isinstance(message, Depart)] == [Depart("r", 0)]
        assert (router.loads.num_own("d1"), router.loads.num_own("d2")) == (0, 1)
        left, taken = (fleet.actors[name].blocks.counts() for name in ("kv-d1", "kv-d2"))
        assert (left.num_reservations, taken.num_reservations) == (0, 0)
        assert not fleet.actors["d1"].scheduler._order
        assert taken.leased > 0
        await reading
        assert client.ids == simulated_tokens(PROMPT, 40)
        ended = fleet.actors["d1"].scheduler.counts.counters().num_finished
        assert ended == {"moved": 1}


@pytest.mark.parametrize("message", [PrepRecv, SendKv, Freeze, StartGenerate])
@pytest.mark.parametrize("side", ["d1", "d2"])
async def test_who_never_answers_holds_a_stream_up_for_a_bounded_time(side: str, message: type, write_script: Any):
    hub = SimHub(1)
    async with fleet_of(write_script(BESIDE), given={"hub": hub}) as fleet:
        struck: list[float] = []

        def strike(row: Any, sent: Any) -> None:
            if isinstance(sent, message) and not struck and len(client.ids) > 5:
                struck.append(asyncio.get_running_loop().time())
                island = frozenset(f"inproc://{name}" for name in (side, f"kv-{side}"))
                partition = hub.partition(island, refuses=False)
                asyncio.get_running_loop().call_later(8.0, hub.heal, partition)

        client = Client(fleet)
        fleet.nodes["control"].follow(strike, everything=True)
        await asyncio.wait_for(client.read(), 60.0)
        assert struck, "the moment never came"
        assert client.ids == simulated_tokens(PROMPT, 40)
        # Whoever is cut off with what it generates is given up after 5 s of silence, and recovered from elsewhere.
        assert client.longest_gap_s() < SWITCH_S + 2.0
