"""The request as a script sees it, and ranges of its prompt."""

from collections.abc import Callable, Mapping

from callboard.actors.protocol import Generate, SamplingParams
from callboard.kv.layout import BadRange
from callboard.kv.tokens import num_tokens, unpack_tokens


class Request:
    """One sequence for one client. Scripts read it; a retry gets one of its own with ``attempt`` counted up."""

    def __init__(
        self,
        message: Generate,
        *,
        attempt: int,
        remaining_s: Callable[[], float],
    ) -> None:
        self.id: str = message.request_id
        self.model: str = message.model
        self.sampling: SamplingParams = message.sampling
        self.priority: int = message.priority
        self.headers: Mapping[str, str] = message.headers
        self.num_tokens: int = num_tokens(message.prompt)
        self.attempt: int = attempt
        """0 at first; counted up when an engine died under the request, or a KV manager."""
        self.num_output_tokens: int = message.num_output_tokens
        """The last so many tokens of ``prompt`` were sent to the client by earlier attempts."""
        self.packed_prompt: bytes = message.prompt
        self._prompt: list[int] | None = None
        self._remaining_s = remaining_s
        self.notes: dict[str, str] = {}
        """What the script noted of its choices."""

    @property
    def prompt(self) -> list[int]:
        """The prompt's token ids, and behind them those that earlier attempts have sent."""
        if self._prompt is None:
            self._prompt = unpack_tokens(self.packed_prompt)
        return self._prompt

    @property
    def deadline(self) -> float:
        """Seconds left for this request."""
        return self._remaining_s()

    def note(self, **why: object) -> None:
        """Put the reasons of a choice into the request's trace."""
        self.notes.update({key: str(value) for key, value in why.items()})

    def bound(self, value: int | None, *, default: int) -> int:
        """Return a bound of a range as a token position: negative counts from the end. Raises BadRange."""
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int):
            raise BadRange(begin=repr(value), end="...", num_tokens=self.num_tokens, reason="bounds are integers")
        position = value + self.num_tokens if value < 0 else value
        if not 0 <= position <= self.num_tokens:
            raise BadRange(begin=0, end=value, num_tokens=self.num_tokens, reason=f"{value} lies outside of the prompt")
        return position
