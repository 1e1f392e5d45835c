"""The packed lane over cables that are slow and break: what it moved is right, and what it left is left alone."""

import asyncio
from collections.abc import Sequence
from random import Random

import pytest
from simulated_wires import WireNetwork

from callboard.bus import LinkLost, Refusal, VirtualClock
from callboard.bus.testing import run_virtual
from callboard.kv.lanes import TRAILER_BYTES, Inlet, LaneClosed, PackedLane, PageWrite, Piece, WireBroken
from callboard.kv.lanes.packed import NUM_BUFFERS, cut_pages
from callboard.kv.layout import KvLayout, SlotRun
from callboard.kv.packed_form import packed_bytes
from callboard.kv.packing import unpack
from callboard.kv.page_store import PageStore
from callboard.kv.slots import cut_runs

LAYOUT = KvLayout(num_layers=3, num_kv_heads=1, head_dim=2, block_size=4)
NUM_BLOCKS = 8
PIECE_BYTES = 200


def scattered(rng: Random, num_tokens: int) -> tuple[SlotRun, ...]:
    """Return slots in some order, as those of scattered blocks are."""
    blocks = rng.sample(range(NUM_BLOCKS), NUM_BLOCKS)
    runs = [SlotRun(block * 4, 4) for block in blocks]
    return cut_runs(runs, 1, 1 + num_tokens)


def slots_of(runs: Sequence[SlotRun]) -> list[int]:
    return [slot for run in runs for slot in range(run.slot, run.slot + run.count)]


class Far:
    """The receiving side: takes what is announced, in its own time, and refuses some of it."""

    def __init__(self, inlet: Inlet, network: WireNetwork, *, refuse_share: float) -> None:
        self.store = PageStore.in_process(LAYOUT, NUM_BLOCKS)
        self._inlet = inlet
        self._network = network
        self._refuse_share = refuse_share

    async def take(self, pages: PageWrite, piece: Piece) -> None:
        buffer = memoryview(bytearray(piece.num_bytes + TRAILER_BYTES))
        await self._network.delay()
        try:
            await self._inlet.receive(piece.tag, buffer)
        except WireBroken:
            raise LinkLost from None
        assert int.from_bytes(buffer[piece.num_bytes :], "little") == piece.tag
        await self._network.delay()
        if self._network.rng.random() < self._refuse_share:
            raise Refusal
        runs = cut_runs(pages.target, piece.token_begin - pages.token_begin, piece.token_end - pages.token_begin)
        unpack(self.store, runs, piece.layers, buffer[: piece.num_bytes], wire_dtype=piece.dtype)
        await self._network.delay()


async def one_run(seed: int, *, break_share: float, refuse_share: float, num_writes: int) -> list[str]:
    """Do some writes at once, each of its own slots; return how they ended."""
    rng = Random(seed)
    network = WireNetwork(VirtualClock(), rng, break_share=break_share)
    receiving, sending = network("d"), network("p")
    invitation = await receiving.invite()
    far = Far(invitation.inlet, network, refuse_share=refuse_share)
    wire = await sending.connect(invitation.address, invitation.secret)
    lane = PackedLane(
        "ucx", wire, far.take, dtype="float32", new_tag=lambda: rng.getrandbits(64), piece_bytes=PIECE_BYTES
    )
    source = PageStore.in_process(LAYOUT, NUM_BLOCKS)
    source.view[:] = rng.randbytes(len(source.view))
    before = bytes(source.view)
    all_source, all_target = scattered(rng, 24), scattered(rng, 24)

    async def write(number: int) -> str:
        begin, end = number * 24 // num_writes, (number + 1) * 24 // num_writes
        runs, target = cut_runs(all_source, begin, end), cut_runs(all_target, begin, end)
        pages = PageWrite("r", "e", f"w{number}", begin, end, range(3), runs, target)
        writing = asyncio.ensure_future(lane.write(source, pages))
        if rng.random() < 0.3:
            await asyncio.wait((writing,), timeout=rng.uniform(0.0, 0.03))
            writing.cancel()
            await asyncio.wait((writing,), timeout=0)
            writing.cancel()  # Those in a hurry do it twice.
        await asyncio.wait((writing,))
        # It is over: what lies in its slots is theirs whose they are now, and stays.
        for slot in slots_of(runs):
            for layer in range(3):
                source.slot(layer, 0, slot)[:] = source.slot(layer, 1, slot)[:] = b"\xee" * 8
        result = "cancelled" if writing.cancelled() else type(writing.exception()).__name__
        if result == "NoneType":
            assert writing.result() == packed_bytes(LAYOUT, end - begin, 3, "float32")
        for at, to in zip(slots_of(runs), slots_of(target), strict=True):
            for layer in range(3):
                for half in (0, 1):
                    found, begin_at = bytes(far.store.slot(layer, half, to)), source.offset(layer, half, at)
                    assert found in (before[begin_at : begin_at + 8], bytes(8))
                    assert result != "NoneType" or found != bytes(8)
                    far.store.slot(layer, half, to)[:] = b"\xdd" * 8
        return result

    writes = [asyncio.ensure_future(write(number)) for number in range(num_writes)]
    if rng.random() < 0.2:
        await asyncio.wait(writes, timeout=rng.uniform(0.0, 0.03))
        lane.close()
    results = await asyncio.gather(*writes)
    await asyncio.sleep(10)
    assert all(far.store.slot(2, 1, to) == b"\xdd" * 8 for to in slots_of(all_target)), "touched after the end"
    assert lane.staging.num_lent == 0
    lane.close()
    return results


