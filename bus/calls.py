"""The two ends of an ask or a stream: what was asked (here), and what is served (there).

Each ends exactly once. The asking end is taken out of ``link.asked`` by its one terminal (an answer, an end, an
error, a deadline, a broken link, its own cancellation), and whatever arrives for it later finds nobody.
"""

import asyncio
from collections import deque
from contextvars import ContextVar
from typing import Any, Protocol, Self

from .clock import Clock
from .errors import ActorDied, AskTimeout, BusError, LinkLost, refusal_from_wire
from .frames import TELL, Cancel, Credit, Fail, Frame

FOREVER = float("inf")
DEFAULT_CREDIT = 256
"""Items a stream's receiver takes before it grants more; granted again at half."""


class Pipe(Protocol):
    """A link, as the two ends of a call see it."""

    asked: "dict[int, Asked]"
    served: "dict[int, Served]"

    @property
    def name(self) -> str:
        """The peer's node name, as far as it is known."""

    def next_id(self) -> int:
        """Return a new id for something asked over the link."""

    def post(self, frame: Frame) -> None:
        """Queue a frame."""

    def post_fail(self, fail: Fail) -> None:
        """Queue a Fail, also one that does not encode as it is."""


class Asked:
    """An ask or a stream this node sent, until its end."""

    def __init__(self, link: Pipe, decoder: Any) -> None:
        self.link = link
        self.id = link.next_id()
        self.decoder = decoder
        self.timer: asyncio.TimerHandle | None = None
        link.asked[self.id] = self

    def forget(self) -> bool:
        """Take this out of the link's table; return whether it was still there."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        return self.link.asked.pop(self.id, None) is not None

    def cancel(self) -> None:
        """Tell the far side that nobody waits any more. A repeat does nothing."""
        if self.forget():
            self.link.post(Cancel(self.id))

    def expire(self, to: str, timeout: float) -> None:
        """End with AskTimeout and cancel the far side."""
        if self.forget():
            self.link.post(Cancel(self.id))
            self.fail(AskTimeout(f"{to} did not answer within {timeout:.3g} s"))

    def decode(self, body: Any) -> Any:
        """Return an answer as its type; one of the wrong type is the far side's bug."""
        return self.decoder(body)

    def answer(self, body: Any) -> None:
        """Take the answer or an item."""
        raise AssertionError

    def end(self) -> None:
        """Take a stream's end."""
        raise AssertionError

    def fail(self, error: BusError) -> None:
        """Take an error as the end."""
        raise AssertionError


class PendingAsk(Asked):
    """An ask: one future."""

    def __init__(self, link: Pipe, decoder: Any) -> None:
        super().__init__(link, decoder)
        self.future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    def answer(self, body: Any) -> None:
        self.forget()
        if not self.future.done():
            self.future.set_result(self.decode(body))

    def end(self) -> None:
        self.fail(LinkLost("a stream's end came as the answer of an ask"))

    def fail(self, error: BusError) -> None:
        if not self.future.done():
            self.future.set_exception(error)


class OpenStream(Asked):
    """A stream's receiving end: ``async for item in stream``. Buffers at most ``credit`` items."""

    def __init__(self, link: Pipe, decoder: Any, credit: int) -> None:
        super().__init__(link, decoder)
        self._credit = credit
        self._taken = 0
        self._items: deque[Any] = deque()
        self._error: BusError | None = None
        self._is_ended = False
        self._wake: asyncio.Future[None] | None = None

    def answer(self, body: Any) -> None:
        self._items.append(self.decode(body))
        self._notify()

    def end(self) -> None:
        self.forget()
        self._is_ended = True
        self._notify()

    def fail(self, error: BusError) -> None:
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
        self._grant(len(items))
        return items

    def _grant(self, count: int) -> None:
        self._taken += count
        if self._taken * 2 >= self._credit and not self._is_ended:
            self.link.post(Credit(self.id, self._taken))
            self._taken = 0

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        while not self._items:
            if self._is_ended:
                if self._error is not None:
                    raise self._error
                raise StopAsyncIteration
            # Not cleared afterwards: by the time a cancelled reader gets here, another may be waiting.
            wake = self._wake = asyncio.get_running_loop().create_future()
            await wake
        item = self._items.popleft()
        self._grant(1)
        return item


class Call:
    """What a handler may know of the call it serves (``current_call()``)."""

    def __init__(self, clock: Clock, *, caller: str, caller_incarnation: str, request_id: str, timeout: float) -> None:
        self.caller = caller
        self.caller_incarnation = caller_incarnation
        self.request_id = request_id
        self.ended = ""
        """Why the handler was cancelled: cancelled, timeout, actor_died, link_lost or stopped; "" while it runs."""
        self._clock = clock
        self._deadline = clock.now() + timeout

    def remaining_s(self) -> float:
        """Return the seconds until the deadline, not below 0; infinite for standing streams."""
        return max(0.0, self._deadline - self._clock.now())


_CURRENT: ContextVar[Call | None] = ContextVar("callboard_call", default=None)
"""Follows asyncio tasks: what a handler awaits or spawns inherits its deadline."""


def current_call() -> Call | None:
    """Return the call being served, None outside of handlers."""
    return _CURRENT.get()


def enter_call(call: Call | None) -> Any:
    """Make ``call`` the current one; returns what leave_call needs."""
    return _CURRENT.set(call)


def leave_call(token: Any) -> None:
    """Undo enter_call."""
    _CURRENT.reset(token)


class Served(Call):
    """A tell, an ask or a stream this node serves, until its end."""

    def __init__(self, link: Pipe, call_id: int, kind: int, actor: str, **call: Any) -> None:
        super().__init__(**call)
        self.link = link
        self.id = call_id
        self.kind = kind
        self.actor = actor
        self.is_open = True
        self.task: asyncio.Task[Any] | None = None
        self.timer: asyncio.TimerHandle | None = None
        self.credit = 0
        self._room: asyncio.Event | None = None

    def finish(self) -> bool:
        """Note the end and take this out of the link's table; return whether the end is still to be told."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        was_open, self.is_open = self.is_open, False
        if self.link.served.get(self.id) is self:  # Tells are not in it, and their ids mean nothing.
            del self.link.served[self.id]
        return was_open

    def end(self, reason: str, fail: Fail | None = None) -> None:
        """End from outside: note why, tell the caller ``fail`` if given, cancel the handler."""
        if not self.finish():
            return
        self.ended = reason
        if fail is not None and self.kind != TELL:
            self.link.post_fail(fail)
        if self.task is not None:
            self.task.cancel()

    def grant(self, count: int) -> None:
        """Take credit for ``count`` more items."""
        self.credit += count
        if self._room is not None:
            self._room.set()

    async def has_credit(self) -> None:
        """Wait until an item may be sent."""
        while self.credit <= 0:
            self._room = asyncio.Event()
            await self._room.wait()
        self._room = None


def error_of(frame: Fail) -> BusError:
    """Return the error a Fail frame stands for."""
    if frame.kind == "refusal":
        return refusal_from_wire(frame.name, frame.fields, frame.text)
    return {"actor_died": ActorDied, "timeout": AskTimeout}.get(frame.kind, LinkLost)(frame.text)
