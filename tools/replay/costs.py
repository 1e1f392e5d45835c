"""What steps, pages and messages cost: fitted to what a recording saw of them, and how well it fits.

A step takes so long whatever it computes, and more for each prefill token and for each sequence that decodes
(``callboard.actors.engine.simulated.Simulation``). Every phase that was recorded is one equation.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from callboard.actors.engine.simulated import Simulation
from callboard.bus.taps import ENDED, SPAN, decode_facts
from callboard.tools.trace.event import Event

DEFAULT = (2e-3, 0.1e-3, 0.2e-3)
"""Where nothing was recorded: about what a small model takes on a core of a CPU, as bench/ measured."""
DEFAULT_BYTES_PER_S = 2e9
DEFAULT_LATENCY_S = 0.2e-3
LEAST_ROWS = 8
"""An engine with fewer phases is taken to be as the others are."""
MOST_ROWS = 20_000
SHORTEST_S, LONGEST_S = 1e-9, 1e6
"""Phases that took less or more were not measured."""
MOST_NUMBER = 1e12
NUM_ROUNDS = 8
HUBER = 0.1
"""Relative errors beyond this count less: steps during which the machine did something else."""
PRIOR = 0.01
"""How much what is known of all engines counts beside one phase of this one: it decides only what those leave open."""
QUICK = ("OpenWrite", "CloseWrite", "PrepRecv", "Admit")
"""Asks that are answered at once, but for those that wait for blocks or pages."""
WAITS = ("blocks", "pages")
USUAL_SHARE = 0.98
"""Of the phases: the others, such as a model's first step, say nothing of what is usual."""

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Fit:
    """The costs of an engine's steps, and how far off they are: the median and 90th percentile of relative errors."""

    engine: str
    """Empty for all engines together."""
    costs: tuple[float, float, float]
    """Seconds of a step, and more for each prefill token and for each sequence that decodes."""
    gap_s: float = 0.0
    """Seconds between two steps."""
    num_prefills: int = 0
    num_decodes: int = 0
    error_p50: float = 0.0
    error_p90: float = 0.0

    def simulation(self, like: Simulation) -> Simulation:
        """Return a model with these costs."""
        per_step, per_token, per_decode = self.costs
        return msgspec.structs.replace(
            like,
            seconds_per_step=per_step + self.gap_s,
            seconds_per_prefill_token=per_token,
            seconds_per_decode=per_decode,
        )


@dataclass(frozen=True, slots=True)
class Pages:
    """What it costs to write pages into another pool. A send is what is written at a time: a group of layers."""

    bytes_per_s: float = DEFAULT_BYTES_PER_S
    seconds_per_send: float = 0.0
    num_sends: int = 0


@dataclass(frozen=True, slots=True)
class Costs:
    """What a simulation charges. ``others`` and ``other_pages`` are for those that the recording knows nothing of."""

    engines: dict[str, Fit]
    others: Fit
    pages: dict[tuple[str, str], Pages] = field(default_factory=dict)
    """By the sending and the receiving KV manager."""
    other_pages: Pages = Pages()
    latency_s: float = DEFAULT_LATENCY_S
    """Of a message, with what it takes both processes to get to it: half of a round trip."""
    num_latencies: int = 0

    def of(self, engine: str) -> Fit:
        """Return what an engine's steps cost."""
        return self.engines.get(engine, self.others)

    def pages_of(self, manager: str, to: str) -> Pages:
        """Return what it costs a KV manager to send to another."""
        return self.pages.get((manager, to), self.other_pages)


