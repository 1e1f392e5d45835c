"""The values that messages carry: sampling, addresses of KV, load, usage."""

from typing import Literal

import msgspec

from callboard.bus import Address, Refusal
from callboard.kv.layout import KvLayout, SlotRun

FinishReason = Literal["stop", "length", "abort"]


class SamplingParams(msgspec.Struct, frozen=True, array_like=True):
    """How tokens are chosen. Noise is a function of (seed, index, output position) alone."""

    max_tokens: int = 16
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int = 0
    index: int = 0
    """Which of the ``n`` sequences of one request this is."""
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    presence_penalty: float = 0.0
    """Taken from the logit of every token that is in the output so far."""
    frequency_penalty: float = 0.0
    """The same, times how often it is in there."""


class KvAddr(msgspec.Struct, frozen=True, array_like=True):
    """A reservation's slots, addressed so that it authenticates itself.

    ``slots`` are those of the tokens ``[begin, end)``, in order: for people and for checks. Where a write goes its
    receiver says when it is opened.
    """

    manager: Address
    epoch: str
    reservation_id: str
    layout: KvLayout
    begin: int
    end: int
    slots: tuple[SlotRun, ...]


class Load(msgspec.Struct, frozen=True, array_like=True):
    """How busy an engine is."""

    num_running: int = 0
    num_waiting: int = 0
    free_blocks: int = 0
    num_blocks: int = 0
    prefill_tps: float = 0.0
    decode_tps: float = 0.0
    queue_s: float = 0.0
    cached_blocks: int = 0
    """Of ``free_blocks``, those that the prefix cache holds until they are needed."""
    quarantined_blocks: int = 0
    """Of the others, those that nobody may have until a writer is known to be dead. A KV manager's."""
    num_decoding: int = 0
    """Of ``num_running``, those whose prompt is in place: each takes a token of every step."""
    num_uncomputed_tokens: int = 0
    """Tokens that are still to go through the model before all that is running and waiting decodes."""
    step_s: float = 0.0
    """What a step takes whatever is in it; the next three are added to it (actors/engine/step_fit.py)."""
    prefill_token_s: float = 0.0
    decode_s: float = 0.0
    attended_s: float = 0.0
    """For each pair of a token that is computed and one that it attends to."""
    prefill_share: float = 0.0
    """Of the engine's time lately, that which went into prefill: what a decode waits for beside its own steps."""
    num_generating: int = 0
    """Of all that is running and waiting, what decodes here or will: the others are only computed for others."""


class Counters(msgspec.Struct, frozen=True, array_like=True):
    """What an actor has done since it started; every number only grows. An engine's, or a KV manager's."""

    num_prompt_tokens: int = 0
    """Of the sequences that were generated here, each counted at its first token."""
    num_computed_tokens: int = 0
    """Prompt tokens that went through the model here, for this engine's own sequences and for remote_send."""
    num_generated_tokens: int = 0
    num_preemptions: int = 0
    num_finished: dict[str, int] = {}
    """Sequences by how they ended: stop, length, abort (its client left, too), error, moved (to another engine)."""
    num_queried_tokens: int = 0
    """Tokens that were looked for in the prefix cache, once for each time that blocks were taken for them."""
    num_hit_tokens: int = 0
    """Of these, the ones that were found."""
    num_evicted_blocks: int = 0
    num_bytes_sent: int = 0
    """Of KV, into other pools."""
    num_tier_hit_tokens: int = 0
    """Tokens whose KV came back from host memory or disk."""
    num_tier_bytes_read: int = 0
    """Of KV, from disk."""
    num_tier_bytes_written: int = 0
    """Of KV, to disk, with what files have beside."""
    num_tier_dropped_blocks: int = 0
    """Cached blocks that were lost, because they were evicted before a tier had them, or could not be written."""
    num_tier_bad_blocks: int = 0
    """Files on disk that did not hold what they should, and were removed."""


class Usage(msgspec.Struct, frozen=True, array_like=True):
    """What one sequence cost on the engine that generated it. Rides on the last Token."""

    num_prompt_tokens: int
    num_cached_tokens: int
    """Prompt tokens whose KV was already in place: prefix cache and received pages."""
    num_computed_tokens: int
    """Prompt tokens whose KV this engine computed, recomputation after preemption included."""
    num_preemptions: int
    queue_s: float
    prefill_s: float
    decode_s: float


class BadRequest(Refusal):
    """A request no engine of this fleet can serve as it is. The client must change it."""

    sentence = "{reason}"


class Stalled(Refusal):
    """A request that was cancelled because nobody read its tokens. Fields: request_id, stall_s."""

    sentence = "request {request_id} was cancelled: nothing of it was read for {stall_s:.3g} s"


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """What the directory knows of an actor."""

    name: str
    kind: str
    """engine, kv_manager, router, frontend, or what a user's actor calls itself."""
    address: Address
    state: str = "ready"
    model: str = ""
    roles: tuple[str, ...] = ()
    device: str = ""
    manager: Address | None = None
    load: Load = Load()
    detail: dict[str, str] = {}
    pid: int = 0
    num_strangers: int = 0
    """Connections that its node has turned away, because they did not show the fleet's keys."""
    counters: Counters = Counters()
    started: float = 0.0
    """When the actor first entered the directory, on its node's wall clock; 0: it is not known."""
    host: str = ""
    """The joined host that it runs on, by its name in the fleet; empty where the fleet was started."""
