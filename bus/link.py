"""One link between two nodes: a handshake, numbered batches out, numbered batches in.

Messages on a link arrive in order and at most once. A link breaks as a whole: everything asked over it ends with an
error, everything served over it is cancelled, and whoever wants to go on dials a new one.
"""

import asyncio
from collections import deque
from typing import Any

import msgspec

from .calls import Asked, Served
from .frames import MAX_BATCH_BYTES, MAX_FRAME_BYTES, Bye, Fail, Frame, PeerInfo, encode_batch
from .liveness import ProcessWatch
from .transports.contract import Connection

MAX_CUT_TEXT = 1000
"""Characters kept of the sentence of a Fail that did not encode."""
RETRY_S = 0.002
"""A transport without room is asked again after this long."""


class Link:
    """A link as one of its two nodes sees it. The node moves it; it keeps no policy of its own."""

    def __init__(self, encode: Any, incarnation: str, *, endpoint: str = "", max_backlog_bytes: int) -> None:
        self.endpoint = endpoint
        self.peer: PeerInfo | None = None
        self.connection: Connection | None = None
        self.is_open = False
        """The handshake is done."""
        self.is_broken = False
        self._has_said_bye = False
        self.asked: dict[int, Asked] = {}
        """What this node asked of the peer, until its one end."""
        self.served: dict[int, Served] = {}
        """What the peer asked of this node, until its one end."""
        self.last_heard = 0.0
        self.watch: ProcessWatch | None = None
        self.dial_until = 0.0
        self.on_overflow: Any = None
        self._encode = encode
        self._incarnation = incarnation
        self._max_backlog_bytes = max_backlog_bytes
        self._loop = asyncio.get_running_loop()
        self._frames: deque[bytes] = deque()
        self._backlog_bytes = 0
        self._next_id = 0
        self._sent = 0
        self._received = 0
        self._is_flush_scheduled = False

    @property
    def name(self) -> str:
        """The peer's node name, as far as it is known."""
        return self.peer.node if self.peer is not None else self.endpoint

    def next_id(self) -> int:
        """Return a new id for something this node asks over the link."""
        self._next_id += 1
        return self._next_id

    def post(self, frame: Frame) -> None:
        """Queue a frame; it leaves with this loop pass's batch. Raises ValueError if it is too large to send."""
        if self.is_broken or self._has_said_bye:
            return
        data = self._encode(frame)
        if len(data) > MAX_FRAME_BYTES:
            raise ValueError(f"a message of {len(data)} bytes is too large: the bus takes {MAX_FRAME_BYTES} at most")
        self._frames.append(data)
        self._backlog_bytes += len(data)
        if self._backlog_bytes > self._max_backlog_bytes:
            self._loop.call_soon(self.on_overflow, self)
        self.schedule_flush()

    def post_fail(self, fail: Fail) -> None:
        """Queue an end. It must be told: what of it does not encode, or is too large, stays behind."""
        try:
            self.post(fail)
        except (TypeError, ValueError, OverflowError, RecursionError):
            text = fail.text[:MAX_CUT_TEXT].encode(errors="replace").decode()
            self.post(Fail(fail.id, fail.kind, text, fail.name))

    def schedule_flush(self) -> None:
        """Send what is queued at the end of this loop pass."""
        if not self._is_flush_scheduled and self.is_open:
            self._is_flush_scheduled = True
            self._loop.call_soon(self._flush)

    def begin_numbering(self) -> None:
        """Count batches from 0: a new connection is a new numbering, also when this link is dialled again."""
        self._sent = self._received = 0

    def send_now(self, frame: Frame) -> None:
        """Send a handshake frame by itself, before the link is open."""
        assert self.connection is not None
        self.connection.send(encode_batch((self._incarnation, self._sent, [frame])))
        self._sent += 1

    def _flush(self) -> None:
        # Hot: once per peer and loop pass (bench/bus.py).
        self._is_flush_scheduled = False
        frames = self._frames
        while frames and not self.is_broken and self.connection is not None:
            batch: list[msgspec.Raw] = []
            size = 0
            for data in frames:
                if batch and size + len(data) > MAX_BATCH_BYTES:
                    break
                batch.append(msgspec.Raw(data))
                size += len(data)
            if not self.connection.send(encode_batch((self._incarnation, self._sent, batch))):
                self._is_flush_scheduled = True
                self._loop.call_later(RETRY_S, self._flush)
                return
            self._sent += 1
            self._backlog_bytes -= size
            for _ in batch:
                frames.popleft()

    def accepts(self, incarnation: str, sequence: int) -> bool:
        """Count a received batch; return whether it is the next one of the peer this link was opened with."""
        expected = self._received
        self._received += 1
        return sequence == expected and (self.peer is None or incarnation == self.peer.incarnation)

    def close(self) -> None:
        """Drop the connection and what is queued; the node ends what was under way."""
        self.is_broken = True
        self.is_open = False
        self._frames.clear()
        if self.watch is not None:
            self.watch.close()
            self.watch = None
        if self.connection is not None:
            self.connection.close()
            self.connection = None

    def say_bye(self) -> None:
        """Send what is queued and Bye, without waiting for the end of the pass; what is posted later is dropped."""
        self.post(Bye())
        self._has_said_bye = True
        if self.is_open:
            self._flush()


class LocalLink(Link):
    """A node's link to itself: frames are handed over as they are, without encoding, in the next loop pass."""

    def __init__(self, deliver: Any) -> None:
        super().__init__(encode_batch, "", max_backlog_bytes=0)
        self.is_open = True
        self._deliver = deliver

    def post(self, frame: Frame) -> None:
        if not self.is_broken:
            self._loop.call_soon(self._deliver, self, frame)

    def schedule_flush(self) -> None:
        return
