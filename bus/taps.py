"""What a node remembers of requests, and tells those who follow it: a record per message, and per span of an actor.

What belongs to a request is always remembered, in a ring that drops the oldest request first: a tracer that comes
late still sees it. All other messages cost one attribute test, unless somebody follows them (``Place.tap``). Items of
streams are counted, not noted. There is no collector and no sampling: who looks gathers what the nodes have.
"""

from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any

import msgspec

SENT, RECEIVED, ANSWERED, ENDED, SPAN = range(5)
WHAT = ("sent", "received", "answered", "ended", "span")

NUM_REQUESTS = 1000
NUM_PER_REQUEST = 512
"""More than any sensible request makes; one that loops keeps its last ones."""
MEAN_PER_REQUEST = 64
"""The ring drops requests early where they make more than this: a record takes about 600 bytes."""
MOST_ID = 256
"""Characters of a request's id; what belongs to one with a longer id is not recorded."""
MOST_TEXT = 100
"""Characters of a text that is kept as a fact; longer ones are content."""
MOST_BYTES, MOST_FACTS = 8192, 32
"""Of facts that take more bytes, so many are kept, and of their texts the beginnings."""
TOKENS, TOKEN_BYTES = ("prompt", "tokens"), 4
"""Fields of messages that hold int32 token ids."""
REQUEST_ID, FACTS, BODY = 7, 14, 15
"""Where a row has them."""
NO_FACTS = msgspec.Raw(b"\x80")
NO_BODY = msgspec.Raw(b"\xc0")

Row = tuple[Any, ...]
"""A TapRecord's fields in order, as the hot path makes it. Its facts may be the message (see finished)."""


