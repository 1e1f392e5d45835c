"""Attention over a paged KV pool, as one operator that writes the new KV and attends over block tables.

One operator rather than a few lines in the model, so that it stays opaque to torch.compile and can be captured by
CUDA graphs. Everything that changes from step to step comes in tensors, which the caller preallocates and reuses.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Decodes whose gathered keys would exceed this many tokens per useful token are attended in two halves by length.
MAX_PADDING = 1.5


@torch.library.custom_op("callboard::paged_attention", mutates_args=("pool",))
def paged_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pool: Tensor,
    slots: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    query_start: Tensor,
    split: Tensor,
    scale: float,
    window: int | None = None,
    host_lens: Tensor | None = None,
) -> Tensor:
    """Write ``key`` and ``value`` into their slots, then attend each query to its sequence's KV up to itself.

    query         [num_tokens, num_heads, head_dim], the sequences of the step one after another
    key, value    [num_tokens, num_kv_heads, head_dim]; num_heads is a multiple of num_kv_heads
    pool          [2, num_blocks, block_size, num_kv_heads, head_dim]: one layer's keys and values, changed in place
    slots         int64 [num_tokens]: block_id * block_size + offset, or -1 where nothing is to be written
    block_tables  int32 [>= num_sequences, max_blocks], rows padded with any valid block id
    context_lens  int64 [>= num_sequences]: tokens of a sequence up to and including its last query
    query_start   int64 [>= num_sequences + 1]: the row at which a sequence's queries begin
    split         int64 [2] on the CPU: num_decodes, num_sequences; the first num_decodes have one query each.
                  A third number says how many slots are -1; without it they are looked for
    window        a query sees itself and the ``window - 1`` tokens before it; None: everything before it
    host_lens     int64 [2, >= num_sequences + 1] on the CPU: context_lens and query_start once more, for a pool on a
                  GPU. Without it they are fetched from there, and the step waits for the GPU in every layer

    Returns [num_tokens, num_heads, head_dim]. Distinct slots are the caller's duty.
    """
    check_shapes(query, key, value, pool, slots)
    num_decodes, num_sequences, *num_unwritten = split.tolist()
    write_slots(key, value, pool, slots, has_unwritten=bool(num_unwritten[0]) if num_unwritten else None)
    known_lens, known_start = (context_lens, query_start) if host_lens is None else host_lens
    output = torch.empty_like(query)
    if num_decodes:
        _attend_decodes(query, pool, block_tables, context_lens, known_lens[:num_decodes], scale, window, output)
    if num_sequences > num_decodes:
        starts = known_start[: num_sequences + 1].tolist()
        contexts = known_lens[:num_sequences].tolist()
        for i in range(num_decodes, num_sequences):
            chunk = slice(starts[i], starts[i + 1])
            output[chunk] = _attend_chunk(query[chunk], pool, block_tables[i], contexts[i], scale, window)
    return output


@paged_attention.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pool: Tensor,
    slots: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    query_start: Tensor,
    split: Tensor,
    scale: float,
    window: int | None = None,
    host_lens: Tensor | None = None,
) -> Tensor:
    return torch.empty_like(query)


def paged_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pool: Tensor,
    slots: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    query_start: Tensor,
    split: Tensor,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Do the same as ``paged_attention``, one query head of one token at a time: slow, and plainly right."""
    num_heads, head_dim = query.shape[1:]
    num_kv_heads = key.shape[1]
    keys, values = pool.view(2, -1, num_kv_heads, head_dim)
    for row, slot in enumerate(slots.tolist()):
        if slot >= 0:
            keys[slot] = key[row]
            values[slot] = value[row]
    block_size = pool.shape[2]
    output = torch.zeros_like(query)
    for i in range(int(split[1])):
        begin, end = int(query_start[i]), int(query_start[i + 1])
        for row in range(begin, end):
            position = int(context_lens[i]) - (end - row)
            first = 0 if window is None else max(0, position - window + 1)
            seen = torch.tensor(
                [
                    int(block_tables[i, p // block_size]) * block_size + p % block_size
                    for p in range(first, position + 1)
                ]
            )
            for head in range(num_heads):
                kv_head = head * num_kv_heads // num_heads
                weights = torch.softmax(keys[seen, kv_head].float() @ query[row, head].float() * scale, dim=0)
                output[row, head] = (weights @ values[seen, kv_head].float()).to(output.dtype)
    return output


def check_shapes(query: Tensor, key: Tensor, value: Tensor, pool: Tensor, slots: Tensor) -> None:
    """Raise ValueError where shapes, dtypes or devices do not fit together."""
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads = key.shape[1]
    if key.shape != (num_tokens, num_kv_heads, head_dim) or value.shape != key.shape or num_heads % num_kv_heads:
        raise ValueError(f"query {query.shape}, key {key.shape} and value {value.shape} do not belong together")
    if pool.dim() != 5 or pool.shape[0] != 2 or pool.shape[3:] != (num_kv_heads, head_dim):
        raise ValueError(f"a pool of shape {tuple(pool.shape)} does not hold keys of shape {tuple(key.shape)}")
    if not pool.is_contiguous() or slots.shape != (num_tokens,):
        raise ValueError("the pool must be contiguous, and every token must have a slot")
    if not query.dtype == key.dtype == value.dtype == pool.dtype or query.device != pool.device:
        raise ValueError(f"query is {query.dtype} on {query.device}, the pool is {pool.dtype} on {pool.device}")


def write_slots(key: Tensor, value: Tensor, pool: Tensor, slots: Tensor, *, has_unwritten: bool | None = None) -> None:
    """Copy each token's key and value into its slot of one layer's pool; a slot of -1 is left out.

    ``has_unwritten`` says whether there are such; None: look, for which a GPU is waited for.
    """
    keys, values = pool.view(2, -1, *pool.shape[3:])
    if bool((slots < 0).any()) if has_unwritten is None else has_unwritten:
        rows = (slots >= 0).nonzero().flatten()
        key, value, slots = key[rows], value[rows], slots[rows]
    keys.index_copy_(0, slots, key)
    values.index_copy_(0, slots, value)


def _attend_decodes(
    query: Tensor,
    pool: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    known: Tensor,
    scale: float,
    window: int | None,
    output: Tensor,
) -> None:
    """Attend the step's first queries, one a sequence. ``known`` [num_decodes] is their context_lens, on the CPU."""
    num_decodes = known.shape[0]
    contexts = context_lens[:num_decodes]
    lengths = known if window is None else known.clamp(max=window)
    longest = int(lengths.max())
    # Hot: once per layer (bench/serve.py). One long sequence must not make every short one as dear as itself.
    if num_decodes > 1 and longest * num_decodes > MAX_PADDING * int(lengths.sum()) + 64 * num_decodes:
        is_long = lengths * 2 > longest
        for rows in (is_long.nonzero().flatten(), (~is_long).nonzero().flatten()):
            there = rows.to(query.device)
            output[there] = _attend_batch(
                query[there], pool, block_tables[there], contexts[there], known[rows], scale, window
            )
    else:
        rows = query[:num_decodes]
        output[:num_decodes] = _attend_batch(rows, pool, block_tables[:num_decodes], contexts, known, scale, window)


def _attend_batch(
    query: Tensor,
    pool: Tensor,
    block_tables: Tensor,
    contexts: Tensor,
    known: Tensor,
    scale: float,
    window: int | None,
) -> Tensor:
    """Attend one query per sequence: gather whole blocks, fold the GQA group into the query axis, mask by length."""
    num_sequences, num_heads, head_dim = query.shape
    block_size, num_kv_heads = pool.shape[2], pool.shape[3]
    if window is None:
        first_block = contexts.new_zeros(num_sequences)
        num_columns = (int(known.max()) - 1) // block_size + 1
        tables = block_tables[:, :num_columns]
    else:
        first_block = (contexts - window).clamp(min=0) // block_size
        num_columns = int(((known - 1) // block_size - (known - window).clamp(min=0) // block_size).max()) + 1
        columns = first_block[:, None] + torch.arange(num_columns, device=query.device)
        tables = block_tables.gather(1, columns.clamp(max=block_tables.shape[1] - 1))
    gathered = pool.index_select(1, tables.flatten())
    shape = (num_sequences, num_columns * block_size, num_kv_heads, head_dim)
    keys, values = gathered[0].view(shape).transpose(1, 2), gathered[1].view(shape).transpose(1, 2)
    positions = first_block[:, None] * block_size + torch.arange(shape[1], device=query.device)
    is_seen = positions < contexts[:, None]
    if window is not None:
        is_seen &= positions >= contexts[:, None] - window
    folded = query.view(num_sequences, num_kv_heads, num_heads // num_kv_heads, head_dim)
    attended = F.scaled_dot_product_attention(folded, keys, values, attn_mask=is_seen[:, None, None], scale=scale)
    return attended.reshape(num_sequences, num_heads, head_dim)


def _attend_chunk(
    query: Tensor, pool: Tensor, block_table: Tensor, context: int, scale: float, window: int | None
) -> Tensor:
    """Attend a run of queries of one sequence to the blocks they can see."""
    num_queries, head_dim = query.shape[0], query.shape[2]
    block_size, num_kv_heads = pool.shape[2], pool.shape[3]
    begin = context - num_queries
    first_block = 0 if window is None else max(0, begin - window + 1) // block_size
    blocks = block_table[first_block : (context - 1) // block_size + 1]
    seen = pool.index_select(1, blocks).view(2, -1, num_kv_heads, head_dim)[:, : context - first_block * block_size]
    keys, values = seen.transpose(1, 2)
    queries = query.transpose(0, 1)
    if begin == 0 and window is None:
        mask = None
    else:
        positions = torch.arange(first_block * block_size, context, device=query.device)
        own = torch.arange(begin, context, device=query.device)[:, None]
        mask = positions <= own
        if window is not None:
            mask &= positions > own - window
    attended = F.scaled_dot_product_attention(
        queries[None], keys[None], values[None], attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True
    )
    return attended[0].transpose(0, 1)
