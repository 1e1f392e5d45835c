"""The pages of one write on their way: a part leaves while the next one is computed, and at most two are under way."""

import asyncio
from collections import deque

from callboard.actors.protocol import OpenWrite, WriteOpened
from callboard.bus import LinkLost, current_call
from callboard.kv.block_manager import Loan
from callboard.kv.digests import Digests
from callboard.kv.lanes import Lane, LaneClosed, PageWrite
from callboard.kv.layout import KvLayout, SlotRun
from callboard.kv.slots import cut_runs, slot_runs

from .pool_actor import PoolActor

MOST_UNDER_WAY = 2
"""Parts: one is packed while the other is in flight."""


class OpenedWrite:
    """Leave to write the tokens ``[begin, end)`` into a pool of ``layout``, and the lane to do it over."""

    def __init__(
        self,
        opening: OpenWrite,
        opened: WriteOpened,
        lane: Lane,
        layout: KvLayout,
        to: str,
        *,
        is_here: bool = False,
    ) -> None:
        self.opening = opening
        self.opened = opened
        self.lane = lane
        self.layout = layout
        self.to = to
        self.is_here = is_here
        """Whether the pool is the writer's own: then blocks change hands, and hardly a byte is copied."""
        self.begin, self.end = opening.begin, opening.end
        self.digests = Digests(layout, self.begin, self.end) if opened.wants_digests else None

    @property
    def all_layers(self) -> range:
        """Every layer."""
        return range(self.layout.num_layers)

    def pages(self, begin: int, end: int, layers: range, source: tuple[SlotRun, ...]) -> PageWrite:
        """Return what is to be written of the tokens ``[begin, end)``."""
        opening = self.opening
        target = cut_runs(self.opened.slots, begin - self.begin, end - self.begin)
        return PageWrite(opening.reservation_id, opening.epoch, opening.write_id, begin, end, layers, source, target)


class Transfer:
    """Sends the pages of a loan into what was opened. Whoever puts parts must end with ``drain`` or ``abandon``."""

    def __init__(self, manager: PoolActor, write: OpenedWrite, loan: Loan) -> None:
        self.num_bytes = 0
        self.send_s = 0.0
        """Seconds in which a part or two were under way."""
        self._num_sent = 0
        self._manager = manager
        self._clock = manager.node.clock
        self._write = write
        self._loan = loan
        self._waiting: deque[tuple[int, int, range]] = deque()
        self._under_way: dict[asyncio.Future[None], None] = {}
        self._since_s = 0.0
        self._error: BaseException | None = None

    def put(self, begin: int, end: int, layers: range) -> None:
        """Let go of what is wanted of ``[begin, end)``, for these layers, as soon as it is its turn.

        Raises what an earlier part failed with.
        """
        self._raise_error()
        begin, end = max(begin, self._write.begin), min(end, self._write.end)
        if begin < end and layers:
            self._waiting.append((begin, end, layers))
            self._pump()

    async def drain(self) -> None:
        """Wait until every part is in place. Raises what one failed with."""
        while self._under_way and self._error is None:
            await asyncio.wait(self._under_way, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.sleep(0)  # For what is done when one is over.
        self._raise_error()

    async def abandon(self) -> None:
        """End every part that is under way; returns when none of them reads or writes a page any more."""
        self._waiting.clear()
        for part in self._under_way:
            part.cancel()
        is_cancelled = False
        while self._under_way:
            try:
                await asyncio.wait(self._under_way)
                await asyncio.sleep(0)
            except asyncio.CancelledError:
                is_cancelled = True  # The blocks must stay as they are until then, whoever is in a hurry.
        if is_cancelled:
            raise asyncio.CancelledError

    @property
    def is_complete(self) -> bool:
        """Whether every layer of every token is in place."""
        return self._num_sent >= (self._write.end - self._write.begin) * self._write.layout.num_layers

    def has_failed_with(self, error: BaseException) -> bool:
        """Return whether this is what a part failed with."""
        return self._error is error

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _pump(self) -> None:
        while self._waiting and len(self._under_way) < MOST_UNDER_WAY:
            if not self._under_way:
                self._since_s = self._clock.now()
            part = asyncio.ensure_future(self._send(*self._waiting.popleft()))
            self._under_way[part] = None
            part.add_done_callback(self._over)

    def _over(self, part: asyncio.Future[None]) -> None:
        del self._under_way[part]
        error = None if part.cancelled() else part.exception()
        if error is not None:
            self._error = self._error or error
            self._waiting.clear()
        self._pump()
        if not self._under_way:
            self.send_s += self._clock.now() - self._since_s

    async def _send(self, begin: int, end: int, layers: range) -> None:
        manager, write, started = self._manager, self._write, self._clock.now()
        source = slot_runs(self._loan.block_table, begin, end, manager.config.layout.block_size)
        try:
            if write.digests is not None:
                await write.digests.add_pages(manager.store, source, begin, layers, via=write.lane.wire_dtype)
            num_bytes = await write.lane.write(manager.store, write.pages(begin, end, layers, source))
        except LaneClosed:
            raise LinkLost(f"the tie to {write.to} broke before all pages were sent") from None
        self._num_sent += (end - begin) * len(layers)
        self.num_bytes += num_bytes
        manager.num_bytes_sent += num_bytes
        manager.node.note(
            current_call(),
            "send",
            started,
            end=self._clock.now(),
            num_bytes=num_bytes,
            lane=write.lane.name,
            to=write.to,
            layer_begin=layers.start,
            layer_end=layers.stop,
            token_begin=begin,
            token_end=end,
        )
