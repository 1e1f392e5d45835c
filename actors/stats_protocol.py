"""What a frontend says of the requests it has answered: for ``callboard top``. Fields are positional: append only."""

import msgspec

from callboard.bus import Ask, Message


class Percentiles(msgspec.Struct, frozen=True, array_like=True):
    """Of the values of the last ``FrontendStats.window_s`` seconds; None where there were none."""

    count: int = 0
    mean: float | None = None
    p50: float | None = None
    p95: float | None = None
    p99: float | None = None


class ModelStats(msgspec.Struct, frozen=True, array_like=True):
    """The requests for one served model, since the frontend started; latencies are seconds, of its last minute."""

    model: str
    num_in_flight: int
    num_ended: int
    num_failed: int
    """Of those ended: by an error of the server (500 and above, also after the answer had begun)."""
    num_left: int
    """Of those ended: the client had gone, or read nothing any more."""
    num_prompt_tokens: int
    num_generated_tokens: int
    ttft: Percentiles
    """From a request's arrival to its first token."""
    itl: Percentiles
    """Between two tokens of a sequence, as they arrive at the frontend."""
    e2e: Percentiles
    """From a request's arrival to the end of its answer."""


class FrontendStats(Message, frozen=True):
    """The answer to GetFrontendStats. ``everything`` sums up the models."""

    window_s: float
    models: tuple[ModelStats, ...]
    everything: ModelStats


class GetFrontendStats(Ask[FrontendStats], frozen=True):
    """To a frontend: how many requests, and how fast they were answered lately."""
