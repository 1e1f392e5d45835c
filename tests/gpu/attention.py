"""Paged attention on CUDA: equal to its reference, never waiting for the GPU, and its time against a copy of the KV."""

from typing import Any

import torch

from callboard.kernels.paged_attention import paged_attention, paged_attention_reference

TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def a_step(*, num_decodes: int, chunks: list[int], context: int, block_size: int) -> dict[str, Any]:
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
    host_lens = torch.zeros(2, len(lengths) + 1, dtype=torch.int64)
    host_lens[0, :-1], host_lens[1] = torch.tensor(lengths), torch.tensor(starts)
    return {
        "num_tokens": sum(queries),
        "num_blocks": order.numel(),
        "tensors": {
            "slots": torch.tensor(slots),
            "block_tables": tables,
            "context_lens": host_lens[0].clone(),
            "query_start": host_lens[1].clone(),
        },
        "host": {"split": torch.tensor([num_decodes, len(lengths), 0]), "host_lens": host_lens},
    }


def inputs(step: dict[str, Any], dtype: torch.dtype, *, heads: int, kv_heads: int, dim: int) -> list[torch.Tensor]:
    """Return query, key, value and pool of random numbers."""
    n = step["num_tokens"]
    shapes = [(n, heads, dim), (n, kv_heads, dim), (n, kv_heads, dim), (2, step["num_blocks"], 16, kv_heads, dim)]
    return [torch.randn(*shape).to(dtype) for shape in shapes]


def on(device: str, step: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return what of a step lies where the pool is."""
    return {name: tensor.to(device) for name, tensor in step["tensors"].items()}


def equality(device: str) -> list[dict[str, Any]]:
    """Compare on mixed steps at three dtypes, with and without a window."""
    rows = []
    for dtype, tolerance in TOLERANCES.items():
        for window in (None, 20):
            torch.manual_seed(0)
            step = a_step(num_decodes=5, chunks=[1, 17, 40], context=50, block_size=16)
            query, key, value, pool = inputs(step, dtype, heads=8, kv_heads=2, dim=64)
            expected_pool = pool.clone()
            split, more = step["host"]["split"], {"scale": 0.125, "window": window}
            expected = paged_attention_reference(
                query, key, value, expected_pool, **step["tensors"], split=split, **more
            )
            query, key, value, pool = (tensor.to(device) for tensor in (query, key, value, pool))
            got = paged_attention(query, key, value, pool, **on(device, step), **step["host"], **more)
            error = float((got.cpu().float() - expected.float()).abs().max())
            name = f"paged attention {str(dtype).removeprefix('torch.')}, window {window}"
            holds = error <= tolerance and torch.equal(pool.cpu(), expected_pool)
            rows.append({"test": name, "holds": holds, "error": error, "tolerance": tolerance})
    return rows


def never_waits(device: str) -> dict[str, Any]:
    """Launch mixed steps with synchronisation forbidden: the launches must run ahead of the GPU, layer after layer."""
    step = a_step(num_decodes=5, chunks=[1, 17, 40], context=50, block_size=16)
    tensors = [tensor.to(device) for tensor in inputs(step, torch.bfloat16, heads=8, kv_heads=2, dim=64)]
    metadata, problem = on(device, step), ""
    paged_attention(*tensors, **metadata, **step["host"], scale=0.125)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for window in (None, 20):
            paged_attention(*tensors, **metadata, **step["host"], scale=0.125, window=window)
    except RuntimeError as error:
        problem = str(error)[:300]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return {"test": "paged attention is launched without waiting for the GPU", "holds": not problem, "problem": problem}


def timings(device: str) -> list[dict[str, Any]]:
    """Time decodes of Llama-8B's shape against copying the bytes that they must read."""
    rows = []
    for num_decodes, context in ((8, 1024), (64, 1024), (64, 4096)):
        step = a_step(num_decodes=num_decodes, chunks=[], context=context, block_size=16)
        query, key, value, pool = (
            tensor.to(device) for tensor in inputs(step, torch.bfloat16, heads=32, kv_heads=8, dim=128)
        )
        metadata, target = on(device, step), torch.empty_like(pool)

        def attend(
            q: Any = query, k: Any = key, v: Any = value, p: Any = pool, m: Any = metadata, h: Any = step["host"]
        ) -> None:
            paged_attention(q, k, v, p, **m, **h, scale=128**-0.5)

        def copy(p: Any = pool, t: Any = target) -> None:
            t.copy_(p)

        mine, limit = milliseconds(attend), milliseconds(copy)
        rows.append(
            {"decodes": num_decodes, "context": context, "ms": mine, "copy ms": limit, "over copy": mine / limit}
        )
    return rows


def milliseconds(call: Any, repeats: int = 20) -> float:
    """Return the median time of a call on the device, after warming up."""
    for _ in range(5):
        call()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return float(sorted(times)[repeats // 2])


def rows(device: str = "cuda:0") -> list[dict[str, Any]]:
    """Return what was found."""
    if device == "cpu":
        return equality(device)
    return [*equality(device), never_waits(device), *timings(device)]
