"""Conversions in numpy are those of torch, bit for bit; whatever the shapes, pages are those of the torch reference."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from callboard.kernels import pages_numpy, pages_reference
from callboard.kernels.pages import SlotTable

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
LOWER_HALVES = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
"""Those that decide how the upper half of a float32 is rounded."""
UPPER_HALVES = np.arange(1 << 16, dtype=np.uint32) << 16
NUMBERS = {
    "float32": (UPPER_HALVES[:, None] | LOWER_HALVES).reshape(-1).view(np.float32),
    "bfloat16": np.arange(1 << 16, dtype=np.uint16),
    "float16": np.arange(1 << 16, dtype=np.uint16).view(np.float16),
}


def as_torch(values: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(values.view(f"i{values.itemsize}" if values.itemsize > 1 else "u1")).view(dtype)


def as_numpy(values: torch.Tensor, dtype: str) -> np.ndarray:
    return values.view(BITS[values.element_size()]).numpy().view(pages_numpy.STORAGE[dtype])


def assert_same(got: torch.Tensor, expected: torch.Tensor) -> None:
    is_nan = expected.float().isnan()
    assert torch.equal(got.float().isnan(), is_nan)
    bits = BITS[got.element_size()]
    assert torch.equal(got.view(bits)[~is_nan], expected.view(bits)[~is_nan])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("other", DTYPES)
def test_every_number_is_converted_as_torch_does(dtype: str, other: str) -> None:
    numbers = NUMBERS[dtype]
    got = np.empty(numbers.shape, pages_numpy.STORAGE[other])
    pages_numpy.cast(numbers, dtype, got, other)
    assert_same(as_torch(got, DTYPES[other]), as_torch(numbers, DTYPES[dtype]).to(DTYPES[other]))


def test_every_number_becomes_the_float8_that_torch_makes_of_it() -> None:
    numbers = NUMBERS["float32"]
    expected = torch.from_numpy(numbers).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert_same(as_torch(pages_numpy.encode(numbers), torch.float8_e4m3fn), expected)


def test_every_float8_is_read_as_torch_does() -> None:
    codes = np.arange(256, dtype=np.uint8)
    assert_same(torch.from_numpy(pages_numpy.decoding_table()[codes]), as_torch(codes, torch.float8_e4m3fn).float())


@pytest.mark.parametrize(
    ("values", "scale"),
    [
        ([0.0, -0.0], 1.0),
        ([448.0, -1.0], 1.0),
        ([1.0, -896.0], 2.0),
        ([float("nan"), 224.0], 0.5),
        ([float("-inf"), 224.0], 0.5),
        ([float("inf"), float("nan")], 1.0),
        ([1e-44, 0.0], 2.0**-126),
        ([3.4028234663852886e38, 1.0], np.float32(3.4028234663852886e38) / np.float32(448)),
    ],
)
def test_a_scale_is_the_largest_finite_magnitude_over_448(values: list[float], scale: float) -> None:
    rows = np.array([values], np.float32)
    assert pages_numpy.scales_of(rows).tolist() == [scale]
    assert pages_reference.scale_of(torch.from_numpy(rows).view(1, 1, 1, 1, 2)).flatten().tolist() == [scale]


def test_the_largest_float32_comes_back_finite() -> None:
    largest = np.full((1, 2, 16, 4), np.finfo(np.float32).max, np.float32)
    codes, scales = np.empty(largest.shape, np.uint8), np.empty((1, 2, 1), np.float32)
    pages_numpy.quantize(largest.copy(), codes, scales)
    np.testing.assert_allclose(pages_numpy.dequantize(codes, scales), largest, rtol=1e-6)


@st.composite
def runs_in(draw: st.DrawFn, num_slots: int) -> list[tuple[int, int]]:
    """Draw disjoint runs of slots, in any order."""
    cuts = sorted(draw(st.sets(st.integers(0, num_slots), min_size=2, max_size=8)))
    runs = [(begin, end - begin) for begin, end in pairwise(cuts)]
    return draw(st.permutations(runs))[: draw(st.integers(1, len(runs)))]


@st.composite
def cases(draw: st.DrawFn) -> tuple[tuple[int, ...], list[tuple[int, int]], int, int]:
    num_layers, num_blocks, block_size = draw(st.integers(1, 3)), draw(st.integers(1, 6)), draw(st.integers(1, 17))
    shape = (num_layers, 2, num_blocks, block_size, draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 5, 8])))
    return shape, draw(runs_in(num_blocks * block_size)), draw(st.integers(1, 300)), draw(st.integers(0, 1000))


def random_kv(shape: tuple[int, ...], dtype: str, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator).to(DTYPES[dtype])
    values[:, 1, 0] = 0
    values.view(-1)[:: 37 + seed] = float("nan")
    values.view(-1)[:: 41 + seed] = float("-inf")
    return values


@settings(max_examples=60, deadline=None)
@given(cases(), st.sampled_from(sorted(DTYPES)), st.sampled_from([*sorted(DTYPES), "float8_e4m3"]))
def test_pages_are_packed_and_unpacked_as_the_reference_does(case, dtype, wire):
    shape, runs, part, seed = case
    kept, pages_numpy.PART = pages_numpy.PART, part
    try:
        pool = random_kv(shape, dtype, seed)
        slots = SlotTable.of_runs(runs, "cpu").slots
        layers, heads = range(seed % shape[0], shape[0]), range(seed % shape[4], shape[4])
        size = (len(layers), 2, len(slots), len(heads), shape[5])
        is_scaled = wire == "float8_e4m3"
        wire_dtype = torch.float8_e4m3fn if is_scaled else DTYPES[wire]
        packed = torch.zeros(size).to(wire_dtype)
        scales = torch.zeros(*size[:2], -(-len(slots) // 16)) if is_scaled else None
        pages_reference.gather(pool, slots, packed, layers, heads, scales)
        pool_array = as_numpy(pool.flatten(2, 3), dtype)[layers.start :, :, :, heads.start :]
        got = np.zeros(size, pages_numpy.STORAGE[wire])
        got_scales = np.zeros(scales.shape if is_scaled else 0, np.float32)
        if is_scaled:
            pages_numpy.gather_scaled(pool_array, dtype, runs, got, got_scales)
            assert torch.equal(torch.from_numpy(got_scales), scales)
        else:
            pages_numpy.gather(pool_array, dtype, runs, got, wire)
        assert_same(as_torch(got, wire_dtype), packed)

        expected = torch.full(shape, 3, dtype=DTYPES[dtype])
        target = expected.clone()
        pages_reference.scatter(packed, expected, slots, layers, heads, scales)
        target_array = as_numpy(target.flatten(2, 3), dtype)[layers.start :, :, :, heads.start :]
        if is_scaled:
            pages_numpy.scatter_scaled(as_numpy(packed, wire), got_scales, target_array, dtype, runs)
        else:
            pages_numpy.scatter(as_numpy(packed, wire), wire, target_array, dtype, runs)
        assert_same(target, expected)
    finally:
        pages_numpy.PART = kept


@given(st.integers(1, 40), st.integers(1, 100), st.integers(1, 50), st.integers(1, 5000))
def test_parts_cover_everything_once_and_are_small(num_layers, num_tokens, width, size):
    covered = np.zeros((num_layers, num_tokens), int)
    for layers, tokens in pages_numpy.parts(num_layers, num_tokens, width, size):
        covered[layers, tokens] += 1
        part = covered[layers, tokens].size * 2 * width
        assert part <= size or part == 2 * width
    assert (covered == 1).all()
