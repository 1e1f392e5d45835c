"""A request that has been understood: its prompts as tokens, its sequences, and what is said around their text."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from callboard.actors.protocol import Generate
from callboard.bus import Node
from callboard.kv.tokens import pack_tokens

from .claimed_ids import ClaimedIds
from .errors import ApiError, shutting_down
from .generation import Outbox, Sequence, usage_of
from .http_trace import HttpTrace
from .observed import Observed, RequestMetrics
from .pace import Pace
from .prompts import Model, encode_prompts, num_output_tokens
from .requests import ChatRequest, CompletionRequest
from .responses import Reply, UsageReply
from .routers import Routers
from .text import SequenceText

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_PRIVATE_HEADERS = (b"x-api-key", b"x-request-id")
_PROMPT_TAIL = 8
"""Prompt tokens a detokeniser sees: enough for a decoder to know that this is not the start of a text."""

Headers = list[tuple[bytes, bytes]]


@dataclass(slots=True)
class Backend:
    """What all requests share: the models by served name, the routers, limits, and the request ids in flight."""

    node: Node
    routers: Routers
    models: Mapping[str, Model]
    timeout_s: float
    max_body_bytes: int
    metrics: RequestMetrics
    actor: str = "frontend"
    """Its name in the records of requests."""
    patience_s: float = 15.0
    """How long a request waits for a router, where there is none."""
    in_flight: set[str] = field(default_factory=set)
    outboxes: dict[str, Outbox] = field(default_factory=dict)
    """Of the requests being answered, by request id."""
    claimed: ClaimedIds | None = None
    """The ids of clients in flight at all frontends, where there are several."""

    def model(self, name: str) -> Model:
        """Return a served model. Raises ApiError (404)."""
        model = self.models.get(name)
        if model is None:
            served = ", ".join(f"'{known}'" for known in self.models) or "none"
            text = f"The model '{name}' does not exist. Served models: {served}."
            raise ApiError(404, text, param="model", code="model_not_found")
        return model

    def cut_short(self) -> None:
        """End every request that is still being answered."""
        for outbox in self.outboxes.values():
            outbox.fail(shutting_down())

    def claim_ids(self, given: str | None, count: int, prefix: str) -> list[str]:
        """Return ``count`` request ids that no request in flight has. Give them to release_ids.

        They are made of the one that the client gave, else of a new one behind ``prefix``.
        """
        wanted = prefix + self.node.new_id() if given is None else given
        claimed = None if given is None else self.claimed
        base, repeat = wanted, 1
        while True:
            ids = [base, *(f"{base}.{index}" for index in range(1, count))]
            if self.in_flight.isdisjoint(ids) and (claimed is None or claimed.claim(ids)):
                self.in_flight.update(ids)
                return ids
            repeat += 1
            base = f"{wanted}-{repeat}"

    def release_ids(self, ids: list[str]) -> None:
        """Say that these requests have ended."""
        self.in_flight.difference_update(ids)
        if self.claimed is not None:
            self.claimed.release(ids)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A checked request: a known model, prompts that fit its context, and how many tokens each may be answered with."""

    request: CompletionRequest | ChatRequest
    model: Model
    prompts: list[list[int]]
    max_tokens: list[int]

    @property
    def num_sequences(self) -> int:
        """How many choices the answer has."""
        return len(self.prompts) * self.request.num_choices


async def prepare(request: CompletionRequest | ChatRequest, backend: Backend) -> Prepared:
    """Tokenise and check against the model's context. Raises ApiError."""
    model = backend.model(request.model)
    prompts = await encode_prompts(request, model, backend.node)
    return Prepared(request, model, prompts, [num_output_tokens(request, model, len(prompt)) for prompt in prompts])


@dataclass(frozen=True, slots=True)
class Answer:
    """The sequences of a request, and the fields that every reply and chunk repeats."""

    id: str
    request_id: str
    created: int
    prepared: Prepared
    sequences: list[Sequence]
    observed: Observed
    trace: HttpTrace

    def reply(self, kind: str, choices: list[Any], usage: Any) -> Reply:
        """Return the Struct around ``choices``."""
        return Reply(self.id, kind, self.created, self.prepared.model.name, choices, usage)

    def usage(self) -> UsageReply:
        """Return the usage, once all sequences have ended."""
        return usage_of(self.sequences, [len(prompt) for prompt in self.prepared.prompts])

    @property
    def last_s(self) -> float:
        """When the last token came, on the node's clock; 0 before the first."""
        return max(sequence.pace.last or 0.0 for sequence in self.sequences)

    def headers(self, content_type: bytes) -> Headers:
        """Return the headers of a good answer."""
        return [(b"content-type", content_type), (b"x-request-id", self.request_id.encode())]


def given_id(headers: Headers) -> str | None:
    """Return the request id that the client gave, None if it gave none."""
    given = dict(headers).get(b"x-request-id", b"").decode("latin-1")
    return given if REQUEST_ID.fullmatch(given) else None


def build_answer(
    prepared: Prepared,
    backend: Backend,
    ids: list[str],
    prefix: str,
    headers: Headers,
    observed: Observed,
    trace: HttpTrace,
) -> Answer:
    """Return the answer that the sequences of ``ids`` will give. The router hears the client's ``x-`` headers.

    It hears the trace of a client that sent one, so that a script which asks others can name it to them.
    """
    request, model = prepared.request, prepared.model
    # The choices of a prompt share the seed and differ by their index alone.
    seed = backend.node.rng.getrandbits(63)
    forwarded = {
        name.decode("latin-1"): value.decode("latin-1")
        for name, value in headers
        if name.startswith(b"x-") and name not in _PRIVATE_HEADERS
    }
    forwarded |= trace.context.onward(trace.span)
    sequences = []
    for index, request_id in enumerate(ids):
        prompt_index, choice_index = divmod(index, request.num_choices)
        prompt = prepared.prompts[prompt_index]
        sampling = request.sampling(
            max_tokens=prepared.max_tokens[prompt_index],
            seed=seed,
            index=choice_index,
            eos_token_ids=model.tokenizer.eos_token_ids,
        )
        message = Generate(
            request_id=request_id,
            model=model.name,
            prompt=pack_tokens(prompt),
            sampling=sampling,
            priority=request.priority or 0,
            headers=forwarded,
        )
        text = SequenceText(
            model.tokenizer,
            prompt=prompt[-_PROMPT_TAIL:],
            stops=request.stops,
            has_logprobs=request.wants_logprobs,
            has_token_ids=bool(request.return_token_ids),
        )
        pace = Pace(backend.node.clock.now, backend.metrics.models[model.name].itl)
        sequences.append(Sequence(index, prompt_index, message, text, pace))
    num_prompt_tokens = sum(map(len, prepared.prompts))
    observed.serves(sequences, num_prompt_tokens=num_prompt_tokens)
    trace.facts |= {
        "model": model.name,
        "num_prompt_tokens": num_prompt_tokens,
        "num_sequences": len(sequences),
        "stream": bool(request.stream),
    }
    return Answer(
        id=ids[0] if ids[0].startswith(prefix) else prefix + ids[0],
        request_id=ids[0],
        created=int(backend.node.clock.wall()),
        prepared=prepared,
        sequences=sequences,
        observed=observed,
        trace=trace,
    )