@pytest.mark.parametrize(("break_share", "refuse_share"), [(0.0, 0.0), (0.01, 0.0), (0.0, 0.05), (0.02, 0.02)])
def test_a_write_that_is_over_is_right_or_failed_and_touches_nothing_more(
    break_share: float, refuse_share: float
) -> None:
    ends: set[str] = set()
    for seed in range(60):

        async def main(seed: int = seed) -> list[str]:
            num_writes = 1 + seed % 4
            return await one_run(seed, break_share=break_share, refuse_share=refuse_share, num_writes=num_writes)

        ends.update(run_virtual(main))
    assert {"NoneType", "cancelled", "LaneClosed"} <= ends
    assert ("Refusal" in ends) == bool(refuse_share)
    assert not ends - {"NoneType", "cancelled", "LaneClosed", "Refusal", "LinkLost"}


def test_all_that_is_written_after_the_wires_were_closed_has_ended_at_once() -> None:
    async def main() -> None:
        network = WireNetwork(VirtualClock(), Random(1))
        sending = network("p")
        invitation = await network("d").invite()
        wire = await sending.connect(invitation.address, invitation.secret)
        far = Far(invitation.inlet, network, refuse_share=0.0)
        lane = PackedLane("ucx", wire, far.take, dtype="float32", new_tag=sending.new_tag)
        source = PageStore.in_process(LAYOUT, NUM_BLOCKS)
        runs = scattered(Random(1), 4)
        await sending.close()
        begin_s = asyncio.get_running_loop().time()
        with pytest.raises(LaneClosed):
            await lane.write(source, PageWrite("r", "e", "w", 0, 4, range(3), runs, runs))
        assert asyncio.get_running_loop().time() == begin_s
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert lane.staging.num_lent == 0

    run_virtual(main)


@pytest.mark.parametrize("dtype", ["float32", "float8_e4m3"])
@pytest.mark.parametrize("num_tokens", [1, 15, 16, 17, 33, 1000])
@pytest.mark.parametrize("piece_bytes", [100, 1000, 1 << 20])
def test_pieces_cover_every_token_of_every_layer_once(dtype: str, num_tokens: int, piece_bytes: int) -> None:
    layout = KvLayout(num_layers=5, num_kv_heads=2, head_dim=3)
    pages = PageWrite("r", "e", "w", 7, 7 + num_tokens, range(1, 5), (), ())
    covered: list[tuple[int, int]] = []
    for begin, end, layers in cut_pages(layout, pages, dtype, piece_bytes):
        assert 0 < packed_bytes(layout, end - begin, len(layers), dtype) <= piece_bytes
        covered += [(layer, token) for layer in layers for token in range(begin, end)]
    assert sorted(covered) == [(layer, token) for layer in range(1, 5) for token in range(7, 7 + num_tokens)]


def test_a_token_that_does_not_fit_into_a_piece_is_an_error() -> None:
    pages = PageWrite("r", "e", "w", 0, 1, range(1), (), ())
    with pytest.raises(ValueError, match="more than 8 bytes"):
        next(cut_pages(LAYOUT, pages, "float32", 8))


