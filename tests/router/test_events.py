"""What scripts are told of engines that come, go, die, change, and are busy."""

import asyncio

import pytest

from callboard.actors.actor import stop_actor
from callboard.actors.protocol import Entry, Load
from callboard.bus import Address
from callboard.router.events import Events

SCRIPT = """
heard = []

@background()
async def listen(fleet):
    async for event in fleet.events():
        heard.append((event.kind, event.engine.name, event.engine.roles))

async def route(request, fleet):
    async for token in least_loaded(fleet.engines).start_generate(request):
        yield token
"""


def entry(name: str, roles: tuple[str, ...] = (), state: str = "ready", node: str = "n", running: int = 0) -> Entry:
    address = Address(node, f"inproc://{node}", name)
    return Entry(name, "engine", address, state=state, roles=roles, load=Load(num_running=running))


class Listener:
    """Notes what is told."""

    def __init__(self, events: Events) -> None:
        self._happenings = events.listen()
        self._next: asyncio.Future[object] | None = None

    async def told(self) -> list[tuple[str, str]]:
        """Return what was told since it was asked last."""
        told = []
        while True:
            self._next = self._next or asyncio.ensure_future(anext(self._happenings))
            done, _ = await asyncio.wait([self._next], timeout=0.01)
            if not done:
                return told
            happening = self._next.result()
            told.append((happening.kind, happening.entry.name))
            self._next = None

    async def close(self) -> None:
        if self._next is not None:
            self._next.cancel()
            await asyncio.wait([self._next])


@pytest.fixture
async def events():
    return Events()


async def test_who_is_there_has_joined_and_what_changes_is_told(events):
    events.view((entry("a"), entry("b", state="starting")))
    listener = Listener(events)
    assert await listener.told() == [("joined", "a")]
    events.view((entry("a", ("prefill",)), entry("b")))
    assert await listener.told() == [("roles", "a"), ("joined", "b")]
    events.view((entry("a", ("prefill",), running=1), entry("b", state="draining")))
    assert sorted(await listener.told()) == [("left", "b"), ("load", "a")]
    events.view((entry("a", ("prefill",), running=1, node="again"),))
    assert await listener.told() == [("left", "a"), ("joined", "a")]
    await listener.close()


async def test_a_death_is_told_once_and_is_no_leaving(events):
    events.view((entry("a"),))
    listener = Listener(events)
    await listener.told()
    events.died("a")
    events.died("a")
    events.died("nobody")
    assert await listener.told() == [("died", "a")]
    events.view(())
    assert await listener.told() == []
    events.view((entry("a", node="again"),))
    assert await listener.told() == [("joined", "a")]
    await listener.close()


async def test_one_that_was_taken_for_dead_and_speaks_has_joined_again(events):
    events.view((entry("a"),))
    events.died("a")
    listener = Listener(events)
    assert await listener.told() == []
    events.load_changed("a")
    assert await listener.told() == [("joined", "a"), ("load", "a")]
    await listener.close()


async def test_who_is_slow_is_told_the_latest_of_each_kind(events):
    listener = Listener(events)
    await listener.told()
    for number in range(1000):
        events.view((entry("a", running=number),))
    assert await listener.told() == [("joined", "a"), ("load", "a")]
    await listener.close()
    events.view(())


async def test_a_script_hears_of_its_fleet(fleet, write_script):
    await fleet.add_engine("a", "prefill")
    await fleet.add_router(write_script(SCRIPT))
    heard = fleet.router.script.route.func.__globals__["heard"]
    await fleet.add_engine("b")
    await asyncio.sleep(0.1)
    assert heard == [("joined", "a", ("prefill",)), ("joined", "b", ())]
    fleet.engines["a"].registration.update(roles=("decode",))
    await asyncio.sleep(0.1)
    assert heard[2:] == [("roles", "a", ("decode",))]
    await stop_actor(fleet.engines["b"])
    await asyncio.sleep(0.1)
    assert heard[3:] == [("left", "b", ())]
