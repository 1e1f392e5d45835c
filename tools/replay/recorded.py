"""The requests of a recording, as they were asked, to be asked again."""

from dataclasses import dataclass, field

import msgspec
import numpy as np

from callboard.actors.protocol import Generate, SamplingParams
from callboard.bus.taps import ENDED, RECEIVED, SENT
from callboard.kv.tokens import TOKEN_BYTES, num_tokens
from callboard.tools.trace.event import Event

SAFE_VOCAB = 200
"""Pseudo tokens have ids from 1 to this: every vocabulary has them, and what they cost is what any others do."""
HASH_BYTES = 8
MOST_BLOCK_SIZE = 1024
NIL = b"\xc0"


class HashedTokens(msgspec.Struct, frozen=True):
    """A prompt of which only the hashes of its blocks were recorded, 8 bytes each; the last block may be partial."""

    num_tokens: int
    block_size: int
    hashes: bytes

    @property
    def is_sound(self) -> bool:
        """Whether it can be what a node recorded."""
        if not (0 < self.block_size <= MOST_BLOCK_SIZE and self.num_tokens >= 0):
            return False
        return len(self.hashes) == HASH_BYTES * -(-self.num_tokens // self.block_size)

    def tokens(self, salt: int = 0) -> bytes:
        """Return pseudo tokens (int32 bytes): a function of each block's hash, so that equal blocks stay equal.

        Another ``salt`` gives others, which no cache has.
        """
        seeds = np.frombuffer(self.hashes, dtype="<u8") ^ np.uint64(salt)
        steps = np.arange(1, self.block_size + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        state = seeds[:, None] + steps[None, :]
        # SplitMix64's finaliser (Steele, Lea, Flood 2014).
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = (state ^ (state >> np.uint64(31))) % np.uint64(SAFE_VOCAB) + np.uint64(1)
        packed: bytes = state.astype("<i4").tobytes()
        return packed[: self.num_tokens * TOKEN_BYTES]


class _GenerateBody(msgspec.Struct, frozen=True):
    """A Generate as it was recorded."""

    request_id: str
    model: str
    prompt: bytes | HashedTokens
    sampling: SamplingParams
    priority: int = 0
    headers: dict[str, str] = {}


_decode_body = msgspec.msgpack.Decoder(_GenerateBody).decode


@dataclass(slots=True)
class RecordedRequest:
    """One sequence that was asked of a router. ``time`` is in seconds on the recorder's clock."""

    id: str
    time: float
    router: str
    """The router's name."""
    asked_at: str
    """The node that asked, where it was recorded."""
    model: str
    prompt: bytes | HashedTokens
    sampling: SamplingParams
    priority: int
    headers: dict[str, str]
    num_tokens: int | None = None
    """How many tokens came of it; None while that is not known."""
    error: str = ""
    """How it ended: empty for well, ``cancelled`` where its client left."""
    seconds: float | None = None
    """How long it took."""

    @property
    def num_prompt_tokens(self) -> int:
        """The length of the prompt."""
        return self.prompt.num_tokens if isinstance(self.prompt, HashedTokens) else num_tokens(self.prompt)

    @property
    def leaves_early(self) -> bool:
        """Whether the client left before the end; a stop string ends a request so, too."""
        return self.error == "cancelled"

    def message(self, request_id: str, salt: int = 0) -> Generate:
        """Return the request to be asked again, for as many tokens as came of it the first time."""
        prompt = self.prompt.tokens(salt) if isinstance(self.prompt, HashedTokens) else self.prompt
        sampling = self.sampling
        if self.num_tokens and not self.error:
            sampling = msgspec.structs.replace(sampling, max_tokens=self.num_tokens, ignore_eos=True, stop_token_ids=())
        return Generate(request_id, self.model, prompt, sampling, self.priority, self.headers)


@dataclass(slots=True)
class Requests:
    """The requests of a recording, in the order they were asked; fed with its events."""

    num_without_body: int = 0
    """Requests that cannot be asked again: their bodies were not recorded."""
    _by_span: dict[int, RecordedRequest] = field(default_factory=dict)
    _without_body: dict[int, None] = field(default_factory=dict)
    _ids: dict[str, int] = field(default_factory=dict)

    def add(self, event: Event) -> str:
        """Take what an event says of a request; return the id of the sequence that it is of, if that is known."""
        record = event.record
        if record.name != "Generate":
            return ""
        if record.what in (SENT, RECEIVED):
            self._begun(event)
        elif record.what == ENDED and (request := self._by_span.get(record.span)) is not None:
            request.num_tokens, request.error = record.num_items, record.error
            request.seconds = event.time - event.begin
        request = self._by_span.get(record.span)
        return "" if request is None else request.id

    def _begun(self, event: Event) -> None:
        record = event.record
        known = self._by_span.get(record.span)
        if known is not None:
            if record.what == SENT:
                known.time, known.asked_at = event.time, event.node
            return
        try:
            body = None if bytes(record.body) == NIL else _decode_body(record.body)
        except (msgspec.MsgspecError, RecursionError):
            body = None
        if body is None or (isinstance(body.prompt, HashedTokens) and not body.prompt.is_sound):
            self._without_body[record.span] = None
            self.num_without_body = len(self._without_body)
            return
        if isinstance(body.prompt, bytes) and len(body.prompt) % TOKEN_BYTES:
            return
        if self._without_body.pop(record.span, 0) is None:
            self.num_without_body = len(self._without_body)
        # Clients may give an id twice, one after the other.
        times = self._ids[body.request_id] = self._ids.get(body.request_id, 0) + 1
        self._by_span[record.span] = RecordedRequest(
            body.request_id if times == 1 else f"{body.request_id}#{times}",
            event.time,
            record.actor,
            event.node if record.what == SENT else record.peer,
            body.model,
            body.prompt,
            body.sampling,
            body.priority,
            body.headers,
        )

    def in_order(self) -> list[RecordedRequest]:
        """Return them by the times they were asked at."""
        return sorted(self._by_span.values(), key=lambda request: (request.time, request.id))
