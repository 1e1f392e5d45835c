"""A writer on another host that is heard of no more: nobody can prove it dead, and it can harm nobody."""

import asyncio

from two_managers import PROMPT, Fleet, prep, send

from callboard.actors.protocol import CloseWrite, Release
from callboard.bus import FOREVER, LinkLost, Refusal

from .test_take_pages import by_hand, over_wires


def hang_up(fleet: Fleet, name: str, peer: str) -> None:
    """Break a node's links to another as its pings do when nothing is heard: neither is known to have died."""
    links = fleet.nodes[name]._links
    for link in [link for link in links._links if link.peer_node == peer]:
        links._break(link, LinkLost(f"{peer} has not been heard of"), "link_lost")


@over_wires()
async def test_blocks_that_a_vanished_host_was_writing_over_a_wire_come_back(fleet: Fleet) -> None:
    manager, clock = fleet.actors["d"], fleet.nodes["d"].clock
    async with by_hand(fleet) as sender:
        await sender.deliver(sender.piece)
        assert manager.blocks.counts().reserved == 3
        hang_up(fleet, "d", "client")
        await clock.sleep(manager.config.lease_s + 1)
        counts = manager.blocks.counts()
        assert (counts.quarantined, counts.reserved, counts.free) == (0, 0, 16)
        assert manager.blocks.check_integrity() == []
        # It was not dead after all: what it says now is about nothing.
        kv = sender.reserved.kv
        try:
            await sender.d.ask(CloseWrite(kv.reservation_id, kv.epoch, "w", is_complete=True))
        except Refusal:
            pass
        assert manager.blocks.counts().free == 16


@over_wires()
async def test_a_link_that_breaks_in_the_middle_of_a_write_ends_it_at_both_ends(fleet: Fleet) -> None:
    clock, p, d = fleet.nodes["d"].clock, fleet.actors["p"], fleet.actors["d"]
    for number, (breaks, peer) in enumerate([("p", "d"), ("d", "p"), ("p", "d")]):
        reserved = await fleet.at("d").ask(prep(PROMPT, 10, request_id=f"r{number}"))
        sending = asyncio.ensure_future(fleet.at("p").ask(send(reserved, PROMPT), timeout=FOREVER))
        while not (lines := list(d._receiver._lines.values())) or not lines[0].staging.num_lent:
            await clock.sleep(1e-4)
        hang_up(fleet, breaks, peer)  # The wire is whole.
        await asyncio.wait((sending,), timeout=5)
        assert isinstance(sending.exception(), LinkLost)
        await clock.sleep(5)
        assert not lines[0].staging.num_lent
        assert p._sender.lanes() == {}
        await fleet.at("d").ask(Release(reserved.kv))
        assert (await fleet.stats("d")).free == 16
