"""How close do packing and unpacking KV pages come to copying as many bytes within a GPU's memory?

Blocks of 16 tokens, 8 KV heads of 128 and 32 layers (a Llama-3-8B), scattered over a pool of four times as many. Rates
count what is read and what is written; the limit is a copy of the same size in the same run. Every row is checked
before it is timed: what was moved must be what torch's indexing moves. Rows other than bfloat16 to bfloat16 convert.
Not run on a GPU yet. ``--tune`` times the kernels' tile sizes instead.
"""

import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / ".typing"))  # Where Callboard is not installed, it is found there.

from _report import arguments, goal, median, report

LAYERS, HEADS, HEAD_DIM, BLOCK = 32, 8, 128, 16
POOL_SHARE = 4
PAIRS = (
    ("bfloat16", "bfloat16"),
    ("float32", "float32"),
    ("float32", "bfloat16"),
    ("bfloat16", "float16"),
    ("bfloat16", "float8_e4m3fn"),
)
TILES = (4096, 8192, 16384, 32768)
WARPS = (4, 8, 16)


class Bench:
    """One device, and how long calls take on it."""

    def __init__(self, torch: Any, device: str, rounds: int) -> None:
        self.torch = torch
        self.device = device
        self.rounds = rounds

    def seconds(self, call: Callable[[], object]) -> list[float]:
        """Return what each of some calls took, after warming up."""
        for _ in range(3):
            call()
        return [self._once(call) for _ in range(self.rounds)]

    def _once(self, call: Callable[[], object]) -> float:
        if self.device == "cpu":
            begin_s = time.perf_counter()
            call()
            return time.perf_counter() - begin_s
        begin, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    def numbers(self, *shape: int, dtype: Any) -> Any:
        """Return random numbers of any dtype."""
        return self.torch.randn(*shape, device=self.device, dtype=self.torch.float32).to(dtype)


class Pages:
    """Blocks of a pool, and room to pack them into."""

    def __init__(self, bench: Bench, dtype: str, wire: str, num_blocks: int) -> None:
        from callboard.kernels.pages import SlotTable

        torch = bench.torch
        self.torch = torch
        torch.manual_seed(0)
        shape = (2, num_blocks * POOL_SHARE, BLOCK, HEADS, HEAD_DIM)
        layers = [bench.numbers(*shape, dtype=getattr(torch, dtype)) for _ in range(LAYERS)]
        self.pool = torch.stack(layers)
        del layers
        chosen = random.Random(0).sample(range(num_blocks * POOL_SHARE), num_blocks)
        others = random.Random(1).sample(range(num_blocks * POOL_SHARE), num_blocks)
        self.table = SlotTable.of_blocks(chosen, BLOCK, bench.device)
        self.other_table = SlotTable.of_blocks(others, BLOCK, bench.device)
        num_tokens = num_blocks * BLOCK
        wire_dtype = getattr(torch, wire)
        # Not zeros: what is not written must not look written.
        self.packed = bench.numbers(LAYERS, 2, num_tokens, HEADS, HEAD_DIM, dtype=wire_dtype)
        is_scaled = wire.startswith("float8")
        self.scales = torch.ones(LAYERS, 2, num_blocks, device=bench.device) if is_scaled else None
        self.num_bytes = self.packed.numel() * (self.packed.element_size() + self.pool.element_size())

    def pack(self) -> None:
        from callboard.kernels.pages import gather_pages

        gather_pages(self.pool, self.table, self.packed, layers=range(LAYERS), scales=self.scales)

    def unpack(self) -> None:
        from callboard.kernels.pages import scatter_pages

        scatter_pages(self.packed, self.pool, self.other_table, layers=range(LAYERS), scales=self.scales)

    def check(self, name: str) -> None:
        """Do it once, and exit with a sentence if some layer is not what torch's indexing makes of it."""
        from callboard.kernels import pages_reference

        for call, is_packing in ((self.pack, True), (self.unpack, False)):
            call()
            for layer in (0, LAYERS - 1):
                scales = None if self.scales is None else self.scales[layer : layer + 1].clone()
                pool, packed = self.pool[layer : layer + 1], self.packed[layer : layer + 1]
                whole = range(1), range(HEADS), scales
                if is_packing:
                    got, expected = packed, self.torch.empty_like(packed)
                    pages_reference.gather(pool, self.table.slots, expected, *whole)
                else:
                    slots, target = self.other_table.slots, self.torch.empty_like(pool)
                    pages_reference.scatter(packed, target, slots, *whole)
                    got, expected = (each.flatten(2, 3)[:, :, slots] for each in (pool, target))
                if not self.torch.equal(got.float(), expected.float()):
                    what = "packed" if is_packing else "unpacked"
                    raise SystemExit(f"{name}: pages of layer {layer} are wrong where they were {what}")


