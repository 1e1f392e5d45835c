"""How long a request will take on given engines, and what that costs the others: the arithmetic of adaptive scripts.

Every engine tells what its steps take, fitted online to its own (actors/engine/step_fit.py); what is made of it here is
in pace.py. Of an engine let

    W, R, G  be the tokens that it has still to compute, and the sequences that it decodes; and all that it will decode
    a, b, c  what a step takes whatever is in it, and more for each prefill token, each decode
    B, r     its token budget, and the share of time that goes into prefill (of the engines that generate, the mean)

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

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from .engine import Engine
from .pace import Pace, paces_of
from .request import Request

HANDOFF = 1.1
"""How much more a way with a hand-off is taken to cost: routers and KV managers work for it, which is not reckoned."""
FEW = 3
"""Engines of each kind that are looked at in all pairs: the ones with the least to do."""


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


def predict(
    request: Request, prefill: Engine, decode: Engine, split: int = 0, cached: Mapping[Engine, int] | None = None
) -> Prediction:
    """Return how long the request will take if ``prefill`` computes ``[0, split)`` and ``decode`` the rest.

    With ``split`` 0, or one and the same engine, that does all of it. ``cached`` is what ``fleet.probe`` says; what it
    does not name has nothing of the prompt. Uses what engines report, to this instant; asks nobody.
    """
    cached = cached or {}
    paces = paces_of((prefill, decode), request.num_tokens)
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
    to, by = list(decode), list(prefill)
    if not to:
        raise ValueError("there is no engine to decode at: decode is empty")
    paces = paces_of(dict.fromkeys((*to, *by)), request.num_tokens)
    to.sort(key=lambda e: _ahead(e, cached, paces))
    by.sort(key=lambda e: _ahead(e, cached, paces))
    plans = [
        Plan(p, d, split, _predict(request, p, d, split, cached, paces))
        for p, d, split in _ways(request, by[:FEW], to[:FEW], cached, parts)
    ]
    best = min(plans, key=lambda plan: (_cost(plan), plan.decode.last_picked, plan.split))
    best.decode.pick()
    if best.split:
        best.prefill.pick()
    return best


def _cost(plan: Plan) -> float:
    return plan.prediction.cost * (HANDOFF if plan.split else 1.0)


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


def _ahead(engine: Engine, cached: Mapping[Engine, int], paces: Mapping[Engine, Pace]) -> float:
    pace = paces[engine]
    return pace.waiting_s - cached.get(engine, 0) * pace.token_s + pace.num_generating * pace.decode_s


def _predict(
    request: Request,
    prefill: Engine,
    decode: Engine,
    split: int,
    cached: Mapping[Engine, int],
    paces: Mapping[Engine, Pace],
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
