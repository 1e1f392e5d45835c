"""The sending half of a link: frames go in one by one, and leave as numbered batches.

A batch is written once, as the bytes that go out: its head, with room for the numbers, then frame after frame.
Everything of one loop pass is one batch, with two exceptions: when little is going on, a frame leaves at once, and
of much, a part leaves early, so that the far side can begin.
"""

import asyncio
import struct
from collections import deque
from typing import Any

import msgspec

from .frames import MAX_BATCH_BYTES, MAX_FRAME_BYTES, Fail, Frame, Items, encode_batch
from .transports.contract import Connection

MAX_CUT_TEXT = 1000
"""Characters kept of the sentence of a Fail that did not encode."""
EARLY_BYTES = 24 * 1024
"""So much does not wait for the end of the loop pass."""
RETRY_S = 0.002
"""A transport without room is asked again after this long."""

_NUMBERS = struct.Struct(">BQBH")
"""The end of a batch's head in msgpack: the sequence number as uint64, the number of frames as array16."""
_ITEMS = struct.Struct(">BBBQBH")
"""The head of an Items frame: an array of 3, its tag, the stream's id as uint64, the number of items as array16."""
_ARRAY3, _UINT64, _ARRAY16 = 0x93, 0xCF, 0xDC
_ITEMS_TAG = Items.__struct_config__.tag


