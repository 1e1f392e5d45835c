"""KV pages gathered, scattered and converted on the CPU, in numpy: the path of a KV manager, which loads no torch.

A pool is an array ``[num_layers, 2, num_slots, num_kv_heads, head_dim]``, packed tokens are
``[num_layers, 2, num_tokens, num_kv_heads, head_dim]``; either may be a slice of heads of a larger one. Formats that
numpy does not know are arrays of plain bits (STORAGE): bfloat16 as uint16, float8_e4m3 (the finite one: no infinity,
448 is the largest) as uint8. Every conversion goes through float32, which holds all of them exactly, and rounds once,
to nearest even. NaN stays NaN. Beyond what a format holds is infinity, and 448 in float8_e4m3.

In float8_e4m3, 16 tokens of one layer's keys or values share a scale: the largest finite magnitude among them over 448,
at least 2**-126, and 1 if all are zero. A value is stored as itself over its scale.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Run = tuple[int, int]
"""A slot, and how many adjacent ones from there on."""

STORAGE: dict[str, type[np.generic]] = {
    "float32": np.float32,
    "bfloat16": np.uint16,
    "float16": np.float16,
    "float8_e4m3": np.uint8,
}
"""What an array of a format is made of."""
SCALED_TOKENS = 16
"""Tokens that share a scale."""
LARGEST = 448.0
SMALLEST_SCALE = 2.0**-126
"""The smallest normal float32: below it, a GPU may take the scale for zero."""
PART = 1 << 16
"""Elements converted at a time: what lies between two passes over them stays in the cache."""


def gather(pool: Array, dtype: str, runs: Sequence[Run], out: Array, out_dtype: str) -> None:
    """Convert the slots of ``runs``, one after another, into ``out``. Not to or from float8_e4m3."""
    at = 0
    for slot, count in runs:
        if dtype == out_dtype:  # Hot: what else there is to a call costs more than a page takes (bench/transfer.py).
            out[:, :, at : at + count] = pool[:, :, slot : slot + count]
        else:
            cast_in_parts(pool[:, :, slot : slot + count], dtype, out[:, :, at : at + count], out_dtype)
        at += count


def scatter(values: Array, dtype: str, pool: Array, pool_dtype: str, runs: Sequence[Run]) -> None:
    """Convert packed tokens into the slots of ``runs``. Not to or from float8_e4m3."""
    at = 0
    for slot, count in runs:
        if dtype == pool_dtype:
            pool[:, :, slot : slot + count] = values[:, :, at : at + count]
        else:
            cast_in_parts(values[:, :, at : at + count], dtype, pool[:, :, slot : slot + count], pool_dtype)
        at += count


def gather_scaled(pool: Array, dtype: str, runs: Sequence[Run], out: Array, scales: Array) -> None:
    """Convert the slots of ``runs`` to float8_e4m3, and set ``scales`` [num_layers, 2, ceil(num_tokens / 16)]."""
    for layers, begin, cut in _cut_to_parts(runs, pool):
        count = sum(run[1] for run in cut)
        values = np.empty((*pool[layers, :, :0].shape[:2], count, *pool.shape[3:]), np.float32)
        gather(pool[layers], dtype, cut, values, "float32")
        pages = slice(begin // SCALED_TOKENS, -(-(begin + count) // SCALED_TOKENS))
        quantize(values, out[layers, :, begin : begin + count], scales[layers, :, pages])


def scatter_scaled(values: Array, scales: Array, pool: Array, pool_dtype: str, runs: Sequence[Run]) -> None:
    """Convert packed tokens of float8_e4m3 into the slots of ``runs``."""
    for layers, begin, cut in _cut_to_parts(runs, pool):
        count = sum(run[1] for run in cut)
        pages = slice(begin // SCALED_TOKENS, -(-(begin + count) // SCALED_TOKENS))
        plain = dequantize(values[layers, :, begin : begin + count], scales[layers, :, pages])
        scatter(plain, "float32", pool[layers], pool_dtype, cut)


def parts(num_layers: int, num_tokens: int, width: int, size: int = PART) -> Iterator[tuple[slice, slice]]:
    """Cut layers and tokens into parts of at most ``size`` elements, ``width`` for a layer's token; one at least."""
    most_tokens = max(1, min(num_tokens, size // (2 * width)))
    most_layers = max(1, size // (2 * width * most_tokens))
    for layer in range(0, num_layers, most_layers):
        for token in range(0, num_tokens, most_tokens):
            yield slice(layer, min(layer + most_layers, num_layers)), slice(token, min(token + most_tokens, num_tokens))


def _cut_to_parts(runs: Sequence[Run], pool: Array) -> Iterator[tuple[slice, int, list[Run]]]:
    """Cut runs so that no scale is divided: yield layers, the first token among the packed, and its slots."""
    width = int(np.prod(pool.shape[3:]))
    most = max(1, PART // (2 * width * SCALED_TOKENS)) * SCALED_TOKENS
    most_layers = max(1, PART // (2 * width * most))
    begin, room = 0, most
    cut: list[Run] = []

    def part() -> Iterator[tuple[slice, int, list[Run]]]:
        for layer in range(0, len(pool), most_layers):
            yield slice(layer, min(layer + most_layers, len(pool))), begin, cut

    for slot, count in runs:
        while count:
            taken = min(count, room)
            cut.append((slot, taken))
            slot, count, room = slot + taken, count - taken, room - taken
            if not room:
                yield from part()
                begin, cut, room = begin + most, [], most
    if cut:
        yield from part()


# ---- between float32, bfloat16 and float16 --------------------------------------------------------------------------


@np.errstate(over="ignore", invalid="ignore")
def cast_in_parts(values: Array, dtype: str, out: Array, out_dtype: str) -> None:
    """Do as ``cast`` for arrays [num_layers, 2, num_tokens, ...] of any size."""
    if dtype == out_dtype:
        out[...] = values
        return
    for layers, tokens in parts(len(values), values.shape[2], int(np.prod(values.shape[3:]))):
        cast(values[layers, :, tokens], dtype, out[layers, :, tokens], out_dtype)


@np.errstate(over="ignore", invalid="ignore")
def cast(values: Array, dtype: str, out: Array, out_dtype: str) -> None:
    """Write ``values`` of a format into ``out``, of the same shape and another format. Not for float8_e4m3."""
    if dtype == out_dtype:
        out[...] = values
    elif out_dtype == "float32":
        _TO_FLOAT32[dtype](values, out)
    elif dtype == "float32":
        _FROM_FLOAT32[out_dtype](values, out)
    else:
        between = np.empty(values.shape, np.float32)
        _TO_FLOAT32[dtype](values, between)
        _FROM_FLOAT32[out_dtype](between, out)


def _bfloat16_to_float32(values: Array, out: Array) -> None:
    np.left_shift(values, 16, out=out.view(np.uint32), dtype=np.uint32)


def _float32_to_bfloat16(values: Array, out: Array) -> None:
    bits = values.view(np.uint32)
    # Half of what is cut off, less one unless the last bit that stays is odd: what lies half way goes to even.
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    out[...] = rounded
    is_nan = np.isnan(values)
    if is_nan.any():  # The sum may have carried out of it.
        out[is_nan] = (bits[is_nan] >> 16) | 0x40


def _assign(values: Array, out: Array) -> None:
    out[...] = values  # numpy knows both.


_TO_FLOAT32: dict[str, Callable[[Array, Array], None]] = {
    "bfloat16": _bfloat16_to_float32,
    "float16": _assign,
}
_FROM_FLOAT32: dict[str, Callable[[Array, Array], None]] = {
    "bfloat16": _float32_to_bfloat16,
    "float16": _assign,
}


# ---- float8_e4m3 ----------------------------------------------------------------------------------------------------


@np.errstate(over="ignore", invalid="ignore")
def quantize(values: Array, out: Array, scales: Array) -> None:
    """Write float32 [num_layers, 2, num_tokens, ...] as float8_e4m3, and the scale of every 16 tokens. Ruins values."""
    num_tokens = values.shape[2]
    whole = num_tokens - num_tokens % SCALED_TOKENS
    for begin, end in ((0, whole), (whole, num_tokens)):
        if begin == end:
            continue
        pages = slice(begin // SCALED_TOKENS, -(-end // SCALED_TOKENS))
        shape = (*values.shape[:2], pages.stop - pages.start, -1)
        rows = values[:, :, begin:end].reshape(shape)
        scales[:, :, pages] = scale = scales_of(rows)
        np.divide(rows, scale[..., None], out=rows)
        out[:, :, begin:end] = encode(rows).reshape(out[:, :, begin:end].shape)


@np.errstate(over="ignore", invalid="ignore")
def dequantize(values: Array, scales: Array) -> Array:
    """Return float8_e4m3 [num_layers, 2, num_tokens, ...] as float32."""
    plain = decoding_table().take(values, mode="clip")
    each = np.repeat(scales, SCALED_TOKENS, axis=2)[:, :, : values.shape[2]]
    plain *= each.reshape(*each.shape, *[1] * (values.ndim - 3))
    return plain


def scales_of(rows: Array) -> NDArray[np.float32]:
    """Return the scale of each row (the last axis) of float32 values."""
    magnitudes = np.abs(rows)
    largest = magnitudes.max(axis=-1)
    if not np.isfinite(largest).all():
        magnitudes[~np.isfinite(magnitudes)] = 0
        largest = magnitudes.max(axis=-1)
    scales = np.maximum(largest / np.float32(LARGEST), np.float32(SMALLEST_SCALE))
    scales[largest == 0] = 1
    return scales  # type: ignore[no-any-return]


def encode(values: Array) -> NDArray[np.uint8]:
    """Return float32 values as float8_e4m3."""
    # The upper half of a float32's bits, made odd if anything is lost with the lower half, rounds as the whole does.
    bits = values.view(np.uint32)
    upper = bits & 0xFFFF
    upper += 0xFFFF
    upper |= bits
    upper >>= 16
    return encoding_table().take(upper, mode="clip")


@cache
def decoding_table() -> NDArray[np.float32]:
    """Return the value of each float8_e4m3: 4 bits of exponent (its bias is 7), 3 of mantissa."""
    codes = np.arange(128)
    exponents, mantissas = codes >> 3, codes & 7
    values = np.where(exponents == 0, mantissas * 2.0**-9, (1 + mantissas / 8) * 2.0 ** (exponents - 7))
    values[127] = np.nan
    return np.concatenate([values, -values]).astype(np.float32)


@cache
@np.errstate(invalid="ignore")
def encoding_table() -> NDArray[np.uint8]:
    """Return the nearest float8_e4m3 to each bfloat16, by its bits; to the even one of two that are as near."""
    values = decoding_table()[:127].astype(np.float64)
    between = (values[1:] + values[:-1]) / 2
    codes = np.arange(1 << 15, dtype=np.uint16)
    numbers = np.empty(len(codes), np.float32)
    _bfloat16_to_float32(codes, numbers)
    below, above = np.searchsorted(between, numbers, "left"), np.searchsorted(between, numbers, "right")
    nearest = np.where(below % 2 == 0, below, above)
    nearest = np.where(below == above, below, nearest)
    nearest[np.isnan(numbers)] = 127
    return np.concatenate([nearest, nearest | 128]).astype(np.uint8)
