"""The wire over UCX by itself: who is let in, what ends it, and when a buffer is its owner's again."""

import asyncio
import os
from collections.abc import AsyncIterator

import pytest
from waiting import PATIENCE_S

from callboard.kv.lanes import TRAILER_BYTES, Invitation, PackedLane, PageWrite, Piece, UcxWires, WireBroken, ucx
from callboard.kv.lanes.ucx import KEY_BYTES, Ucx, UcxListener, is_installed
from callboard.kv.layout import KvLayout, SlotRun
from callboard.kv.packing import unpack
from callboard.kv.page_store import PageStore
from callboard.kv.slots import cut_runs

pytestmark = pytest.mark.skipif(not is_installed(), reason="ucxx is not installed: it is for Linux on x86_64")

SOME = 100_000
LONG = 32 << 20
"""Bytes that take UCX a while."""


@pytest.fixture
async def wires() -> AsyncIterator[UcxWires]:
    wires = UcxWires("127.0.0.1")
    yield wires
    await wires.close()


@pytest.fixture
async def listener() -> AsyncIterator[UcxListener]:
    """A listener that is impatient."""
    ucx = await Ucx.open()
    listener = UcxListener(ucx, "127.0.0.1", show_s=0.2, most_strangers=2)
    yield listener
    listener.close()
    await ucx.close()


def random(num_bytes: int) -> memoryview:
    return memoryview(bytearray(os.urandom(num_bytes)))


def empty(num_bytes: int) -> memoryview:
    return memoryview(bytearray(num_bytes))


async def refused(listener: UcxListener, count: int) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while listener.num_refused < count:
            await asyncio.sleep(0.01)


async def test_messages_find_their_buffers_in_any_order(wires: UcxWires) -> None:
    invitation = await wires.invite()
    wire = await wires.connect(invitation.address, invitation.secret)
    sent = {wires.new_tag(): random(size) for size in (1, 8, SOME, 3 << 20, 17)}
    taken = {tag: empty(len(data)) for tag, data in reversed(sent.items())}
    receiving = [asyncio.ensure_future(invitation.inlet.receive(tag, buffer)) for tag, buffer in taken.items()]
    await asyncio.gather(*(wire.send(tag, data) for tag, data in sent.items()), *receiving)
    assert taken == sent


async def test_a_secret_opens_one_endpoint_and_a_wrong_one_none(wires: UcxWires) -> None:
    invitation = await wires.invite()
    with pytest.raises(WireBroken):
        await wires.connect(invitation.address, bytes(2 * KEY_BYTES))
    await wires.connect(invitation.address, invitation.secret)
    with pytest.raises(WireBroken):
        await wires.connect(invitation.address, invitation.secret)
    assert wires._listener is not None
    assert wires._listener.num_refused == 2


async def test_a_listener_that_does_not_know_the_other_half_gets_no_pages(wires: UcxWires) -> None:
    invitation = await wires.invite()
    with pytest.raises(WireBroken, match="somebody else"):
        await wires.connect(invitation.address, invitation.secret[:KEY_BYTES] + bytes(KEY_BYTES))


async def test_nobody_at_the_address_is_an_error() -> None:
    wires = UcxWires("127.0.0.1", show_s=0.2)
    with pytest.raises(WireBroken):
        await wires.connect("127.0.0.1:1", bytes(2 * KEY_BYTES))
    await wires.close()


@pytest.mark.parametrize("address", ["", "nowhere", "127.0.0.1:", "127.0.0.1:port", "127.0.0.1:99999"])
async def test_what_is_no_address_is_an_error(wires: UcxWires, address: str) -> None:
    with pytest.raises(WireBroken):
        await wires.connect(address, bytes(2 * KEY_BYTES))


async def test_strangers_are_few_and_do_not_stay_and_the_invited_get_in(listener: UcxListener, wires: UcxWires) -> None:
    invitation = listener.invite()
    host, _, port = invitation.address.partition(":")
    ucx = await wires._open()
    strangers = [await ucx.connect(host, int(port)) for _ in range(4)]
    await refused(listener, 4)
    wire = await wires.connect(invitation.address, invitation.secret)
    data, taken = random(SOME), empty(SOME)
    await asyncio.gather(wire.send(7, data), invitation.inlet.receive(7, taken))
    assert taken == data
    for stranger in strangers:
        ucx.discard(stranger)


async def test_noise_at_the_port_keeps_nobody_out(wires: UcxWires) -> None:
    invitation = await wires.invite()
    host, _, port = invitation.address.partition(":")
    _, noisy = await asyncio.open_connection(host, int(port))
    noisy.write(os.urandom(4096))
    await noisy.drain()
    wire = await wires.connect(invitation.address, invitation.secret)
    data, taken = random(SOME), empty(SOME)
    await asyncio.gather(wire.send(7, data), invitation.inlet.receive(7, taken))
    noisy.close()
    assert taken == data


