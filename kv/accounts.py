"""What an engine holds of a pool: the blocks of its sequences, and the slab it may grow them with."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Grant:
    """A sequence's blocks, and how many of its tokens are in place from 0 on."""

    block_table: tuple[int, ...]
    num_cached_tokens: int


class SequenceLease:
    """The blocks that one sequence holds, one reference to each. ``grant`` is what it was admitted with.

    ``num_claims``: how often it was asked for. Who takes that back must not end it under the others.
    """

    __slots__ = ("blocks", "grant", "num_claims")

    def __init__(self, grant: Grant) -> None:
        self.grant = grant
        self.num_claims = 0
        self.blocks = list(grant.block_table)


class EngineAccount:
    """An attached engine: its slab and its sequences."""

    def __init__(self, engine: str, incarnation: str, node: str, attachment: str) -> None:
        self.engine = engine
        self.incarnation = incarnation
        self.node = node
        """Where its process is: the next one of that name proves it dead."""
        self.attachment = attachment
        """Names the tie that it lasts for."""
        self.slab: dict[int, None] = {}
        self.sequences: dict[str, SequenceLease] = {}

    def absorb(self, lease: SequenceLease, block_table: Sequence[int]) -> None:
        """Move the slab blocks that the sequence has grown into to the sequence.

        Raises ValueError, and changes nothing, if the table holds a block that is neither the sequence's nor the
        slab's, or one block twice.
        """
        held = set(lease.blocks)
        grown = [block for block in block_table if block not in held]
        for block in grown:
            if block not in self.slab:
                raise ValueError(f"block {block} is neither the sequence's nor in the slab of {self.engine}")
        if len(set(block_table)) != len(block_table):
            raise ValueError("a block is twice in the table")
        for block in grown:
            del self.slab[block]
        lease.blocks.extend(grown)

    def all_blocks(self) -> list[int]:
        """Return every block held, once for each time it is held."""
        blocks = list(self.slab)
        for lease in self.sequences.values():
            blocks.extend(lease.blocks)
        return blocks
