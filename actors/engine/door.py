"""What an engine checks of a request before it takes it in. Everything behind this door may rely on it."""

import math

import msgspec

from callboard.actors.protocol import BadRequest, SamplingParams
from callboard.kv.layout import BadRange
from callboard.kv.tokens import unpack_tokens

MOST_PENALTY = 2.0
"""Either way, as in OpenAI's API."""


class Door(msgspec.Struct, frozen=True):
    """The limits of one engine."""

    vocab_size: int
    max_model_len: int

    def check_prompt(self, prompt: bytes, *, is_generating: bool) -> list[int]:
        """Return a prompt's token ids. Raises BadRequest."""
        try:
            tokens = unpack_tokens(prompt)
        except ValueError:
            raise BadRequest(reason=f"a prompt of {len(prompt)} bytes holds no whole number of int32 ids") from None
        if not tokens:
            raise BadRequest(reason="the prompt is empty")
        longest = self.max_model_len - is_generating
        if len(tokens) > longest:
            raise BadRequest(reason=f"the prompt has {len(tokens)} tokens, and this model takes at most {longest}")
        lowest, highest = min(tokens), max(tokens)
        if lowest < 0 or highest >= self.vocab_size:
            wrong = lowest if lowest < 0 else highest
            raise BadRequest(reason=f"token id {wrong} is not in the vocabulary of {self.vocab_size}")
        return tokens


def check_sampling(sampling: SamplingParams) -> None:
    """Raise BadRequest for parameters that mean nothing."""
    if sampling.max_tokens < 1:
        raise BadRequest(reason=f"max_tokens must be at least 1, not {sampling.max_tokens}")
    if not (math.isfinite(sampling.temperature) and 0.0 <= sampling.temperature <= 100.0):
        raise BadRequest(reason=f"temperature must lie between 0 and 100, not {sampling.temperature}")
    if not 0.0 < sampling.top_p <= 1.0:
        raise BadRequest(reason=f"top_p must be above 0 and at most 1, not {sampling.top_p}")
    if sampling.top_k is not None and sampling.top_k < 1:
        raise BadRequest(reason=f"top_k must be absent or at least 1, not {sampling.top_k}")
    for name, penalty in (("presence", sampling.presence_penalty), ("frequency", sampling.frequency_penalty)):
        if not -MOST_PENALTY <= penalty <= MOST_PENALTY:
            raise BadRequest(reason=f"{name}_penalty must lie between -2 and 2, not {penalty}")


def check_output(num_output_tokens: int, num_tokens: int, sampling: SamplingParams) -> None:
    """Raise BadRequest unless so many of a prompt's tokens can be output that is not yet all of it."""
    if not 0 <= num_output_tokens < num_tokens:
        raise BadRequest(
            reason=f"{num_output_tokens} of {num_tokens} tokens cannot be output: a prompt has one at least"
        )
    if num_output_tokens >= sampling.max_tokens:
        raise BadRequest(reason=f"{num_output_tokens} tokens are generated already, of at most {sampling.max_tokens}")


def check_begin(begin: int | None, num_tokens: int) -> None:
    """Raise BadRange unless ``begin`` leaves at least one token of the prompt to compute, or none is given."""
    if begin is None:
        return
    first = begin + num_tokens if begin < 0 else begin
    if not 0 <= first <= num_tokens:
        raise BadRange(begin=begin, end=num_tokens, num_tokens=num_tokens, reason="it begins outside of the prompt")


def check_block_table(block_table: bytes, num_blocks: int) -> None:
    """Raise BadRequest for a table with a block that a pool of ``num_blocks`` does not have, or one block twice."""
    try:
        blocks = unpack_tokens(block_table)
    except ValueError:
        raise BadRequest(reason=f"a block table of {len(block_table)} bytes holds no whole number of ids") from None
    if blocks and not 0 <= min(blocks) <= max(blocks) < num_blocks:
        raise BadRequest(reason=f"the block table names blocks outside of the pool's {num_blocks}")
    if len(set(blocks)) != len(blocks):
        raise BadRequest(reason="a block is twice in the table")
