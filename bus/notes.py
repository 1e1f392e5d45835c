"""The records of a call's asking end: SENT when it leaves, ENDED at its one end."""

from typing import Any, Protocol

import msgspec

from .clock import Clock
from .errors import words_of
from .taps import ENDED, NO_BODY, NO_FACTS, SENT, SPAN, Row, facts_of, written

SMALL_BYTES = 512
"""A message of so many is kept with its record, and looked at when somebody asks."""
MOST_ERROR = 300
"""Characters of an error's sentence that a record keeps."""
TURN_S = 20e-6
"""A message that waits so long until its process gets to it is worth a record."""


class Recorder(Protocol):
    """A node, as far as notes need it."""

    clock: Clock

    def record(self, row: Row, message: Any = None) -> None:
        """Take a record."""

    def new_span(self) -> int:
        """Return an id for a span."""


class Turns(Protocol):
    """The call a message is sent in, as far as notes need it (calls.py, Call)."""

    actor: str
    span: int
    sent_s: float
    heard_s: float


def error_text(error: BaseException) -> str:
    """Return an error for a record: its class, and its sentence as far as there is room."""
    return written(words_of(error)[:MOST_ERROR])


class Note:
    """A call that was sent and is recorded; ``ended`` counts once. Belongs to its asking end (calls.py)."""

    __slots__ = ("_begin", "_call", "_end_s", "_first", "_is_open", "_node", "_num_bytes", "_num_items", "_who")

    def __init__(
        self, node: Recorder, call: Turns | None, actor: str, peer: str, name: str, request_id: str, span: int
    ) -> None:
        self._node = node
        self._begin = node.clock.now()
        self._call: Turns | None = None
        source, parent = "", 0
        if call is not None:
            source, parent = call.actor, call.span
            if parent:
                self._call = call
                call.sent_s = call.sent_s or self._begin
        self._who = (actor, source, peer, name, request_id, span, parent)
        self._num_bytes = 0
        self._num_items = 0
        self._first = 0.0
        self._end_s = 0.0
        self._is_open = True

    def sent(self, message: Any, num_bytes: int) -> None:
        """Record that it left, at the time this note was made."""
        # Hot: once per message of a request (bench/taps.py).
        node = self._node
        # Facts are made when somebody asks. A long message is not kept for that.
        facts = message if 0 < num_bytes <= SMALL_BYTES else facts_of(message)
        node.record((SENT, self._begin, 0.0, *self._who, num_bytes, 0, 0.0, "", facts, NO_BODY), message)

    def items(self, num_items: int, body: Any) -> None:
        """Count items of a stream that came in one frame."""
        # Hot: once per frame of items of a request.
        if not self._num_items:
            self._first = self._node.clock.now()
        self._num_items += num_items
        if type(body) is msgspec.Raw:
            self._num_bytes += len(body)

    def answered(self, answer: Any, body: Any) -> None:
        """Record the answer of an ask."""
        if type(body) is msgspec.Raw:
            self._num_bytes = len(body)
        facts = answer if 0 < self._num_bytes <= SMALL_BYTES else facts_of(answer)
        self._end("", facts)

    def ended(self, error: str) -> None:
        """Record a stream's end, or a bad end. A repeat does nothing."""
        self._end(error, NO_FACTS)

    def _end(self, error: str, facts: Any) -> None:
        if not self._is_open:
            return
        self._is_open = False
        node = self._node
        self._end_s = node.clock.now()
        if self._call is not None:
            self._call.heard_s = self._end_s
        node.record(
            (
                *(ENDED, self._end_s, self._begin, *self._who),
                *(self._num_bytes, self._num_items, self._first, error, facts, NO_BODY),
            )
        )

    def resumed(self) -> None:
        """Record that whoever asked goes on only now after the end, if its process was at other things for long."""
        end, node = self._end_s, self._node
        if not end or (now := node.clock.now()) - end < TURN_S:
            return
        _, source, _, _, request_id, _, parent = self._who
        if request_id:
            row = (SPAN, now, end, source, "", "", "turn", request_id, node.new_span(), parent)
            node.record((*row, 0, 0, 0.0, "", NO_FACTS, NO_BODY))
