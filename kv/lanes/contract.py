"""What every lane promises: a way for pages into one peer's pool."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from callboard.bus import Refusal
from callboard.kv.layout import SlotRun
from callboard.kv.page_store import PageStore


class NoLane(Refusal):
    """No lane leads from one manager to the other: they have none in common, or what it takes is not installed."""

    sentence = "no lane leads to {manager}: {reason}"


class LaneClosed(Exception):
    """The lane is given up: what is written now would be of use to nobody, and may be somebody else's."""


@dataclass(frozen=True, slots=True)
class PageWrite:
    """A part of an open write: the KV of the prompt's tokens ``[token_begin, token_end)``, for a group of layers.

    ``source`` are their slots in the pool here, ``target`` those in the peer's, both in the order of the tokens.
    """

    reservation_id: str
    epoch: str
    write_id: str
    token_begin: int
    token_end: int
    layers: range
    source: tuple[SlotRun, ...]
    target: tuple[SlotRun, ...]


class Lane(Protocol):
    """A way into one peer's pool, opened once for a (manager, epoch). ``name`` is shown to people."""

    name: str
    wire_dtype: str
    """What KV is converted to on its way, if not straight to the peer's dtype; else empty."""

    async def write(self, store: PageStore, pages: PageWrite) -> int:
        """Write pages of ``store`` into the peer's pool; return the bytes moved, once all of them are in place.

        Several writes may be under way at once. A write is over when this returns or raises, also when it is
        cancelled: nothing of it touches the peer's slots afterwards, nor reads those of ``store``. That is what lets a
        reservation be closed by message. Raises LaneClosed when the lane is closed meanwhile.
        """

    def fits(self, runs: Sequence[SlotRun]) -> bool:
        """Return whether the peer's pool has all these slots."""

    def close(self) -> None:
        """Give up what the lane holds, also under a write. A repeat does nothing."""
