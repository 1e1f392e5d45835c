"""What OpenAI's clients get: the shapes of completions and chat completions, whole and as chunks.

A *shape* turns pieces of text into Structs of one endpoint; everything else about the two endpoints is the same.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import msgspec
from msgspec import UNSET, UnsetType

from .text import Piece, TokenLogprob

# ---- values ------------------------------------------------------------------------------------------------------


class PromptTokensDetails(msgspec.Struct, frozen=True):
    """Of the prompt's tokens, those whose KV did not have to be computed."""

    cached_tokens: int


class UsageReply(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a request cost. The details are left out when no sequence reported them."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None


class CompletionLogprobs(msgspec.Struct, frozen=True):
    """Logprobs in the completions' shape. Offsets count characters of the choice's text."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: None
    text_offset: list[int]


class ChatTokenLogprob(msgspec.Struct, frozen=True):
    """One token in the chat completions' shape."""

    token: str
    logprob: float | None
    bytes: list[int]
    top_logprobs: tuple[()] = ()


class ChatLogprobs(msgspec.Struct, frozen=True):
    """Logprobs in the chat completions' shape."""

    content: list[ChatTokenLogprob]
    refusal: None = None


class CompletionChoice(msgspec.Struct, frozen=True):
    """A choice of a completion, whole or a chunk of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    token_ids: list[int] | UnsetType = UNSET
    """An extension, for clients that set ``return_token_ids``."""


class AssistantMessage(msgspec.Struct, frozen=True):
    """What the assistant said."""

    content: str
    role: str = "assistant"
    refusal: None = None


class ChatChoice(msgspec.Struct, frozen=True):
    """A choice of a chat completion."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    token_ids: list[int] | UnsetType = UNSET


class Delta(msgspec.Struct, frozen=True):
    """What a chunk adds to the assistant's message."""

    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct, frozen=True):
    """A choice of a chunk of a chat completion."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    token_ids: list[int] | UnsetType = UNSET


class Reply(msgspec.Struct, frozen=True):
    """A completion, a chat completion, or a chunk of one. ``usage`` is null in chunks before the one that holds it."""

    id: str
    object: str
    created: int
    model: str
    choices: Sequence[Any]
    usage: UsageReply | UnsetType | None = UNSET


class ModelReply(msgspec.Struct, frozen=True):
    """A served model. ``max_model_len`` is an extension."""

    id: str
    created: int
    max_model_len: int
    object: str = "model"
    owned_by: str = "callboard"


class ModelsReply(msgspec.Struct, frozen=True):
    """All served models."""

    data: list[ModelReply]
    object: str = "list"


# ---- shapes ------------------------------------------------------------------------------------------------------


class Shape(Protocol):
    """How one endpoint writes choices."""

    id_prefix: str
    whole_object: str
    chunk_object: str

    def opening(self, index: int) -> Any | None:
        """Return the chunk choice that comes before a choice's first text, None if there is none."""

    def chunks(self, index: int, piece: Piece) -> list[Any]:
        """Return the chunk choices that carry ``piece``."""

    def choice(self, index: int, pieces: Sequence[Piece]) -> Any:
        """Return a choice whole; the last piece holds the finish reason."""


class CompletionShape:
    """POST /v1/completions."""

    id_prefix = "cmpl-"
    whole_object = chunk_object = "text_completion"

    def opening(self, index: int) -> Any | None:
        return None

    def chunks(self, index: int, piece: Piece) -> list[Any]:
        return [self.choice(index, (piece,))]

    def choice(self, index: int, pieces: Sequence[Piece]) -> Any:
        text = "".join(piece.text for piece in pieces)
        return CompletionChoice(index, text, _completion_logprobs(pieces), pieces[-1].finish_reason, _token_ids(pieces))


class ChatShape:
    """POST /v1/chat/completions."""

    id_prefix = "chatcmpl-"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def opening(self, index: int) -> Any | None:
        return ChatChunkChoice(index, Delta(role="assistant", content=""), None, None)

    def chunks(self, index: int, piece: Piece) -> list[Any]:
        chunks = []
        if piece.text or piece.logprobs or piece.token_ids:
            delta, token_ids = Delta(content=piece.text), _token_ids((piece,))
            chunks.append(ChatChunkChoice(index, delta, _chat_logprobs((piece,)), None, token_ids))
        if piece.finish_reason is not None:
            chunks.append(ChatChunkChoice(index, Delta(), None, piece.finish_reason))
        return chunks

    def choice(self, index: int, pieces: Sequence[Piece]) -> Any:
        text = "".join(piece.text for piece in pieces)
        message, token_ids = AssistantMessage(text), _token_ids(pieces)
        return ChatChoice(index, message, _chat_logprobs(pieces), pieces[-1].finish_reason, token_ids)


def _token_ids(pieces: Sequence[Piece]) -> list[int] | UnsetType:
    if pieces[-1].token_ids is None:
        return UNSET
    return [id for piece in pieces for id in piece.token_ids or ()]


def _shown(entry: TokenLogprob) -> str:
    """Return a token as text; one that is part of a character as OpenAI writes it, ``bytes:\\xe2\\x82``."""
    try:
        return entry.data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in entry.data)


def _completion_logprobs(pieces: Sequence[Piece]) -> CompletionLogprobs | None:
    entries = [entry for piece in pieces for entry in piece.logprobs]
    if not entries:
        return None
    return CompletionLogprobs(
        tokens=[_shown(entry) for entry in entries],
        token_logprobs=[entry.logprob for entry in entries],
        top_logprobs=None,
        text_offset=[entry.offset for entry in entries],
    )


def _chat_logprobs(pieces: Sequence[Piece]) -> ChatLogprobs | None:
    entries = [entry for piece in pieces for entry in piece.logprobs]
    if not entries:
        return None
    return ChatLogprobs([ChatTokenLogprob(_shown(entry), entry.logprob, list(entry.data)) for entry in entries])
