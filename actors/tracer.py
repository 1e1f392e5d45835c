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
MOST_AT_ONCE = 200
"""Records of one message: it should not hold up tokens behind it."""
SHORTEST_S = 0.01
MOST_FOLLOWERS = 32
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
        rows = self._past(message.of)
        for begin in range(0, len(rows) or 1, MOST_AT_ONCE):
            yield _records(rows[begin : begin + MOST_AT_ONCE], is_past=True)

    async def on_follow(self, message: Follow) -> AsyncIterator[Records]:
        if message.bodies == "full" and self.config.prompts != "full":
            reason = 'this fleet gives prompts out as hashes only: set [trace] prompts = "full" in its file'
            raise BadRequest(reason=reason)
        if len(self._followers) >= MOST_FOLLOWERS:
            raise BadRequest(reason=f"{MOST_FOLLOWERS} tracers follow this node already")
        # At once with the ring's content: nothing lies between what is past and what is to come.
        past = self._past("") if message.with_past else []
        num_before = self.node.trace.num_made - len(past)
        follower = _Follower(message)
        self._followers.append(follower)
        self.node.follow(follower.take, everything=message.everything)
        try:
            num_records = 0
            for begin in range(0, len(past) or 1, MOST_AT_ONCE):
                rows = past[begin : begin + MOST_AT_ONCE]
                num_records += len(rows)
                yield _records(rows, is_past=True, num_records=num_records, num_before=num_before)
            every_s = max(SHORTEST_S, message.every_s)
            while True:
                await follower.wait()
                while follower.rows:
                    rows, num_lost = follower.take_out()
                    num_records += len(rows) + num_lost
                    yield _records(rows, num_lost=num_lost, num_records=num_records)
                await self.node.clock.sleep(every_s)
        finally:
            self.node.unfollow(follower.take)
            self._followers.remove(follower)

    def _past(self, request_id: str) -> list[Row]:
        trace = self.node.trace
        if request_id:
            wanted = [known for known in trace.request_ids() if _is_of(known, request_id)]
        else:
            wanted = trace.request_ids()
        return [row for known in wanted for row in trace.of(known)]


class _Follower:
    """What waits for one who watches."""

    def __init__(self, message: Follow) -> None:
        self.message = message
        self.rows: deque[Row] = deque()
        self.num_lost = 0
        self._filled = asyncio.Event()
        self._write = None if message.bodies == "none" else body_writer(message)

    def take(self, row: Row, message: Any) -> None:
        # Hot: once per record (bench/taps.py).
        if len(self.rows) >= MOST_WAITING:
            self.num_lost += 1
            return
        if not self.rows:
            self._filled.set()
        if message is not None and self._write is not None:
            row = (*finished(row)[:BODY], self._write(message))
        self.rows.append(row)

    async def wait(self) -> None:
        """Wait for a record."""
        if not self.rows:
            self._filled.clear()
            await self._filled.wait()

    def take_out(self) -> tuple[list[Row], int]:
        """Return the oldest records, and how many were lost before them."""
        rows = [finished(self.rows.popleft()) for _ in range(min(len(self.rows), MOST_AT_ONCE))]
        # They were lost behind all that waited: told with the last of that.
        num_lost = 0
        if not self.rows:
            num_lost, self.num_lost = self.num_lost, 0
        return rows, num_lost


def _is_of(known: str, request_id: str) -> bool:
    """Say whether an id is the request's, or that of one of its later sequences (``ID.1``)."""
    return known == request_id or (known.startswith(f"{request_id}.") and known[len(request_id) + 1 :].isdigit())


def _records(
    rows: list[Row], *, is_past: bool = False, num_lost: int = 0, num_records: int = 0, num_before: int = 0
) -> Records:
    records = tuple(TapRecord(*row) for row in rows)
    return Records(records, is_past, num_lost, num_records, num_before)


# ---- bodies ------------------------------------------------------------------------------------------------------


def body_writer(message: Follow) -> Callable[[Any], msgspec.Raw]:
    """Return what makes the body of a record: a message's fields as a map, in msgpack.

    With ``hashed`` bodies token ids become ``{num_tokens, block_size, hashes}``, a salted hash of 8 bytes for each
    block of 16 tokens, and headers are left out.
    """
    encode = msgspec.msgpack.Encoder(enc_hook=str).encode
    is_full, salt = message.bodies == "full", message.salt[:64]

    def write(sent: Any) -> msgspec.Raw:
        fields: Fields = {name: getattr(sent, name) for name in sent.__struct_fields__}
        if not is_full:
            for name, value in fields.items():
                if name in TOKENS and type(value) is bytes:
                    fields[name] = hashed(value, salt)
            fields.pop("headers", None)
        try:
            return msgspec.Raw(encode(fields))
        except (TypeError, ValueError, OverflowError, RecursionError):
            return NO_BODY

    return write


def hashed(tokens: bytes, salt: bytes) -> Fields:
    """Return int32 token ids as hashes: equal blocks have equal ones, and nobody without the salt can try out ids."""
    size = HASH_BLOCK * TOKEN_BYTES
    hashes = b"".join(
        hashlib.blake2b(tokens[begin : begin + size], digest_size=HASH_BYTES, key=salt).digest()
        for begin in range(0, len(tokens), size)
    )
    return {"num_tokens": len(tokens) // TOKEN_BYTES, "block_size": HASH_BLOCK, "hashes": hashes}