def copy_rate(bench: Bench, num_bytes: int) -> list[float]:
    """Return the bytes/s of a copy that reads and writes ``num_bytes`` together."""
    source = bench.torch.randint(0, 255, (num_bytes // 2,), dtype=bench.torch.uint8, device=bench.device)
    target = bench.torch.empty_like(source)
    return [num_bytes / seconds for seconds in bench.seconds(lambda: target.copy_(source))]


def compare(bench: Bench, num_blocks: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return a row for each pair of dtypes, and the goals."""
    rows, goals = [], []
    for dtype, wire in PAIRS:
        pages = Pages(bench, dtype, wire, num_blocks)
        pages.check(f"{dtype} to {wire}")
        limit = copy_rate(bench, pages.num_bytes)
        row: dict[str, Any] = {"pool": dtype, "packed": wire, "MiB moved": pages.num_bytes / 2**20}
        row["copy GB/s"] = median(limit) / 1e9
        for name, call in (("pack", pages.pack), ("unpack", pages.unpack)):
            rates = [pages.num_bytes / seconds for seconds in bench.seconds(call)]
            shares = [rate / median(limit) for rate in rates]
            row |= {f"{name} GB/s": median(rates) / 1e9, f"{name} of copy": median(shares)}
            if dtype == wire == "bfloat16":
                goals.append(goal(f"{name}: share of the copy's rate", shares, ">= 0.8"))
        rows.append(row)
        del pages
    return rows, goals


def tune(bench: Bench, num_blocks: int) -> list[dict[str, Any]]:
    """Return a row for each size of tile and number of warps: what pages_triton.py should have as its own."""
    from callboard.kernels import pages_triton

    pages, rows = Pages(bench, "bfloat16", "bfloat16", num_blocks), []
    for tile in TILES:
        for warps in WARPS:
            pages_triton.TILE, pages_triton.OPTIONS["num_warps"] = tile, warps
            packing, unpacking = bench.seconds(pages.pack), bench.seconds(pages.unpack)
            rates = {
                name: pages.num_bytes / median(took) / 1e9
                for name, took in (("pack GB/s", packing), ("unpack GB/s", unpacking))
            }
            rows.append({"tile": tile, "warps": warps, **rates})
    return rows


def main() -> None:
    options = arguments(
        __doc__ or "",
        blocks={"type": int, "help": "blocks that are moved, of 2 MiB in bfloat16 (default 256, quick 64)"},
        rounds={"type": int, "default": 20, "help": "repeats of every measurement (default 20)"},
        tune={"action": "store_true", "help": "time the sizes of tiles"},
        device={"default": "cuda", "help": '"cpu" times torch, to see that the benchmark works'},
    )
    try:
        import torch
    except ImportError:
        print("kernels: this Python has no torch, so nothing was measured", file=sys.stderr)
        return
    if options.device == "cuda" and not torch.cuda.is_available():
        print("kernels: there is no CUDA device here, so nothing was measured", file=sys.stderr)
        return
    num_blocks = options.blocks or (64 if options.quick else 256)
    bench = Bench(torch, options.device, options.rounds)
    if options.tune:
        report("kernels", tune(bench, num_blocks), [], options.json)
        return
    rows, goals = compare(bench, num_blocks)
    report("kernels", rows, goals, options.json)


if __name__ == "__main__":
    main()
