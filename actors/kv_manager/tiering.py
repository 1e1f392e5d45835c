"""The tiers below a manager's pool: what is cached goes down into them soon after (spill.py), and comes back when it is
asked for (warming.py).
"""

from collections.abc import Iterator, Sequence

import msgspec

from callboard.actors.protocol import Counters
from callboard.bus import Node
from callboard.kv.block_manager import BlockManager
from callboard.kv.tiers import BlockName, Bytes, Chain, DiskTier, HostTier, TierSpec

from .pool_actor import PoolActor
from .spill import Spill

FLUSH_S = 3.0
"""How long an orderly stop may take to write what is not yet on the disk."""


class Tiering:
    """The tiers of one manager, as its configuration names them; watches its prefix cache."""

    def __init__(self, manager: PoolActor) -> None:
        self._manager = manager
        self._node: Node = manager.node
        self._blocks: BlockManager = manager.blocks
        config = manager.config
        self._layout = config.layout
        self._chain = chain = Chain(config.layout, config.fingerprint)
        kinds: dict[str, TierSpec] = {spec.kind: spec for spec in config.tiers}
        self.host = HostTier(kinds["host"].num_bytes, chain) if "host" in kinds else None
        self.disk = None
        if "disk" in kinds:
            self.disk = DiskTier(self._node, kinds["disk"].path, kinds["disk"].num_bytes, chain)
        self._spills: list[Spill] = []
        if self.host is not None:
            self._spills.append(Spill(manager, self._put_into_host, lambda name: None))
        if self.disk is not None:
            find = (lambda name: None) if self.host is None else self.host.get
            self._spills.append(Spill(manager, self._put_onto_disk, find))
        self._names: dict[int, BlockName] = {}
        self.num_hit_tokens = 0
        """Tokens whose KV came back."""
        self._num_bytes_read = 0
        self._num_bytes_written = 0

    async def start(self) -> None:
        """See what the tiers hold from earlier lives, and begin to write into them."""
        if self._spills:
            self._blocks.cache.watch = self
        if self.disk is not None:
            await self.disk.refresh()
        for spill, tier in self._tiers():
            self._manager.spawn(spill.run(tier))

    async def stop(self) -> None:
        """Write what is not yet written, as far as time allows."""
        if self.disk is not None:
            await self._spills[-1].flush(FLUSH_S)
            await self.disk.close(FLUSH_S)

    def counted(self, counters: Counters) -> Counters:
        """Return the manager's counters with those of the tiers."""
        return msgspec.structs.replace(
            counters,
            num_tier_hit_tokens=self.num_hit_tokens,
            num_tier_bytes_read=self._num_bytes_read,
            num_tier_bytes_written=self._num_bytes_written,
            num_tier_dropped_blocks=sum(spill.num_dropped for spill in self._spills),
            num_tier_bad_blocks=0 if self.disk is None else self.disk.num_bad,
        )

    # ---- what the cache says ---------------------------------------------------------------------------------------

    def cached(self, parent: int | None, tokens: bytes, block: int) -> None:
        """See CacheWatch."""
        above = self._chain.root if parent is None else self._names[parent].key
        self._names[block] = name = self._chain.child(above, tokens)
        for spill, tier in self._tiers():
            if name not in tier:
                spill.add(name, block)

    def evicting(self, blocks: Sequence[int]) -> None:
        """See CacheWatch."""
        for block in blocks:
            name = self._names.pop(block)
            for spill, tier in self._tiers():
                if name in tier:
                    tier.index.touch((name.key,))
                    spill.remove(name)  # Others have written it meanwhile: in this place will soon be something else.
                else:
                    spill.evicting(name, block)

    # ---- coming back -----------------------------------------------------------------------------------------------

    def num_held_tokens(self, prompt: bytes) -> int:
        """Return how many tokens of a prompt the tiers hold beyond those that are cached."""
        return self._layout.block_size * sum(1 for _ in self.held(prompt))

    def held(self, prompt: bytes, table: Sequence[int] | None = None) -> Iterator[BlockName]:
        """Yield the names of the blocks of a prompt that some tier holds, behind those that are cached.

        Or behind those of ``table``, which are cached.
        """
        if not self._spills:
            return
        blocks = self._blocks.cache.match(prompt).blocks if table is None else table
        parent = self._names[blocks[-1]].key if blocks else self._chain.root
        for name in self._chain.names(parent, prompt, len(blocks)):
            if not any(name in tier or spill.staged(name) is not None for spill, tier in self._tiers()):
                return
            yield name

    async def fetch(self, names: Sequence[BlockName]) -> list[Bytes]:
        """Return the bytes of these blocks, up to the first that is not to be had."""
        at_hand = {name.key: data for name in names if (data := self._at_hand(name)) is not None}
        others = [name for name in names if name.key not in at_hand]
        if others and self.disk is not None:
            read = await self.disk.read(others)
            self._num_bytes_read += sum(map(len, read))
            at_hand |= {name.key: data for name, data in zip(others, read, strict=False)}
        found: list[Bytes] = []
        for name in names:
            if name.key not in at_hand:
                break
            found.append(at_hand[name.key])
        if self.host is not None:
            self.host.index.touch(name.key for name in names[: len(found)])
        return found

    def _at_hand(self, name: BlockName) -> Bytes | None:
        """Return a block's bytes if they are in memory."""
        data = None if self.host is None else self.host.get(name)
        for spill in self._spills:
            data = spill.staged(name) if data is None else data
        return data

    # ---- going down ------------------------------------------------------------------------------------------------

    def _tiers(self) -> Iterator[tuple[Spill, HostTier | DiskTier]]:
        tiers = [tier for tier in (self.host, self.disk) if tier is not None]
        return zip(self._spills, tiers, strict=True)

    async def _put_into_host(self, name: BlockName, data: Bytes) -> None:
        assert self.host is not None
        for gone in self.host.put(name, data):
            for spill in self._spills[1:]:
                spill.keep(gone.name, gone.data)

    async def _put_onto_disk(self, name: BlockName, data: Bytes) -> None:
        assert self.disk is not None
        self._num_bytes_written += await self.disk.write(name, data)
