"""What the steps of engines take now, as ``predict`` and ``best_plan`` reckon with it (prediction.py has the formulas).

Each engine's fit tells its steps' time well, and the parts of it badly: prefill and decodes come together, so that a
part more of the one and less of the other fits as well. Engines that are offered together serve one model: the parts
are the mean of theirs, times what an engine is slower or faster by as a whole, if it is so by more than noise.

The share of time that goes into prefill is a mean, too, of the engines that generate. It says how much of what comes
later will be prefill, and that these decisions spread. An engine's own share says what was decided before: who had
taken many prompts would look slow for decodes, be given prompts alone, and look so for ever.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from callboard.actors.protocol import Load

from .engine import Engine

MOST_SHARE = 0.9
"""Of prefill: beyond, decodes would be expected to take for ever."""
DEFAULT_BUDGET = 512
UNKNOWN = Load(step_s=5e-3, prefill_token_s=2e-4, decode_s=5e-4)
"""Of an engine that has not made a step, in a fleet of such."""
NOISE = 1.1
"""Engines whose steps take up to so many times the mean, or of which the mean does, are taken to be equals."""
TYPICAL = 8
"""Decodes of a typical step, and such steps to one prompt."""


@dataclass(frozen=True, slots=True)
class Parts:
    """Of a step's time, in seconds (actors/engine/step_fit.py)."""

    step_s: float
    prefill_token_s: float
    decode_s: float
    attended_s: float

    def typical_s(self, num_tokens: int) -> float:
        """Return what a prompt of ``num_tokens``, and some steps of decodes that attend to as many, take together."""
        num_decodes = TYPICAL * TYPICAL
        pairs = num_tokens * num_tokens / 2 + num_decodes * num_tokens
        compute_s = num_tokens * self.prefill_token_s + num_decodes * self.decode_s + pairs * self.attended_s
        return (1 + TYPICAL) * self.step_s + compute_s

    def times(self, factor: float) -> "Parts":
        """Return the parts of steps that take so many times as long."""
        return Parts(
            factor * self.step_s,
            factor * self.prefill_token_s,
            factor * self.decode_s,
            factor * self.attended_s,
        )


def paces_of(engines: Iterable[Engine], num_tokens: int) -> dict[Engine, "Pace"]:
    """Return the paces of engines of one model, for prompts of about ``num_tokens``."""
    found = list(engines)
    shares = [engine.load.prefill_share for engine in found if engine.has_role("decode")]
    share = min(MOST_SHARE, fmean(shares)) if shares else 0.0
    parts = pooled([_parts(engine) for engine in found], num_tokens)
    return {engine: Pace(engine, own, share) for engine, own in zip(found, parts, strict=True)}


def pooled(parts: Sequence[Parts], num_tokens: int) -> list[Parts]:
    """Return for each engine's parts the mean of all, times what that engine is slower or faster by beyond NOISE."""
    mean = Parts(*(fmean(getattr(each, name) for each in parts) for name in Parts.__slots__))
    mean_s = mean.typical_s(num_tokens)
    factors = (own.typical_s(num_tokens) / mean_s for own in parts)
    return [mean.times(factor) if max(factor, 1 / factor) > NOISE else mean for factor in factors]


def _parts(engine: Engine) -> Parts:
    load = engine.load
    known = load if load.step_s else engine.speed
    known = known if known.step_s else UNKNOWN
    return Parts(
        known.step_s,
        load.prefill_token_s or known.prefill_token_s or UNKNOWN.prefill_token_s,
        load.decode_s or known.decode_s,
        load.attended_s or known.attended_s,
    )


class Pace:
    """What an engine's steps take now, reckoned once for all ways that lead over it."""

    def __init__(self, engine: Engine, parts: Parts, share: float) -> None:
        load = engine.load
        self.step_s = parts.step_s
        self.prefill_token_s = parts.prefill_token_s
        self.decode_s = parts.decode_s
        self.attended_s = parts.attended_s
        budget = engine.limit("max_num_batched_tokens", default=DEFAULT_BUDGET)
        step_s = self.step_s + self.decode_s * load.num_decoding
        self.token_s = self.prefill_token_s + step_s / max(1, budget - load.num_decoding)
        """For each token of a prompt, with its share of the steps."""
        self.waiting_s = load.num_uncomputed_tokens * self.token_s
        self.num_generating = load.num_generating
        self.num_decoding = load.num_decoding
        self.share = share

    def own_s(self, num_tokens: int, num_pairs: float) -> float:
        """Return what computing these tokens takes by itself."""
        return num_tokens * self.token_s + num_pairs * self.attended_s

    def queue_s(self, later_s: float, typical: int) -> float:
        """Return how long what waits here will take in so many seconds, when more has come.

        It tends to the mean of a queue of prompts of ``typical`` tokens (M/D/1: r / 2 (1 - r) of one).
        """
        if later_s <= 0.0:
            return self.waiting_s
        typical_s = typical * self.token_s
        mean_s = self.share / (1.0 - self.share) * typical_s / 2
        left_s = self.waiting_s - later_s * (1.0 - self.share)
        return max(left_s, mean_s * (1.0 - math.exp(-later_s / typical_s)))

    def delay_s(self, own_s: float, typical: int) -> float:
        """Return the seconds that others wait longer for what takes ``own_s``, where prompts have so many tokens."""
        # Who comes later waits for it as well while there is a queue: so many come until there is none.
        num_later = self.waiting_s / (typical * self.token_s) * self.share / (1.0 - self.share)
        return (self.num_generating + num_later) * own_s

    def decode_token_s(self, num_attended: int) -> float:
        """Return the seconds from one token of a sequence to the next."""
        step_s = self.step_s + (self.num_generating + 1) * (self.decode_s + num_attended * self.attended_s)
        return step_s / (1.0 - self.share)
