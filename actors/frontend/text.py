"""From tokens to text that may be shown: whole characters, and nothing of a stop string.

Synchronous, one per sequence. It lives in the frontend, so text outlives the death of any engine.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from callboard.actors.protocol import Token, Usage

from .tokenizer import Tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_MAX_HELD = 32
"""Tokens held at most for a character that does not complete. A character has four bytes; more is no text."""
_TAIL = 8


class Detokenizer:
    """Text of a growing sequence of tokens, in pieces that end at whole characters.

    The pieces joined are ``tokenizer.decode`` of all tokens. ``prompt`` is what came before: some decoders treat
    the start of a text in their own way, and this is not one.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = [id for id in prompt if not tokenizer.is_special(id)]
        self._known = tokenizer.decode(self._ids)
        """The text of the first ``_num_known`` ids, which has been returned already."""
        if self._known.endswith(REPLACEMENT):
            self._ids, self._known = [], ""
        self._num_known = len(self._ids)

    def push(self, id: int) -> str:
        """Take one token; return the text it completes, perhaps none."""
        # Hot: once per token. Only a window is decoded: what was returned last, and what is held.
        if self._tokenizer.is_special(id):
            return ""
        self._ids.append(id)
        text = self._tokenizer.decode(self._ids)
        if text.endswith(REPLACEMENT):
            return self._cut(text) if len(self._ids) - self._num_known > _MAX_HELD else ""
        piece = text[len(self._known) :]
        if piece:
            del self._ids[: self._num_known]
            self._num_known = len(self._ids)
            self._known = self._tokenizer.decode(self._ids)
        return piece

    def flush(self) -> str:
        """Return what is held, at the end: bytes that never became a character are U+FFFD."""
        piece = self._tokenizer.decode(self._ids)[len(self._known) :]
        self._ids, self._known, self._num_known = [], "", 0
        return piece

    def _cut(self, text: str) -> str:
        """Return the older part of a long run of bytes that are no characters, so that the window stays short."""
        for cut in range(len(self._ids) - _TAIL, len(self._ids) - _TAIL // 2):
            left = self._tokenizer.decode(self._ids[:cut])
            # A cut inside a character shows: the two halves give more than the whole.
            if left + self._tokenizer.decode(self._ids[cut:]) == text:
                piece = left[len(self._known) :]
                self._ids, self._known, self._num_known = self._ids[cut:], "", 0
                return piece
        return ""


class StopStrings:
    """Text without what follows the first stop string, and without the stop string.

    The match that ends first wins, so that how the text arrives in pieces changes nothing.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._longest = max(map(len, stops), default=0)
        self._held = ""
        self.is_matched = False

    def push(self, piece: str) -> str:
        """Take text; return what can be no part of a stop string. After a match, nothing."""
        if not self._stops:
            return piece
        if self.is_matched or not piece:
            return ""
        text = self._held + piece
        matches = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if matches:
            self.is_matched, self._held = True, ""
            return text[: min(matches)[1]]
        keep = self._num_held(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """Return what is held: no stop string will complete any more."""
        held, self._held = self._held, ""
        return held

    def _num_held(self, text: str) -> int:
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            tail = text[-length:]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A shown token: its bytes, its logprob where the engine gave one, and where its text begins."""

    data: bytes
    logprob: float | None
    offset: int


@dataclass(frozen=True, slots=True)
class Piece:
    """What one token let out: text, the logprobs that belong to it, and the finish reason if it was the last."""

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str | None = None
    token_ids: tuple[int, ...] | None = None
    """The token itself, where the client asked for ids."""

    def __bool__(self) -> bool:
        return bool(self.text or self.logprobs or self.finish_reason or self.token_ids)


class SequenceText:
    """The text state of one sequence: tokens in, pieces out, until the engine finishes or a stop string appears."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        prompt: Sequence[int] = (),
        stops: Sequence[str] = (),
        has_logprobs: bool = False,
        has_token_ids: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(tokenizer, prompt)
        self._stops = StopStrings(stops)
        self._has_logprobs = has_logprobs
        self._has_token_ids = has_token_ids
        self._waiting: list[TokenLogprob] = []
        self._num_seen = 0
        self._num_shown = 0
        self.num_tokens = 0
        self.finish_reason: str | None = None
        self.usage: Usage | None = None
        """What the engine reported with the last token; None when a stop string ended the sequence before."""

    def push(self, token: Token) -> Piece:
        """Take the next token."""
        self.num_tokens += 1
        self.usage = token.usage
        # The token that makes an engine stop is an end mark, whether or not the tokenizer calls it special.
        is_end_mark = token.finish_reason == "stop"
        if self._has_logprobs and not is_end_mark:
            self._waiting.append(TokenLogprob(self._tokenizer.token_bytes(token.id), token.logprob, self._num_seen))
        text = "" if is_end_mark else self._detokenizer.push(token.id)
        if token.finish_reason is not None:
            text += self._detokenizer.flush()
        self._num_seen += len(text)
        shown = self._stops.push(text)
        if self._stops.is_matched:
            self.finish_reason = "stop"
        elif token.finish_reason is not None:
            shown += self._stops.flush()
            self.finish_reason = token.finish_reason
        self._num_shown += len(shown)
        token_ids = (token.id,) if self._has_token_ids else None
        return Piece(shown, self._take_logprobs(), self.finish_reason, token_ids)

    @property
    def is_cut(self) -> bool:
        """Say whether a stop string ended the sequence, so that the engine need not go on."""
        return self._stops.is_matched

    def _take_logprobs(self) -> tuple[TokenLogprob, ...]:
        if not self._waiting:
            return ()
        if self.finish_reason is not None and not self.is_cut:
            ready, self._waiting = self._waiting, []
            return tuple(ready)
        ready = [entry for entry in self._waiting if entry.offset < self._num_shown]
        self._waiting = [] if self.is_cut else [entry for entry in self._waiting if entry.offset >= self._num_shown]
        return tuple(ready)
