"""The names of blocks: hashes that stand for all the tokens up to a block's end, so that equal prefixes are found.

A name is a function of what the KV is a function of: how it is laid out, which model computed it, and the tokens. So
several fleets may keep their blocks side by side, and no two lives of a fleet take each other's for something else.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec

from callboard.kv.layout import KvLayout
from callboard.kv.tokens import TOKEN_BYTES

FORMAT = 1
"""Counted up when files of blocks change: then nobody looks for the old ones."""
KEY_BYTES = 20
"""Of a key: nobody finds two prefixes of one key, and files hold their tokens, too."""


@dataclass(frozen=True, slots=True)
class BlockName:
    """A block of KV: ``tokens`` are those in it, ``parent`` the key of the block before it."""

    key: bytes
    parent: bytes
    tokens: bytes


class Chain:
    """Names blocks of one layout and one model. ``root`` is the parent of every first block."""

    def __init__(self, layout: KvLayout, fingerprint: str) -> None:
        self.layout = layout
        self.fingerprint = fingerprint
        self._block_bytes = layout.block_size * TOKEN_BYTES
        whose = msgspec.msgpack.encode(("callboard block", FORMAT, layout, fingerprint))
        self.root = hashlib.blake2b(whose, digest_size=KEY_BYTES).digest()

    def child(self, parent: bytes, tokens: bytes) -> BlockName:
        """Return the name of the block of ``tokens`` that follows the one whose key is ``parent``."""
        return BlockName(hashlib.blake2b(tokens, digest_size=KEY_BYTES, key=parent).digest(), parent, tokens)

    def names(self, parent: bytes, tokens: bytes, begin: int) -> Iterator[BlockName]:
        """Yield the names of the full blocks of ``tokens`` from block ``begin`` on, which follows ``parent``."""
        step = self._block_bytes
        for at in range(begin * step, len(tokens) - step + 1, step):
            name = self.child(parent, tokens[at : at + step])
            yield name
            parent = name.key
