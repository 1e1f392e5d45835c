"""How KV is laid out in a pool: which bytes belong to which token of which layer.

A pool is one array ``[num_layers, 2, num_blocks, block_size, num_kv_heads, head_dim]`` (2: keys, values), so that a
layer's keys are one contiguous tensor for attention, and adjacent slots of a layer are adjacent bytes for copying.
"""

import msgspec

from callboard.bus import Refusal

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class KvLayout(msgspec.Struct, frozen=True, array_like=True):
    """The shape of one token's KV and of a block."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int = 16
    dtype: str = "float32"

    @property
    def slot_bytes(self) -> int:
        """Bytes of one token's keys (or values) in one layer."""
        return self.num_kv_heads * self.head_dim * DTYPE_BYTES[self.dtype]

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values over all layers."""
        return 2 * self.num_layers * self.slot_bytes

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers."""
        return self.block_size * self.token_bytes

    def can_exchange_with(self, other: "KvLayout") -> bool:
        """Return whether pages can go from one pool to the other; their block size and dtype may differ."""
        mine, theirs = (self.num_layers, self.num_kv_heads, self.head_dim), (other.num_layers, other.num_kv_heads)
        return mine == (*theirs, other.head_dim)

    def num_blocks_in(self, num_bytes: int) -> int:
        """Return how many blocks fit into ``num_bytes``."""
        return num_bytes // self.block_bytes

    def pool_shape(self, num_blocks: int) -> tuple[int, int, int, int, int, int]:
        """Return the shape of a pool of ``num_blocks``."""
        return (self.num_layers, 2, num_blocks, self.block_size, self.num_kv_heads, self.head_dim)


class SlotRun(msgspec.Struct, frozen=True, array_like=True):
    """``count`` adjacent slots from ``slot`` on. A slot is ``block_id * block_size + offset``."""

    slot: int
    count: int


class OutOfBlocks(Refusal):
    """The pool cannot give that many blocks. Nothing was changed."""

    sentence = "{needed} blocks are needed and {free} are free"


class StaleReservation(Refusal):
    """The reservation is not (or no longer) this manager's: another epoch, expired, released, or never made."""

    sentence = "reservation {reservation_id} is not open here: {reason}"


class BadRange(Refusal):
    """A token range that the prompt does not have."""

    sentence = "[{begin}, {end}) is no range of a prompt of {num_tokens} tokens: {reason}"


class CorruptPages(Refusal):
    """Pages that are not what their sender says they are."""

    sentence = (
        "reservation {reservation_id}: {num_pages} of its pages did not arrive as they were sent, "
        "the first in layer {layer}, block {block} of the prompt"
    )
