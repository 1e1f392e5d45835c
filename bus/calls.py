"""The two ends of an ask or a stream: what was asked (here), and what is served (there).

Each ends exactly once. The asking end is taken out of ``link.asked`` by its one terminal (an answer, an end, an
error, a deadline, a broken link, its own cancellation), and whatever arrives for it later finds nobody. Items of a
stream come under credit that its receiver grants: a peer that sends beyond it loses the stream.
"""

import asyncio
from collections import deque
from contextlib import suppress
from contextvars import ContextVar
from typing import Any, Protocol, Self

import msgspec

from .clock import Clock
from .deadlines import Slot
from .errors import AskTimeout, BusError, LinkLost
from .failures import fail_of
from .frames import TELL, Cancel, Credit, Fail, Frame
from .notes import Note, error_text

FOREVER = float("inf")
DEFAULT_CREDIT = 256
"""Items a stream's receiver takes before it grants more; granted again at half."""

_decode_run = msgspec.msgpack.Decoder(list[msgspec.Raw]).decode


class Pipe(Protocol):
    """A link, as the two ends of a call see it."""

    asked: "dict[int, Asked]"
    served: "dict[int, Served]"
    peer_node: str
    """The peer's node name; "" until it is known."""
    peer_incarnation: str
    last_heard: float
    """When the peer's last batch came, on the node's clock."""

    @property
    def name(self) -> str:
        """The peer's node name or endpoint, as far as it is known."""

    def next_id(self) -> int:
        """Return a new id for something asked over the link."""

    def post(self, frame: Frame) -> int:
        """Queue a frame; return its bytes, 0 where it is not encoded."""

    def post_item(self, stream: int, item: Any) -> None:
        """Queue an item of a stream that is served."""

    def post_fail(self, fail: Fail) -> None:
        """Queue a Fail, also one that does not encode as it is."""


class Asked:
    """An ask or a stream this node sent, until its end."""

    __slots__ = ("decode", "id", "is_open", "link", "note", "slot", "what")

    def __init__(self, link: Pipe, decode: Any) -> None:
        self.note: Note | None = None
        """Where it is recorded."""
        self.link = link
        self.id = link.next_id()
        self.decode = decode
        """Turns an answer, or a list of items, into its type; one of the wrong type is the far side's bug."""
        self.is_open = True
        self.slot: Slot | None = None
        self.what: tuple[Any, type, float] | None = None
        """The address, the message's type and the seconds given, for the sentence about its deadline."""
        link.asked[self.id] = self

    def forget(self) -> bool:
        """Take this out of the link's table; return whether it was still there."""
        was_open, self.is_open = self.is_open, False
        if was_open:
            if self.slot is not None:
                self.slot.pop(self, None)
            self.link.asked.pop(self.id, None)
        return was_open

    def cancel(self) -> None:
        """Tell the far side that nobody waits any more. A repeat does nothing."""
        if self.forget():
            self.link.post(Cancel(self.id))
            if self.note is not None:
                self.note.ended("cancelled")

    def expire(self) -> None:
        """End with AskTimeout and cancel the far side."""
        if self.forget():
            self.link.post(Cancel(self.id))
            assert self.what is not None
            to, message_type, timeout = self.what
            self.fail(AskTimeout(f"{to} ({message_type.__name__}) did not answer within {timeout:.3g} s"))

    def answer(self, body: Any) -> None:
        """Take an ask's answer. Raises ValueError where this is a stream, or what ``decode`` raises."""
        raise ValueError("a stream is not answered")

    def items(self, body: Any) -> None:
        """Take items of a stream. Raises ValueError where this is an ask, or beyond the credit granted."""
        raise ValueError("an ask has no items")

    def end(self) -> None:
        """Take a stream's end."""
        raise AssertionError

    def fail(self, error: BusError) -> None:
        """Take an error as the end."""
        raise AssertionError


