"""What a client is told when a request fails, in OpenAI's shape, and which failure of the bus becomes which status."""

from typing import Any

import msgspec

from callboard.bus import ActorDied, AskTimeout, BusError, LinkLost, Refusal, RemoteError

RETRY_AFTER_S = 1
"""What clients are told to wait: blocks come back, and engines restart, in about that time."""

SCRIPT_FAILED = "The router's script failed on this request: the router's log says where and why."

_INVALID = "invalid_request_error"
_SERVER = "server_error"


class ErrorBody(msgspec.Struct, frozen=True):
    """OpenAI's description of an error."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(msgspec.Struct, frozen=True):
    """The whole JSON body."""

    error: ErrorBody


class ApiError(Exception):
    """A request that ends with an HTTP status, a sentence, and perhaps a Retry-After header."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after_s = retry_after_s
        kind = "rate_limit_error" if status == 429 else _SERVER if status >= 500 else _INVALID
        self.body = ErrorBody(message=message, type=kind, param=param, code=code)

    def encode(self) -> bytes:
        """Return the JSON body."""
        return msgspec.json.encode(ErrorReply(self.body))

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Return the headers that belong to the body."""
        headers = [(b"content-type", b"application/json")]
        if self.retry_after_s is not None:
            headers.append((b"retry-after", str(self.retry_after_s).encode()))
        if self.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        return headers


def not_supported(param: str, what: str) -> ApiError:
    """Return the refusal of a part of OpenAI's interface that is not there."""
    return ApiError(400, f"{what} not supported by this server.", param=param, code="unsupported_parameter")


# Refusals cross the bus by name, so they are told apart by name: a script's or a KV manager's need not be imported.
_STATUS_OF_REFUSAL: dict[str, tuple[int, str]] = {
    "BadRequest": (400, "bad_request"),
    "BadRange": (400, "bad_range"),
    "OutOfBlocks": (503, "out_of_blocks"),
    "QueueFull": (429, "queue_full"),
    "UnknownModel": (404, "model_not_found"),
    "Stalled": (408, "stalled"),
    "UnknownActor": (503, "unavailable"),
    "NoEngine": (503, "unavailable"),
    "NoRouter": (503, "unavailable"),
    "StaleReservation": (503, "unavailable"),
    "CorruptPages": (503, "unavailable"),
    "ScriptError": (500, "script_error"),
}


def refusal_name(error: BusError) -> str:
    """Return the class of a refusal, also of one that this process does not know; "" for what is none."""
    if not isinstance(error, Refusal):
        return ""
    return str(error.name) if isinstance(error, RemoteError) else type(error).__name__


def all_full(error: BusError, retry_after_s: int) -> ApiError:
    """Return what the client is told when every router has as many requests as it takes."""
    return ApiError(429, str(error), code="queue_full", retry_after_s=retry_after_s)


def no_router(missing: str | None) -> ApiError:
    """Return what the client is told when there was no router to ask for as long as it is waited for one."""
    text = f"The server cannot answer just now: {missing or 'no router can be reached'}."
    return ApiError(503, text, code="unavailable", retry_after_s=RETRY_AFTER_S)


def api_error_of(error: BusError) -> ApiError:
    """Return what the client is told when the router's stream ended with ``error``."""
    if isinstance(error, AskTimeout):
        return ApiError(504, f"The request took too long: {error}.", code="timeout")
    if isinstance(error, ActorDied | LinkLost):
        text = f"What served this request is gone ({error}). Try again."
        return ApiError(503, text, code="unavailable", retry_after_s=RETRY_AFTER_S)
    if isinstance(error, Refusal):
        status, code = _STATUS_OF_REFUSAL.get(refusal_name(error), (500, "server_error"))
        if code == "script_error":  # Its text is for who wrote the script: it names files, and what is in them.
            return ApiError(status, SCRIPT_FAILED, code=code)
        retry_after_s = RETRY_AFTER_S if status in (429, 503) else None
        return ApiError(status, str(error), code=code, retry_after_s=retry_after_s)
    return ApiError(500, str(error) or type(error).__name__, code="server_error")


def internal_error(error: BaseException) -> ApiError:
    """Return what the client is told of a bug: that it happened, and nothing of its inside."""
    return ApiError(500, f"The server failed on this request ({type(error).__name__}).", code="internal_error")


def shutting_down() -> ApiError:
    """Return what clients are told whose answers a stop cuts short."""
    return ApiError(503, "The server is shutting down.", code="shutting_down", retry_after_s=RETRY_AFTER_S)


def context_length_exceeded(*, limit: int, num_prompt: int, num_output: int, param: str) -> ApiError:
    """Return the refusal of a prompt, or a prompt and its output, that do not fit the model's context."""
    return ApiError(
        400,
        f"This model's maximum context length is {limit} tokens. However, you requested {num_prompt + num_output} "
        f"tokens ({num_prompt} in the prompt, {num_output} in the completion). Shorten one of them.",
        param=param,
        code="context_length_exceeded",
    )


def as_api_error(error: Any) -> ApiError:
    """Return any failure of a request as an ApiError."""
    if isinstance(error, ApiError):
        return error
    return api_error_of(error) if isinstance(error, BusError) else internal_error(error)
