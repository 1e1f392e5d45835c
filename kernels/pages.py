"""KV pages between a pool and a packed buffer, or between two pools, on the device they are on.

    pool    [num_layers, 2, num_blocks, block_size, num_kv_heads, head_dim], contiguous; 2: keys, values
    packed  [len(layers), 2, num_tokens, len(heads), head_dim], contiguous, tokens in the order of their slots
    scales  float32 [len(layers), 2, ceil(num_tokens / 16)], for packed tokens of float8_e4m3fn, and only for them

``layers`` and ``heads`` are ranges of the pool's; a range of heads is what resharding between degrees of tensor
parallelism takes (shards.py). Block sizes need not agree: a slot is a slot. Pools are float32, bfloat16 or float16,
packed tokens these or float8_e4m3fn. Conversions round once, to nearest even, and scale as pages_numpy.py says, which
does the same on the CPU without torch, bit for bit except for which NaN a NaN becomes.

CUDA tensors are moved by Triton (pages_triton.py) on the current stream, and nothing here waits for the device; others
by torch (pages_reference.py). Everything is checked before anything is moved: what does not fit is a ValueError.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from .pages_numpy import SCALED_TOKENS

POOL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SCALED_DTYPE = torch.float8_e4m3fn


@dataclass(frozen=True, slots=True)
class SlotTable:
    """The slots of some tokens, on a device: made once, used for many layers. ``end``: every slot is below it."""

    slots: Tensor
    end: int

    @classmethod
    def of_runs(cls, runs: Iterable[tuple[int, int]], device: torch.device | str) -> "SlotTable":
        """Make one of runs (a slot, and how many adjacent ones). Raises ValueError for what is no run of slots."""
        ranges, end = [], 0
        for slot, count in runs:
            if slot < 0 or count < 0:
                raise ValueError(f"{count} slots from {slot} on are no slots")
            ranges.append(torch.arange(slot, slot + count))
            end = max(end, slot + count)
        slots = torch.cat(ranges) if ranges else torch.zeros(0, dtype=torch.int64)
        if torch.device(device).type == "cuda":
            return cls(slots.pin_memory().to(device, non_blocking=True), end)
        return cls(slots.to(device), end)

    @classmethod
    def of_blocks(cls, blocks: Sequence[int], block_size: int, device: torch.device | str) -> "SlotTable":
        """Make one of whole blocks."""
        return cls.of_runs([(block * block_size, block_size) for block in blocks], device)

    def __len__(self) -> int:
        return len(self.slots)


def gather_pages(
    pool: Tensor,
    table: SlotTable,
    out: Tensor,
    *,
    layers: range,
    heads: range | None = None,
    scales: Tensor | None = None,
) -> None:
    """Pack the slots of ``table``, converted to the dtype of ``out``."""
    heads = range(pool.shape[4]) if heads is None and pool.dim() == 6 else heads or range(0)
    _check_pool(pool, table, layers, heads)
    _check_packed(out, pool, len(table), layers, heads, scales)
    if out.numel():
        _implementation(pool).gather(pool, table.slots, out, layers, heads, scales)


def scatter_pages(
    packed: Tensor,
    pool: Tensor,
    table: SlotTable,
    *,
    layers: range,
    heads: range | None = None,
    scales: Tensor | None = None,
) -> None:
    """Unpack into the slots of ``table``, converted to the pool's dtype. Distinct slots are the caller's duty."""
    heads = range(pool.shape[4]) if heads is None and pool.dim() == 6 else heads or range(0)
    _check_pool(pool, table, layers, heads)
    _check_packed(packed, pool, len(table), layers, heads, scales)
    if packed.numel():
        _implementation(pool).scatter(packed, pool, table.slots, layers, heads, scales)


def copy_pages(
    source: Tensor,
    target: Tensor,
    source_table: SlotTable,
    target_table: SlotTable,
    *,
    layers: range,
    source_heads: range | None = None,
    target_heads: range | None = None,
) -> None:
    """Gather, convert and scatter in one pass, from pool to pool: nothing lies in between.

    Distinct target slots, and in one pool none that is a source too, are the caller's duty.
    """
    for pool in (source, target):
        if pool.dim() != 6:
            raise ValueError(f"a pool has 6 dimensions, and this one is {tuple(pool.shape)}")
    source_heads = range(source.shape[4]) if source_heads is None else source_heads
    target_heads = range(target.shape[4]) if target_heads is None else target_heads
    _check_pool(source, source_table, layers, source_heads)
    _check_pool(target, target_table, layers, target_heads)
    if source.shape[5] != target.shape[5]:
        raise ValueError(f"heads of {source.shape[5]} do not go into heads of {target.shape[5]}")
    if len(source_heads) != len(target_heads):
        raise ValueError(f"{len(source_heads)} heads do not go into {len(target_heads)}")
    if len(source_table) != len(target_table):
        raise ValueError(f"{len(source_table)} tokens do not go into {len(target_table)} slots")
    if source.device != target.device:
        raise ValueError(f"one pool is on {source.device}, the other on {target.device}")
    if len(source_table) and len(layers) and len(source_heads):
        _implementation(target).copy(
            source, target, source_table.slots, target_table.slots, layers, source_heads, target_heads
        )


def _implementation(tensor: Tensor) -> ModuleType:
    if tensor.is_cuda:
        from . import pages_triton

        return pages_triton
    from . import pages_reference

    return pages_reference


def _check_pool(pool: Tensor, table: SlotTable, layers: range, heads: range) -> None:
    if pool.dim() != 6 or pool.shape[1] != 2:
        shape = "[num_layers, 2, num_blocks, block_size, num_kv_heads, head_dim]"
        raise ValueError(f"a pool is {shape}, and this one is {tuple(pool.shape)}")
    if pool.dtype not in POOL_DTYPES:
        raise ValueError(f"a pool is float32, bfloat16 or float16, and this one is {pool.dtype}")
    if not pool.is_contiguous():
        raise ValueError("a pool must be contiguous")
    if table.slots.dtype != torch.int64 or table.slots.dim() != 1 or not table.slots.is_contiguous():
        raise ValueError("a table of slots is one contiguous row of int64")
    if table.slots.device != pool.device:
        raise ValueError(f"the pool is on {pool.device}, and the table of its slots on {table.slots.device}")
    num_slots = pool.shape[2] * pool.shape[3]
    if table.end > num_slots:
        raise ValueError(f"slot {table.end - 1} is not in a pool of {num_slots} slots")
    _check_range("layers", layers, pool.shape[0])
    _check_range("heads", heads, pool.shape[4])


def _check_range(name: str, chosen: range, count: int) -> None:
    if chosen.step != 1 or not 0 <= chosen.start <= chosen.stop <= count:
        raise ValueError(f"{chosen} are no {name} of a pool that has {count}")


def _check_packed(
    packed: Tensor, pool: Tensor, num_tokens: int, layers: range, heads: range, scales: Tensor | None
) -> None:
    shape = (len(layers), 2, num_tokens, len(heads), pool.shape[5])
    if tuple(packed.shape) != shape:
        raise ValueError(f"the packed tokens should be {shape}, and are {tuple(packed.shape)}")
    if packed.dtype not in (*POOL_DTYPES, SCALED_DTYPE):
        raise ValueError(f"tokens cannot be packed as {packed.dtype}")
    if packed.device != pool.device or not packed.is_contiguous():
        raise ValueError(f"packed tokens must be contiguous and on {pool.device}, where the pool is")
    if (scales is None) != (packed.dtype != SCALED_DTYPE):
        raise ValueError(f"{SCALED_DTYPE} has scales and nothing else has, and the packed tokens are {packed.dtype}")
    if scales is None:
        return
    rows = (len(layers), 2, -(-num_tokens // SCALED_TOKENS))
    if scales.dtype != torch.float32 or tuple(scales.shape) != rows or not scales.is_contiguous():
        raise ValueError(f"the scales should be float32 {rows}, and are {scales.dtype} {tuple(scales.shape)}")
    if scales.device != pool.device:
        raise ValueError(f"the pool is on {pool.device}, and the scales on {scales.device}")
