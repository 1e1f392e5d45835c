"""A lane that carries so many bytes a second, whatever lane it is put around: a network's link, to try things with."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from callboard.kv.lanes import Lane, PageWrite
from callboard.kv.layout import SlotRun
from callboard.kv.page_store import PageStore
from callboard.kv.slots import cut_runs

PIECE_TOKENS = 128
"""Of one layer: what is on the link at a time. Writes that are under way together take turns."""


class Link:
    """One link, shared by all lanes that go over it. ``bytes_per_s`` may change at any time; None has no limit."""

    def __init__(self) -> None:
        self.bytes_per_s: float | None = None
        self._free_s = 0.0
        """When it will have carried what it was given."""

    async def carry(self, num_bytes: int) -> None:
        """Return when these bytes have gone over the link, after those it was given before."""
        if self.bytes_per_s is None:
            return
        now = asyncio.get_running_loop().time()
        # From when it was free, not from when it was found to be: a late wake-up costs nothing.
        self._free_s = max(self._free_s, now) + num_bytes / self.bytes_per_s
        await asyncio.sleep(self._free_s - now)


class LimitedLane:
    """Writes by ``inner``, a piece at a time, each of which takes its time on the link."""

    def __init__(self, inner: Lane, link: Link) -> None:
        self.name = inner.name
        self.wire_dtype = inner.wire_dtype
        self._inner = inner
        self._link = link

    async def write(self, store: PageStore, pages: PageWrite) -> int:
        num_bytes = 0
        for piece in pieces(pages):
            moved = await self._inner.write(store, piece)
            await self._link.carry(moved)
            num_bytes += moved
        return num_bytes

    def fits(self, runs: Sequence[SlotRun]) -> bool:
        return self._inner.fits(runs)

    def close(self) -> None:
        self._inner.close()


def pieces(pages: PageWrite) -> Iterator[PageWrite]:
    """Cut what is to be written into pieces of a layer, and of PIECE_TOKENS at most."""
    count = pages.token_end - pages.token_begin
    for layer in pages.layers:
        for begin in range(0, count, PIECE_TOKENS):
            end = min(begin + PIECE_TOKENS, count)
            yield replace(
                pages,
                token_begin=pages.token_begin + begin,
                token_end=pages.token_begin + end,
                layers=range(layer, layer + 1),
                source=cut_runs(pages.source, begin, end),
                target=cut_runs(pages.target, begin, end),
            )


def limit_lanes(link: Link) -> None:
    """Have every lane that a KV manager of this process opens from now on go over ``link``."""
    from callboard.actors.kv_manager.peers import Peers

    opened: Callable[..., Awaitable[Lane]] = Peers._open

    async def open_limited(*arguments: Any) -> Lane:
        return LimitedLane(await opened(*arguments), link)

    Peers._open = open_limited  # type: ignore[method-assign,assignment]
