"""Pages that are held against their senders' digests."""

import asyncio

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from two_managers import LAYOUT, PROMPT, admit, is_in_place, prep, running, send

from callboard.bus import AskTimeout
from callboard.kv.digests import Digests
from callboard.kv.lanes import Pace
from callboard.kv.layout import CorruptPages, KvLayout, SlotRun
from callboard.kv.packed_form import packed_bytes
from callboard.kv.packing import pack, unpack
from callboard.kv.page_store import PageStore
from callboard.kv.slots import slot_runs
from callboard.kv.tokens import unpack_tokens

SMALL = KvLayout(num_layers=2, num_kv_heads=1, head_dim=3, block_size=4)


def filled(layout: KvLayout, num_blocks: int, seed: int) -> PageStore:
    store = PageStore.in_process(layout, num_blocks)
    store.view[:] = np.random.default_rng(seed).bytes(len(store.view))
    return store


def digests_of(store: PageStore, table: list[int], begin: int, end: int, cuts: list[int]) -> Digests:
    """Return the digests of the tokens ``[begin, end)``, added part by part."""

    async def add() -> Digests:
        digests = Digests(SMALL, begin, end)
        for first, last in zip([begin, *cuts], [*cuts, end], strict=True):
            for layers in (range(1), range(1, 2)):
                runs = slot_runs(table, first, last, store.layout.block_size)
                await digests.add_pages(store, runs, first, layers)
        return digests

    return asyncio.run(add())


@settings(max_examples=40, deadline=None)
@given(st.data(), st.integers(0, 9), st.integers(1, 10), st.integers(0, 2**32))
def test_parts_add_up_however_they_are_cut_and_wherever_the_blocks_lie(data, begin, length, seed):
    end = begin + length
    table = data.draw(st.permutations(range(6)))
    cuts = sorted(data.draw(st.lists(st.integers(begin, end), max_size=3)))
    store, other = filled(SMALL, 6, seed), PageStore.in_process(SMALL, 6)
    for token in range(begin, end):
        for layer in range(2):
            for half in (0, 1):
                mine, theirs = (t[token // 4] * 4 + token % 4 for t in (table, range(6)))
                other.slot(layer, half, theirs)[:] = store.slot(layer, half, mine)
    whole = digests_of(other, list(range(6)), begin, end, [])
    digests_of(store, table, begin, end, cuts).require(whole.to_bytes(), "r")


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 11), st.integers(0, 1), st.integers(0, 1), st.integers(0, 11), st.integers(1, 255))
def test_one_changed_byte_is_found_and_named(token, layer, half, byte, flip):
    store = filled(SMALL, 3, 7)
    before = digests_of(store, [2, 0, 1], 0, 12, []).to_bytes()
    store.slot(layer, half, [2, 0, 1][token // 4] * 4 + token % 4)[byte] ^= flip
    with pytest.raises(CorruptPages) as caught:
        digests_of(store, [2, 0, 1], 0, 12, []).require(before, "r")
    assert (caught.value.num_pages, caught.value.layer, caught.value.block) == (1, layer, token // 4)


@pytest.mark.parametrize("wire", ["bfloat16", "float16", "float8_e4m3"])
def test_a_sender_foresees_what_a_lossy_wire_makes_of_its_pages(wire):
    layout = KvLayout(num_layers=2, num_kv_heads=2, head_dim=4, block_size=16, dtype="float32")
    target = KvLayout(num_layers=2, num_kv_heads=2, head_dim=4, block_size=8, dtype="bfloat16")
    here, there = PageStore.in_process(layout, 40), PageStore.in_process(target, 80)
    values = np.random.default_rng(3).normal(0, 9, len(here.view) // 4).astype(np.float32)
    here.view[:] = values.tobytes()
    source, slots = [SlotRun(320, 100), SlotRun(16, 240)], [SlotRun(200, 340)]
    packed = bytearray(packed_bytes(layout, 340, 2, wire))
    pack(here, source, range(2), memoryview(packed), wire_dtype=wire)
    unpack(there, slots, range(2), memoryview(packed), wire_dtype=wire)

    async def compare() -> None:
        sent, arrived = Digests(target, 0, 340), Digests(target, 0, 340)
        await sent.add_pages(here, source, 0, range(2), via=wire)
        await arrived.add_pages(there, slots, 0, range(2))
        arrived.require(sent.to_bytes(), "r")

    asyncio.run(compare())


def test_digests_of_another_number_of_pages_are_refused():
    digests = digests_of(filled(SMALL, 3, 7), [2, 0, 1], 0, 12, [])
    for expected in (b"", b"\0" * 4, digests.to_bytes() + b"\0\0\0\0"):
        with pytest.raises(CorruptPages):
            digests.require(expected, "r")


def test_slots_of_broken_words_cannot_be_verified():
    with pytest.raises(ValueError, match="multiple of 4"):
        Digests(KvLayout(1, 1, 1, dtype="bfloat16"), 0, 4)


class Spoiler(Pace):
    """Changes a byte of the peer's pool after the last piece that was copied for layer 1."""

    def __init__(self, store: PageStore, slot: int) -> None:
        self.store = store
        self.slot = slot
        self.is_honest = False

    async def take(self, copy):
        num_bytes = await super().take(copy)
        if not self.is_honest:
            value = self.store.slot(1, 1, self.slot)
            value[2] = ~value[2] & 0xFF if value[2] < 0x80 else value[2]
        return num_bytes


async def test_what_arrives_as_it_was_sent_is_adopted():
    async with running(d_config={"verify": True}) as fleet:
        reserved = await fleet.at("d").ask(prep(PROMPT))
        await fleet.at("p").ask(send(reserved, PROMPT, 0, 6))
        await fleet.at("p").ask(send(reserved, PROMPT, 6, 11))
        admitted = await fleet.at("d").ask(admit(PROMPT, reserved.kv))
        assert is_in_place(fleet, "d", PROMPT, unpack_tokens(admitted.block_table), 0, 11)


async def test_a_corrupt_page_is_refused_before_anybody_can_adopt_it_and_may_be_sent_again():
    async with running(d_config={"verify": True}) as fleet:
        reserved = await fleet.at("d").ask(prep(PROMPT))
        spoiler = Spoiler(fleet.actors["d"].store, reserved.kv.slots[0].slot + 9)
        fleet.actors["p"].pace = lambda to: spoiler
        with pytest.raises(CorruptPages, match="layer 1, block 2 of the prompt"):
            await fleet.at("p").ask(send(reserved, PROMPT))
        with pytest.raises(AskTimeout):
            await fleet.at("d").ask(admit(PROMPT, reserved.kv), timeout=0.1)
        assert (await fleet.stats("d")).cached == 0
        spoiler.is_honest = True
        await fleet.at("p").ask(send(reserved, PROMPT))
        admitted = await fleet.at("d").ask(admit(PROMPT, reserved.kv))
        assert is_in_place(fleet, "d", PROMPT, unpack_tokens(admitted.block_table), 0, 11)


async def test_without_verify_no_digests_are_made(monkeypatch):
    made = []
    monkeypatch.setattr(Digests, "__init__", lambda self, *_: made.append(self))
    async with running() as fleet:
        await fleet.at("p").ask(send(await fleet.at("d").ask(prep(PROMPT)), PROMPT))
        assert (await fleet.stats("d")).num_reservations == 1
    assert not made
    assert LAYOUT.slot_bytes % 4 == 0
