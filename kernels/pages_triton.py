"""KV pages gathered, scattered and copied by Triton kernels. Shapes and rounding as in pages.py, which checks them.

A program moves some tokens of one layer's keys or values. Slots come from a table, one entry a token; within a slot all
is contiguous, so that loads and stores are 16 bytes wide. Offsets are 64 bits: a pool has more than 2**31 elements.

bfloat16 and float8_e4m3 are converted by integer arithmetic: the same bits on every GPU, those without instructions
for them too, and under the interpreter, whose own conversions do not round to nearest. The kernels wait for memory
as it is.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from .pages_numpy import LARGEST, SCALED_TOKENS, SMALLEST_SCALE

TILE = 16384
"""Elements that a program has in registers at a time: with 8 warps, 64 a thread."""
MOST_TOKENS = 32
OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}

FLOAT32, BFLOAT16, FLOAT16, FLOAT8 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
_FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float8_e4m3fn: 3}
_SEEN_AS = {torch.bfloat16: torch.int16, torch.float8_e4m3fn: torch.uint8}
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}

_LARGEST = tl.constexpr(LARGEST)
_SMALLEST_SCALE = tl.constexpr(SMALLEST_SCALE)


# ---- formats --------------------------------------------------------------------------------------------------------


@triton.jit  # type: ignore[untyped-decorator]
def to_float32(values, FORMAT: tl.constexpr):  # type: ignore[no-untyped-def]
    if FORMAT == BFLOAT16:
        return (values.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    elif FORMAT == FLOAT8:  # noqa: RET505 (Triton compiles no return in the middle.)
        bits = values.to(tl.int32)
        magnitude = bits & 127
        # 4 bits of exponent (its bias is 7) and 3 of mantissa: the bias of float32 is 120 more.
        normal = ((magnitude << 20) + (120 << 23)).to(tl.float32, bitcast=True)
        value = tl.where(magnitude < 8, magnitude.to(tl.float32) * 0.001953125, normal)
        value = tl.where(magnitude == 127, float("nan"), value)
        return (value.to(tl.int32, bitcast=True) | ((bits & 128) << 24)).to(tl.float32, bitcast=True)
    else:
        return values.to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def from_float32(values, FORMAT: tl.constexpr):  # type: ignore[no-untyped-def]
    if FORMAT == BFLOAT16:
        bits = values.to(tl.uint32, bitcast=True)
        # Half of what is cut off, less one unless the last bit that stays is odd: what lies half way goes to even.
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(values == values, rounded, (bits >> 16) | 0x40).to(tl.int16)
    elif FORMAT == FLOAT8:  # noqa: RET505
        bits = values.to(tl.uint32, bitcast=True)
        magnitude = tl.minimum(tl.abs(values), _LARGEST)
        exact = magnitude.to(tl.uint32, bitcast=True)
        normal = ((exact + 0x7FFFF + ((exact >> 20) & 1)) >> 20) - (120 << 3)
        # The last bit of a float32 from 2**14 on is worth 2**-9, what the least float8 is: the addition rounds to it.
        small = (magnitude + 16384.0).to(tl.uint32, bitcast=True) & 15
        code = tl.where(magnitude < 0.015625, small, normal)
        code = tl.where(values == values, code, 127)
        return (code | ((bits >> 24) & 128)).to(tl.uint8)
    elif FORMAT == FLOAT16:
        return values.to(tl.float16)
    else:
        return values


# ---- kernels --------------------------------------------------------------------------------------------------------


@triton.jit  # type: ignore[untyped-decorator]
def move_kernel(  # type: ignore[no-untyped-def]
    source,
    target,
    source_slots,
    target_slots,
    num_tokens,
    source_half,
    target_half,
    SOURCE_SLOT: tl.constexpr,
    TARGET_SLOT: tl.constexpr,
    SOURCE_FORMAT: tl.constexpr,
    TARGET_FORMAT: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Move WIDTH elements of TOKENS tokens of one layer's keys or values.

    A table of slots that is None: the tokens lie one after another. ``*_half`` and ``*_SLOT``: elements from one
    layer's keys to its values, and from one slot to the next.
    """
    row = tl.program_id(1).to(tl.int64)
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    is_token = tokens < num_tokens
    read = tokens.to(tl.int64) if source_slots is None else tl.load(source_slots + tokens, mask=is_token, other=0)
    write = tokens.to(tl.int64) if target_slots is None else tl.load(target_slots + tokens, mask=is_token, other=0)
    source += row * source_half
    target += row * target_half
    for begin in tl.static_range(0, WIDTH, COLUMNS):
        columns = begin + tl.arange(0, COLUMNS)
        mask = is_token[:, None] & (columns < WIDTH)[None, :]
        values = tl.load(source + read[:, None] * SOURCE_SLOT + columns[None, :], mask=mask)
        if SOURCE_FORMAT != TARGET_FORMAT:
            values = from_float32(to_float32(values, SOURCE_FORMAT), TARGET_FORMAT)
        tl.store(target + write[:, None] * TARGET_SLOT + columns[None, :], values, mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def quantize_kernel(  # type: ignore[no-untyped-def]
    pool,
    slots,
    packed,
    scales,
    num_tokens,
    pool_half,
    packed_half,
    SLOT: tl.constexpr,
    FORMAT: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Gather a page of TOKENS tokens of one layer's keys or values as float8_e4m3, and set its scale.

    The page is read twice where it does not fit into registers; the second time, from the cache.
    """
    page, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    tokens = page * TOKENS + tl.arange(0, TOKENS)
    is_token = tokens < num_tokens
    read = tl.load(slots + tokens, mask=is_token, other=0)
    pool += row * pool_half
    packed += row * packed_half
    largest = 0.0
    for begin in tl.static_range(0, WIDTH, COLUMNS):
        columns = begin + tl.arange(0, COLUMNS)
        mask = is_token[:, None] & (columns < WIDTH)[None, :]
        values = tl.load(pool + read[:, None] * SLOT + columns[None, :], mask=mask, other=0)
        magnitudes = tl.abs(to_float32(values, FORMAT))
        magnitudes = tl.where(magnitudes < float("inf"), magnitudes, 0.0)
        largest = tl.maximum(largest, tl.max(magnitudes))
    scale = tl.maximum(tl.div_rn(largest, _LARGEST), _SMALLEST_SCALE)
    scale = tl.where(largest == 0.0, 1.0, scale)
    tl.store(scales + row * tl.num_programs(0) + page, scale)
    for begin in tl.static_range(0, WIDTH, COLUMNS):
        columns = begin + tl.arange(0, COLUMNS)
        mask = is_token[:, None] & (columns < WIDTH)[None, :]
        values = tl.load(pool + read[:, None] * SLOT + columns[None, :], mask=mask, other=0)
        scaled = tl.div_rn(to_float32(values, FORMAT), scale)
        codes = from_float32(scaled, FLOAT8)
        tl.store(packed + tokens.to(tl.int64)[:, None] * WIDTH + columns[None, :], codes, mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def dequantize_kernel(  # type: ignore[no-untyped-def]
    packed,
    scales,
    pool,
    slots,
    num_tokens,
    packed_half,
    pool_half,
    SLOT: tl.constexpr,
    FORMAT: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Scatter a page of TOKENS tokens of one layer's keys or values from float8_e4m3."""
    page, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    tokens = page * TOKENS + tl.arange(0, TOKENS)
    is_token = tokens < num_tokens
    write = tl.load(slots + tokens, mask=is_token, other=0)
    scale = tl.load(scales + row * tl.num_programs(0) + page)
    packed += row * packed_half
    pool += row * pool_half
    for begin in tl.static_range(0, WIDTH, COLUMNS):
        columns = begin + tl.arange(0, COLUMNS)
        mask = is_token[:, None] & (columns < WIDTH)[None, :]
        codes = tl.load(packed + tokens.to(tl.int64)[:, None] * WIDTH + columns[None, :], mask=mask, other=0)
        values = from_float32(to_float32(codes, FLOAT8) * scale, FORMAT)
        tl.store(pool + write[:, None] * SLOT + columns[None, :], values, mask=mask)


# ---- launches -------------------------------------------------------------------------------------------------------


def gather(pool: Tensor, slots: Tensor, out: Tensor, layers: range, heads: range, scales: Tensor | None) -> None:
    """Convert the pool's ``slots`` into ``out``, on the current stream."""
    if scales is None:
        _move(_slots_of(pool, layers, heads), slots, out, None)
        return
    source, width = _slots_of(pool, layers, heads), len(heads) * pool.shape[5]
    grid = (triton.cdiv(len(slots), SCALED_TOKENS), 2 * len(layers))
    with _on(pool):
        quantize_kernel[grid](
            _seen(source),
            slots,
            _seen(out),
            scales,
            len(slots),
            source.stride(1),
            out.stride(1),
            SLOT=source.stride(2),
            FORMAT=_FORMATS[pool.dtype],
            WIDTH=width,
            TOKENS=SCALED_TOKENS,
            COLUMNS=_columns(width, SCALED_TOKENS),
            **OPTIONS,
        )


def scatter(packed: Tensor, pool: Tensor, slots: Tensor, layers: range, heads: range, scales: Tensor | None) -> None:
    """Convert packed tokens into the pool's ``slots``, on the current stream."""
    target = _slots_of(pool, layers, heads)
    if scales is None:
        _move(packed, None, target, slots)
        return
    width = len(heads) * pool.shape[5]
    grid = (triton.cdiv(len(slots), SCALED_TOKENS), 2 * len(layers))
    with _on(pool):
        dequantize_kernel[grid](
            _seen(packed),
            scales,
            _seen(target),
            slots,
            len(slots),
            packed.stride(1),
            target.stride(1),
            SLOT=target.stride(2),
            FORMAT=_FORMATS[pool.dtype],
            WIDTH=width,
            TOKENS=SCALED_TOKENS,
            COLUMNS=_columns(width, SCALED_TOKENS),
            **OPTIONS,
        )


def copy(
    source: Tensor,
    target: Tensor,
    source_slots: Tensor,
    target_slots: Tensor,
    layers: range,
    source_heads: range,
    target_heads: range,
) -> None:
    """Convert slots of one pool into those of another, on the current stream."""
    _move(_slots_of(source, layers, source_heads), source_slots, _slots_of(target, layers, target_heads), target_slots)


def _move(source: Tensor, source_slots: Tensor | None, target: Tensor, target_slots: Tensor | None) -> None:
    """Move [num_layers, 2, ..., num_kv_heads, head_dim]; heads and elements of a slot are adjacent on both sides."""
    num_layers, width = source.shape[0], source.shape[3] * source.shape[4]
    slots = source_slots if source_slots is not None else target_slots
    assert slots is not None
    formats = _FORMATS[source.dtype], _FORMATS[target.dtype]
    if source.dtype == target.dtype:  # Bits are moved as they are.
        source, target = (each.view(_BITS[each.element_size()]) for each in (source, target))
    columns = min(triton.next_power_of_2(width), TILE)
    tokens = min(MOST_TOKENS, max(1, TILE // columns), triton.next_power_of_2(len(slots)))
    with _on(target):
        move_kernel[triton.cdiv(len(slots), tokens), 2 * num_layers](
            _seen(source),
            _seen(target),
            source_slots,
            target_slots,
            len(slots),
            source.stride(1),
            target.stride(1),
            SOURCE_SLOT=source.stride(2),
            TARGET_SLOT=target.stride(2),
            SOURCE_FORMAT=formats[0],
            TARGET_FORMAT=formats[1],
            WIDTH=width,
            TOKENS=tokens,
            COLUMNS=columns,
            **OPTIONS,
        )


def _slots_of(pool: Tensor, layers: range, heads: range) -> Tensor:
    """Return a part of a pool as [num_layers, 2, num_slots, num_kv_heads, head_dim]; it is the pool's own memory."""
    return pool.flatten(2, 3)[layers.start : layers.stop, :, :, heads.start : heads.stop]


def _seen(tensor: Tensor) -> Tensor:
    """Return a tensor as the kernels take it: formats that they convert themselves, as bits."""
    return tensor.view(_SEEN_AS[tensor.dtype]) if tensor.dtype in _SEEN_AS else tensor


def _columns(width: int, tokens: int) -> int:
    return int(min(triton.next_power_of_2(width), TILE // tokens))


def _on(tensor: Tensor) -> AbstractContextManager[None]:
    """Make the tensor's device the current one for a launch; the interpreter needs none."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
