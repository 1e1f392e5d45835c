"""Packing pages for the wire, and converting them between pools: dtypes, block sizes, what is refused, what is left."""

import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from callboard.kv.layout import KvLayout, SlotRun
from callboard.kv.packed_form import WIRE_DTYPES, packed_bytes
from callboard.kv.packing import convert, pack, unpack
from callboard.kv.page_store import PageStore
from callboard.kv.slots import num_slots, pair_runs

DTYPES = ("float32", "bfloat16", "float16")
RUNS = (SlotRun(9, 6), SlotRun(0, 3), SlotRun(28, 12), SlotRun(4, 1))
OTHER_RUNS = (SlotRun(1, 2), SlotRun(30, 18), SlotRun(5, 2))
"""As many slots, of a pool of another block size."""


def a_store(dtype: str, block_size: int = 8, num_blocks: int = 6, num_layers: int = 3, seed: int = 0) -> PageStore:
    store = PageStore.in_process(KvLayout(num_layers, 2, 5, block_size, dtype), num_blocks)
    numbers = torch.randn(len(store.view) // WIRE_DTYPES[dtype], generator=torch.Generator().manual_seed(seed))
    tensor_of(store).view(-1).copy_(numbers)
    return store


def tensor_of(store: PageStore) -> torch.Tensor:
    layout = store.layout
    flat = torch.frombuffer(store.view, dtype=getattr(torch, layout.dtype))
    return flat.view(layout.num_layers, 2, store.num_slots, layout.num_kv_heads, layout.head_dim)


def slots_of(runs: tuple[SlotRun, ...]) -> list[int]:
    return [slot for run in runs for slot in range(run.slot, run.slot + run.count)]


def packed(store: PageStore, wire: str, layers: range = range(3), runs: tuple[SlotRun, ...] = RUNS) -> bytearray:
    data = bytearray(packed_bytes(store.layout, num_slots(runs), len(layers), wire))
    assert pack(store, runs, layers, memoryview(data), wire_dtype=wire) == len(data)
    return data


def values_in(data: bytes, dtype: str, num_layers: int, num_tokens: int) -> torch.Tensor:
    count = 2 * num_layers * num_tokens * 10
    flat = torch.frombuffer(bytearray(data), dtype=getattr(torch, dtype), count=count)
    return flat.view(num_layers, 2, num_tokens, 2, 5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wire", DTYPES)
def test_a_piece_holds_the_tokens_in_their_order_as_torch_converts_them(dtype: str, wire: str) -> None:
    store = a_store(dtype)
    expected = tensor_of(store)[1:3][:, :, slots_of(RUNS)].to(getattr(torch, wire))
    assert torch.equal(values_in(packed(store, wire, range(1, 3)), wire, 2, 22), expected)


def test_a_piece_of_float8_ends_with_a_scale_for_each_16_tokens() -> None:
    store = a_store("bfloat16")
    data = packed(store, "float8_e4m3", range(1, 2))
    assert len(data) == 2 * 22 * 10 + 2 * 2 * 4
    values = tensor_of(store)[1, :, slots_of(RUNS)].float()
    largest = torch.stack([values[:, :16].abs().amax((1, 2, 3)), values[:, 16:].abs().amax((1, 2, 3))], dim=1)
    scales = torch.tensor(struct.unpack("4f", data[-16:])).view(2, 2)
    assert torch.equal(scales, largest / 448)
    codes = torch.frombuffer(data, dtype=torch.uint8, count=440).view(torch.float8_e4m3fn).view(2, 22, 2, 5)
    each = scales.repeat_interleave(16, dim=1)[:, :22, None, None]
    assert torch.equal(codes.float(), (values / each).to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wire", WIRE_DTYPES)
@pytest.mark.parametrize("target_dtype", DTYPES)
def test_what_is_unpacked_lies_in_its_slots_and_nothing_else_is_touched(
    dtype: str, wire: str, target_dtype: str
) -> None:
    source, target = a_store(dtype), a_store(target_dtype, block_size=16, num_blocks=3, seed=1)
    before = tensor_of(target).clone()
    unpack(target, OTHER_RUNS, range(1, 3), packed(source, wire, range(1, 3)), wire_dtype=wire)
    got, wanted = tensor_of(target), tensor_of(source)[1:3][:, :, slots_of(RUNS)]
    if wire == "float8_e4m3":
        error = (got[1:3][:, :, slots_of(OTHER_RUNS)].float() - wanted.float()).abs()
        assert bool((error <= wanted.float().abs() * 2**-3 + 2e-5).all())
    else:
        wanted = wanted.to(getattr(torch, wire)).to(got.dtype)
        assert torch.equal(got[1:3][:, :, slots_of(OTHER_RUNS)], wanted)
    left = [slot for slot in range(target.num_slots) if slot not in slots_of(OTHER_RUNS)]
    assert torch.equal(got[:, :, left], before[:, :, left])
    assert torch.equal(got[0], before[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("other", DTYPES)
@pytest.mark.parametrize("piece_bytes", [1, 100, 1 << 20])
def test_converting_is_packing_and_unpacking(dtype: str, other: str, piece_bytes: int) -> None:
    source = a_store(dtype)
    target, expected = (a_store(other, block_size=16, num_blocks=3, seed=1) for _ in range(2))
    unpack(expected, OTHER_RUNS, range(1, 3), packed(source, other, range(1, 3)), wire_dtype=other)
    pieces = list(convert(source, target, pair_runs(RUNS, OTHER_RUNS), range(1, 3), piece_bytes=piece_bytes))
    assert target.view == expected.view
    assert sum(pieces) == packed_bytes(target.layout, 22, 2, other)
    assert max(pieces) <= max(piece_bytes, 2 * target.layout.slot_bytes)


def test_between_two_pieces_of_a_conversion_the_pools_may_be_closed() -> None:
    source, target = a_store("float32"), a_store("bfloat16")
    pieces = convert(source, target, pair_runs(RUNS, RUNS), range(3), piece_bytes=64)
    assert next(pieces) > 0
    target.close()
    source.close()
    with pytest.raises(ValueError, match="released"):
        next(pieces)


def test_pools_of_different_models_are_not_converted() -> None:
    with pytest.raises(ValueError, match="does not go into a pool of"):
        next(convert(a_store("float32"), a_store("bfloat16", num_layers=2), (), range(2)))


@pytest.mark.parametrize("wire", WIRE_DTYPES)
def test_nothing_is_packed_as_nothing(wire: str) -> None:
    store = a_store("float32")
    for runs, layers in (((), range(3)), (RUNS, range(0)), (RUNS, range(3, 3))):
        assert packed(store, wire, layers, runs) == b""
        unpack(store, runs, layers, memoryview(b""), wire_dtype=wire)


@pytest.mark.parametrize(
    ("runs", "layers", "short", "wire", "sentence"),
    [
        ((SlotRun(46, 3),), range(3), 0, "float32", "48 slots does not have 3 from 46 on"),
        ((SlotRun(-1, 2),), range(3), 0, "float32", "does not have 2 from -1 on"),
        ((SlotRun(5, 0),), range(3), 0, "float32", "does not have 0 from 5 on"),
        (RUNS, range(2, 4), 0, "float32", "no layers of a pool of 3"),
        (RUNS, range(-1, 2), 0, "float32", "no layers of a pool of 3"),
        (RUNS, range(0, 3, 2), 0, "float32", "no layers of a pool of 3"),
        (RUNS, range(3), 1, "float32", "the buffer has"),
        (RUNS, range(3), 1, "float8_e4m3", "the buffer has"),
        (RUNS, range(3), 0, "int8", "cannot be packed as 'int8', only as float32, bfloat16, float16, float8_e4m3"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(runs, layers, short, wire, sentence) -> None:
    store = a_store("float32")
    before = bytes(store.view)
    size = 3 * 2 * 22 * 10 * WIRE_DTYPES.get(wire, 4) + (3 * 2 * 2 * 4 if wire == "float8_e4m3" else 0)
    data = bytearray(b"\x07" * (size - short))
    with pytest.raises(ValueError, match=sentence):
        pack(store, runs, layers, memoryview(data), wire_dtype=wire)
    with pytest.raises(ValueError, match=sentence):
        unpack(store, runs, layers, memoryview(data), wire_dtype=wire)
    assert bytes(store.view) == before
    assert not data.strip(b"\x07")


def test_a_larger_buffer_is_filled_only_as_far_as_needed() -> None:
    store = a_store("float32")
    data = bytearray(b"\x07" * 100_000)
    num_bytes = pack(store, RUNS, range(3), memoryview(data), wire_dtype="bfloat16")
    assert num_bytes == packed_bytes(store.layout, 22, 3, "bfloat16")
    assert not data[num_bytes:].strip(b"\x07")


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(1, 8)), min_size=1, max_size=6),
    st.sampled_from(DTYPES),
    st.sampled_from(sorted(WIRE_DTYPES)),
)
def test_any_runs_come_back_as_the_wire_holds_them(runs, dtype, wire) -> None:
    """Also runs that overlap: a page may be sent twice in one piece."""
    runs = tuple(SlotRun(*run) for run in runs)
    store = a_store(dtype)
    data = packed(store, wire, range(3), runs)
    other = a_store("float32", block_size=num_slots(runs), num_blocks=1)
    unpack(other, (SlotRun(0, num_slots(runs)),), range(3), data, wire_dtype=wire)
    again = packed(other, wire, range(3), (SlotRun(0, num_slots(runs)),))
    if wire == "float8_e4m3":
        assert again[: 60 * num_slots(runs)] == data[: 60 * num_slots(runs)]
    else:
        assert again == data