@dataclass(slots=True)
class _Rows:
    """Equations: steps, prefill tokens and decodes that took so many seconds."""

    features: list[tuple[float, float, float]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    num_prefills: int = 0
    num_decodes: int = 0
    gaps: list[float] = field(default_factory=list)
    """Seconds between two steps, in the mean of each decode."""

    def add(self, features: tuple[float, float, float], seconds: float, *, is_prefill: bool) -> None:
        if not SHORTEST_S <= seconds <= LONGEST_S or features[0] < 1 or len(self.seconds) >= MOST_ROWS:
            return
        self.features.append(features)
        self.seconds.append(seconds)
        self.num_prefills += is_prefill
        self.num_decodes += not is_prefill


class CostsOf:
    """Fed with a recording's events; ``fit`` then says what things cost there."""

    def __init__(self) -> None:
        self._rows: dict[str, _Rows] = {}
        self._sends: dict[tuple[str, str], list[tuple[float, float]]] = {}
        self._round_trips: dict[int, float] = {}
        self._waited: dict[int, None] = {}

    def add(self, event: Event) -> None:
        """Take what an event says of a cost."""
        record = event.record
        if record.what == SPAN:
            if record.name in ("prefill", "compute", "decode"):
                self._add_phase(event)
            elif record.name in WAITS and len(self._waited) < MOST_ROWS:
                self._waited[record.parent] = None
            elif record.name == "send":
                facts = decode_facts(record.facts)
                sends = self._sends.setdefault((record.actor, str(facts.get("to"))), [])
                num_bytes = facts.get("num_bytes")
                if (
                    isinstance(num_bytes, int)
                    and num_bytes > 0
                    and event.time >= event.begin
                    and len(sends) < MOST_ROWS
                ):
                    sends.append((float(num_bytes), event.time - event.begin))
        elif record.what == ENDED and record.name in QUICK and not record.error:
            trips = self._round_trips
            if len(trips) < MOST_ROWS and event.time >= event.begin:
                trips[record.span] = event.time - event.begin

    def _add_phase(self, event: Event) -> None:
        record = event.record
        facts = decode_facts(record.facts)
        num_steps = _number(facts, "num_steps")
        if num_steps < 1:
            return
        rows, is_prefill = self._rows.setdefault(record.actor, _Rows()), record.name != "decode"
        features = (num_steps, _number(facts, "step_prefill_tokens"), _number(facts, "step_decodes"))
        rows.add(features, _number(facts, "step_s"), is_prefill=is_prefill)
        if not is_prefill:  # A sequence that decodes is in nearly every step: what lies between is what a step costs.
            rows.gaps.append(_number(facts, "between_s") / num_steps)

    def fit(self) -> Costs:
        """Return the costs."""
        everything = _Rows()
        for rows in self._rows.values():
            for features, seconds in zip(rows.features, rows.seconds, strict=True):
                if len(everything.seconds) < MOST_ROWS:
                    everything.features.append(features)
                    everything.seconds.append(seconds)
            everything.gaps += rows.gaps
            everything.num_prefills += rows.num_prefills
            everything.num_decodes += rows.num_decodes
        others = _fit("", everything, DEFAULT, 0.0)
        engines = {}
        for name in sorted(self._rows):
            rows = self._rows[name]
            if len(rows.seconds) >= LEAST_ROWS:
                engines[name] = _fit(name, rows, others.costs, others.gap_s)
        pages = {name: _fit_sends(self._sends[name]) for name in sorted(self._sends)}
        all_sends = [send for name in sorted(self._sends) for send in self._sends[name][:MOST_ROWS]]
        return Costs(
            engines,
            others,
            {name: each for name, each in pages.items() if each.num_sends >= LEAST_ROWS},
            _fit_sends(all_sends),
            *self._latency(),
        )

    def _latency(self) -> tuple[float, int]:
        trips = sorted(trip for span, trip in self._round_trips.items() if span not in self._waited)
        if len(trips) >= LEAST_ROWS:
            usual = trips[: math.ceil(USUAL_SHARE * len(trips))]
            return sum(usual) / len(usual) / 2, len(trips)
        return DEFAULT_LATENCY_S, 0


def _number(facts: dict[str, Any], name: str) -> float:
    value = facts.get(name, 0)
    return float(value) if isinstance(value, int | float) and 0 <= value < MOST_NUMBER else 0.0


def _fit(engine: str, rows: _Rows, prior: tuple[float, float, float], gap_s: float) -> Fit:
    """Least squares of relative errors, no cost below zero; what the rows do not say is as in ``prior``."""
    if not rows.seconds:
        return Fit(engine, prior)
    features, seconds = np.array(rows.features), np.array(rows.seconds)
    known = np.array(prior)
    # Each cost is held to what is known by a row of its own, as heavy as a few phases in which it is all there is.
    anchors = np.diag(PRIOR / np.maximum(known, 1e-7))
    weights = 1.0 / seconds
    costs = known
    for _ in range(NUM_ROUNDS):
        left = np.vstack((features * weights[:, None], anchors))
        right = np.concatenate((seconds * weights, np.full(3, PRIOR)))
        costs = _non_negative(left, right)
        errors = np.abs(features @ costs - seconds) / seconds
        weights = np.sqrt(np.minimum(1.0, HUBER / np.maximum(errors, 1e-9))) / seconds
    expected = features @ costs
    errors = np.abs(expected - seconds) / seconds
    # What takes longer now and then makes the mean, which is what many steps add up to.
    usual = errors <= np.quantile(errors, USUAL_SHARE)
    costs = costs * (seconds[usual].sum() / max(expected[usual].sum(), 1e-12))
    errors = np.sort(np.abs(features @ costs - seconds) / seconds)
    p50, p90 = (float(errors[int(share * (len(errors) - 1))]) for share in (0.5, 0.9))
    found = (float(costs[0]), float(costs[1]), float(costs[2]))
    gap_s = float(np.median(rows.gaps)) if rows.gaps else gap_s
    return Fit(engine, found, gap_s, rows.num_prefills, rows.num_decodes, p50, p90)


def _non_negative(left: Array, right: Array) -> Array:
    """Return the least squares solution with no negative part: the most negative one is left out, and again."""
    kept = list(range(left.shape[1]))
    solution = np.zeros(left.shape[1])
    while kept:
        part = np.linalg.lstsq(left[:, kept], right, rcond=None)[0]
        if part.min() >= 0:
            solution[kept] = part
            break
        del kept[int(part.argmin())]
    return solution


def _fit_sends(sends: Sequence[tuple[float, float]]) -> Pages:
    timed = [send for send in sends if send[1] > SHORTEST_S]
    if 2 * len(timed) <= len(sends):  # On a virtual clock they may take no time at all.
        return Pages(math.inf, 0.0, len(sends)) if sends else Pages()
    table = np.array(timed)
    num_bytes, seconds = table[:, 0], table[:, 1]
    left = np.stack((np.ones(len(table)), num_bytes / 1e9), axis=1) / seconds[:, None]
    fixed, per_gb = _non_negative(left, np.ones(len(table)))
    if per_gb <= 0:
        return Pages(float(num_bytes.sum() / seconds.sum()), 0.0, len(sends))
    return Pages(float(1e9 / per_gb), float(fixed), len(sends))
