"""Calls that are recorded: the serving end of one, and the root that an actor makes for a request from outside."""

from typing import Any

import msgspec

from .calls import FOREVER, Call, Pipe, Served
from .clock import Clock
from .errors import BusError
from .frames import TELL, Fail, TracedPost
from .place import Place
from .taps import ANSWERED, NO_BODY, NO_FACTS, RECEIVED


class TracedServed(Served):
    """A served call whose begin and end are recorded."""

    __slots__ = ("_begin", "_end_s", "_is_noted", "_name", "_node", "heard_s", "sent_s", "span", "trace")

    def __init__(self, server: Any, node: Place, link: Pipe, kind: int, post: TracedPost, message: Any) -> None:
        super().__init__(server, link, post.id, kind, post.actor, node.clock, post.request_id, post.timeout)
        self._node = node
        self._begin = node.clock.now()
        self._name = type(message).__name__
        self._end_s = self.sent_s = self.heard_s = 0.0
        self._is_noted = kind == TELL  # It has no end that anybody hears of.
        self.span, self.trace = post.span or node.new_span(), post.trace
        num_bytes = len(post.body) if type(post.body) is msgspec.Raw else 0
        node.record(
            (
                *(RECEIVED, self._begin, 0.0, post.actor, "", link.name, self._name, post.request_id, self.span, 0),
                *(num_bytes, 0, 0.0, "", NO_FACTS, NO_BODY),
            ),
            message,
        )

    def note_turn(self) -> None:
        """Record that its handler begins only now, if its process was at other things for long."""
        self._node.note_turn(self, self._begin)

    def ends(self) -> None:
        self._end_s = self._clock.now()

    def note_end(self, error: str = "") -> None:
        """Record the end. A repeat does nothing: the first one told is what the caller hears."""
        if self._is_noted:
            return
        self._is_noted = True
        node = self._node
        node.record(
            (
                *(ANSWERED, self._end_s or node.clock.now(), self._begin, self.actor, "", self.link.name, self._name),
                *(self.request_id, self.span, 0, 0, 0, 0.0, error, NO_FACTS, NO_BODY),
            )
        )

    def end(self, reason: str, fail: Fail | None = None) -> None:
        if self.is_open:
            self.note_end(reason)
        super().end(reason, fail)

    async def has_credit(self) -> None:
        begin = self._clock.now()
        try:
            await super().has_credit()
        finally:  # It says most of one that was cut off because nobody read it.
            self._node.note(self, "credit", begin)


class Root(Call):
    """What is done for a request that did not come over the bus: made current, it is the parent of what is sent."""

    __slots__ = ("heard_s", "sent_s", "span", "trace")

    def __init__(self, actor: str, request_id: str, clock: Clock, *, span: int, trace: str = "") -> None:
        self.actor = actor
        self.caller = self.caller_incarnation = self.ended = ""
        self.request_id = request_id
        self.span = span
        self.trace = trace
        self.sent_s = self.heard_s = 0.0
        self._clock = clock
        self._deadline = FOREVER

    def fail(self, error: BusError) -> None:
        raise error