class PendingAsk(Asked):
    """An ask: one future."""

    __slots__ = ("future",)

    def __init__(self, link: Pipe, decode: Any, loop: asyncio.AbstractEventLoop) -> None:
        # Hot: once per ask (bench/bus.py); what Asked does, without the call.
        self.link = link
        self.id = call_id = link.next_id()
        self.decode = decode
        self.is_open = True
        self.slot = self.what = self.note = None
        link.asked[call_id] = self
        self.future: asyncio.Future[Any] = loop.create_future()

    def answer(self, body: Any) -> None:
        answer = self.decode(body)
        self.is_open = False
        if self.slot is not None:
            self.slot.pop(self, None)
        del self.link.asked[self.id]
        if self.note is not None:
            self.note.answered(answer, body)
        if not self.future.done():
            self.future.set_result(answer)

    def end(self) -> None:
        self.forget()
        self.fail(LinkLost("a stream's end came as the answer of an ask"))

    def fail(self, error: BusError) -> None:
        if self.note is not None:
            self.note.ended(error_text(error))
        if not self.future.done():
            self.future.set_exception(error)


class OpenStream(Asked):
    """A stream's receiving end: ``async for item in stream``. Buffers at most ``credit`` items."""

    __slots__ = ("_credit", "_error", "_is_ended", "_items", "_loop", "_room", "_taken", "_wake")

    def __init__(self, link: Pipe, decode: Any, loop: asyncio.AbstractEventLoop, credit: int) -> None:
        super().__init__(link, decode)
        self._loop = loop
        self._credit = credit
        self._room = credit
        """Items the far side may still send."""
        self._taken = 0
        self._items: deque[Any] = deque()
        self._error: BusError | None = None
        self._is_ended = False
        self._wake: asyncio.Future[None] | None = None

    def items(self, body: Any) -> None:
        # Hot: once per frame of items (bench/bus.py).
        try:
            items = self.decode(body)
        except Exception:
            self._take_good(body)
            raise
        self._room -= len(items)
        if self._room < 0:
            self._items += items[: self._room]
            raise ValueError(f"more than the {self._credit} items it had credit for")
        self._items += items
        if self.note is not None:
            self.note.items(len(items), body)
        wake = self._wake
        if wake is not None and not wake.done():
            wake.set_result(None)

    def _take_good(self, body: Any) -> None:
        """Keep the items before the first bad one: which of them share its frame is chance."""
        with suppress(Exception):
            for item in _decode_run(body)[: self._room]:
                self._items += self.decode(b"\x91" + item)  # As an array of one.

    def end(self) -> None:
        self.forget()
        self._is_ended = True
        if self.note is not None:
            self.note.ended("")
        self._notify()

    def fail(self, error: BusError) -> None:
        if self.note is not None:
            self.note.ended(error_text(error))
        self._error = error
        self._is_ended = True
        self._notify()

    def cancel(self) -> None:
        super().cancel()
        if not self._is_ended:  # Whoever still reads would wait for ever.
            self.fail(BusError("the stream was left: nothing more comes"))

    def _notify(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    def take_ready(self) -> list[Any]:
        """Return all items that are here now, without waiting; perhaps none."""
        items = list(self._items)
        self._items.clear()
        self._taken += len(items)
        if self._taken * 2 >= self._credit:
            self._grant()
        return items

    def _grant(self) -> None:
        if not self._is_ended:
            self._room += self._taken
            self.link.post(Credit(self.id, self._taken))
        self._taken = 0

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        items = self._items
        while not items:
            if self._is_ended:
                if self._error is not None:
                    raise self._error
                raise StopAsyncIteration
            # Not cleared afterwards: by the time a cancelled reader gets here, another may be waiting.
            wake = self._wake = self._loop.create_future()
            await wake
            if self.note is not None:
                self.note.resumed()
        self._taken += 1
        if self._taken * 2 >= self._credit:
            self._grant()
        return items.popleft()


class Call:
    """What a handler may know of the call it serves (``current_call()``)."""

    __slots__ = ("_clock", "_deadline", "actor", "caller", "caller_incarnation", "ended", "request_id")

    actor: str
    """The actor that serves it."""
    caller: str
    """The asking node."""
    caller_incarnation: str
    request_id: str
    ended: str
    """Why the handler was cancelled: cancelled, timeout, actor_died, link_lost, stopped or failed; "" while it runs."""
    _clock: Clock
    _deadline: float
    span: int = 0
    """Its id in the records (taps.py); 0 where it is not recorded."""
    trace: str = ""
    """The W3C trace that it belongs to, 32 hex digits; empty for none."""
    sent_s: float = 0.0
    """When something was sent for it, on the node's clock: the first since ``Place.begin_turn``."""
    heard_s: float = 0.0
    """When the latest end was heard of what was asked for it."""

    def remaining_s(self) -> float:
        """Return the seconds until the deadline, not below 0; infinite for standing streams."""
        return max(0.0, self._deadline - self._clock.now())

    def fail(self, error: BusError) -> None:
        """End the call with ``error`` and cancel its handler, if it has not ended yet; ``ended`` is then "failed".

        For whoever watches over a handler: that of a stream nobody reads cannot raise, it waits for credit.
        """
        raise AssertionError


_CURRENT: ContextVar[Call | None] = ContextVar("callboard_call", default=None)
"""Follows asyncio tasks: what a handler awaits or spawns inherits its deadline."""

current_call = _CURRENT.get
"""Return the call being served, None outside of handlers."""
enter_call = _CURRENT.set
"""Make a call, or None, the current one; returns what leave_call needs."""
leave_call = _CURRENT.reset
"""Undo enter_call."""


class Dropper(Protocol):
    """What a served call needs of its server."""

    def drop(self, served: "Served") -> None:
        """Forget a call that will never begin."""


class Served(Call):
    """A tell, an ask or a stream this node serves, until its end."""

    __slots__ = ("_room", "credit", "has_begun", "id", "is_open", "kind", "link", "server", "task")

    def __init__(
        self,
        server: Dropper,
        link: Pipe,
        call_id: int,
        kind: int,
        actor: str,
        clock: Clock,
        request_id: str,
        timeout: float | None,
    ) -> None:
        # Hot: once per message (bench/bus.py), so nothing here calls anything.
        self.server = server
        self.caller = link.peer_node
        self.caller_incarnation = link.peer_incarnation
        self.request_id = request_id
        self.ended = ""
        self._clock = clock
        self._deadline = FOREVER if timeout is None else link.last_heard + timeout
        self.link = link
        self.id = call_id
        self.kind = kind
        self.actor = actor
        self.is_open = True
        self.task: asyncio.Task[Any] | None = None
        self.has_begun = False
        """Its task has taken its first step."""
        self.credit = 0
        self._room: asyncio.Event | None = None

    def finish(self) -> bool:
        """Note the end and take this out of the link's table; return whether the end is still to be told."""
        was_open, self.is_open = self.is_open, False
        if self.link.served.get(self.id) is self:  # Tells are not in it, and their ids mean nothing.
            del self.link.served[self.id]
        return was_open

    def end(self, reason: str, fail: Fail | None = None) -> None:
        """End from outside: note why, tell the caller ``fail`` if given, cancel the handler."""
        if not self.finish():
            return
        self.ended = reason
        self.credit = 0
        if fail is not None and self.kind != TELL:
            self.link.post_fail(fail)
        if self.task is not None:
            self.task.cancel()
            if not self.has_begun:
                self.server.drop(self)

    def fail(self, error: BusError) -> None:
        self.end("failed", fail_of(self.id, error))

    def note_turn(self) -> None:
        """Record that its handler begins, where the call is recorded (traced.py) and has waited for that."""

    def ends(self) -> None:
        """Note the time at which it ends, where the call is recorded: what tells its caller may leave before a note."""

    def note_end(self, error: str = "") -> None:
        """Record the end where the call is recorded (traced.py). A repeat does nothing."""

    def grant(self, count: int) -> None:
        """Take credit for ``count`` more items."""
        if self.is_open:
            self.credit += count
        if self._room is not None:
            self._room.set()

    async def has_credit(self) -> None:
        """Wait until an item may be sent."""
        while self.credit <= 0:
            self._room = asyncio.Event()
            await self._room.wait()
        self._room = None
