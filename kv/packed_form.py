"""What pages look like when they are packed for a wire.

A packed piece is the KV of some tokens for a range of layers, ``[num_layers, 2, num_tokens, num_kv_heads, head_dim]``
in the wire's dtype, which may be another than the pool's: float32, bfloat16, float16, or float8_e4m3, which is followed
by float32 scales ``[num_layers, 2, ceil(num_tokens / 16)]``, one for each 16 tokens of the piece.
"""

from .layout import DTYPE_BYTES, KvLayout

SCALED = "float8_e4m3"
SCALED_TOKENS = 16
"""Tokens that share a scale."""
WIRE_DTYPES = {**DTYPE_BYTES, SCALED: 1}
"""What KV can be packed as, and the bytes of an element."""


def packed_bytes(layout: KvLayout, num_tokens: int, num_layers: int, wire_dtype: str) -> int:
    """Return how many bytes a packed piece takes. Raises ValueError for what KV cannot be packed as."""
    width = WIRE_DTYPES.get(wire_dtype)
    if width is None:
        raise ValueError(f"KV cannot be packed as {wire_dtype!r}, only as {', '.join(WIRE_DTYPES)}")
    num_rows = 2 * num_layers
    num_scales = num_rows * -(-num_tokens // SCALED_TOKENS) if wire_dtype == SCALED else 0
    return num_rows * num_tokens * layout.num_kv_heads * layout.head_dim * width + 4 * num_scales
