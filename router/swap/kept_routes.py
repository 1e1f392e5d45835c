"""What a router runs, kept in a file of the run directory: one that is started again goes on with it.

The file is written before a change is acknowledged. It ends with the run directory: a fleet that is started anew
begins with its fleet file.
"""

import logging
import os
from pathlib import Path

import msgspec

from callboard.actors.route_protocol import RouteChange, RouteRecord, ScriptText

log = logging.getLogger("callboard.router")

MOST_HISTORY = 50
"""Changes that are remembered."""
MOST_TEXTS_BYTES = 4 * 1024 * 1024
"""Bytes of all scripts' texts that are remembered; those of the present change always are."""


class KeptRoutes(msgspec.Struct, frozen=True):
    """The file's content."""

    change: RouteChange
    history: tuple[RouteRecord, ...]
    texts: tuple[ScriptText, ...]


def read_kept(path: str) -> KeptRoutes | None:
    """Return what was kept, None if nothing was, or it cannot be read."""
    if not path:
        return None
    try:
        return msgspec.msgpack.decode(Path(path).read_bytes(), type=KeptRoutes)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError) as error:
        log.error(
            "what the router ran cannot be read from %s (%s): it begins with its fleet file's script", path, error
        )
        return None


def write_kept(path: str, kept: KeptRoutes) -> None:
    """Replace the file, all or nothing. Raises OSError. Quick: a few KiB that need not survive the machine."""
    if not path:
        return
    beside = f"{path}.new"
    fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(msgspec.msgpack.encode(kept))
    os.replace(beside, path)
