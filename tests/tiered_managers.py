"""Managers with tiers, and sequences computed at them."""

from pathlib import Path
from typing import Any

from two_managers import Fleet, admit, finish, is_in_place

from callboard.kv.tiers import TierSpec
from callboard.kv.tokens import unpack_tokens

FIRST, SECOND, THIRD = list(range(40)), list(range(100, 164)), list(range(50, 90))
"""Prompts that do not all fit into a pool: together with one of the others, the first is evicted by the second."""
BLOCK_BYTES = 3 * 2 * 4 * 8


def tiers(kinds: str, folder: Path, *, host_bytes: int = 1 << 20, disk_bytes: int = 1 << 20) -> dict[str, Any]:
    """Return the part of a manager's configuration for ``host``, ``disk`` or ``host+disk``."""
    specs = {"host": TierSpec("host", host_bytes), "disk": TierSpec("disk", disk_bytes, str(folder / "cache"))}
    return {"tiers": tuple(specs[kind] for kind in kinds.split("+"))}


def compute(fleet: Fleet, at: str, ids: list[int], table: list[int], begin: int) -> None:
    for layer in range(3):
        fleet.actors[f"{at}e"].compute(ids, table, begin, len(ids), layer)


async def run(fleet: Fleet, ids: list[int], *, at: str = "d", sequence_id: str = "s") -> int:
    """Compute a sequence as an engine does, and end it; return how many tokens were in place, all of them rightly."""
    admitted = await fleet.at(at).ask(admit(ids, sequence_id=sequence_id, wait_s=10.0))
    table, begin = unpack_tokens(admitted.block_table), admitted.num_cached_tokens
    assert is_in_place(fleet, at, ids, table, 0, begin)
    compute(fleet, at, ids, table, begin)
    fleet.at(at).tell(finish(ids, admitted.block_table, sequence_id=sequence_id))
    await fleet.stats(at)
    return begin