def test_the_next_piece_is_packed_while_one_is_in_flight_and_no_more_than_there_are_buffers() -> None:
    async def main() -> None:
        network = WireNetwork(VirtualClock(), Random(1))
        invitation = await network("d").invite()
        wire = await network("p").connect(invitation.address, invitation.secret)
        far = Far(invitation.inlet, network, refuse_share=0.0)
        may_take, num_announced = asyncio.Event(), 0

        async def take(pages: PageWrite, piece: Piece) -> None:
            nonlocal num_announced
            num_announced += 1
            await may_take.wait()
            await far.take(pages, piece)

        lane = PackedLane(
            "ucx", wire, take, dtype="float32", new_tag=lambda: network.rng.getrandbits(64), piece_bytes=64
        )
        source, runs = PageStore.in_process(LAYOUT, NUM_BLOCKS), (SlotRun(0, 24),)
        writing = asyncio.ensure_future(lane.write(source, PageWrite("r", "e", "w", 0, 24, range(3), runs, runs)))
        await asyncio.sleep(5)
        assert num_announced == NUM_BUFFERS > 1
        may_take.set()
        assert await writing == 24 * LAYOUT.token_bytes

    run_virtual(main)


def test_a_receiver_without_its_end_of_the_wire_ends_the_lane() -> None:
    async def main() -> None:
        network, broken = WireNetwork(VirtualClock(), Random(1)), []
        invitation = await network("d").invite()
        wire = await network("p").connect(invitation.address, invitation.secret)

        async def take(pages: PageWrite, piece: Piece) -> None:
            raise LinkLost("the pages did not arrive")

        lane = PackedLane("ucx", wire, take, dtype="float32", new_tag=lambda: 1, on_break=lambda: broken.append(1))
        source, runs = PageStore.in_process(LAYOUT, NUM_BLOCKS), (SlotRun(0, 4),)
        pages = PageWrite("r", "e", "w", 0, 4, range(3), runs, runs)
        writing = asyncio.ensure_future(lane.write(source, pages))
        await asyncio.sleep(1)
        lane.close()
        with pytest.raises((LinkLost, LaneClosed)):
            await writing
        with pytest.raises(LaneClosed):
            await lane.write(source, pages)

    run_virtual(main)


class StuckWire:
    """Takes a message, and never lets go of it: not even when it is closed."""

    async def send(self, tag: int, data: memoryview) -> None:
        await asyncio.get_running_loop().create_future()

    def close(self) -> None:
        pass


@pytest.mark.parametrize("is_under_way", [True, False])
def test_a_lane_that_is_closed_waits_neither_for_its_wire_nor_for_an_answer(is_under_way: bool) -> None:
    async def main() -> None:
        announced: list[int] = []

        async def take(pages: PageWrite, piece: Piece) -> None:
            announced.append(piece.tag)
            await asyncio.get_running_loop().create_future()

        def new_tag() -> int:
            if not is_under_way:  # Between packing and sending.
                asyncio.get_running_loop().call_soon(lane.close)
            return 1

        lane = PackedLane("ucx", StuckWire(), take, dtype="float32", new_tag=new_tag)
        source, runs = PageStore.in_process(LAYOUT, NUM_BLOCKS), (SlotRun(0, 4),)
        writing = asyncio.ensure_future(lane.write(source, PageWrite("r", "e", "w", 0, 4, range(3), runs, runs)))
        await asyncio.sleep(1)
        lane.close()
        await asyncio.wait((writing,), timeout=1)
        assert isinstance(writing.exception(), LaneClosed)
        assert announced == ([1] if is_under_way else [])

    run_virtual(main)


def test_a_wire_that_fails_as_none_should_ends_the_write_at_once() -> None:
    class Faulty(StuckWire):
        async def send(self, tag: int, data: memoryview) -> None:
            raise RuntimeError("a fault of the library")

    async def main() -> None:
        async def take(pages: PageWrite, piece: Piece) -> None:
            await asyncio.get_running_loop().create_future()

        lane = PackedLane("ucx", Faulty(), take, dtype="float32", new_tag=lambda: 1)
        source, runs = PageStore.in_process(LAYOUT, NUM_BLOCKS), (SlotRun(0, 4),)
        with pytest.raises(RuntimeError):
            await lane.write(source, PageWrite("r", "e", "w", 0, 4, range(3), runs, runs))

    run_virtual(main)
