"""The tracer: the actor on every node that tells those who watch what the node has noted (bus/taps.py).

Whoever watches can be slow, stop, or vanish: records wait for it in a bounded buffer, what does not fit is counted
as lost, and when its stream ends nothing is left of it.
"""

import asyncio
import hashlib
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any, Literal

import msgspec

from callboard.bus.liveness import local_host
from callboard.bus.taps import BODY, NO_BODY, TOKEN_BYTES, TOKENS, Row, TapRecord, finished

from .actor import Actor
from .protocol import BadRequest
from .trace_protocol import Follow, GetMoment, GetRecords, Moment, Records

MOST_WAITING = 50_000
"""Records that wait for one follower: some 30 MB, and a second of a thousand requests/s."""
MOST_WAITING_BYTES = 32 << 20
"""The same of their bodies."""
MOST_AT_ONCE = 200
"""Records of one message: it should not hold up tokens behind it."""
MOST_BYTES_AT_ONCE = 128 << 10
"""Bodies of one message, but for a longer one, which is alone."""
MOST_BODY = 8 << 20
"""A record without its body, where that is longer: a message about a message must still be one."""
SHORTEST_S = 0.01
"""Between two messages to one follower, whatever it wants."""
MOST_FOLLOWERS = 32
SECRET = ("headers", "salt")
"""Fields of messages that are in no body but a full one."""
HASH_BLOCK = 16
HASH_BYTES = 8

Fields = dict[str, Any]


class Tracer(Actor):
    """Serves Follow, GetRecords and GetMoment for its node."""

    class Config(msgspec.Struct, frozen=True):
        """``keep`` requests' records are remembered; prompts leave the node as hashes, or also in full."""

        keep: int = 1000
        prompts: Literal["hashed", "full"] = "hashed"

    def __init__(self, config: Config | None = None) -> None:
        self.config = config or self.Config()
        self._followers: list[_Follower] = []

    @property
    def num_followers(self) -> int:
        """How many watch now."""
        return len(self._followers)

    async def start(self) -> None:
        self.node.trace.keep = self.config.keep

    def on_get_moment(self, message: GetMoment) -> Moment:
        node = self.node
        host = node.name if node.clock.is_virtual else local_host()
        return Moment(node.clock.now(), node.clock.wall(), host, node.incarnation)

    async def on_get_records(self, message: GetRecords) -> AsyncIterator[Records]:
        rows: list[Row] = []
        for request_id in self._remembered(message.of):  # One after another: who does not read keeps none of them.
            rows += self.node.trace.rows_of(request_id)
            while len(rows) > MOST_AT_ONCE:
                yield _records(rows[:MOST_AT_ONCE], is_past=True)
                del rows[:MOST_AT_ONCE]
                await asyncio.sleep(0)  # Others have their turn.
        yield _records(rows, is_past=True)

    async def on_follow(self, message: Follow) -> AsyncIterator[Records]:
        if message.bodies == "full" and self.config.prompts != "full":
            reason = 'this fleet gives prompts out as hashes only: set [trace] prompts = "full" in its file'
            raise BadRequest(reason=reason)
        if len(self._followers) >= MOST_FOLLOWERS:
            raise BadRequest(reason=f"{MOST_FOLLOWERS} tracers follow this node already")
        # At once with the ring's content: nothing lies between what is past and what is to come.
        trace = self.node.trace
        past = [row for known in trace.request_ids() for row in trace.rows_of(known)] if message.with_past else []
        num_before = trace.num_made - len(past)
        follower = _Follower(message)
        self._followers.append(follower)
        self.node.follow(follower.take, everything=message.everything)
        try:
            num_records = 0
            for begin in range(0, len(past) or 1, MOST_AT_ONCE):
                rows = past[begin : begin + MOST_AT_ONCE]
                num_records += len(rows)
                yield _records(rows, is_past=True, num_records=num_records, num_before=num_before)
                await asyncio.sleep(0)  # Others have their turn.
            past = rows = []  # What the ring forgets from here on is kept by nobody.
            every_s = max(SHORTEST_S, message.every_s)
            while True:
                await follower.wait()
                while follower.rows:
                    rows, num_lost = follower.take_out()
                    num_records += len(rows) + num_lost
                    yield _records(rows, num_lost=num_lost, num_records=num_records)
                    await asyncio.sleep(0)
                await self.node.clock.sleep(every_s)
        finally:
            self.node.unfollow(follower.take)
            self._followers.remove(follower)

    def _remembered(self, request_id: str) -> list[str]:
        known = self.node.trace.request_ids()
        return [each for each in known if _is_of(each, request_id)] if request_id else known


