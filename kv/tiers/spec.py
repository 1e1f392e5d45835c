"""What a tier is made of, as a KV manager is told."""

from typing import Literal

import msgspec

from callboard.kv.layout import KvLayout

from .block_file import file_bytes


class TierSpec(msgspec.Struct, frozen=True):
    """A tier of at most ``num_bytes``. ``path`` is a disk tier's directory; several managers may share one."""

    kind: Literal["host", "disk"]
    num_bytes: int
    path: str = ""


def least_bytes(kind: str, layout: KvLayout) -> int:
    """Return the size of the smallest tier: one block's."""
    return layout.block_bytes if kind == "host" else file_bytes(layout)