class TapRecord(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What one node noted. Times are seconds on that node's monotonic clock: floats tell nanoseconds for 100 days.

    A call (an ask or a stream) makes four records with one ``span``: its asking node notes SENT and ENDED, its serving
    node RECEIVED and ANSWERED; a tell makes SENT and RECEIVED. A SPAN is what an actor says it did.
    """

    what: int
    time: float
    """When it happened; of ANSWERED, ENDED and SPAN, the end."""
    begin: float
    """When what ends here began: when it was received (ANSWERED), sent (ENDED), begun (SPAN). Else 0."""
    actor: str
    """The actor that is addressed; of a SPAN, the one that did it."""
    source: str
    """The actor that asks, where this is its node and it is known; else empty."""
    peer: str
    """The node at the other end of the link."""
    name: str
    """The message's type, or the span's name."""
    request_id: str
    """Empty for what belongs to no request."""
    span: int
    """The call's id, the same at both nodes; a SPAN has one of its own."""
    parent: int
    """The call or span that it was done for; 0: none, or (RECEIVED, ANSWERED) the asking node knows."""
    num_bytes: int
    """Of the message (SENT, RECEIVED), of the answer (ANSWERED: where it is known), of all items (ENDED)."""
    num_items: int
    """Of a stream, at its ENDED."""
    first: float
    """When the first item came, at ENDED; 0: none did."""
    error: str
    """How it ended badly; ``cancelled`` where its caller left. Empty: well."""
    facts: msgspec.Raw
    """A map of names to numbers and short texts: the message's (SENT), the answer's (ENDED), or what the actor says."""
    body: msgspec.Raw
    """The message as a map of its fields, at SENT and RECEIVED, where a follower asked for bodies; else nil."""


encode = msgspec.msgpack.Encoder().encode
decode_facts = msgspec.msgpack.Decoder(dict[str, int | float | str | bool | None]).decode

Follower = Callable[[Row, Any], None]
"""Called with a record and, at SENT and RECEIVED, with the message; else with None."""


class Trace:
    """One node's records. Followers are called with every one; what belongs to a request is kept as well."""

    def __init__(self, *, keep: int = NUM_REQUESTS) -> None:
        self.keep = keep
        """How many requests' records are remembered."""
        self.followers: tuple[Follower, ...] = ()
        self._num_forgotten = 0
        self._requests: OrderedDict[str, deque[Row]] = OrderedDict()
        self._num_rows = 0

    def add(self, row: Row, message: Any = None) -> None:
        """Take a record of a request; ``message`` is for the followers alone."""
        # Hot: a few dozen times per request (bench/taps.py).
        request_id = row[REQUEST_ID]
        rows = self._requests.get(request_id)
        if rows is None:
            # Whoever makes such ids does not get to fill memory with them, or to make records that cannot be told.
            if len(request_id) > MOST_ID or written(request_id) != request_id:
                return
            rows = self._requests[request_id] = deque(maxlen=NUM_PER_REQUEST)
            if len(self._requests) > self.keep:
                self._forget_oldest()
        if len(rows) < NUM_PER_REQUEST:
            self._num_rows += 1
        else:
            self._num_forgotten += 1
        rows.append(row)
        if self._num_rows > self.keep * MEAN_PER_REQUEST and len(self._requests) > 1:
            self._forget_oldest()  # Perhaps this very one: it is counted by now.
        for follow in self.followers:
            follow(row, message)

    def _forget_oldest(self) -> None:
        _, rows = self._requests.popitem(last=False)
        self._num_rows -= len(rows)
        self._num_forgotten += len(rows)

    @property
    def num_made(self) -> int:
        """How many records of requests there have been, the forgotten ones included."""
        return self._num_forgotten + self._num_rows

    def request_ids(self) -> list[str]:
        """Return the requests that are remembered, the oldest first."""
        return list(self._requests)

    def of(self, request_id: str) -> list[Row]:
        """Return the records of a request, in the order they were made."""
        return [finished(row) for row in self.rows_of(request_id)]

    def rows_of(self, request_id: str) -> list[Row]:
        """Return them as they are kept: the facts of some are still to be made (see finished)."""
        return list(self._requests.get(request_id, ()))


def finished(row: Row) -> Row:
    """Return a row with its facts made: until somebody asks, it may hold the message itself."""
    facts = row[FACTS]
    return row if type(facts) is msgspec.Raw else (*row[:FACTS], facts_of(facts), row[BODY])


def facts_of(message: Any) -> msgspec.Raw:
    """Return what a record keeps of a message: its numbers and short texts, without what is in all records.

    Of bytes it keeps nothing but, where they are token ids (``prompt``, ``tokens``), how many; of a reservation its id.
    """
    facts: dict[str, Any] = {}
    for name in getattr(message, "__struct_fields__", ()):
        value = getattr(message, name)
        kind = type(value)
        if kind is int or kind is float or kind is bool:
            facts[name] = value
        elif kind is str:
            if value and len(value) <= MOST_TEXT and name != "request_id":
                facts[name] = value
        elif kind is bytes:
            if name in TOKENS:
                facts["num_tokens"] = len(value) // TOKEN_BYTES
        elif type(reservation_id := getattr(value, "reservation_id", None)) is str and len(reservation_id) <= MOST_TEXT:
            facts["reservation"] = reservation_id
    return encode_facts(facts)


def encode_facts(facts: dict[str, Any]) -> msgspec.Raw:
    """Return facts as a record has them. It never fails: of too many some stay, and what cannot travel is None."""
    if not facts:
        return NO_FACTS
    try:  # Hot: once per message of a request that somebody looks at (bench/taps.py).
        if len(whole := encode(facts)) <= MOST_BYTES:
            return msgspec.Raw(whole)
    except (TypeError, ValueError, OverflowError):
        pass
    few = list(facts.items())[:MOST_FACTS]
    return msgspec.Raw(encode({written(name[:MOST_TEXT]): _told(value) for name, value in few}))


def _told(value: Any) -> int | float | str | bool | None:
    """Return a fact as it can be told; None for what cannot, as an integer of more than 64 bits."""
    if type(value) is str:
        return written(value[:MOST_TEXT])
    return value if type(value) in (float, bool) or (type(value) is int and abs(value) < 1 << 63) else None


def written(text: str) -> str:
    """Return text that can be written down: half of a character, as in a file's name, is a question mark."""
    return text if text.isascii() else text.encode(errors="replace").decode()
