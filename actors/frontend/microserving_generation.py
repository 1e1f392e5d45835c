"""start_generate over HTTP, and completions of one engine: OpenAI's answer, of an engine that the client has chosen."""

from typing import Any

from callboard.actors.protocol import Entry
from callboard.actors.protocol import StartGenerate as StartGenerateMessage
from callboard.bus import Refusal
from callboard.kv.layout import BadRange
from callboard.kv.tokens import digest_of, num_tokens

from .answer import REQUEST_ID, Answer, Prepared
from .endpoint import Endpoint
from .errors import ApiError, refusal_name
from .generation import Outbox, Sequence, read_tokens
from .microserving_door import EngineDoor, EngineRequest
from .microserving_held import Held
from .responses import CompletionShape

UNUSABLE = ("StaleReservation", "CorruptPages")
"""Refusals of a reservation: the engine can compute by itself what was to be in there."""


class StartGenerateRequest(EngineRequest, frozen=True, kw_only=True):
    """POST /microserving/start_generate: from ``begin`` on the engine computes the prompt's KV itself."""

    begin: int | None = None

    @property
    def has_usage_chunk(self) -> bool:
        """Whether a stream ends with a chunk that holds the usage: it does unless the client wants none."""
        return self.stream_options is None or self.stream_options.include_usage is not False


class EngineCompletion(Endpoint):
    """One completion by an engine; an ASGI application, used once."""

    kind: type[EngineRequest] = EngineRequest
    name = "engine_completions"

    def __init__(self, door: EngineDoor, engine: str) -> None:
        super().__init__(door.backend, CompletionShape(), self._checked, self.name)
        self._door = door
        self._engine_name = engine
        self._engine: Entry

    def _checked(self, body: bytes) -> Any:
        # Who has a reservation goes on where it is, although the engine takes nothing new.
        self._engine = self._door.engine(self._engine_name, is_new=False)
        request = self._door.decode(self.kind, self._engine, body)
        if self._held_for(request) is None:
            self._door.engine(self._engine_name)
        return request

    def _held_for(self, request: EngineRequest) -> Held | None:
        return None

    def _wanted_id(self, prepared: Prepared) -> str | None:
        user = getattr(prepared.request, "user", None)
        return user if user is not None and REQUEST_ID.fullmatch(user) else None

    async def _run(self, answer: Answer, sequence: Sequence, outbox: Outbox) -> ApiError | None:
        return await self._generate(answer, sequence, outbox, begin=None, held=None)

    async def _generate(
        self, answer: Answer, sequence: Sequence, outbox: Outbox, *, begin: int | None, held: Held | None
    ) -> ApiError | None:
        """Read what the engine generates. Raises BusError."""
        message = sequence.message
        asked = StartGenerateMessage(
            message.request_id,
            self._door.new_attempt() if held is None else held.attempt,
            message.prompt,
            message.sampling,
            begin,
            None if held is None else held.kv,
        )
        node = self._door.backend.node
        async with node.ref(self._engine.address).stream(asked, timeout=self._door.backend.timeout_s) as tokens:
            answer.trace.opened()
            return await read_tokens(sequence, tokens, outbox)


class StartGenerate(EngineCompletion):
    """One start_generate; an ASGI application, used once."""

    kind = StartGenerateRequest
    name = "microserving_start_generate"

    def _held_for(self, request: EngineRequest) -> Held | None:
        held = None if request.user is None else self._door.held.of(self._engine_name, request.user)
        return None if held is None or held.is_taken else held

    async def _run(self, answer: Answer, sequence: Sequence, outbox: Outbox) -> ApiError | None:
        request = answer.prepared.request
        assert isinstance(request, StartGenerateRequest)
        begin = _begin(request, num_tokens(sequence.message.prompt))
        held = self._held_for(request) if sequence.index == 0 else None
        if held is None or held.prompt_digest != digest_of(sequence.message.prompt):
            return await self._generate(answer, sequence, outbox, begin=begin, held=None)
        held.is_taken = True
        try:
            # Where the client says that less is there than was promised, it is waited for in vain.
            if begin is None or begin >= held.kv.end:
                try:
                    return await self._generate(answer, sequence, outbox, begin=begin, held=held)
                except Refusal as error:
                    if sequence.sent or refusal_name(error) not in UNUSABLE:
                        raise
            self._door.let_go(held)
            return await self._generate(answer, sequence, outbox, begin=None, held=None)
        finally:
            if sequence.sent:
                self._door.held.forget(held)  # The first token shows that the engine has it.
            else:
                self._door.let_go(held)


def _begin(request: StartGenerateRequest, length: int) -> int | None:
    """Return the token of the prompt that ``begin`` names. Raises BadRange."""
    if request.begin is None:
        return None
    begin = request.begin + length if request.begin < 0 else request.begin
    if not 0 <= begin < length:
        reason = "one token at least must be left to be computed"
        raise BadRange(begin=request.begin, end=length, num_tokens=length, reason=reason)
    return begin
