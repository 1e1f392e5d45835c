"""Moving a running sequence to another engine, and taking an engine out of service. Append only, as protocol.py is.

A hand-over is the router's: it alone decides from which engine a stream's tokens come. An engine only holds a sequence
still for a while, and lets go of it by itself: none of these messages can hurt if it is lost, late, or sent twice.
"""

from callboard.bus import Ask, Message, Refusal

from .protocol import Done, KvAddr, Sent, Usage


class NotMovable(Refusal):
    """A sequence that cannot be moved now: it goes on where it is. Fields: request_id, reason."""

    sentence = "request {request_id} cannot be moved now: {reason}"


class SendKv(Ask[Sent], frozen=True):
    """To an engine: send the KV of ``[begin, end)`` of this sequence into ``kv``, while it goes on, or is held.

    A part-filled block is sent as far as it is filled. A repeat gets the answer of the first, as with RemoteSend.
    Raises NotMovable where the KV is not in place, and as RemoteSend does.
    """

    request_id: str
    attempt: int
    kv: KvAddr
    begin: int
    end: int


class SendHeld(Ask[Sent], frozen=True):
    """Engine to its KV manager: send ``[begin, end)`` of a sequence of its, whose KV is in place in ``block_table``.

    ``tokens`` end at ``end``. The blocks are held until they are sent, whatever becomes of the sequence. Raises
    StaleReservation, BadRange, UnknownActor, NotMovable where the manager knows of no such sequence.
    """

    request_id: str
    attempt: int
    engine: str
    sequence_id: str
    tokens: bytes
    block_table: bytes
    kv: KvAddr
    begin: int
    end: int
    attachment: str = ""


class Frozen(Message, frozen=True):
    """The sequence is in no step any more: ``position`` is that of the token which would be next.

    All before it are on their way to the reader. ``usage`` is what it has cost so far.
    """

    position: int
    usage: Usage


class Freeze(Ask[Frozen], frozen=True):
    """To an engine: hold a sequence that decodes, for ``hold_s`` seconds at most, then it goes on by itself.

    Answered when no step writes its blocks any more. A repeat holds it anew. Raises NotMovable.
    """

    request_id: str
    attempt: int
    hold_s: float


class Thaw(Ask[Done], frozen=True):
    """To an engine: let a held sequence go on. A repeat does nothing."""

    request_id: str
    attempt: int


class Depart(Ask[Done], frozen=True):
    """To an engine: whoever reads this sequence has it from another engine now, so end it. A repeat does nothing."""

    request_id: str
    attempt: int


class Occupied(Message, frozen=True):
    """What is still to be done in an engine: sequences of requests, and KV that others wait for."""

    num_sequences: int
    num_sends: int
    is_draining: bool


class SetDraining(Ask[Occupied], frozen=True):
    """To an engine: be offered to no request any more, or again. What it has goes on."""

    is_draining: bool


class GetOccupied(Ask[Occupied], frozen=True):
    """To an engine: what is still to be done?"""


class SetRoles(Ask[Done], frozen=True):
    """To an engine: be this from now on; no roles at all means every one. What it has goes on."""

    roles: tuple[str, ...]


class Moved(Message, frozen=True):
    """A hand-over that came to its end. Seconds are of the router's clock."""

    request_id: str
    source: str
    target: str
    num_bytes: int
    lane: str
    num_tokens: int
    """Of the sequence: its prompt, and its output until then."""
    pause_s: float
    """From the last token of the one engine to the first of the other."""
    copy_s: float
    """Of these, the seconds until the last of the KV had been sent."""
    itl_s: float | None = None
    """Between two tokens of the one engine, on average; None if it had brought only one."""


class Leaving(Message, frozen=True):
    """What a router knows of an engine that is left: how much of it is still under way, and what was moved from it.

    ``num_requests`` are those with a verb, a reservation or a stream there. ``why_not`` says why the last one that
    could not be moved was not.
    """

    is_known: bool
    """The router has heard that it drains: it sends nothing new there."""
    num_requests: int
    num_streams: int
    num_moved: int
    num_failed: int
    num_bytes: int
    moves: tuple[Moved, ...] = ()
    """The last ones."""
    num_targets: int = 0
    """Engines that could take what runs there."""
    why_not: str = ""


class GetLeaving(Ask[Leaving], frozen=True):
    """To a router: how far is it with leaving this engine?"""

    engine: str