class _Follower:
    """What waits for one who watches."""

    def __init__(self, message: Follow) -> None:
        self.message = message
        self.rows: deque[Row | int] = deque()
        """And, at its place between them, a number: so many were lost."""
        self._num_gaps = 0
        self._num_bytes = 0
        """Of the bodies that wait."""
        self._filled = asyncio.Event()
        self._write = None if message.bodies == "none" else body_writer(message)

    def take(self, row: Row, message: Any) -> None:
        # Hot: once per record (bench/taps.py).
        if len(self.rows) >= MOST_WAITING or self._num_bytes >= MOST_WAITING_BYTES:
            self._lose()
            return
        if not self.rows:
            self._filled.set()
        if message is not None and self._write is not None:
            body = self._write(message)
            row = (*finished(row)[:BODY], body)
            self._num_bytes += 0 if body is NO_BODY else len(body)
        self.rows.append(row)

    def _lose(self) -> None:
        last = self.rows[-1]
        if isinstance(last, int):
            self.rows[-1] = last + 1
        else:
            self.rows.append(1)
            self._num_gaps += 1

    async def wait(self) -> None:
        """Wait for a record."""
        if not self.rows:
            self._filled.clear()
            await self._filled.wait()

    def take_out(self) -> tuple[list[Any], int]:
        """Return the oldest records, perhaps none, and how many were lost just before them."""
        waiting, rows, num_lost, num_bytes = self.rows, list[Any](), 0, 0
        if isinstance(waiting[0], int):
            num_lost = waiting[0]
            waiting.popleft()
            self._num_gaps -= 1
        if not self._num_gaps and not self._num_bytes:
            return [waiting.popleft() for _ in range(min(len(waiting), MOST_AT_ONCE))], num_lost
        while waiting and len(rows) < MOST_AT_ONCE and not isinstance(row := waiting[0], int):
            num_bytes += (size := 0 if row[BODY] is NO_BODY else len(row[BODY]))
            if rows and num_bytes > MOST_BYTES_AT_ONCE:
                break
            self._num_bytes -= size
            rows.append(row)
            waiting.popleft()
        return rows, num_lost


def _is_of(known: str, request_id: str) -> bool:
    """Say whether an id is the request's, or that of one of its later sequences (``ID.1``)."""
    return known == request_id or (known.startswith(f"{request_id}.") and known[len(request_id) + 1 :].isdigit())


def _records(
    rows: list[Row], *, is_past: bool = False, num_lost: int = 0, num_records: int = 0, num_before: int = 0
) -> Records:
    records = tuple(TapRecord(*finished(row)) for row in rows)
    return Records(records, is_past, num_lost, num_records, num_before)


# ---- bodies ------------------------------------------------------------------------------------------------------


def body_writer(message: Follow) -> Callable[[Any], msgspec.Raw]:
    """Return what makes the body of a record: a message's fields as a map, in msgpack.

    With ``hashed`` bodies token ids become ``{num_tokens, block_size, hashes}``, a salted hash of 8 bytes for each
    block of 16 tokens, and headers are left out; and so is the salt of another who follows.
    """
    encode = msgspec.msgpack.Encoder(enc_hook=str).encode
    is_full, salt = message.bodies == "full", message.salt[:64]

    def write(sent: Any) -> msgspec.Raw:
        fields: Fields = {name: getattr(sent, name) for name in sent.__struct_fields__}
        if not is_full:
            for name, value in fields.items():
                if name in TOKENS and type(value) is bytes:
                    fields[name] = hashed(value, salt)
            for name in SECRET:
                fields.pop(name, None)
        try:
            body = encode(fields)
        except Exception:  # Whoever watches must not end what is watched.
            return NO_BODY
        return msgspec.Raw(body) if len(body) <= MOST_BODY else NO_BODY

    return write


def hashed(tokens: bytes, salt: bytes) -> Fields:
    """Return int32 token ids as hashes. Nobody without the salt can try out ids.

    Equal blocks have equal ones, so that a replay of a recording hits the prefix cache as the original did.
    """
    size = HASH_BLOCK * TOKEN_BYTES
    hashes = b"".join(
        hashlib.blake2b(tokens[begin : begin + size], digest_size=HASH_BYTES, key=salt).digest()
        for begin in range(0, len(tokens), size)
    )
    return {"num_tokens": len(tokens) // TOKEN_BYTES, "block_size": HASH_BLOCK, "hashes": hashes}
