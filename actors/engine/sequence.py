"""One sequence inside an engine: its tokens, its blocks, and how far it has come."""

from array import array
from collections.abc import Iterable

from callboard.actors.protocol import FinishReason, SamplingParams
from callboard.kv.tokens import pack_tokens, unpack_tokens

from .step import Chunk, Draw


class Sequence:
    """A prompt and what was generated after it, or (``sampling`` None) tokens of which only the KV is wanted.

    A kv-only sequence borrows its block table: it never grows, is never preempted, and gives nothing back.
    """

    def __init__(
        self,
        sequence_id: str,
        prompt: Iterable[int],
        sampling: SamplingParams | None,
        *,
        request_id: str = "",
        num_output_tokens: int = 0,
    ) -> None:
        self.sequence_id = sequence_id
        self.request_id = request_id or sequence_id
        self.sampling = sampling
        self.tokens = list(prompt)
        self.num_prompt_tokens = len(self.tokens) - num_output_tokens
        self.first_position = num_output_tokens
        """Where its output begins here; what is before it came with the prompt, from another engine."""
        self.block_table: array[int] = array("i")
        self.num_cached_tokens = 0
        self.num_computed_tokens = 0
        self.finish_reason: FinishReason | None = None
        self.arrival: int | None = None
        """Its rank among all sequences, kept through preemptions, so that the oldest always makes progress."""
        self.is_aborted = False
        self.is_paused = False
        """Nobody reads its tokens: it keeps its blocks and takes no part in steps."""
        self.is_held = False
        """It may be about to go on elsewhere: it keeps its blocks and decodes no further (moving.py)."""
        self.num_holds = 0
        """How often it was held or let go."""
        self.is_sealed = False
        # For Usage: prompt tokens found in place at first, written by this engine, and preemptions.
        self.num_reused_tokens: int | None = None
        self.num_written_prompt_tokens = 0
        self.num_preemptions = 0

    @property
    def is_kv_only(self) -> bool:
        """Whether nothing is sampled."""
        return self.sampling is None

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - self.num_prompt_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens that are still to go through the model; a decoding sequence has one, its newest."""
        return len(self.tokens) - self.num_computed_tokens

    @property
    def is_idle(self) -> bool:
        """Whether it takes part in no step, for now."""
        return self.is_paused or self.is_held

    @property
    def is_decoding(self) -> bool:
        """Whether only its newest generated token is missing."""
        return self.num_uncomputed_tokens == 1 and self.num_output_tokens > 0

    def place(self, block_table: bytes, num_cached_tokens: int) -> None:
        """Give the sequence its blocks, of which the first ``num_cached_tokens`` slots hold its KV already.

        Where that is everything, the last token is computed again for its logits, without writing its slot.
        """
        assert 0 <= num_cached_tokens <= len(self.tokens), (num_cached_tokens, len(self.tokens))
        self.block_table = array("i", unpack_tokens(block_table))
        self.num_cached_tokens = num_cached_tokens
        self.num_computed_tokens = num_cached_tokens
        if num_cached_tokens == len(self.tokens) and not self.is_kv_only:
            self.num_computed_tokens -= 1
        if self.num_reused_tokens is None:
            self.num_reused_tokens = min(num_cached_tokens, self.num_prompt_tokens)

    def displace(self) -> None:
        """Take the sequence's blocks away, keeping its tokens: it was preempted."""
        self.block_table = array("i")
        self.num_cached_tokens = 0
        self.num_computed_tokens = 0
        self.is_sealed = False
        self.num_preemptions += 1

    def next_chunk(self, num_tokens: int) -> Chunk:
        """Return the work of computing its next ``num_tokens`` tokens; the last of all of them draws."""
        begin, end = self.num_computed_tokens, self.num_computed_tokens + num_tokens
        assert begin < end <= len(self.tokens)
        draw = None
        if self.sampling is not None and end == len(self.tokens):
            draw = Draw(self.sampling, self.num_output_tokens, self._penalized())
        return Chunk(
            sequence_id=self.sequence_id,
            tokens=pack_tokens(self.tokens[begin:end]),
            begin=begin,
            write_begin=max(begin, self.num_cached_tokens),
            block_table=self.block_table.tobytes(),
            draw=draw,
            is_kv_only=self.is_kv_only,
        )

    def _penalized(self) -> bytes:
        """Return the tokens that penalties count."""
        sampling = self.sampling
        if sampling is None or not (sampling.presence_penalty or sampling.frequency_penalty):
            return b""
        return pack_tokens(self.tokens[self.num_prompt_tokens :])

    def advance(self, chunk: Chunk) -> int:
        """Note that a chunk's KV is in place; return how many of the prompt's tokens it has written."""
        num_written = max(0, min(chunk.end, self.num_prompt_tokens) - chunk.write_begin)
        self.num_written_prompt_tokens += num_written
        self.num_computed_tokens = chunk.end
        return num_written

    def __repr__(self) -> str:
        done = f"{self.num_computed_tokens}/{len(self.tokens)}"
        return f"Sequence({self.sequence_id}, {done} computed, {len(self.block_table)} blocks)"
