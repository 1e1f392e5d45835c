"""How long a request will take on given engines, and what that costs the others: the arithmetic of adaptive scripts.

Every engine tells what its steps take, fitted online to its own (actors/engine/step_fit.py). Of an engine let

    W, R, G  be the tokens that it has still to compute, and the sequences that it decodes; and all that it will decode
    a, b, c  what a step takes whatever is in it, and more for each prefill token, each decode
    B, r     its token budget, and the share of its time that goes into prefill

Then computing ``k`` tokens behind what is there, and generating ``m`` tokens, take

    fill(k) = (W + k) (b + (a + c R) / (B - R))         decode(m) = m (a + c (G + 1)) / (1 - r)

with a term for attention to both. A request of ``n`` tokens, of which P computes ``[0, split)`` and D the rest, takes

    ttft = fill(split - cached) on P + the hand-off, and then fill(n - split) on D, whose own queue drains meanwhile
    jct  = ttft + decode(m - 1) on D

What it costs others is what it delays. All G sequences of an engine wait for what is computed there, and so does who
comes while there is a queue; and each of those that decode beside it waits ``c`` a token. A router that lets each
request take the way of the least sum of both steers the fleet towards the least sum of all. That keeps prompts away
from where many decode, and so separates prefill from decode just where, and while, that pays.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from callboard.actors.protocol import Load

from .engine import Engine
from .request import Request

MOST_SHARE = 0.9
"""Of prefill: beyond, decodes would be expected to take for ever."""
DEFAULT_BUDGET = 512
FEW = 3
"""Engines of each kind that are looked at in all pairs: the ones with the least to do."""
UNKNOWN = Load(step_s=5e-3, prefill_token_s=2e-4, decode_s=5e-4)
"""Of an engine that has not made a step, in a fleet of such."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """Seconds until the first token and until the last, and the seconds that others will wait longer, summed up."""

    ttft: float
    jct: float
    delay: float

    @property
    def cost(self) -> float:
        """What it takes from everybody together."""
        return self.jct + self.delay


@dataclass(frozen=True, slots=True)
class Plan:
    """P computes ``[0, split)`` and sends it, D computes the rest and decodes. Where ``split`` is 0, D does all."""

    prefill: Engine
    decode: Engine
    split: int
    prediction: Prediction


class _Pace:
    """What an engine's steps take now, reckoned once for all ways that lead over it."""

    def __init__(self, engine: Engine) -> None:
        load = engine.load
        known = load if load.step_s else engine.speed
        known = known if known.step_s else UNKNOWN
        self.step_s = known.step_s
        self.prefill_token_s = load.prefill_token_s or known.prefill_token_s or UNKNOWN.prefill_token_s
        self.decode_s = load.decode_s or known.decode_s
        self.attended_s = load.attended_s or known.attended_s
        budget = engine.limit("max_num_batched_tokens", default=DEFAULT_BUDGET)
        step_s = self.step_s + self.decode_s * load.num_decoding
        self.token_s = self.prefill_token_s + step_s / max(1, budget - load.num_decoding)
        """For each token of a prompt, with its share of the steps."""
        self.waiting_s = load.num_uncomputed_tokens * self.token_s
        self.num_generating = load.num_generating
        self.num_decoding = load.num_decoding
        self.share = min(MOST_SHARE, load.prefill_share)

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


def predict(
    request: Request, prefill: Engine, decode: Engine, split: int = 0, cached: Mapping[Engine, int] | None = None
) -> Prediction:
    """Return how long the request will take if ``prefill`` computes ``[0, split)`` and ``decode`` the rest.

    With ``split`` 0, or one and the same engine, that does all of it. ``cached`` is what ``fleet.probe`` says; what it
    does not name has nothing of the prompt. Uses what engines report, to this instant; asks nobody.
    """
    cached = cached or {}
    paces = {engine: _Pace(engine) for engine in (prefill, decode)}
    return _predict(request, prefill, decode, 0 if prefill == decode else split, cached, paces)


def best_plan(
    request: Request,
    prefill: Iterable[Engine],
    decode: Iterable[Engine],
    cached: Mapping[Engine, int],
    *,
    parts: int = 4,
) -> Plan:
    """Return the cheapest way to serve a request, for all requests together; ValueError where there is no engine.

    Tried are every decode engine alone, and its pairs with prefill engines for splits at each of so many parts of the
    prompt and at the end of what is cached. Picks the engines.
    """
    paces: dict[Engine, _Pace] = {}
    to = sorted(decode, key=lambda e: _ahead(e, cached, paces))
    by = sorted(prefill, key=lambda e: _ahead(e, cached, paces))
    plans = [
        Plan(p, d, split, _predict(request, p, d, split, cached, paces))
        for p, d, split in _ways(request, by[:FEW], to[:FEW], cached, parts)
    ]
    best = min(plans, key=lambda plan: (plan.prediction.cost, plan.decode.last_picked, plan.split))
    best.decode.pick()
    if best.split:
        best.prefill.pick()
    return best


def _ways(
    request: Request, prefill: list[Engine], decode: list[Engine], cached: Mapping[Engine, int], parts: int
) -> Iterator[tuple[Engine, Engine, int]]:
    num_tokens = request.num_tokens
    for d in decode:
        yield d, d, 0
        for p in prefill:
            if p == d:
                continue
            splits = {num_tokens * part // parts for part in range(1, parts + 1)} | {cached.get(p, 0)}
            yield from ((p, d, split) for split in sorted(splits) if cached.get(d, 0) < split <= num_tokens)


def _ahead(engine: Engine, cached: Mapping[Engine, int], paces: dict[Engine, _Pace]) -> float:
    pace = paces.get(engine)
    if pace is None:
        pace = paces[engine] = _Pace(engine)
    return pace.waiting_s - cached.get(engine, 0) * pace.token_s + pace.num_generating * pace.decode_s


def _predict(
    request: Request,
    prefill: Engine,
    decode: Engine,
    split: int,
    cached: Mapping[Engine, int],
    paces: Mapping[Engine, _Pace],
) -> Prediction:
    d, num_tokens = paces[decode], request.num_tokens
    there_s = delay_s = 0.0
    begin = min(cached.get(decode, 0), num_tokens - 1)
    if split > begin:
        p, has = paces[prefill], min(cached.get(prefill, 0), split)
        transfer = decode.transfer_from(prefill)
        there_s = transfer.handoff_s + (has - min(has, begin)) * transfer.token_s
        if split > has:
            own_s = p.own_s(split - has, _pairs(has, split))
            there_s += p.waiting_s + own_s
            delay_s += p.delay_s(own_s, num_tokens)
        begin = min(split, num_tokens - 1)
    own_s = d.own_s(num_tokens - begin, _pairs(begin, num_tokens))
    ttft = there_s + d.queue_s(there_s, num_tokens) + own_s + d.step_s
    num_output = max(1, decode.expected_tokens(request))
    delay_s += d.delay_s(own_s, num_tokens)
    delay_s += d.num_generating * num_output * d.decode_s / 2  # Half of them are there for all of it.
    return Prediction(ttft, ttft + (num_output - 1) * d.decode_token_s(num_tokens), delay_s)


def _pairs(begin: int, end: int) -> float:
    return (end - begin) * (begin + end + 1) / 2
