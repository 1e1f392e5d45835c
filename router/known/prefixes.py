"""Which beginnings many prompts share, by the prompts that this router was given: a radix tree of their tokens.

How often a prefix is asked for only routers know; where it is cached only KV managers do, who evict, restart, and serve
other routers. So the tree says what is hot, and holders are asked for when somebody wants to know (Fleet.hot_prefixes).
Events of the managers would cost a message a block, and say nothing of hits.
"""

import math
from collections import OrderedDict

from callboard.kv.tokens import TOKEN_BYTES

CHUNK_TOKENS = 16
"""Prefixes are told apart in steps of so many tokens."""
CHUNK = CHUNK_TOKENS * TOKEN_BYTES
MOST_LEAVES = 1024
MOST_BYTES = 32 * 1024 * 1024
"""Of token ids, over all prompts that are remembered."""
MEMORY_S = 30.0
"""How long a hit counts: its weight falls to a third in that time."""


class _Node:
    """A run of tokens behind those of its parent, and how often prompts went through its end."""

    __slots__ = ("children", "edge", "parent", "rate", "seen_s")

    def __init__(self, edge: bytes, parent: "_Node | None", rate: float, now: float) -> None:
        self.edge = edge
        self.parent = parent
        self.children: dict[bytes, _Node] = {}
        self.rate = rate
        self.seen_s = now

    def rate_at(self, now: float) -> float:
        """Return the hits per second, the latest weighing most."""
        return self.rate * math.exp((self.seen_s - now) / MEMORY_S)

    def hit(self, now: float) -> None:
        """Count one more."""
        self.rate, self.seen_s = self.rate_at(now) + 1.0 / MEMORY_S, now


class Prefixes:
    """The prompts of one router, forgotten least recently used first. Times are seconds of the caller's clock."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self._roots: dict[str, _Node] = {}
        self._leaves: OrderedDict[_Node, str] = OrderedDict()

    def __len__(self) -> int:
        return len(self._leaves)

    def note(self, model: str, prompt: bytes, now: float) -> int:
        """Take in a prompt (int32 bytes) that was asked for; return how many tokens of it others began with before."""
        # Hot: once per request. A walk over a few nodes, by comparing bytes.
        end = len(prompt) // CHUNK * CHUNK
        if not end or end > MOST_BYTES // 8:
            return 0
        root = self._roots.get(model)
        if root is None:
            root = self._roots[model] = _Node(b"", None, 0.0, now)
        node, begin, num_seen = root, 0, end // TOKEN_BYTES
        while begin < end:
            child = node.children.get(prompt[begin : begin + CHUNK])
            if child is None:
                child = _Node(prompt[begin:end], node, 0.0, now)
                node.children[child.edge[:CHUNK]] = child
                self._leaves.pop(node, None)
                self.num_bytes += len(child.edge)
                num_seen = begin // TOKEN_BYTES
            else:
                common = _common(child.edge, prompt, begin, end)
                if common < len(child.edge):
                    child = self._split(child, common)
            child.hit(now)
            node, begin = child, begin + len(child.edge)
        if not node.children:
            self._leaves[node] = model
            self._leaves.move_to_end(node)
        while len(self._leaves) > MOST_LEAVES or self.num_bytes > MOST_BYTES:
            self._forget()
        return num_seen

    def hot(self, model: str, *, min_hits_per_s: float, now: float, most: int) -> list[tuple[str, bytes, float]]:
        """Return model, tokens and hits per second of the prefixes that are asked for that often, the hottest first.

        Of one that continues another, only the longer where that is hot itself. ``model`` "" stands for every one.
        """
        found: list[tuple[str, bytes, float]] = []
        for name, root in self._roots.items():
            if model in ("", name):
                pending = [(root, b"")]
                while pending:
                    node, before = pending.pop()
                    tokens = before + node.edge
                    hot = [child for child in node.children.values() if child.rate_at(now) >= min_hits_per_s]
                    pending += [(child, tokens) for child in hot]
                    if not hot and node.parent is not None:
                        found.append((name, tokens, node.rate_at(now)))
        return sorted(found, key=lambda each: -each[2])[:most]

    def _split(self, node: _Node, at: int) -> _Node:
        """Cut a node's edge; return the new node of its first part."""
        assert node.parent is not None
        upper = _Node(node.edge[:at], node.parent, node.rate, node.seen_s)
        node.parent.children[upper.edge[:CHUNK]] = upper
        node.edge, node.parent = node.edge[at:], upper
        upper.children[node.edge[:CHUNK]] = node
        return upper

    def _forget(self) -> None:
        leaf, model = self._leaves.popitem(last=False)
        parent = leaf.parent
        assert parent is not None
        del parent.children[leaf.edge[:CHUNK]]
        self.num_bytes -= len(leaf.edge)
        if not parent.children:
            if parent.parent is None:
                del self._roots[model]
            else:
                # It was used as late as any prompt that went through it.
                self._leaves[parent] = model
                self._leaves.move_to_end(parent, last=False)


def _common(edge: bytes, prompt: bytes, begin: int, end: int) -> int:
    """Return how many bytes ``edge`` and ``prompt[begin:end]`` share, in whole chunks; the first one they do."""
    least, most = 1, min(len(edge), end - begin) // CHUNK
    while least < most:
        middle = (least + most + 1) // 2
        if prompt.startswith(edge[: middle * CHUNK], begin):
            least = middle
        else:
            most = middle - 1
    return least * CHUNK
