"""Full blocks by the tokens before and in them: a radix tree whose edges are one block's token bytes.

The cache holds one reference to each of its blocks. A block that nobody else holds is idle, and may be evicted once
nothing hangs below it: a prefix is worth more than its continuation.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from .block_pool import BlockPool
from .tokens import TOKEN_BYTES


@dataclass(frozen=True, slots=True)
class Match:
    """The longest run of cached blocks that a prompt begins with."""

    blocks: tuple[int, ...]
    num_tokens: int


class CacheWatch(Protocol):
    """Who hears which blocks are cached under which tokens: the tiers below the pool (tiers/)."""

    def cached(self, parent: int | None, tokens: bytes, block: int) -> None:
        """Hear of a block that holds the KV of ``tokens``, which follow those of ``parent``."""

    def evicting(self, blocks: Sequence[int]) -> None:
        """Hear of blocks that are about to become free: their KV is in place until this returns."""


class _Node:
    """One cached block."""

    __slots__ = ("block", "children", "is_queued", "key", "last_used", "parent")

    def __init__(self, key: bytes, block: int, parent: "_Node | None") -> None:
        self.key = key
        self.block = block
        self.parent = parent
        self.children: dict[bytes, _Node] = {}
        self.last_used = 0
        self.is_queued = False


class PrefixCache:
    """Radix prefix cache over a pool, evicting least recently used leaves first.

    All references to blocks that may be cached go through ``pin`` and ``unpin``: that is how the cache knows which
    of its blocks are idle. "Recently" counts pins, unpins and inserts, not seconds.
    """

    def __init__(self, pool: BlockPool, block_size: int) -> None:
        self.num_evicted = 0
        self.num_queried_tokens = 0
        self.num_hit_tokens = 0
        self.num_idle = 0
        """Blocks that only the cache holds."""
        self.watch: CacheWatch | None = None
        self._pool = pool
        self._block_bytes = block_size * TOKEN_BYTES
        self._block_size = block_size
        self._root = _Node(b"", -1, None)
        self._nodes: dict[int, _Node] = {}
        # Candidates for eviction: each idle leaf is in here once, perhaps with an outdated time; others may be too.
        self._queue: list[tuple[int, int, _Node]] = []
        self._tick = 0

    def __len__(self) -> int:
        return len(self._nodes)

    def __contains__(self, block: int) -> bool:
        return block in self._nodes

    def match(self, tokens: bytes) -> Match:
        """Return the cached blocks that ``tokens`` begins with. Changes nothing: pin what you mean to keep."""
        step = self._block_bytes
        blocks = []
        node = self._root
        for begin in range(0, len(tokens) - step + 1, step):
            child = node.children.get(tokens[begin : begin + step])
            if child is None:
                break
            blocks.append(child.block)
            node = child
        return Match(tuple(blocks), len(blocks) * self._block_size)

    def note_query(self, num_queried: int, num_hits: int) -> None:
        """Count that blocks were taken for ``num_queried`` tokens, ``num_hits`` of which were found here."""
        self.num_queried_tokens += num_queried
        self.num_hit_tokens += min(num_hits, num_queried)

    def insert(self, tokens: bytes, block_table: Sequence[int]) -> int:
        """Enter the full blocks of ``tokens``, which the caller holds in ``block_table``; return how many were new.

        Where the tree has the block already, it keeps its own, and the caller's duplicate stays private. Raises
        ValueError, and changes nothing, if a block is cached under other tokens.
        """
        step = self._block_bytes
        num_full = min(len(tokens) // step, len(block_table))
        keys = [tokens[i * step : (i + 1) * step] for i in range(num_full)]
        node, depth = self._root, 0
        while depth < num_full and (child := node.children.get(keys[depth])) is not None:
            node, depth = child, depth + 1
        for block in block_table[depth:num_full]:
            if block in self._nodes:
                raise ValueError(f"block {block} is cached under other tokens")
        self._tick += 1
        for key, block in zip(keys[depth:], block_table[depth:num_full], strict=True):
            child = _Node(key, block, node)
            node.children[key] = child
            self._nodes[block] = child
            self._pool.retain((block,))
            if self.watch is not None:
                self.watch.cached(node.block if node.parent is not None else None, key, block)
            node = child
        while node.parent is not None:
            node.last_used = self._tick
            node = node.parent
        return num_full - depth

    def pin(self, blocks: Sequence[int]) -> None:
        """Hold these blocks, cached or not: they are not evicted until unpinned."""
        self._tick += 1
        for block in blocks:
            node = self._nodes.get(block)
            if node is not None:
                node.last_used = self._tick
                self.num_idle -= self._pool.refs(block) == 1
            self._pool.retain((block,))

    def unpin(self, blocks: Sequence[int]) -> None:
        """Give up one hold for each time a block is listed: cached ones stay until evicted, others become free."""
        self._tick += 1
        self._pool.release(blocks)
        for block in dict.fromkeys(blocks):
            node = self._nodes.get(block)
            if node is not None:
                node.last_used = self._tick
                if self._pool.refs(block) == 1:
                    self.num_idle += 1
                    self._enqueue(node)

    def evict(self, count: int) -> bool:
        """Free the ``count`` blocks least worth keeping; return False, and change nothing, if there are not so many."""
        if count > self.num_idle:
            return False
        victims: list[_Node] = []
        while len(victims) < count and self._queue:
            tick, _, node = heapq.heappop(self._queue)
            node.is_queued = False
            if not self._is_idle_leaf(node):
                continue
            if tick != node.last_used:
                self._enqueue(node)
                continue
            assert node.parent is not None
            del node.parent.children[node.key]
            victims.append(node)
            self._enqueue(node.parent)
        if len(victims) < count:
            # Idle blocks above held ones cannot go: put everything back.
            for node in reversed(victims):
                assert node.parent is not None
                node.parent.children[node.key] = node
                self._enqueue(node)
            return False
        for node in victims:
            del self._nodes[node.block]
        self.num_idle -= count
        self.num_evicted += count
        if self.watch is not None:
            self.watch.evicting([node.block for node in victims])
        self._pool.release([node.block for node in victims])
        return True

    def check_integrity(self) -> list[str]:
        """Return what is wrong: nothing, unless there is a bug."""
        problems = []
        seen: list[_Node] = []
        pending = [self._root]
        while pending:
            node = pending.pop()
            for key, child in node.children.items():
                if child.parent is not node or child.key != key or self._nodes.get(child.block) is not child:
                    problems.append(f"block {child.block} is not where the tree says")
                seen.append(child)
                pending.append(child)
        if len(seen) != len(self._nodes):
            problems.append(f"{len(seen)} nodes in the tree, {len(self._nodes)} blocks in the table")
        idle = [node for node in seen if self._pool.refs(node.block) == 1]
        if len(idle) != self.num_idle:
            problems.append(f"{len(idle)} cached blocks are idle, {self.num_idle} are counted")
        queued = {id(node) for _, _, node in self._queue}
        for node in seen:
            if self._pool.refs(node.block) < 1:
                problems.append(f"cached block {node.block} is free")
            if self._is_idle_leaf(node) and id(node) not in queued:
                problems.append(f"idle leaf {node.block} can never be evicted")
        return problems

    def _is_idle_leaf(self, node: _Node) -> bool:
        return not node.children and node.parent is not None and self._pool.refs(node.block) == 1

    def _enqueue(self, node: _Node) -> None:
        if not node.is_queued and self._is_idle_leaf(node):
            node.is_queued = True
            heapq.heappush(self._queue, (node.last_used, node.block, node))