async def test_a_sender_that_never_comes_is_not_waited_for_for_ever(listener: UcxListener) -> None:
    inlet = listener.invite().inlet
    receiving = asyncio.ensure_future(inlet.receive(1, empty(8)))
    await asyncio.sleep(0)
    inlet.close()
    with pytest.raises(WireBroken):
        await receiving


async def start_long(
    wires: UcxWires,
) -> tuple[Invitation, object, asyncio.Future[None], asyncio.Future[None], memoryview]:
    invitation = await wires.invite()
    wire = await wires.connect(invitation.address, invitation.secret)
    buffer = empty(LONG)
    receiving = asyncio.ensure_future(invitation.inlet.receive(7, buffer))
    sending = asyncio.ensure_future(wire.send(7, memoryview(b"x" * LONG)))
    while not any(buffer[::4096]):
        await asyncio.sleep(0)
    return invitation, wire, sending, receiving, buffer


async def test_a_receiver_that_closes_in_the_middle_has_its_buffer_to_itself(wires: UcxWires) -> None:
    invitation, _, sending, receiving, buffer = await start_long(wires)
    invitation.inlet.close()
    # Whether the message still gets through is up to UCX; that both ends come to know is not.
    done, _ = await asyncio.wait((sending, receiving), timeout=20)
    assert len(done) == 2
    assert isinstance(receiving.exception(), (WireBroken, type(None)))
    buffer[:] = bytes(LONG)
    await asyncio.sleep(0.05)
    assert buffer == bytes(LONG)


async def test_giving_up_a_receive_does_not_free_its_memory_before_it_has_ended(wires: UcxWires) -> None:
    _, _, sending, receiving, buffer = await start_long(wires)
    receiving.cancel()
    await asyncio.wait((sending, receiving))
    assert receiving.cancelled()
    # UCX goes on writing: had the buffer gone with the one who waited, it would write into somebody else's memory.
    assert sending.exception() is None
    assert buffer == b"x" * LONG


async def test_closing_a_wire_ends_a_message_that_nobody_takes(wires: UcxWires) -> None:
    invitation = await wires.invite()
    wire = await wires.connect(invitation.address, invitation.secret)
    sending = asyncio.ensure_future(wire.send(7, random(SOME)))
    await asyncio.sleep(0.02)
    assert not sending.done()
    wire.close()
    with pytest.raises(WireBroken):
        await sending


async def test_what_never_ends_does_not_keep_a_process_from_ending(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ucx, "END_S", 0.05)
    library, never = await Ucx.open(), asyncio.Event()
    library.see_out(never.wait())
    async with asyncio.timeout(PATIENCE_S):
        await library.close()
    wires = UcxWires("127.0.0.1")  # Whoever opens it anew finds it as it was.
    invitation = await wires.invite()
    await wires.connect(invitation.address, invitation.secret)
    await wires.close()
    never.set()
    await library.close()


async def test_a_message_that_is_too_long_is_not_taken(wires: UcxWires) -> None:
    invitation = await wires.invite()
    wire = await wires.connect(invitation.address, invitation.secret)
    taken = empty(SOME)
    sending = asyncio.ensure_future(wire.send(7, random(2 * SOME)))
    with pytest.raises(WireBroken):
        await invitation.inlet.receive(7, taken[: SOME // 2])
    invitation.inlet.close()
    await asyncio.wait((sending,))
    assert taken[SOME // 2 :] == bytes(SOME // 2)


async def test_two_writes_of_a_thousand_pieces_share_a_lane(wires: UcxWires) -> None:
    layout = KvLayout(num_layers=4, num_kv_heads=2, head_dim=8, block_size=4)
    source, target = PageStore.in_process(layout, 512), PageStore.in_process(layout, 512)
    source.view[:] = os.urandom(len(source.view))
    invitation, num_pieces = await wires.invite(), 0

    async def take(pages: PageWrite, piece: Piece) -> None:
        nonlocal num_pieces
        num_pieces += 1
        buffer = empty(piece.num_bytes + TRAILER_BYTES)
        await invitation.inlet.receive(piece.tag, buffer)
        runs = cut_runs(pages.target, piece.token_begin - pages.token_begin, piece.token_end - pages.token_begin)
        unpack(target, runs, piece.layers, buffer[: piece.num_bytes], wire_dtype=piece.dtype)

    wire = await wires.connect(invitation.address, invitation.secret)
    lane = PackedLane("ucx", wire, take, dtype="float32", new_tag=wires.new_tag, piece_bytes=1 << 10)

    def pages(begin: int, end: int) -> PageWrite:
        runs = (SlotRun(begin, end - begin),)
        return PageWrite("r", "e", "w", begin, end, range(4), runs, runs)

    written = await asyncio.gather(lane.write(source, pages(0, 1000)), lane.write(source, pages(1000, 2048)))
    assert sum(written) == len(source.view)
    assert num_pieces >= 1000
    assert target.view == source.view
    assert lane.staging.num_lent == 0
