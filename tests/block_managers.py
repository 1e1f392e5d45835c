"""A block manager with one engine, and what tests do to it."""

import itertools
from collections.abc import Iterable

from callboard.kv.accounts import Grant
from callboard.kv.block_manager import BlockManager
from callboard.kv.reservation_table import Held
from callboard.kv.tokens import pack_tokens

LEASE_S = 10.0


def make(num_blocks: int = 8, block_size: int = 2) -> BlockManager:
    ids = map(str, itertools.count())
    manager = BlockManager(num_blocks, block_size, lease_s=LEASE_S, new_id=lambda: next(ids))
    manager.attach("e", "e-1")
    return manager


def run(manager: BlockManager, ids: Iterable[int], sequence_id: str = "s") -> Grant:
    """Let engine "e" compute a sequence and end it."""
    grant = manager.admit("e", sequence_id, pack_tokens(ids))
    manager.finish("e", sequence_id, pack_tokens(ids), grant.block_table)
    return grant


def write(
    manager: BlockManager,
    held: Held,
    *,
    begin: int | None = None,
    end: int | None = None,
    write_id: str = "w",
    writer: str = "p",
) -> None:
    reservation = held.reservation
    manager.reservations.open_write(
        reservation.id,
        write_id,
        begin=reservation.begin if begin is None else begin,
        end=reservation.end if end is None else end,
        writer=writer,
        now=0.0,
    )


def fill(manager: BlockManager, held: Held) -> None:
    """Write all of a reservation."""
    write(manager, held)
    manager.reservations.close_write(held.reservation.id, "w", is_complete=True, now=0.0)


def reserve(
    manager: BlockManager,
    ids: Iterable[int],
    end: int | None = None,
    *,
    key: tuple[str, int] = ("r", 0),
    now: float = 0.0,
) -> Held:
    return manager.reservations.reserve(key, pack_tokens(ids), end, now=now)
