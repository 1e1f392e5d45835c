"""What a tier holds, and what of it goes first: the least recently used block that no other one continues."""

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

LEAST_QUEUED = 64
"""Outdated candidates are left in the queue, up to this many and twice as many as there are blocks."""


@dataclass(slots=True)
class _Entry:
    """One block that a tier holds."""

    parent: bytes
    num_bytes: int
    used: int
    num_children: int = 0
    is_queued: bool = False


class TierIndex:
    """Keys of blocks with their sizes, bounded by ``most_bytes``; decides, and touches no block itself.

    ``root`` is the parent of first blocks. "Recently" counts additions and touches, not seconds. Of a chain the tail
    goes first: a prefix is worth more than its continuation, which nobody finds without it.
    """

    def __init__(self, most_bytes: int, root: bytes) -> None:
        self.most_bytes = most_bytes
        self.num_bytes = 0
        self._root = root
        self._entries: dict[bytes, _Entry] = {}
        self._orphans: dict[bytes, int] = {}
        """How many blocks continue one that is not here, by its key."""
        self._queue: list[tuple[int, bytes]] = []
        self._tick = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: bytes) -> bool:
        return key in self._entries

    def add(self, key: bytes, parent: bytes, num_bytes: int) -> None:
        """Note that a block is held, as the most recently used one. A repeat changes its size."""
        self.remove(key)
        self._tick += 1
        entry = self._entries[key] = _Entry(parent, num_bytes, self._tick, self._orphans.pop(key, 0))
        self.num_bytes += num_bytes
        above = self._entries.get(parent)
        if above is None:
            self._orphans[parent] = self._orphans.get(parent, 0) + 1
        else:
            above.num_children += 1
        self._enqueue(key, entry)

    def touch(self, keys: Iterable[bytes]) -> None:
        """Note that these blocks were used just now; unknown ones are ignored."""
        self._tick += 1
        for key in keys:
            entry = self._entries.get(key)
            if entry is not None:
                entry.used = self._tick

    def remove(self, key: bytes) -> None:
        """Note that a block is held no longer. A repeat does nothing."""
        entry = self._entries.pop(key, None)
        if entry is None:
            return
        self.num_bytes -= entry.num_bytes
        if entry.num_children:
            self._orphans[key] = entry.num_children
        above = self._entries.get(entry.parent)
        if above is not None:
            above.num_children -= 1
            self._enqueue(entry.parent, above)
        else:
            self._orphans[entry.parent] -= 1
            if not self._orphans[entry.parent]:
                del self._orphans[entry.parent]

    def __iter__(self) -> Iterator[bytes]:
        return iter(list(self._entries))

    def clear(self) -> None:
        """Note that nothing is held any more."""
        for key in self:
            self.remove(key)

    def fits(self, num_bytes: int) -> bool:
        """Return whether there is room for so many bytes."""
        return self.num_bytes + num_bytes <= self.most_bytes

    def make_room(self, num_bytes: int, parent: bytes | None = None) -> list[tuple[bytes, bytes]]:
        """Remove what must go for ``num_bytes`` more to fit, those of a block that follows ``parent``.

        Returns the keys that are removed, with their parents', first to go first. It may not fit even so: nothing goes
        for a block whose parent is not here, and no parent for its block; of a chain that is too long the beginning
        is kept.
        """
        above = None if parent is None else self._entries.get(parent)
        if above is None and parent not in (None, self._root):
            return []
        if above is not None:
            above.num_children += 1
        victims = []
        while self._queue and not self.fits(num_bytes):
            used, key = heapq.heappop(self._queue)
            entry = self._entries.get(key)
            if entry is None:
                continue
            entry.is_queued = False
            if used != entry.used:
                self._enqueue(key, entry)
            elif not entry.num_children:
                victims.append((key, entry.parent))
                self.remove(key)
        if parent is not None and above is not None:
            above.num_children -= 1
            self._enqueue(parent, above)
        return victims

    def check_integrity(self) -> list[str]:
        """Return what is wrong: nothing, unless there is a bug."""
        problems = []
        if sum(entry.num_bytes for entry in self._entries.values()) != self.num_bytes:
            problems.append("the bytes of all blocks are not what is counted")
        children: dict[bytes, int] = {}
        for entry in self._entries.values():
            children[entry.parent] = children.get(entry.parent, 0) + 1
        queued = {key for _, key in self._queue}
        for key, entry in self._entries.items():
            if entry.num_children != children.pop(key, 0):
                problems.append(f"block {key.hex()} has another number of children")
            if not entry.num_children and key not in queued:
                problems.append(f"block {key.hex()} can never go")
        if children != self._orphans:
            problems.append("the blocks without a parent are not those that are counted")
        return problems

    def _enqueue(self, key: bytes, entry: _Entry) -> None:
        if not entry.is_queued and not entry.num_children:
            entry.is_queued = True
            heapq.heappush(self._queue, (entry.used, key))
            if len(self._queue) > 2 * len(self._entries) + LEAST_QUEUED:
                self._queue = [(each.used, key) for key, each in self._entries.items() if each.is_queued]
                heapq.heapify(self._queue)
