"""What a manager takes that comes packed, what it refuses, and that a sender can neither harm nor wedge it."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from random import Random
from typing import Any

import msgspec
import pytest
from simulated_wires import WireNetwork
from two_managers import (
    LAYOUT,
    PROMPT,
    Fleet,
    admit,
    finish,
    in_virtual_time,
    is_in_place,
    kv_bytes,
    prep,
    running,
    send,
)

from callboard.actors.actor import stop_actor
from callboard.actors.kv_manager import receiver
from callboard.actors.protocol import CloseWrite, Done, OpenWrite, Release, Reserved, TakePages, Tie
from callboard.bus import FOREVER, ActorDied, LinkLost, Ref, Refusal, VirtualClock
from callboard.bus.testing import run_virtual
from callboard.kv.lanes import TRAILER_BYTES, WireBroken
from callboard.kv.layout import BadRange, StaleReservation
from callboard.kv.tokens import unpack_tokens

UCX = {"transport": "ucx"}


def over_wires(break_share: float = 0.0, seed: int = 1) -> Callable[[Callable[[Fleet], Awaitable[None]]], Any]:
    """Run a test on two managers that reach each other over simulated wires alone."""

    def decorate(test: Callable[[Fleet], Awaitable[None]]) -> Any:
        clock = VirtualClock()
        wires = WireNetwork(clock, Random(seed), break_share=break_share)
        return in_virtual_time(p_config=UCX, d_config=UCX, wires=wires)(test)

    return decorate


class ByHand:
    """A sender that does each step when it is told to, right or wrong. It has opened write ``w`` of ``[0, 11)``."""

    def __init__(self, d: Ref, reserved: Reserved, wire: Any) -> None:
        self.d = d
        self.reserved = reserved
        self.wire = wire
        self.piece = TakePages(reserved.kv.reservation_id, reserved.kv.epoch, "w", 0, 11, 0, 3, 77, 528, "float32")
        pages = b"".join(kv_bytes(n, half, i, PROMPT[i]) for n in range(3) for half in (0, 1) for i in range(11))
        self.pages = pages

    async def deliver(self, message: TakePages, *, data: bytes | None = None, tag: int | None = None) -> None:
        """Announce a piece and send it. Raises what it is refused with; the sending has ended by then."""
        tag = message.tag if tag is None else tag
        data = self.pages[: message.num_bytes] if data is None else data
        buffer = memoryview(bytearray(data + tag.to_bytes(TRAILER_BYTES, "little")))
        sending = asyncio.ensure_future(self.wire.send(tag, buffer))
        try:
            assert await self.d.ask(message, timeout=FOREVER) == Done()
        finally:
            await asyncio.wait((sending,))
            sending.exception()


@asynccontextmanager
async def by_hand(fleet: Fleet, *, opens: bool = True) -> AsyncIterator[ByHand]:
    d = fleet.at("d")
    reserved = await d.ask(prep(PROMPT))
    async with d.stream(Tie(reserved.kv.epoch, lanes=("ucx",)), timeout=FOREVER) as items:
        tied = await anext(aiter(items))
        wires = fleet.hub.exchange["wires"]("client")
        wire = await wires.connect(tied.offers[0].address, tied.offers[0].secret)
        if opens:
            await d.ask(OpenWrite(reserved.kv.reservation_id, reserved.kv.epoch, "w", 0, 11))
        yield ByHand(d, reserved, wire)


def lines(fleet: Fleet) -> list[Any]:
    return list(fleet.actors["d"]._receiver._lines.values())


@over_wires()
async def test_pages_go_packed_layer_by_layer_and_are_adopted(fleet: Fleet) -> None:
    reserved = await fleet.at("d").ask(prep(PROMPT, 10))
    sent = await fleet.at("p").ask(send(reserved, PROMPT))
    assert (sent.lane, sent.num_bytes, sent.num_computed_tokens) == ("ucx", 10 * LAYOUT.token_bytes, 10)
    assert fleet.actors["p"]._sender.lanes() == {"d": "ucx"}
    table = unpack_tokens((await fleet.at("d").ask(admit(PROMPT, reserved.kv))).block_table)
    assert is_in_place(fleet, "d", PROMPT, table, 0, 10)
    assert lines(fleet)[0].staging.num_lent == 0


@over_wires()
async def test_a_piece_lands_in_its_slots_and_a_repeat_of_it_is_refused(fleet: Fleet) -> None:
    async with by_hand(fleet) as sender:
        await sender.deliver(sender.piece)
        with pytest.raises(BadRange, match="before"):
            await sender.deliver(sender.piece)
        kv = sender.reserved.kv
        await sender.d.ask(CloseWrite(kv.reservation_id, kv.epoch, "w", is_complete=True))
        table = unpack_tokens((await sender.d.ask(admit(PROMPT, kv))).block_table)
        assert is_in_place(fleet, "d", PROMPT, table, 0, 11)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"epoch": "another"}, StaleReservation),
        ({"reservation_id": "another"}, StaleReservation),
        ({"write_id": "another"}, StaleReservation),
    ],
)
def test_a_piece_of_nothing_that_is_open_is_taken_and_thrown_away(change: Any, error: type[Refusal]) -> None:
    @over_wires()
    async def test(fleet: Fleet) -> None:
        async with by_hand(fleet) as sender:
            before = bytes(fleet.actors["d"].store.view)
            with pytest.raises(error):
                await sender.deliver(msgspec.structs.replace(sender.piece, **change))
            assert fleet.actors["d"].store.view == before
            await sender.deliver(msgspec.structs.replace(sender.piece, tag=78))  # The wire is good still.

    test()


@pytest.mark.parametrize(
    "change",
    [
        {"num_bytes": 527},
        {"num_bytes": 0},
        {"num_bytes": -8},
        {"num_bytes": 1 << 40},
        {"token_begin": 11},
        {"token_begin": -1},
        {"token_end": 1 << 60},
        {"layer_end": 4},
        {"layer_begin": -1},
        {"layer_begin": 3},
        {"wire_dtype": "float8_e4m3"},
        {"wire_dtype": "int4"},
        {"tag": -1},
    ],
)
def test_what_cannot_be_a_piece_of_this_pool_is_refused_and_ends_the_wire(change: Any) -> None:
    @over_wires()
    async def test(fleet: Fleet) -> None:
        async with by_hand(fleet) as sender:
            with pytest.raises(BadRange):
                await sender.d.ask(msgspec.structs.replace(sender.piece, **change))
            with pytest.raises(WireBroken):
                await sender.wire.send(99, memoryview(b"x"))
        assert (await fleet.stats("d")).problems == ()

    test()


@over_wires()
async def test_a_piece_outside_of_its_write_is_refused(fleet: Fleet) -> None:
    async with by_hand(fleet, opens=False) as sender:
        kv = sender.reserved.kv
        await sender.d.ask(OpenWrite(kv.reservation_id, kv.epoch, "w", 4, 8))
        before = bytes(fleet.actors["d"].store.view)
        with pytest.raises(BadRange, match=r"\[4, 8\)"):
            await sender.deliver(sender.piece)
        assert fleet.actors["d"].store.view == before


@over_wires()
async def test_the_write_of_another_writer_is_not_written(fleet: Fleet) -> None:
    async with by_hand(fleet) as sender:
        foreign = fleet.nodes["pe"].ref(sender.d.address)
        with pytest.raises(LinkLost):  # It has no wire of its own.
            await foreign.ask(sender.piece)
        async with foreign.stream(Tie(sender.reserved.kv.epoch, lanes=("ucx",)), timeout=FOREVER) as items:
            [offer] = (await anext(aiter(items))).offers
            wire = await fleet.hub.exchange["wires"]("pe").connect(offer.address, offer.secret)
            with pytest.raises(StaleReservation):
                await ByHand(foreign, sender.reserved, wire).deliver(sender.piece)
        await sender.deliver(sender.piece)


@over_wires()
async def test_fewer_bytes_than_were_announced_are_not_pages(fleet: Fleet) -> None:
    async with by_hand(fleet) as sender:
        before = bytes(fleet.actors["d"].store.view)
        with pytest.raises(LinkLost, match="fewer"):
            await sender.deliver(sender.piece, data=sender.pages[:100])
        assert fleet.actors["d"].store.view == before


@over_wires()
async def test_a_write_that_is_given_up_while_its_pages_arrive_is_not_written(fleet: Fleet) -> None:
    async with by_hand(fleet) as sender:
        arriving = asyncio.ensure_future(sender.deliver(sender.piece))
        await asyncio.sleep(1e-4)
        before = bytes(fleet.actors["d"].store.view)
        await sender.d.ask(Release(sender.reserved.kv))
        with pytest.raises(StaleReservation, match="given up"):
            await arriving
        assert fleet.actors["d"].store.view == before
        assert (await fleet.stats("d")).quarantined == 3
        await sender.d.ask(CloseWrite(sender.piece.reservation_id, sender.piece.epoch, "w", is_complete=False))
        assert (await fleet.stats("d")).free == 16


@over_wires()
async def test_pages_that_are_announced_and_never_come_are_not_waited_for_past_the_tie(fleet: Fleet) -> None:
    async with by_hand(fleet) as sender:
        asking = [
            asyncio.ensure_future(sender.d.ask(msgspec.structs.replace(sender.piece, tag=tag), timeout=FOREVER))
            for tag in range(10)
        ]
        await asyncio.sleep(1)
        [line] = lines(fleet)
        assert line.staging.num_lent == 4
    await asyncio.wait(asking)
    assert all(isinstance(each.exception(), LinkLost) for each in asking)
    await asyncio.sleep(1)
    assert not lines(fleet)
    assert line.staging.num_lent == 0
    assert (await fleet.stats("d")).problems == ()


def test_one_that_announces_more_and_more_and_sends_nothing_loses_its_wire(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receiver, "MOST_TAGS", 8)

    @over_wires()
    async def test(fleet: Fleet) -> None:
        async with by_hand(fleet) as sender:
            asking = [
                asyncio.ensure_future(sender.d.ask(msgspec.structs.replace(sender.piece, tag=tag), timeout=FOREVER))
                for tag in range(9)
            ]
            await asyncio.wait(asking, timeout=5)
        assert all(each.done() for each in asking)
        assert {type(each.exception()) for each in asking[:8]} == {LinkLost}
        assert isinstance(asking[8].exception(), BadRange)

    test()


@over_wires()
async def test_one_that_gives_up_waiting_does_not_free_the_buffer_that_is_being_filled(fleet: Fleet) -> None:
    async with by_hand(fleet) as sender:
        asking = asyncio.ensure_future(sender.d.ask(sender.piece, timeout=FOREVER))
        await asyncio.sleep(0.1)
        asking.cancel()
        await asyncio.sleep(0.1)
        [line] = lines(fleet)
        assert line.staging.num_lent == 1
        await sender.wire.send(77, memoryview(sender.pages + (77).to_bytes(TRAILER_BYTES, "little")))
        await asyncio.sleep(0.1)
        assert line.staging.num_lent == 0


@over_wires()
async def test_a_manager_that_crashed_has_stopped_when_nothing_goes_over_its_wires_any_more(fleet: Fleet) -> None:
    reserved = await fleet.at("d").ask(prep(PROMPT, 10))
    sending = asyncio.ensure_future(fleet.at("p").ask(send(reserved, PROMPT)))
    manager = fleet.actors.pop("p")

    def num_under_way() -> int:
        return sum(len(end._under_way) for end in manager.wires._ends)

    while not num_under_way():
        await asyncio.sleep(1e-4)
    fleet.nodes["p"].crash("p", RuntimeError("planted"))
    await asyncio.sleep(0)  # What ends its tasks has begun; now its process stops, and ends them once more.
    await asyncio.sleep(0)
    await stop_actor(manager)
    assert not num_under_way()
    with pytest.raises(ActorDied, match="planted"):
        await sending


@over_wires()
async def test_a_write_whose_tie_broke_is_over_and_cannot_be_completed(fleet: Fleet) -> None:
    async with by_hand(fleet) as sender:
        await sender.deliver(sender.piece)
    await asyncio.sleep(1)
    kv = sender.reserved.kv
    with pytest.raises(StaleReservation):
        await sender.d.ask(CloseWrite(kv.reservation_id, kv.epoch, "w", is_complete=True))
    await sender.d.ask(CloseWrite(kv.reservation_id, kv.epoch, "w", is_complete=False))
    await sender.d.ask(Release(kv))
    assert (await fleet.stats("d")).free == 16


@over_wires()
async def test_a_second_tie_takes_the_place_of_the_first(fleet: Fleet) -> None:
    async with by_hand(fleet) as sender:
        async with sender.d.stream(Tie(sender.reserved.kv.epoch, lanes=("ucx",)), timeout=FOREVER) as items:
            await anext(aiter(items))
            with pytest.raises(WireBroken):
                await sender.wire.send(5, memoryview(b"x"))
            assert len(lines(fleet)) == 1


@pytest.mark.parametrize("lanes", [(), ("cuda_ipc",), ("shm",), ("carrier pigeon",)])
def test_a_writer_that_cannot_go_any_lane_there_is_hears_so(lanes: tuple[str, ...]) -> None:
    @over_wires()
    async def test(fleet: Fleet) -> None:
        reserved = await fleet.at("d").ask(prep(PROMPT))
        with pytest.raises(Refusal, match="no lane leads to d"):
            async with fleet.at("d").stream(Tie(reserved.kv.epoch, lanes=lanes)) as items:
                await anext(aiter(items))

    test()


@pytest.mark.parametrize("seed", range(6))
def test_cables_that_break_cost_a_retry_and_nothing_else(seed: int) -> None:
    network = WireNetwork(VirtualClock(), Random(seed), break_share=0.04)

    async def main() -> None:
        async with running(UCX, UCX, network.clock, network) as fleet:
            num_failed = 0
            for number in range(12):
                ids = [100 * number + i for i in range(11)]
                reserved = await fleet.at("d").ask(prep(ids, 10, request_id=f"r{number}"))
                while True:
                    sending = asyncio.ensure_future(fleet.at("p").ask(send(reserved, ids), timeout=20))
                    if network.rng.random() < 0.2:
                        await asyncio.wait((sending,), timeout=network.rng.uniform(0.0, 0.05))
                        sending.cancel()
                    await asyncio.wait((sending,))
                    if not sending.cancelled() and sending.exception() is None:
                        break
                    assert sending.cancelled() or isinstance(sending.exception(), LinkLost)
                    num_failed += 1
                admitted = await fleet.at("d").ask(admit(ids, reserved.kv, sequence_id=f"s{number}"))
                assert is_in_place(fleet, "d", ids, unpack_tokens(admitted.block_table), 0, 10)
                fleet.at("d").tell(finish(ids, admitted.block_table, sequence_id=f"s{number}"))
                await fleet.stats("p")
            assert num_failed
            await asyncio.sleep(1)
            assert sum(line.staging.num_lent for line in lines(fleet)) == 0
            assert len(lines(fleet)) <= 1

    run_virtual(main)
