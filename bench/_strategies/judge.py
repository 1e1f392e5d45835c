"""What the blocks say: rows for people and JSON, and of every goal whether it held."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from .intervals import Array, Estimate, Statistic, estimate, mean, p99, ratio, round_ratios
from .load import TIMEOUT_S, Met
from .measure import tpot_s
from .mixes import Mix
from .records import Calibrated, Measured, Records
from .strategies import DATA_PARALLEL, Strategy

NEAR = 1.05
"""Of the best static strategy: what adaptive may take."""
KEEPS_UP = 2.0
"""A side whose last requests take so many times as long as earlier ones does not keep up with what arrives."""


@dataclass(frozen=True, slots=True)
class Side:
    """A strategy under a mix at a rate, all its rounds; seconds. Requests that failed count as if they had waited."""

    strategy: Strategy
    measured: list[Measured]

    @property
    def rounds(self) -> tuple[int, ...]:
        return tuple(each.round for each in self.measured)

    @property
    def num_failed(self) -> int:
        return sum(bool(met.error) for met in self._met)

    @property
    def _met(self) -> Iterable[Met]:
        return (met for each in self.measured for met in each.met)

    def ttft(self) -> list[Array]:
        return [np.array([met.ttft_s if not met.error else TIMEOUT_S for met in each.met]) for each in self.measured]

    def tpot(self) -> list[Array]:
        return [np.array([tpot_s(met) if not met.error else TIMEOUT_S for met in each.met]) for each in self.measured]

    def jct(self) -> list[Array]:
        return [np.array([met.jct_s if not met.error else TIMEOUT_S for met in each.met]) for each in self.measured]

    def keeps_up(self) -> bool:
        """Return whether the last quarter of the requests took about as long as the second."""
        quarters = [np.array_split(samples, 4) for samples in self.jct()]
        return fmean(float(q[3].mean()) for q in quarters) <= KEEPS_UP * fmean(float(q[1].mean()) for q in quarters)


@dataclass(frozen=True, slots=True)
class Group:
    """All strategies under one mix at one rate, over the rounds that all of them have."""

    mix: Mix
    utilisation: float
    calibrated: Calibrated
    sides: dict[str, Side]

    @property
    def rate(self) -> float:
        return self.utilisation * self.calibrated.saturation

    @property
    def where(self) -> str:
        return f"{self.mix.name} at {self.utilisation:g}"

    def of_kind(self, *kinds: str) -> list[Side]:
        """Return the sides of kinds that run on the two engines."""
        return [
            side for side in self.sides.values() if side.strategy.kind in kinds and side.strategy.deployment == "pair"
        ]


def groups_of(records: Records, mixes: Sequence[Mix], strategies: Sequence[Strategy]) -> list[Group]:
    """Return what was measured, by mix and rate; rounds that not all strategies have are left out."""
    groups, known = [], {strategy.name: strategy for strategy in strategies}
    measured = records.measured.values()
    for mix in mixes:
        for utilisation in sorted({each.utilisation for each in measured if each.mix == mix.name}):
            found = {
                name: {each.round: each for each in measured if each.key[1:] == (mix.name, utilisation, name)}
                for name in known
            }
            found = {name: rounds for name, rounds in found.items() if rounds}
            whole = sorted(set.intersection(*(set(rounds) for rounds in found.values()))) if found else []
            if whole:
                sides = {name: Side(known[name], [rounds[n] for n in whole]) for name, rounds in found.items()}
                groups.append(Group(mix, utilisation, records.calibrated[mix.name], sides))
    return groups


def rows_of(group: Group) -> list[dict[str, Any]]:
    """Return a row for each strategy; what JSON has in lists is a value and its interval."""
    rows = []
    slo_ttft, slo_tpot = group.calibrated.slo(group.mix.slo_ttft, group.mix.slo_tpot)
    for side in group.sides.values():
        ttft, tpot, jct = side.ttft(), side.tpot(), side.jct()
        inside = [(a <= slo_ttft) & (b <= slo_tpot) for a, b in zip(ttft, tpot, strict=True)]
        goodput = estimate([each.astype(float) for each in inside], mean).scaled(group.rate)
        cpu_s = {kind: sum(each.cpu_s.get(kind, 0.0) for each in side.measured) for kind in side.measured[0].cpu_s}
        count = sum(map(len, jct))
        other_s = sum(seconds for kind, seconds in cpu_s.items() if kind not in ("engine", "client"))
        met = [met for each in side.measured for met in each.met]
        rows.append(
            {
                "at": f"{group.where} ({group.rate:.3g}/s)",
                "strategy": side.strategy.label,
                "n": count,
                "TTFT ms": estimate(ttft, mean).scaled(1e3),
                "TTFT p99": estimate(ttft, p99).scaled(1e3),
                "TPOT ms": estimate(tpot, mean).scaled(1e3),
                "TPOT p99": estimate(tpot, p99).scaled(1e3),
                "JCT ms": estimate(jct, mean).scaled(1e3),
                "JCT p99": estimate(jct, p99).scaled(1e3),
                "goodput/s": goodput,
                "keeps up": "yes" if side.keeps_up() else "no",
                "engine CPU ms": 1e3 * cpu_s["engine"] / count,
                "other CPU ms": 1e3 * other_s / count,
                "client": {
                    "CPU ms": round(1e3 * cpu_s["client"] / count, 3),
                    "late p99 ms": round(1e3 * float(p99(np.array([each.late_s for each in met]))), 3),
                },
                "SLO ms": [round(1e3 * slo_ttft, 2), round(1e3 * slo_tpot, 2)],
                "budget": side.measured[0].budget,
                "cached tokens": round(fmean(each.num_cached for each in met), 1),
                "failed": side.num_failed,
            }
        )
    return rows


# ---- goals -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Choice:
    """Adaptive against the best static strategy of the two engines, by mean JCT."""

    where: str
    best: str
    over: Estimate
    by_round: list[float]

    @property
    def is_near(self) -> bool:
        """Within 5%, or within the spread of the repeats."""
        return self.over.value <= NEAR or min(self.by_round) <= 1.0

    @property
    def is_ahead(self) -> bool:
        return self.over.value < 1.0


def choices_of(groups: Iterable[Group]) -> list[Choice]:
    """Compare adaptive with what turned out best, wherever both were measured."""
    choices = []
    for group in groups:
        static = group.of_kind("baseline", "static")
        for mine in group.of_kind("adaptive") if static else ():
            best = min(static, key=lambda side: float(estimate_mean(side)))
            over = ratio(mine.jct(), best.jct(), mean)
            choices.append(Choice(group.where, best.strategy.label, over, round_ratios(mine.jct(), best.jct(), mean)))
    return choices


def estimate_mean(side: Side) -> float:
    """Return the mean JCT over all rounds."""
    return float(np.concatenate(side.jct()).mean())


@dataclass(frozen=True, slots=True)
class Cut:
    """How much less JCT a strategy gave than a baseline: shares, so that 0.13 is 13%."""

    where: str
    strategy: str
    is_best: bool
    """Of all that are no baselines, by mean JCT."""
    against: str
    statistic: str
    cut: Estimate
    most: float
    """What would be cut if no request ever waited, as on an idle engine: nothing can cut more on one."""
    keeps_up: bool
    """Whether the baseline kept up with what arrived."""


def cuts_of(group: Group) -> list[Cut]:
    """Return the cuts of mean and P99 by every strategy that is no baseline."""
    mine = sorted(group.of_kind("static", "adaptive"), key=estimate_mean)
    parallel = [group.sides[name] for name in DATA_PARALLEL if name in group.sides]
    against = {
        "data parallel": min(parallel, key=estimate_mean, default=None),
        "1P1D": group.sides.get("disaggregate"),
        "one engine on both cores": group.sides.get("one"),
    }
    statistics: dict[str, Statistic] = {"mean": mean, "p99": p99}
    return [
        _cut(group, side, side is mine[0], name, base, title, statistic)
        for side in mine
        for name, base in against.items()
        if base is not None
        for title, statistic in statistics.items()
    ]


def _cut(group: Group, mine: Side, is_best: bool, against: str, base: Side, title: str, statistic: Statistic) -> Cut:
    over = ratio(mine.jct(), base.jct(), statistic)
    cut = Estimate(1 - over.value, 1 - over.high, 1 - over.low)
    most = 1 - group.calibrated.alone_jct_s / float(statistic(np.concatenate(base.jct())))
    return Cut(group.where, mine.strategy.label, is_best, against, title, cut, most, base.keeps_up())


def compared(records: Records, what: str) -> dict[str, list[float]]:
    """Return the values of all rounds of a comparison, by name."""
    rounds = [each.values for (name, _), each in sorted(records.compared.items()) if name == what]
    return {name: [values[name] for values in rounds] for name in (rounds[0] if rounds else ())}
