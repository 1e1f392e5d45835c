"""Leases, watches, and ties that outlive the directory."""

import asyncio

import pytest

from callboard.actors.actor import Actor, start_actor, stop_actor
from callboard.actors.directory import Directory, DirectoryView, Registration
from callboard.actors.protocol import Entry, ListEntries, Load, Register, Unregister, Watch
from callboard.bus import Address, Node, VirtualClock
from callboard.bus.transports.inproc import InprocHub


class Registered(Actor):
    """An actor that is in the directory and watches it."""

    async def start(self):
        self.registration = Registration(self, Entry(self.name, "engine", self.ref.address))
        self.view = DirectoryView(self)


@pytest.fixture
async def hub():
    return InprocHub()


def node(hub, name):
    return Node(name, endpoint=f"inproc://{name}", transport=hub.transport(), clock=VirtualClock(), seed=2)


@pytest.fixture
async def control(hub):
    async with node(hub, "control") as control:
        yield control


@pytest.fixture
async def directory(control):
    actor = Directory()
    ref = await start_actor(control, "directory", actor)
    yield ref
    await stop_actor(actor)


def entry(name, **fields):
    return Entry(name, "engine", Address("n", "inproc://n", name), **fields)


def has(*names):
    return lambda view: [e.name for e in view.entries] == list(names)


async def names(directory):
    return [e.name for e in (await directory.ask(ListEntries())).entries]


async def test_entries_are_ordered_by_name(directory):
    for name in ("b", "c", "a"):
        await directory.ask(Register(entry(name), 3.0))
    assert await names(directory) == ["a", "b", "c"]


async def test_a_lapsed_lease_takes_the_entry_out(directory):
    await directory.ask(Register(entry("a"), 3.0))
    await directory.ask(Register(entry("b"), 1.0))
    await asyncio.sleep(0.9)
    assert await names(directory) == ["a", "b"]
    await asyncio.sleep(0.2)
    assert await names(directory) == ["a"]
    await asyncio.sleep(2.0)
    assert await names(directory) == []


async def test_a_renewal_holds_the_lease_and_is_no_news(directory):
    await directory.ask(Register(entry("a"), 1.0))
    version = (await directory.ask(ListEntries())).version
    for _ in range(10):
        await asyncio.sleep(0.5)
        await directory.ask(Register(entry("a"), 1.0))
    assert (await directory.ask(ListEntries())).version == version


async def test_unregistering_takes_the_entry_out_at_once(directory):
    await directory.ask(Register(entry("a"), 3.0))
    await directory.ask(Unregister("a"))
    await directory.ask(Unregister("a"))
    assert await names(directory) == []


async def test_a_watcher_sees_the_present_and_every_lasting_change(directory):
    await directory.ask(Register(entry("a"), 1.0))
    async with directory.stream(Watch()) as views:
        assert [e.name for e in (await anext(views)).entries] == ["a"]
        await directory.ask(Register(entry("b"), 30.0))
        assert [e.name for e in (await anext(views)).entries] == ["a", "b"]
        assert [e.name for e in (await anext(views)).entries] == ["b"]


async def test_changes_of_one_moment_are_one_view(directory):
    async with directory.stream(Watch()) as views:
        await anext(views)
        for number in range(50):
            await directory.ask(Register(entry("a", load=Load(num_running=number)), 3.0))
        assert (await anext(views)).entries[0].load.num_running == 49
        await asyncio.sleep(1.0)
        assert views.take_ready() == []


async def test_a_watcher_whose_node_is_gone_leaves_nothing_behind(hub, control, directory):
    async with node(hub, "far") as far:
        async with far.ref(directory.address).stream(Watch()) as views:
            await anext(views)
            assert len(control._server._serving) == 1
    await asyncio.sleep(0.1)
    assert len(control._server._serving) == 0


async def test_a_registration_renews_for_as_long_as_its_actor_lives(hub, directory):
    async with node(hub, "n") as n:
        actor = Registered()
        await start_actor(n, "a", actor, directory=n.ref(directory.address))
        await asyncio.sleep(60.0)
        assert await names(directory) == ["a"]
        await stop_actor(actor)
        assert await names(directory) == []


async def test_an_update_is_known_at_once(hub, directory):
    async with node(hub, "n") as n:
        actor = Registered()
        await start_actor(n, "a", actor, directory=n.ref(directory.address))
        await actor.view.wait_for(has("a"))
        actor.registration.update(state="draining")
        await asyncio.sleep(0.1)
        assert (await directory.ask(ListEntries())).entries[0].state == "draining"
        assert actor.view.get("a").state == "draining"
        await stop_actor(actor)


async def test_an_actor_that_vanishes_drops_out_when_its_lease_lapses(hub, directory):
    n = node(hub, "n")
    await n.__aenter__()
    actor = Registered()
    await start_actor(n, "a", actor, directory=n.ref(directory.address))
    await actor.view.wait_for(has("a"))
    await n.stop()  # It cannot say goodbye.
    await asyncio.sleep(1.0)
    assert await names(directory) == ["a"]
    await asyncio.sleep(2.5)
    assert await names(directory) == []
    await stop_actor(actor)


async def test_actors_come_back_to_a_directory_that_restarted(hub):
    async with node(hub, "n") as n:
        first = node(hub, "control")
        await first.__aenter__()
        directory = await start_actor(first, "directory", Directory())
        actors = {name: Registered() for name in ("a", "b")}
        for name, actor in actors.items():
            await start_actor(n, name, actor, directory=n.ref(directory.address))
        await actors["a"].view.wait_for(has("a", "b"))

        await first.stop()
        await asyncio.sleep(10.0)
        view = actors["a"].view
        assert view.is_stale
        assert [e.name for e in view.entries("engine")] == ["a", "b"]

        async with node(hub, "control") as second:
            again = Directory()
            directory = await start_actor(second, "directory", again)
            await asyncio.sleep(3.0)
            assert await names(directory) == ["a", "b"]
            assert not view.is_stale
            await stop_actor(again)
        for actor in actors.values():
            await stop_actor(actor)


async def test_entries_are_carried_while_a_restarted_directory_fills_again(hub, directory):
    async with node(hub, "n") as n:
        actor = Registered()
        await start_actor(n, "a", actor, directory=n.ref(directory.address))
        await directory.ask(Register(entry("b"), 60.0))
        await actor.view.wait_for(has("a", "b"))
        actor.view.is_stale = True
        await directory.ask(Unregister("b"))
        await asyncio.sleep(0.5)
        assert [e.name for e in actor.view.entries()] == ["a", "b"]
        await asyncio.sleep(6.0)
        assert [e.name for e in actor.view.entries()] == ["a"]
        await stop_actor(actor)


async def test_waiting_for_a_view_that_never_comes_can_be_limited(hub):
    async with node(hub, "n") as n:
        actor = Registered()
        await start_actor(n, "a", actor, directory=n.ref(Address("nobody", "inproc://nobody", "directory")))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(5.0):
                await actor.view.wait_for(lambda view: True)
        assert actor.view.entries() == ()
        await stop_actor(actor)


async def test_outside_of_a_fleet_nothing_is_registered(hub):
    async with node(hub, "n") as n:
        actor = Registered()
        await start_actor(n, "a", actor)
        actor.registration.update(state="draining")
        await asyncio.sleep(1.0)
        assert not actor.registration.is_registered
        await stop_actor(actor)
