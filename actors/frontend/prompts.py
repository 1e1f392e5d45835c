"""From a request to the token ids of its prompts, and how many tokens each may be answered with."""

from dataclasses import dataclass

from callboard.bus import Node

from .chat_template import TemplateRefused
from .errors import ApiError, context_length_exceeded
from .requests import ChatRequest, CompletionRequest
from .tokenizer import Tokenizer

LONG_TEXT = 4096
"""Characters from which on a text is tokenised in a worker thread: about a millisecond of the loop's time."""
DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's default for completions. Chats go on to the end of the context."""


@dataclass(frozen=True, slots=True)
class Model:
    """A served model: the name clients use, its tokenizer, its context in tokens, and since when it is served."""

    name: str
    tokenizer: Tokenizer
    max_model_len: int
    created: int


async def encode_prompts(request: CompletionRequest | ChatRequest, model: Model, node: Node) -> list[list[int]]:
    """Return the token ids of every prompt. Raises ApiError for one that is empty, unknown to the model, or refused."""
    if isinstance(request, ChatRequest):
        return [await _encode_chat(request, model, node)]
    encoded = []
    for prompt in request.prompts:
        ids = await _encode_text(prompt, model, node) if isinstance(prompt, str) else _checked(prompt, model)
        if not ids:
            raise ApiError(400, "'prompt' must hold at least one token.", param="prompt", code="invalid_value")
        encoded.append(ids)
    return encoded


def num_output_tokens(request: CompletionRequest | ChatRequest, model: Model, num_prompt: int) -> int:
    """Return ``max_tokens`` for a prompt of that length. Raises ApiError if they do not fit the context."""
    is_chat = isinstance(request, ChatRequest)
    param = "messages" if is_chat else "prompt"
    room = model.max_model_len - num_prompt
    asked = request.asked_max_tokens
    if room < 1 or (asked is not None and asked > room):
        raise context_length_exceeded(
            limit=model.max_model_len,
            num_prompt=num_prompt,
            num_output=1 if asked is None else asked,
            param=param if room < 1 else "max_tokens",
        )
    if asked is not None:
        return asked
    return room if is_chat else min(room, DEFAULT_COMPLETION_TOKENS)


async def _encode_text(text: str, model: Model, node: Node) -> list[int]:
    if len(text) > LONG_TEXT:
        return await node.run_blocking(model.tokenizer.encode, text, add_special_tokens=True)
    return model.tokenizer.encode(text, add_special_tokens=True)


async def _encode_chat(request: ChatRequest, model: Model, node: Node) -> list[int]:
    turns = request.conversation()
    if model.tokenizer.chat_template is None:
        text = f"The model '{model.name}' has no chat template: use /v1/completions."
        raise ApiError(400, text, param="model", code="no_chat_template")
    try:
        if sum(len(turn["content"]) for turn in turns) > LONG_TEXT:
            return await node.run_blocking(model.tokenizer.encode_chat, turns)
        return model.tokenizer.encode_chat(turns)
    except TemplateRefused as error:
        text = f"The model's chat template refused these messages: {error}."
        raise ApiError(400, text, param="messages", code="invalid_value") from None


def _checked(ids: list[int], model: Model) -> list[int]:
    size = model.tokenizer.vocab_size
    for id in ids:
        if not 0 <= id < size:
            text = f"'prompt' holds the token id {id}, and the model's ids are 0 to {size - 1}."
            raise ApiError(400, text, param="prompt", code="invalid_value")
    return ids
