"""A tier in the manager's own memory: for pools on a device, whose memory is smaller than its host's."""

from dataclasses import dataclass

from .index import TierIndex
from .names import BlockName, Chain

Bytes = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class HeldBlock:
    """A block's name and its bytes."""

    name: BlockName
    data: Bytes


class HostTier:
    """Blocks in at most ``most_bytes`` of memory."""

    refresh_at = float("inf")
    """Nobody else has a hand in it."""

    def __init__(self, most_bytes: int, chain: Chain) -> None:
        self.index = TierIndex(most_bytes, chain.root)
        self._blocks: dict[bytes, HeldBlock] = {}

    def __contains__(self, name: BlockName) -> bool:
        return self.get(name) is not None

    def get(self, name: BlockName) -> Bytes | None:
        """Return a block's bytes; None if it is not here."""
        held = self._blocks.get(name.key)
        return None if held is None or held.name != name else held.data

    async def refresh(self) -> None:
        """Do nothing: see DiskTier."""

    def put(self, name: BlockName, data: Bytes) -> list[HeldBlock]:
        """Keep a block's bytes, which the caller does not change any more; return the blocks that gave way.

        It gives way itself where there is no room but for what it continues.
        """
        block = HeldBlock(name, data)
        self.index.remove(name.key)
        self._blocks.pop(name.key, None)
        gone = [self._blocks.pop(key) for key, _ in self.index.make_room(len(data), name.parent)]
        if not self.index.fits(len(data)):
            return [*gone, block]
        self.index.add(name.key, name.parent, len(data))
        self._blocks[name.key] = block
        return gone
