"""Where blocks go when the pool has no room for them any more, and come back from: host memory, and a directory."""

from .block_copy import copy_in, copy_out
from .block_file import BadBlockFile
from .disk import DiskTier
from .host import Bytes, HostTier
from .names import BlockName, Chain
from .spec import TierSpec, least_bytes

__all__ = [
    "BadBlockFile",
    "BlockName",
    "Bytes",
    "Chain",
    "DiskTier",
    "HostTier",
    "TierSpec",
    "copy_in",
    "copy_out",
    "least_bytes",
]
