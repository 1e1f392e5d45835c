"""Every kernel of pages_triton.py against its torch reference, as a program: one line of JSON for each check.

    python tests/kernels/triton_checks.py [PART OF A NAME]

On a GPU if there is one; else with TRITON_INTERPRET=1, which counts only if it is set before Triton is imported: that
is why this is a process of its own.
"""

import json
import mmap
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / ".typing"))  # There `callboard` is the repository itself.

import torch
from torch import Tensor

from callboard.kernels import pages_reference, pages_triton
from callboard.kernels.pages import SlotTable

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WIRES = {**DTYPES, "float8_e4m3": torch.float8_e4m3fn}
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
LAYERS, HEADS = range(1, 2), range(1, 3)
RUNS = [(17, 3), (0, 2), (6, 5), (12, 2), (14, 3), (2, 4)]
"""19 tokens, so that the second page is not full; runs that begin and end inside of blocks."""

random = torch.Generator().manual_seed(0)


def any_bits(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return random bits: with them come NaNs, infinities, zeros and numbers below the normal ones."""
    bits = BITS[dtype.itemsize]
    info = torch.iinfo(bits)
    return torch.randint(info.min, info.max + 1, shape, generator=random).to(bits).view(dtype)


def kv(shape: tuple[int, ...], dtype: torch.dtype, faint: float = 0.0) -> Tensor:
    """Return what KV looks like, with anything among the keys; of values, the first 16 slots are made ``faint``."""
    values = torch.randn(shape, generator=random)
    values[:, 1].flatten(1, 2)[:, :16] *= faint
    values = values.to(dtype)
    strange = torch.tensor([float("nan"), float("inf"), float("-inf"), 1e-44, -0.0, 60000.0]).to(dtype)
    some = torch.randint(len(strange), shape, generator=random)
    rate = torch.tensor([0.05, 0.0])[:, None, None, None, None]
    return torch.where(torch.rand(shape, generator=random) < rate, strange[some], values)


def require_same(got: Tensor, expected: Tensor) -> None:
    """Raise AssertionError unless all bits are equal; of a NaN, only that it is one."""
    got, expected = got.cpu(), expected.cpu()
    is_nan = expected.float().isnan()
    assert torch.equal(got.float().isnan(), is_nan), "NaNs are elsewhere"
    bits = BITS[got.element_size()]
    differ = (got.view(bits) != expected.view(bits)) & ~is_nan
    assert not differ.any(), f"{int(differ.sum())} of {got.numel()} differ, first at {differ.nonzero()[0].tolist()}"


def both(name: str, *arguments: Any, outputs: tuple[int, ...]) -> None:
    """Call a kernel and its reference, each with outputs of its own, and compare these."""
    results = []
    for module, device in ((pages_triton, DEVICE), (pages_reference, "cpu")):
        own = [each.to(device, copy=True) if isinstance(each, Tensor) else each for each in arguments]
        getattr(module, name)(*own)
        results.append([own[index] for index in outputs])
    for got, expected in zip(*results, strict=True):
        require_same(got, expected)


def check_gather(dtype: torch.dtype, wire: torch.dtype) -> None:
    slots = SlotTable.of_runs(RUNS, "cpu").slots
    for faint in (0.0, 1e-42) if wire.itemsize == 1 else (1.0,):
        pool = kv((2, 2, 5, 4, 3, 8), dtype, faint)
        packed = torch.zeros(1, 2, 19, 2, 8).to(wire)
        scales = torch.zeros(1, 2, 2) if wire.itemsize == 1 else None
        both("gather", pool, slots, packed, LAYERS, HEADS, scales, outputs=(2,) if scales is None else (2, 5))


def check_scatter(wire: torch.dtype, dtype: torch.dtype) -> None:
    slots = SlotTable.of_runs(RUNS, "cpu").slots
    scales = torch.tensor([[[0.5, 3e-5], [1.0, 700.0]]]) if wire.itemsize == 1 else None
    packed = any_bits((1, 2, 19, 2, 8), wire)
    pool = torch.full((2, 2, 5, 4, 3, 8), 7, dtype=dtype)
    both("scatter", packed, pool, slots, LAYERS, HEADS, scales, outputs=(1,))


def check_copy(dtype: torch.dtype, other: torch.dtype) -> None:
    """Into a pool of another block size, and other heads."""
    source = any_bits((2, 2, 5, 4, 3, 8), dtype)
    slots, target_slots = (
        SlotTable.of_runs(RUNS, "cpu").slots,
        SlotTable.of_runs([(9, 10), (1, 4), (30, 5)], "cpu").slots,
    )
    target = torch.full((2, 2, 5, 7, 4, 8), 7, dtype=other)
    both("copy", source, target, slots, target_slots, LAYERS, HEADS, range(2, 4), outputs=(1,))


def check_every_number(dtype: torch.dtype, wire: torch.dtype) -> None:
    """Every number of 8 or 16 bits; of float32, every upper half with six lower halves that decide about rounding."""
    upper = torch.arange(1 << 16, dtype=torch.int64)
    if dtype.itemsize == 4:
        lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
        numbers = ((upper[:, None] << 16) | lower).flatten().to(torch.int32).view(dtype)
    else:
        numbers = (upper if dtype.itemsize == 2 else upper & 255).to(BITS[dtype.itemsize]).view(dtype)
    num_tokens = len(numbers) // 2048
    slots = torch.arange(num_tokens)
    packed = numbers.view(1, 2, num_tokens, 8, 128)
    scales = torch.ones(1, 2, -(-num_tokens // 16)) if dtype.itemsize == 1 else None
    pool = torch.zeros(1, 2, num_tokens // 16, 16, 8, 128, dtype=wire)
    both("scatter", packed, pool, slots, range(1), range(8), scales, outputs=(1,))


def check_every_float32_as_float8() -> None:
    """The six lower halves again, below 448, each page's largest number 448: its scale is one."""
    upper = torch.arange(0x43E0, dtype=torch.int64)
    numbers = ((upper[:, None] << 16) | torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])).flatten()
    numbers = numbers[torch.randperm(len(numbers), generator=random)].to(torch.int32).view(torch.float32)
    pages = numbers[: len(numbers) // 2047 * 2047].view(-1, 2047)
    pages = torch.cat([pages, torch.full((len(pages), 1), -448.0)], dim=1)[:50]
    pool = pages.view(1, 2, 25, 16, 1, 128)
    packed, scales = torch.zeros(1, 2, 400, 1, 128).to(torch.float8_e4m3fn), torch.zeros(1, 2, 25)
    both("gather", pool, torch.arange(400), packed, range(1), range(1), scales, outputs=(2, 5))


def check_slots_wider_than_a_tile() -> None:
    kept, pages_triton.TILE = pages_triton.TILE, 64
    try:
        for wire in (torch.bfloat16, torch.float8_e4m3fn):
            pool, slots = kv((1, 2, 2, 4, 3, 40), torch.float32), torch.tensor([5, 1, 2])
            packed = torch.zeros(1, 2, 3, 3, 40).to(wire)
            scales = torch.zeros(1, 2, 1) if wire.itemsize == 1 else None
            both("gather", pool, slots, packed, range(1), range(3), scales, outputs=(2,))
            both("scatter", packed, pool, slots, range(1), range(3), scales, outputs=(1,))
    finally:
        pages_triton.TILE = kept


def check_pool_of_more_than_2_to_the_31_elements() -> None:
    """Where one layer's keys have as many, and where they have not; on a CPU only what is touched exists."""
    for num_layers, num_blocks in ((1, 1 << 17), (2, 1 << 16)):
        check_large_pool((num_layers, 2, num_blocks, 16, 8, 129))


def check_large_pool(shape: tuple[int, ...]) -> None:
    num_elements = torch.Size(shape).numel()
    if DEVICE == "cpu":
        fd = os.memfd_create("pool", os.MFD_CLOEXEC)
        os.ftruncate(fd, 2 * num_elements)
        pool = torch.frombuffer(mmap.mmap(fd, 2 * num_elements), dtype=torch.float16).view(shape)
    else:
        pool = torch.zeros(shape, dtype=torch.float16, device=DEVICE)
    last = shape[2] * 16 - 1
    slots, layers = torch.tensor([last, 0, last - 4], device=DEVICE), range(shape[0])
    values = torch.randn(shape[0], 2, 3, 8, 129, generator=random).to(torch.float16)
    pages_triton.scatter(values.to(DEVICE), pool, slots, layers, range(8), None)
    assert torch.equal(pool.flatten(2, 3)[:, :, slots].cpu(), values)
    got = torch.zeros_like(values, device=DEVICE)
    pages_triton.gather(pool, slots, got, layers, range(8), None)
    assert torch.equal(got.cpu(), values)


def checks() -> dict[str, Callable[[], None]]:
    """Return every check by name."""
    found: dict[str, Callable[[], None]] = {}
    for name, dtype in DTYPES.items():
        for wire_name, wire in WIRES.items():
            found[f"gather {name} as {wire_name}"] = lambda dtype=dtype, wire=wire: check_gather(dtype, wire)
            found[f"scatter {wire_name} as {name}"] = lambda dtype=dtype, wire=wire: check_scatter(wire, dtype)
            if wire_name != name:
                every = f"every {wire_name} as {name}"
                found[every] = lambda dtype=dtype, wire=wire: check_every_number(wire, dtype)
            if wire_name in DTYPES:
                found[f"copy {name} as {wire_name}"] = lambda dtype=dtype, wire=wire: check_copy(dtype, wire)
    found["every float32 as float8_e4m3"] = check_every_float32_as_float8
    found["slots wider than a tile"] = check_slots_wider_than_a_tile
    found["a pool of more than 2**31 elements"] = check_pool_of_more_than_2_to_the_31_elements
    return found


def run(part: str = "") -> dict[str, str]:
    """Run the checks with ``part`` in their names; return what is wrong by name, an empty string where nothing is."""
    results = {}
    for name, check in checks().items():
        if part not in name:
            continue
        try:
            check()
            results[name] = ""
        except Exception:
            results[name] = traceback.format_exc()
    return results


if __name__ == "__main__":
    for name, problem in run(*sys.argv[1:]).items():
        print(json.dumps({"check": name, "problem": problem}))
