"""The lane between pools that cannot map each other: pages are packed into staging buffers, which go over a wire.

While one piece is in flight the next is packed. The pool here is read by packing alone, and the one there is written
by its owner alone, who looks first whether the write is still open: so a wire that fails half way, or a peer that goes
on after it was given up, can harm nobody.
"""

import asyncio
from collections.abc import Callable, Iterator, Sequence

from callboard.bus import BusError, Refusal
from callboard.kv.layout import KvLayout, SlotRun
from callboard.kv.packed_form import SCALED_TOKENS, packed_bytes
from callboard.kv.packing import CONVERTED_BYTES, pack
from callboard.kv.page_store import PageStore
from callboard.kv.slots import cut_runs

from .contract import LaneClosed, PageWrite
from .staging import Staging
from .wire import TRAILER_BYTES, Announce, Piece, Wire, WireBroken

PIECE_BYTES = 4 << 20
"""The most bytes of pages in a message: packing it takes 0.7 ms, and each costs as much besides (bench/transfer.py)."""
NUM_BUFFERS = 3
"""Messages of a lane: one is packed while one is in flight and one is unpacked."""


class PackedLane:
    """Writes pages over ``wire``, each piece announced. ``dtype`` is what they are packed as.

    ``on_break`` is called once, when the wire turns out to be broken: the lane is of no use any more.
    """

    def __init__(
        self,
        name: str,
        wire: Wire,
        announce: Announce,
        *,
        dtype: str,
        new_tag: Callable[[], int],
        on_break: Callable[[], object] = lambda: None,
        piece_bytes: int = PIECE_BYTES,
        num_buffers: int = NUM_BUFFERS,
    ) -> None:
        self.name = name
        self.staging = Staging(num_buffers, piece_bytes + TRAILER_BYTES)
        self._wire = wire
        self._announce = announce
        self.wire_dtype = dtype
        self._new_tag = new_tag
        self._on_break = on_break
        self._piece_bytes = piece_bytes
        self._closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._announcing: dict[asyncio.Future[None], None] = {}
        self._sending: dict[asyncio.Future[None], None] = {}

    async def write(self, store: PageStore, pages: PageWrite) -> int:
        under_way: dict[asyncio.Future[None], None] = {}
        num_bytes = 0
        try:
            piece_bytes = self._piece_bytes
            if self.wire_dtype != store.layout.dtype:  # Converting takes longer, and nobody else runs meanwhile.
                piece_bytes = min(piece_bytes, max(CONVERTED_BYTES, packed_bytes(store.layout, 1, 1, self.wire_dtype)))
            for begin, end, layers in cut_pages(store.layout, pages, self.wire_dtype, piece_bytes):
                buffer = await self.staging.take()
                try:
                    piece = self._pack(store, pages, begin, end, layers, buffer)
                except BaseException:
                    self.staging.give(buffer)
                    raise
                under_way[asyncio.ensure_future(self._deliver(pages, piece, buffer))] = None
                num_bytes += piece.num_bytes
                await asyncio.sleep(0)
                _raise_what_failed(under_way)
            while under_way:
                await asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED)
                _raise_what_failed(under_way)
        finally:
            await _see_out(under_way)
        return num_bytes

    def fits(self, runs: Sequence[SlotRun]) -> bool:
        return True  # The receiver takes the slots from its own books.

    def close(self) -> None:
        if not self._closed.done():
            self._closed.set_result(None)
        self.staging.close()
        self._wire.close()
        for announcing in self._announcing:
            announcing.cancel()  # Whoever is still to answer may never do so.

    def _pack(
        self, store: PageStore, pages: PageWrite, begin: int, end: int, layers: range, buffer: memoryview
    ) -> Piece:
        if self._closed.done() or store.is_closed:
            raise LaneClosed
        runs = cut_runs(pages.source, begin - pages.token_begin, end - pages.token_begin)
        tag = self._new_tag()
        num_bytes = pack(store, runs, layers, buffer, wire_dtype=self.wire_dtype)
        buffer[num_bytes : num_bytes + TRAILER_BYTES] = tag.to_bytes(TRAILER_BYTES, "little")
        return Piece(begin, end, layers, tag, num_bytes, self.wire_dtype)

    async def _deliver(self, pages: PageWrite, piece: Piece, buffer: memoryview) -> None:
        """Send a packed piece; returns when it is in place there, or the lane is closed."""
        if self._closed.done():
            self.staging.give(buffer)
            raise LaneClosed
        announcing = asyncio.ensure_future(self._tell(pages, piece))
        self._announcing[announcing] = None
        self._sending[sending := asyncio.ensure_future(self._carry(piece, buffer))] = None
        sending.add_done_callback(self._sending.pop)
        try:
            # Whatever the receiver answers, it takes what was announced. A wire that is closed is not waited for: it
            # reads nothing but its buffer, which nobody gets any more.
            await asyncio.wait((sending, self._closed), return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
            await asyncio.wait((announcing,))
        finally:
            announcing.cancel()
            del self._announcing[announcing]
        if announcing.cancelled():
            raise LaneClosed
        try:
            announcing.result()
        except Refusal:
            raise
        except BusError:  # The receiver has lost its end of the wire, or is gone.
            self._break()
            raise

    async def _carry(self, piece: Piece, buffer: memoryview) -> None:
        """Send the bytes of a piece, and have its buffer back once they will not be read any more."""
        try:
            await self._wire.send(piece.tag, buffer[: piece.num_bytes + TRAILER_BYTES])
        except WireBroken:
            self._break()
        finally:
            self.staging.give(buffer)

    async def _tell(self, pages: PageWrite, piece: Piece) -> None:
        await self._announce(pages, piece)

    def _break(self) -> None:
        if not self._closed.done():
            self.close()
            self._on_break()


def cut_pages(layout: KvLayout, pages: PageWrite, dtype: str, piece_bytes: int) -> Iterator[tuple[int, int, range]]:
    """Cut a write into ``(token_begin, token_end, layers)``, each of at most ``piece_bytes`` when packed as ``dtype``.

    Raises ValueError if one token of one layer is more.
    """
    begin, end, layers = pages.token_begin, pages.token_end, pages.layers
    if packed_bytes(layout, 1, 1, dtype) > piece_bytes:
        raise ValueError(f"a token's KV of one layer is more than {piece_bytes} bytes")
    num_tokens = end - begin
    while packed_bytes(layout, num_tokens, 1, dtype) > piece_bytes:
        num_tokens = -(-num_tokens // 2)
        if num_tokens > SCALED_TOKENS:  # Tokens that share a scale stay together.
            num_tokens = -(-num_tokens // SCALED_TOKENS) * SCALED_TOKENS
    most_layers = max(1, piece_bytes // max(1, packed_bytes(layout, num_tokens, 1, dtype)))
    num_layers = max(1, -(-len(layers) // max(1, -(-len(layers) // most_layers))))  # All of them about as large.
    for first in range(layers.start, layers.stop, num_layers):
        for token in range(begin, end, num_tokens):
            yield token, min(token + num_tokens, end), range(first, min(first + num_layers, layers.stop))


def _raise_what_failed(under_way: dict[asyncio.Future[None], None]) -> None:
    """Forget the pieces that are in place; raise what one failed with."""
    for piece in [piece for piece in under_way if piece.done()]:
        del under_way[piece]
        piece.result()


async def _see_out(under_way: dict[asyncio.Future[None], None]) -> None:
    """Wait for the pieces that cannot be called back, however often the waiting is cancelled."""
    is_cancelled = False
    while any(not piece.done() for piece in under_way):
        try:
            await asyncio.wait(under_way)
        except asyncio.CancelledError:
            is_cancelled = True
    for piece in under_way:
        piece.cancelled() or piece.exception()
    if is_cancelled:
        raise asyncio.CancelledError
