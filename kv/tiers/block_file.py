"""A block as a file: who it is, and its bytes, so that nothing but the block that was asked for is ever taken for it.

    magic (8) | CRC-32 of all that follows (4) | length of the header (4) | header (msgpack) | the block's bytes

Numbers are little-endian. The header's length follows from the layout alone, so every file of a tier has the same size.
"""

import zlib

import msgspec

from callboard.kv.layout import KvLayout
from callboard.kv.tokens import TOKEN_BYTES

from .names import FORMAT, KEY_BYTES, BlockName, Chain

MAGIC = b"CBKVBLK" + bytes([FORMAT])
FINGERPRINT_BYTES = 64
"""Of a model's fingerprint as it stands in a header: what is longer is cut off there, and counts in the key."""
_PREFIX = len(MAGIC) + 8


class BadBlockFile(Exception):
    """A file that does not hold the block that it should; the message says why."""


class BlockHeader(msgspec.Struct, frozen=True, array_like=True):
    """Whose a file is. The key says all of it, but no person can read that."""

    layout: KvLayout
    fingerprint: str
    key: bytes
    parent: bytes
    tokens: bytes


def file_bytes(layout: KvLayout, fingerprint: str = "0" * FINGERPRINT_BYTES) -> int:
    """Return how large a file of such blocks is; with any fingerprint, at most."""
    nobody = bytes(KEY_BYTES)
    name = BlockName(nobody, nobody, bytes(layout.block_size * TOKEN_BYTES))
    return _PREFIX + len(_header(layout, fingerprint, name)) + layout.block_bytes


def encode_prefix(chain: Chain, name: BlockName, data: memoryview) -> bytes:
    """Return what a file has before the block's bytes, ``data``."""
    header = _header(chain.layout, chain.fingerprint, name)
    length = len(header).to_bytes(4, "little")
    checksum = zlib.crc32(data, zlib.crc32(header, zlib.crc32(length)))
    return MAGIC + checksum.to_bytes(4, "little") + length + header


def decode(chain: Chain, name: BlockName, content: memoryview) -> memoryview:
    """Return the bytes of the block ``name`` out of a file's ``content``. Raises BadBlockFile."""
    if bytes(content[: len(MAGIC)]) != MAGIC:
        raise BadBlockFile("it is no block's file")
    # By what is expected, not by what it says: a length that is wrong never addresses anything.
    expected = _header(chain.layout, chain.fingerprint, name)
    data = content[_PREFIX + len(expected) :]
    if len(data) != chain.layout.block_bytes:
        wanted = _PREFIX + len(expected) + chain.layout.block_bytes
        raise BadBlockFile(f"it has {len(content)} bytes, and a block's file {wanted}")
    checksum = int.from_bytes(content[len(MAGIC) : len(MAGIC) + 4], "little")
    if zlib.crc32(content[len(MAGIC) + 4 :]) != checksum:
        raise BadBlockFile("its checksum is wrong")
    if content[_PREFIX : _PREFIX + len(expected)] != expected:
        raise BadBlockFile("it holds another block")
    return data


def _header(layout: KvLayout, fingerprint: str, name: BlockName) -> bytes:
    short = fingerprint.encode()[:FINGERPRINT_BYTES].decode(errors="ignore")
    return msgspec.msgpack.encode(BlockHeader(layout, short, name.key, name.parent, name.tokens))
