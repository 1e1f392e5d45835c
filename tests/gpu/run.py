"""Everything that needs a GPU, in one script that needs no installation: tests first, then timings, then JSON.

Run: make gpu PYTHON=python3 ARGS="--json bench/results/gpu.json". Today that is paged attention on CUDA against its
reference, at every dtype, and its time against the limit that reading the KV once sets. Page lanes and CUDA pools
join when they exist. Without a GPU it says so and exits with 2.
"""

import argparse
import datetime
import json
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / ".typing"))  # There `callboard` is the repository itself.


def steps(torch: Any, *, num_decodes: int, chunks: list[int], context: int, block_size: int) -> dict[str, Any]:
    """Return the metadata of a step: decodes at ``context`` tokens, then chunks that begin a sequence."""
    lengths = [context] * num_decodes + chunks
    queries = [1] * num_decodes + chunks
    num_columns = -(-max(lengths) // block_size)
    order = torch.randperm(len(lengths) * num_columns)
    tables = order.view(len(lengths), num_columns).to(torch.int32)
    slots = [
        int(tables[i, p // block_size]) * block_size + p % block_size
        for i, (length, new) in enumerate(zip(lengths, queries, strict=True))
        for p in range(length - new, length)
    ]
    starts = [sum(queries[:i]) for i in range(len(queries) + 1)]
    return {
        "num_tokens": sum(queries),
        "num_blocks": order.numel(),
        "tensors": {
            "slots": torch.tensor(slots),
            "block_tables": tables,
            "context_lens": torch.tensor(lengths),
            "query_start": torch.tensor(starts),
        },
        "split": torch.tensor([num_decodes, len(lengths)]),
    }


def inputs(torch: Any, step: dict[str, Any], dtype: Any, *, heads: int, kv_heads: int, dim: int, block: int) -> Any:
    """Return query, key, value and pool of random numbers."""

    def random(*shape: int) -> Any:
        return torch.randn(*shape).to(dtype)

    n = step["num_tokens"]
    pool = random(2, step["num_blocks"], block, kv_heads, dim)
    return random(n, heads, dim), random(n, kv_heads, dim), random(n, kv_heads, dim), pool


def check_attention(torch: Any, attention: Any, reference: Any) -> list[dict[str, Any]]:
    """Compare on mixed steps at three dtypes, with and without a window."""
    rows = []
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)):
        for window in (None, 20):
            torch.manual_seed(0)
            step = steps(torch, num_decodes=5, chunks=[1, 17, 40], context=50, block_size=16)
            query, key, value, pool = inputs(torch, step, dtype, heads=8, kv_heads=2, dim=64, block=16)
            expected_pool = pool.clone()
            expected = reference(
                query, key, value, expected_pool, **step["tensors"], split=step["split"], scale=0.125, window=window
            )
            device_pool = pool.cuda()
            metadata = {name: tensor.cuda() for name, tensor in step["tensors"].items()}
            got = attention(
                query.cuda(),
                key.cuda(),
                value.cuda(),
                device_pool,
                **metadata,
                split=step["split"],
                scale=0.125,
                window=window,
            )
            error = float((got.cpu().float() - expected.float()).abs().max())
            is_equal = error <= tolerance and torch.equal(device_pool.cpu(), expected_pool)
            name = f"paged attention {str(dtype).removeprefix('torch.')}, window {window}"
            rows.append({"test": name, "error": error, "tolerance": tolerance, "holds": is_equal})
    return rows


def time_attention(torch: Any, attention: Any) -> list[dict[str, Any]]:
    """Time decodes of Llama-8B's shape against copying the bytes that they must read."""
    rows = []
    for num_decodes, context in ((8, 1024), (64, 1024), (64, 4096)):
        step = steps(torch, num_decodes=num_decodes, chunks=[], context=context, block_size=16)
        query, key, value, pool = (
            tensor.cuda() for tensor in inputs(torch, step, torch.bfloat16, heads=32, kv_heads=8, dim=128, block=16)
        )
        metadata = {name: tensor.cuda() for name, tensor in step["tensors"].items()}
        target = torch.empty_like(pool)

        def attend(
            query: Any = query,
            key: Any = key,
            value: Any = value,
            pool: Any = pool,
            meta: Any = metadata,
            split: Any = step["split"],
        ) -> None:
            attention(query, key, value, pool, **meta, split=split, scale=128**-0.5)

        def copy(pool: Any = pool, target: Any = target) -> None:
            target.copy_(pool)

        mine, limit = milliseconds(torch, attend), milliseconds(torch, copy)
        rows.append(
            {"decodes": num_decodes, "context": context, "ms": mine, "copy ms": limit, "over copy": mine / limit}
        )
    return rows


def milliseconds(torch: Any, call: Any, repeats: int = 20) -> float:
    """Return the median time of a call on the device, after warming up."""
    for _ in range(5):
        call()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return float(sorted(times)[repeats // 2])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", metavar="FILE", help="write the result there")
    arguments = parser.parse_args()
    try:
        import torch
    except ImportError:
        print("this Python has no torch: name one that has, make gpu PYTHON=...", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("there is no CUDA device here: nothing was tested", file=sys.stderr)
        return 2
    from callboard.kernels.paged_attention import paged_attention, paged_attention_reference

    start = time.perf_counter()
    tests = check_attention(torch, paged_attention, paged_attention_reference)
    result = {
        "bench": "gpu",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": {"device": torch.cuda.get_device_name(), "torch": torch.__version__},
        "rows": tests + time_attention(torch, paged_attention),
        "goals": [
            {"name": row["test"], "value": row["error"], "goal": f"<= {row['tolerance']}", "holds": row["holds"]}
            for row in tests
        ],
    }
    for row in result["rows"]:
        print(row)
    print(f"{time.perf_counter() - start:.1f} s")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(result, indent=1) + "\n")
    return 0 if all(row["holds"] for row in tests) else 1


if __name__ == "__main__":
    sys.exit(main())
