"""What a KV manager does not believe: who speaks in another's name, or brings the KV of another model."""

import msgspec
import pytest
from two_managers import LAYOUT, PROMPT, Fleet, in_virtual_time, prep

from callboard.actors.actor import start_actor, stop_actor
from callboard.actors.kv_manager import KvManager
from callboard.actors.protocol import Attach, Attached, BadRequest, GetKvStats, OpenWrite, Release, Tie
from callboard.bus import FOREVER, Address, Node, VirtualClock
from callboard.bus.links import LinkConfig
from callboard.bus.testing import SimulatedProcess, run_virtual
from callboard.bus.transports.sim import SimHub

LINKS = LinkConfig(ping_s=0.25, silent_s=1.0)


@in_virtual_time()
async def test_a_tie_in_another_nodes_name_is_refused(fleet: Fleet) -> None:
    epoch = fleet.actors["d"].epoch
    with pytest.raises(BadRequest, match="in the name of p"):
        async with fleet.at("d").stream(Tie(epoch, fleet.at("p").address), timeout=FOREVER) as items:
            await anext(items)


def test_a_writer_that_gives_anothers_endpoint_for_its_own_is_not_proven_dead_by_that_one() -> None:
    async def main() -> None:
        hub, process = SimHub(3), SimulatedProcess("liar")

        async def node(name: str) -> Node:
            made = Node(
                name, endpoint=f"sim://{name}", transport=hub.transport(), seed=1, clock=VirtualClock(), links=LINKS
            )
            return await made.__aenter__()

        nodes = [await node(name) for name in ("d", "p", "client")]
        managers = [KvManager(KvManager.Config(name, LAYOUT, 6, lease_s=1.0)) for name in ("d", "p")]
        for manager, where in zip(managers, nodes, strict=False):
            await start_actor(where, manager.config.name, manager)
        d = nodes[2].ref(managers[0].ref.address)
        kv = (await d.ask(prep(PROMPT))).kv

        async def lie() -> None:
            own = await node("liar")
            away = own.ref(d.address)
            async with away.stream(Tie(kv.epoch, Address("liar", "sim://p", "p")), timeout=FOREVER) as items:
                await anext(items)
                await away.ask(OpenWrite(kv.reservation_id, kv.epoch, "w", 0, 11))
                process.kill()  # On another host: all that d sees is that the link breaks.

        process.spawn(lie())
        await VirtualClock().sleep(5.0)
        await d.ask(Release(kv))
        await VirtualClock().sleep(60.0)
        assert (await d.ask(GetKvStats())).quarantined == 3
        for manager in managers:
            await stop_actor(manager)
        for each in reversed(nodes):
            await each.stop()

    run_virtual(main)


@in_virtual_time()
async def test_an_engine_of_another_model_of_the_same_layout_is_refused(fleet: Fleet) -> None:
    await fleet.manager("x", fingerprint="one")
    for fingerprint in ("another", ""):
        message = Attach("e", LAYOUT, fleet.at("x").address, fingerprint)
        with pytest.raises(BadRequest, match="another model"):
            async with fleet.at("x").stream(message) as items:
                await anext(items)
    async with fleet.at("x").stream(Attach("e", LAYOUT, fleet.at("x").address, "one")) as items:
        assert isinstance(await anext(items), Attached)


@in_virtual_time()
async def test_a_pool_of_no_given_model_is_that_of_the_first_engine_for_good(fleet: Fleet) -> None:
    await fleet.manager("x")
    first = Attach("e", LAYOUT, fleet.at("x").address, "one")
    async with fleet.at("x").stream(first) as items:
        await anext(items)
    # Its KV is in the prefix cache still.
    with pytest.raises(BadRequest, match="another model"):
        async with fleet.at("x").stream(msgspec.structs.replace(first, fingerprint="another")) as items:
            await anext(items)


@in_virtual_time()
async def test_an_engine_that_takes_a_name_over_says_nothing_of_who_had_it(fleet: Fleet) -> None:
    manager = fleet.actors["d"]
    held = manager.blocks.admit("engine", "s", b"\1\0\0\0" * 8)
    async with fleet.at("d").stream(Attach("engine", LAYOUT, fleet.at("d").address)) as items:
        await anext(items)
        stats = await fleet.stats("d")
        assert (stats.quarantined, stats.leased) == (2, 0), "the one that had it may be writing"
        assert len(held.block_table) == 2
    again = Attach("engine", LAYOUT, fleet.actors["de"].ref.address)
    async with fleet.nodes["de"].ref(fleet.at("d").address).stream(again) as items:
        await anext(items)  # It has let go, and attaches itself again from the same process.
        assert (await fleet.stats("d")).free == 16
