"""KV sent into pools of another dtype and another block size: each token lies where it should, rounded once."""

import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import torch
from two_managers import PROMPT, Fleet, admit, finish, prep, send

from callboard.actors.actor import stop_actor
from callboard.kv.lanes.ucx import is_installed
from callboard.kv.layout import KvLayout, StaleReservation
from callboard.kv.tokens import unpack_tokens

DTYPES = ("float32", "bfloat16", "float16")


def layout(dtype: str, block_size: int = 4, num_layers: int = 3) -> KvLayout:
    return KvLayout(num_layers, 1, 2, block_size, dtype)


def kv_of(layer: int, half: int, position: int, token: int) -> list[float]:
    """Return what an engine computes: numbers that neither bfloat16 nor float16 holds."""
    return [(1000 * layer + 100 * half + 10 * position + token) / 7, -token / 3]


def tensor_of(layer: int, half: int, position: int, token: int) -> torch.Tensor:
    return torch.frombuffer(bytearray(struct.pack("2f", *kv_of(layer, half, position, token))), dtype=torch.float32)


@asynccontextmanager
async def managers(p: KvLayout, d: KvLayout, **config: Any) -> AsyncIterator[Fleet]:
    """Two KV managers of those layouts; the engine at ``p`` computes in the dtype of its pool."""

    def kv(layer: int, half: int, position: int, token: int) -> bytes:
        return bytes(tensor_of(layer, half, position, token).to(getattr(torch, p.dtype)).view(torch.uint8).tolist())

    fleet = Fleet(None)
    try:
        await fleet.node("client")
        at_p = await fleet.manager("p", layout=p, **config)
        at_d = await fleet.manager("d", layout=d, **config)
        await fleet.engine("pe", at_p, layout=p, kv=kv)
        await fleet.engine("de", at_d, layout=d)
        yield fleet
    finally:
        for actor in reversed(fleet.actors.values()):
            await stop_actor(actor)
        for node in reversed(fleet.nodes.values()):
            await node.stop()


def assert_in_place(
    fleet: Fleet, source: KvLayout, target: KvLayout, table: list[int], *, via: str = "", error: float = 0.0
) -> None:
    """Raise AssertionError unless ``d`` holds the prompt's KV as converted by way of ``via``, up to a share of it."""
    store = fleet.actors["d"].store
    for layer in range(3):
        for half in (0, 1):
            for position in range(len(PROMPT)):
                slot = table[position // target.block_size] * target.block_size + position % target.block_size
                got = torch.frombuffer(bytearray(store.slot(layer, half, slot)), dtype=getattr(torch, target.dtype))
                computed = tensor_of(layer, half, position, PROMPT[position]).to(getattr(torch, source.dtype))
                expected = computed.to(getattr(torch, via or target.dtype)).to(got.dtype)
                assert ((got - expected).abs() <= error * expected.abs()).all(), (layer, half, position)


@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("target", DTYPES)
@pytest.mark.parametrize("sizes", [(4, 4), (4, 8), (8, 3)])
async def test_pages_arrive_in_a_pool_of_another_kind(source: str, target: str, sizes: tuple[int, int]) -> None:
    p, d = layout(source, sizes[0]), layout(target, sizes[1])
    async with managers(p, d) as fleet:
        reserved = await fleet.at("d").ask(prep(PROMPT))
        sent = await fleet.at("p").ask(send(reserved, PROMPT))
        assert (sent.lane, sent.num_bytes) == ("inproc", 11 * d.token_bytes)
        admitted = await fleet.at("d").ask(admit(PROMPT, reserved.kv))
        table = unpack_tokens(admitted.block_table)
        assert (admitted.num_cached_tokens, len(table)) == (11, -(-11 // d.block_size))
        assert_in_place(fleet, p, d, table)
        fleet.at("d").tell(finish(PROMPT, admitted.block_table))
        stats = await fleet.stats("d")
        assert (stats.cached, stats.free) == (11 // d.block_size, 16 - 11 // d.block_size)


@pytest.mark.parametrize("begin", [1, 4, 5, 8, 10])
async def test_ranges_meet_inside_the_blocks_of_both_pools(begin: int) -> None:
    p, d = layout("float32", 4), layout("bfloat16", 8)
    async with managers(p, d) as fleet:
        reserved = await fleet.at("d").ask(prep(PROMPT))
        for first, last in ((begin, 11), (0, begin)):
            await fleet.at("p").ask(send(reserved, PROMPT, first, last))
        table = unpack_tokens((await fleet.at("d").ask(admit(PROMPT, reserved.kv))).block_table)
        assert_in_place(fleet, p, d, table)


async def test_what_is_cached_is_found_again_and_sent_again() -> None:
    p, d = layout("bfloat16", 8), layout("float32", 4)
    async with managers(p, d) as fleet:
        first = await fleet.at("d").ask(prep(PROMPT, request_id="a"))
        await fleet.at("p").ask(send(first, PROMPT, request_id="a"))
        table = (await fleet.at("d").ask(admit(PROMPT, first.kv))).block_table
        fleet.at("d").tell(finish(PROMPT, table))
        await fleet.settle()
        second = await fleet.at("d").ask(prep(PROMPT, request_id="b"))
        assert second.begin == 8
        sent = await fleet.at("p").ask(send(second, PROMPT, request_id="b"))
        assert (sent.num_reused_tokens, sent.num_bytes) == (8, 3 * d.token_bytes)
        table = unpack_tokens((await fleet.at("d").ask(admit(PROMPT, second.kv, sequence_id="t"))).block_table)
        assert_in_place(fleet, p, d, table)


@pytest.mark.skipif(not is_installed(), reason="ucxx is not installed: it is for Linux on x86_64")
@pytest.mark.parametrize("wire", ["", "bfloat16", "float8_e4m3"])
@pytest.mark.parametrize("verify", [False, True])
async def test_pages_are_on_the_wire_what_the_receiver_wants(wire: str, verify: bool) -> None:
    p, d = layout("float32", 4), layout("float16", 8)
    async with managers(p, d, transport="ucx", wire_dtype=wire, verify=verify) as fleet:
        reserved = await fleet.at("d").ask(prep(PROMPT))
        sent = await fleet.at("p").ask(send(reserved, PROMPT))
        table = unpack_tokens((await fleet.at("d").ask(admit(PROMPT, reserved.kv))).block_table)
        if wire != "float8_e4m3":
            assert (sent.lane, sent.num_bytes) == ("ucx", 11 * d.token_bytes)
            assert_in_place(fleet, p, d, table, via=wire)
        else:
            assert sent.lane == "ucx"
            # Half the bytes, and at least a scale for each layer's keys and values.
            assert 11 * d.token_bytes // 2 + 3 * 2 * 4 <= sent.num_bytes < 11 * d.token_bytes
            assert_in_place(fleet, p, d, table, error=2**-4 + 2**-10)


async def test_the_kv_of_another_model_is_refused_and_nothing_is_left_behind() -> None:
    async with managers(layout("float32"), layout("float32", num_layers=2)) as fleet:
        reserved = await fleet.at("d").ask(prep(PROMPT))
        with pytest.raises(StaleReservation, match="another model"):
            await fleet.at("p").ask(send(reserved, PROMPT))
        assert fleet.actors["pe"].num_computed == 0
        assert (await fleet.stats("p")).free == 16
