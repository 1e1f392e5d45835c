"""What OpenAI's clients send, checked once: by msgspec for types and ranges, and here for what msgspec cannot say.

Parts of OpenAI's interface that are not there are refused by name, never ignored: a client would take the answer for
what it asked for. Unknown fields are ignored, as OpenAI does. Extensions: ``top_k``, ``ignore_eos``, ``priority``, and
``return_token_ids``, named as in vLLM: text does not say which tokens it was.
"""

import re
from collections.abc import Callable, Iterator
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from callboard.actors.protocol import SamplingParams

from .errors import ApiError, not_supported

MAX_CHOICES = 16
MAX_PROMPTS = 128
MAX_STOPS = 4

_Count = Annotated[int, Meta(ge=1)]
_StopString = Annotated[str, Meta(min_length=1, max_length=1024)]
_Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
_Penalty = Annotated[float, Meta(ge=-2.0, le=2.0)]
_Priority = Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)]

Body = TypeVar("Body", bound="GenerationRequest")


class StreamOptions(msgspec.Struct, frozen=True):
    """Options of a streamed answer."""

    include_usage: bool | None = None


class GenerationRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The fields that completions and chat completions share. None is what the field's default stands for."""

    model: str
    max_tokens: _Count | None = None
    temperature: Annotated[float, Meta(ge=0.0, le=2.0)] | None = None
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    seed: _Seed | None = None
    stop: _StopString | Annotated[list[_StopString], Meta(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    return_token_ids: bool | None = None
    priority: _Priority | None = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    # Known, and refused unless they ask for nothing:
    repetition_penalty: float | None = None
    min_p: float | None = None
    logit_bias: Any = None

    @property
    def num_choices(self) -> int:
        """How many sequences each prompt gets."""
        return self.n or 1

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def has_usage_chunk(self) -> bool:
        """Whether a stream ends with a chunk that holds the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def asked_max_tokens(self) -> int | None:
        """The number of tokens the client asked for, if it did."""
        return self.max_tokens

    @property
    def wants_logprobs(self) -> bool:
        """Whether logprobs go with the tokens."""
        raise AssertionError

    def sampling(self, *, max_tokens: int, seed: int, index: int, eos_token_ids: tuple[int, ...]) -> SamplingParams:
        """Return what an engine needs to know. ``seed`` counts only if the client sent none."""
        ignores_eos = bool(self.ignore_eos)
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=self.top_k if self.top_k is not None and self.top_k > 0 else None,
            seed=(seed if self.seed is None else self.seed) % 2**63,
            index=index,
            ignore_eos=ignores_eos,
            stop_token_ids=() if ignores_eos else eos_token_ids,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
        )

    def refused(self) -> Iterator[ApiError]:
        """Yield what is wrong beyond types and ranges, first things first."""
        if self.repetition_penalty not in (None, 1.0):
            yield not_supported("repetition_penalty", "A repetition penalty is")
        if self.min_p:
            yield not_supported("min_p", "min_p is")
        if self.logit_bias:
            yield not_supported("logit_bias", "logit_bias is")
        if self.stream_options is not None and not self.stream:
            text = "'stream_options' is only allowed when 'stream' is true."
            yield ApiError(400, text, param="stream_options", code="invalid_value")


class CompletionRequest(GenerationRequest, frozen=True, kw_only=True):
    """POST /v1/completions."""

    prompt: str | list[str | int | list[int]]
    logprobs: Annotated[int, Meta(ge=0)] | bool | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, each as text or as token ids. Raises ApiError for a list that mixes kinds."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        kinds = {type(item) for item in self.prompt}
        if len(kinds) != 1:
            text = "'prompt' must be a string, a list of strings, a list of token ids, or a list of such lists."
            raise ApiError(400, text, param="prompt", code="invalid_type" if kinds else "invalid_value")
        if int in kinds:
            return [[item for item in self.prompt if isinstance(item, int)]]
        return [item for item in self.prompt if not isinstance(item, int)]

    @property
    def wants_logprobs(self) -> bool:
        return self.logprobs is not None and self.logprobs is not False

    def refused(self) -> Iterator[ApiError]:
        yield from super().refused()
        if self.echo:
            yield not_supported("echo", "Echoing the prompt is")
        if self.suffix:
            yield not_supported("suffix", "A suffix is")
        if self.best_of is not None and self.best_of not in (1, self.num_choices):
            yield not_supported("best_of", "best_of is")
        if self.logprobs is not None and self.logprobs > 1:
            yield not_supported("logprobs", "logprobs of other tokens than the chosen one are")
        if len(self.prompts) > MAX_PROMPTS:
            text = f"'prompt' holds {len(self.prompts)} prompts, and {MAX_PROMPTS} are the most in one request."
            yield ApiError(400, text, param="prompt", code="invalid_value")


class ContentPart(msgspec.Struct, frozen=True):
    """A part of a chat message. Only text is understood."""

    type: str
    text: str | None = None


class ChatMessage(msgspec.Struct, frozen=True):
    """One turn of a conversation."""

    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: Any = None
    function_call: Any = None


class ChatRequest(GenerationRequest, frozen=True, kw_only=True):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Meta(min_length=1)]
    max_completion_tokens: _Count | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    response_format: Any = None
    modalities: Any = None
    audio: Any = None

    @property
    def asked_max_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def wants_logprobs(self) -> bool:
        return bool(self.logprobs)

    def conversation(self) -> list[dict[str, str]]:
        """Return the messages as a chat template takes them. Raises ApiError for one it could not render."""
        return [_turn(message, f"messages[{index}]") for index, message in enumerate(self.messages)]

    def refused(self) -> Iterator[ApiError]:
        yield from super().refused()
        for name in ("tools", "functions"):
            if getattr(self, name):
                yield not_supported(name, "Tools are")
        for name in ("tool_choice", "function_call"):
            if getattr(self, name) not in (None, "none", "auto"):
                yield not_supported(name, "Tools are")
        form = self.response_format
        if form is not None and not (isinstance(form, dict) and form.get("type") == "text"):
            yield not_supported("response_format", "A response format other than text is")
        if self.top_logprobs:
            yield not_supported("top_logprobs", "logprobs of other tokens than the chosen one are")
        if self.modalities not in (None, ["text"]) or self.audio:
            yield not_supported("modalities", "Any modality but text is")


def _turn(message: ChatMessage, where: str) -> dict[str, str]:
    role = "system" if message.role == "developer" else message.role
    if role in ("tool", "function") or message.tool_calls or message.function_call:
        raise not_supported(f"{where}.role" if role in ("tool", "function") else where, "Tools are")
    if role not in ("system", "user", "assistant"):
        text = f"Invalid value: '{message.role}'. Roles are 'system', 'developer', 'user' and 'assistant'."
        raise ApiError(400, text, param=f"{where}.role", code="invalid_value")
    if message.content is None:
        raise ApiError(400, f"'{where}' has no content.", param=f"{where}.content", code="missing_required_parameter")
    content = message.content if isinstance(message.content, str) else _joined(message.content, where)
    turn = {"role": role, "content": content}
    return turn if message.name is None else {**turn, "name": message.name}


def _joined(parts: list[ContentPart], where: str) -> str:
    texts = []
    for index, part in enumerate(parts):
        param = f"{where}.content[{index}]"
        if part.type != "text":
            raise not_supported(param, f"Content of type '{part.type}' is")
        if part.text is None:
            raise ApiError(400, f"'{param}' has no text.", param=f"{param}.text", code="missing_required_parameter")
        texts.append(part.text)
    return "\n".join(texts)


_WHERE = re.compile(r" - at `\$\.?(.*)`$")
_REQUIRED = re.compile(r"missing required field `(\w+)`")


def _explain(error: msgspec.ValidationError) -> ApiError:
    """Return msgspec's complaint as OpenAI's: the field in ``param`` and in the sentence."""
    text = str(error)
    found = _WHERE.search(text)
    where = found.group(1) if found else ""
    if missing := _REQUIRED.search(text):
        param = f"{where}.{missing.group(1)}" if where else missing.group(1)
        return ApiError(400, f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter")
    complaint = _WHERE.sub("", text)
    complaint = complaint[:1].lower() + complaint[1:]
    if not where:
        return ApiError(400, f"Invalid request body: {complaint}.", code="invalid_type")
    code = "invalid_type" if ", got " in complaint else "invalid_value"
    return ApiError(400, f"Invalid value for '{where}': {complaint}.", param=where, code=code)


def decoding(kind: type[Body]) -> Callable[[bytes], Body]:
    """Return what makes a checked request of a body. It raises ApiError."""
    decode = msgspec.json.Decoder(kind).decode

    def checked(data: bytes) -> Body:
        """Return the request in ``data``. Raises ApiError."""
        try:
            body = decode(data)
        except msgspec.ValidationError as error:
            raise _explain(error) from None
        except ValueError as error:
            raise ApiError(400, f"The request body is no valid JSON: {error}.", code="invalid_json") from None
        except RecursionError:
            raise ApiError(400, "The request body is nested too deeply.", code="invalid_json") from None
        for refusal in body.refused():
            raise refusal
        return body

    return checked


decode_completion = decoding(CompletionRequest)
decode_chat = decoding(ChatRequest)