class Outbox:
    """What waits to be sent over one link."""

    def __init__(self, encode_into: Any, incarnation: str, max_backlog_bytes: int) -> None:
        self.connection: Connection | None = None
        self.is_open = False
        """The handshake is done."""
        self.on_overflow: Any = None
        self._encode_into = encode_into
        self._incarnation = incarnation
        self._max_backlog_bytes = max_backlog_bytes
        self._loop = asyncio.get_running_loop()
        self._head = b"\x93" + msgspec.msgpack.encode(incarnation) + bytes(_NUMBERS.size)
        self._batch = bytearray(self._head)
        self._num_frames = 0
        self._stream = 0
        """Whose items end the batch: the next one of the same stream goes into the same frame. 0: no stream's."""
        self._num_items = 0
        self._items_at = 0
        self._full: deque[tuple[bytearray, int]] = deque()
        """Batches that wait, with their number of frames."""
        self._full_bytes = 0
        self._sent = 0
        self._is_flush_scheduled = False
        self.is_calm = True
        """Little is going on: the next frame leaves at once. So after a pass with one frame, or a batch of one came."""
        self._is_stuck = False
        """The transport had no room: it is asked again later."""
        self._retry_timer: asyncio.TimerHandle | None = None
        self._is_silent = False
        """Broken, or it has said Bye: what is posted goes nowhere."""

    # ---- writing -------------------------------------------------------------------------------------------------

    def post(self, frame: Frame) -> int:
        """Queue a frame; it leaves with this loop pass. Returns its bytes; raises ValueError if it is too large."""
        # Hot: once per message (bench/bus.py).
        if self._is_silent:
            return 0
        if self._stream:
            self._close_items()
        batch = self._batch
        start = len(batch)
        try:
            self._encode_into(frame, batch, -1)
        except BaseException:
            del batch[start:]
            raise
        self._num_frames += 1
        size = len(batch)
        if size > EARLY_BYTES:
            self._grown(start, size)
        if not self._is_flush_scheduled and self.is_open:
            self._begin_pass()
        return size - start

    def post_item(self, stream: int, item: Any) -> None:
        """Queue an item of a stream: with what the stream queued just before, one frame. Raises as ``post``."""
        # Hot: once per item (bench/bus.py).
        batch = self._batch
        start = len(batch)
        if self._stream == stream:
            try:
                self._encode_into(item, batch, -1)
            except BaseException:
                del batch[start:]
                raise
            self._num_items += 1
            size = len(batch)
            if size > MAX_BATCH_BYTES:
                self._grown(start, size)
            return
        if self._is_silent:
            return
        if self._stream:
            self._close_items()
        batch += _ITEMS.pack(_ARRAY3, _ITEMS_TAG, _UINT64, stream, _ARRAY16, 1)
        try:
            self._encode_into(item, batch, -1)
        except BaseException:
            del batch[start:]
            raise
        self._stream, self._num_items, self._items_at = stream, 1, start
        self._num_frames += 1
        size = len(batch)
        if size > MAX_BATCH_BYTES:
            self._grown(start, size)
        if not self._is_flush_scheduled and self.is_open:
            self._begin_pass()

    def _close_items(self) -> None:
        """Write down how many items the last frame has; the next item begins another."""
        if self._num_items > 1:
            _ITEMS.pack_into(
                self._batch, self._items_at, _ARRAY3, _ITEMS_TAG, _UINT64, self._stream, _ARRAY16, self._num_items
            )
        self._stream = 0

    def _grown(self, start: int, size: int) -> None:
        """What was written from ``start`` on made the batch large: send it, or put it aside."""
        if size > MAX_BATCH_BYTES:
            self._put_aside(start, size)
            if self._is_flush_scheduled and not self._is_stuck:
                self._send_full()
        elif self._is_flush_scheduled and not self._is_stuck:
            self._send()

    def _put_aside(self, start: int, size: int) -> None:
        """Let the batch end before ``start``, and begin the next one with the rest."""
        stream, num_items = self._stream, self._num_items
        rest = self._batch[start:]
        if stream and num_items > 1:  # The rest is an item without the head of its frame.
            rest[:0] = _ITEMS.pack(_ARRAY3, _ITEMS_TAG, _UINT64, stream, _ARRAY16, 1)
            self._num_items -= 1
            self._num_frames += 1
        if size - start > MAX_FRAME_BYTES:
            del self._batch[start:]
            self._num_frames -= 1
            if stream and num_items == 1:
                self._stream = 0
            size -= start
            raise ValueError(f"a message of {size} bytes is too large: the bus takes {MAX_FRAME_BYTES} at most")
        if self._num_frames > 1:
            del self._batch[start:]
            self._num_frames -= 1
            self._end_batch()
            self._batch += rest
            self._num_frames = 1
            self._stream, self._num_items, self._items_at = stream, 1, len(self._head)
        if len(self._batch) > MAX_BATCH_BYTES:
            self._end_batch()
        if self._full_bytes > self._max_backlog_bytes:
            self._loop.call_soon(self.on_overflow, self)

    def _end_batch(self) -> None:
        if self._stream:
            self._close_items()
        self._full.append((self._batch, self._num_frames))
        self._full_bytes += len(self._batch)
        self._batch = bytearray(self._head)
        self._num_frames = 0

    def post_fail(self, fail: Fail) -> None:
        """Queue an end. It must be told: what of it does not encode, or is too large, stays behind."""
        try:
            self.post(fail)
        except (TypeError, ValueError, OverflowError, RecursionError):
            text = fail.text[:MAX_CUT_TEXT].encode(errors="replace").decode()
            self.post(Fail(fail.id, fail.kind, text, fail.name))

    # ---- sending -------------------------------------------------------------------------------------------------

    def send_now(self, frame: Frame) -> None:
        """Send a handshake frame by itself, before the link is open."""
        assert self.connection is not None
        self.connection.send(encode_batch((self._incarnation, self._sent, [frame])))
        self._sent += 1

    def schedule_flush(self) -> None:
        """Send what is queued at the end of this loop pass."""
        if not self._is_flush_scheduled and self.is_open:
            self._is_flush_scheduled = True
            self._loop.call_soon(self.flush)

    def _begin_pass(self) -> None:
        if self.is_calm:
            self.is_calm = False
            self._send()
        else:
            self._is_flush_scheduled = True
            self._loop.call_soon(self.flush)

    def flush(self) -> None:
        """Send what is queued, now."""
        if self._retry_timer is not None:
            self._retry_timer.cancel()
            self._retry_timer = None
        self._is_flush_scheduled = self._is_stuck = False
        self.is_calm = self._num_frames <= 1 and not self._full
        if self._num_frames or self._full:
            self._send()

    def _send(self) -> bool:
        """Send what is queued; return False if the transport has no room, and this will be called again."""
        # Hot: once per peer and loop pass (bench/bus.py).
        if self.connection is None:
            return True
        if self._full and not self._send_full():
            return False
        if self._num_frames:
            if self._stream:
                self._close_items()
            if not self._hand_over(self._batch, self._num_frames):
                return self._retry()
            self._batch = bytearray(self._head)
            self._num_frames = 0
        return True

    def _send_full(self) -> bool:
        while self._full and self.connection is not None:
            batch, num_frames = self._full[0]
            if not self._hand_over(batch, num_frames):
                return self._retry()
            self._full.popleft()
            self._full_bytes -= len(batch)
        return True

    def _hand_over(self, batch: bytearray, num_frames: int) -> bool:
        assert self.connection is not None
        _NUMBERS.pack_into(batch, len(self._head) - _NUMBERS.size, _UINT64, self._sent, _ARRAY16, num_frames)
        if not self.connection.send(batch):
            return False
        self._sent += 1
        return True

    def _retry(self) -> bool:
        self.is_calm = False
        self._is_stuck = self._is_flush_scheduled = True
        if self._retry_timer is None:  # Else by the pass that was to come, after a part of it was to leave early.
            self._retry_timer = self._loop.call_later(RETRY_S, self.flush)
        return False

    def discard(self) -> None:
        """Drop all that waits, and what is posted from now on."""
        self._is_silent = True
        self.is_open = False
        self._full.clear()
        self._full_bytes = self._num_frames = self._stream = 0
        self._batch = bytearray(self._head)
