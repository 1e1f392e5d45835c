"""What a run says at its end: tables, goals with their intervals, the JSON and the picture."""

import datetime
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from _report import goal, report

from .intervals import Estimate
from .judge import Choice, Cut, Group, choices_of, compared, cuts_of, groups_of, rows_of
from .mixes import Mix
from .plot import draw
from .records import Records
from .strategies import Strategy

ORIGINAL = {
    ("data parallel", "mean"): 0.13,
    ("data parallel", "p99"): 0.17,
    ("1P1D", "mean"): 0.38,
    ("1P1D", "p99"): 0.33,
}
"""The cuts of the original on its long-input mix at its highest rate."""
SHOWN = (
    "n",
    "TTFT ms",
    "TTFT p99",
    "TPOT ms",
    "TPOT p99",
    "JCT ms",
    "JCT p99",
    "goodput/s",
    "keeps up",
    "other CPU ms",
)
WITH_INTERVALS = ("JCT ms", "JCT p99", "goodput/s")
"""The JSON has those of the others, too."""


def tell(records: Records, mixes: Sequence[Mix], strategies: Sequence[Strategy], options: Any) -> None:
    """Print and write everything that is known by now."""
    groups = groups_of(records, mixes, strategies)
    rows = [row for group in groups for row in rows_of(group)]
    choices, cuts = choices_of(groups), [cut for group in groups for cut in cuts_of(group)]
    goals = [*_goals_of_choices(choices), *_goals_of_cuts(groups, cuts), *_goals_of_router(records)]
    report("strategies", [_shown(row) for row in rows], goals, None, by="at")
    for line in _sentences(records, choices, cuts):
        print(line)
    if options.json:
        _write(Path(options.json), records, rows, goals, choices, cuts)
    if options.plot and groups:
        try:
            draw(groups, Path(options.plot))
        except ModuleNotFoundError as error:
            print(f"there is no picture, because {error.name} is not installed", file=sys.stderr)


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    def cell(key: str) -> Any:
        value = row[key]
        return value if not isinstance(value, Estimate) else str(value) if key in WITH_INTERVALS else value.value

    return {"at": row["at"], "strategy": row["strategy"]} | {key: cell(key) for key in SHOWN}


# ---- goals -----------------------------------------------------------------------------------------------------------


def _interval(name: str, found: Estimate, limit: str) -> dict[str, Any]:
    item: dict[str, Any] = goal(name, found.value, limit)
    return item | {"range": [round(found.low, 4), round(found.high, 4)]}


def _goals_of_choices(choices: Sequence[Choice]) -> list[dict[str, Any]]:
    goals = []
    for each in choices:
        item = _interval(f"{each.where}: adaptive's mean JCT over {each.best}'s", each.over, "<= 1.05")
        spread = f"{min(each.by_round):.3f} to {max(each.by_round):.3f} by round"
        goals.append(item | {"holds": each.is_near, "name": f"{item['name']} (or within its spread: {spread})"})
    if choices:
        ahead = sum(each.is_ahead for each in choices) / len(choices)
        goals.append(goal("adaptive is ahead of every static strategy, share of mixes and rates", ahead, ">= 0.5"))
    return goals


def _goals_of_cuts(groups: Sequence[Group], cuts: Sequence[Cut]) -> list[dict[str, Any]]:
    near = max(
        (group for group in groups if group.mix.name.endswith("(30:1)")), key=lambda g: g.utilisation, default=None
    )
    goals = []
    for cut in cuts:
        least = ORIGINAL.get((cut.against, cut.statistic))
        if near is not None and cut.is_best and cut.where == near.where and least is not None:
            overload = "" if cut.keeps_up else ", which does not keep up"
            name = f"{cut.where}: {cut.statistic} JCT cut by {cut.strategy} against {cut.against}{overload}"
            goals.append(_interval(name, cut.cut, f">= {least}"))
    return goals


def _goals_of_router(records: Records) -> list[dict[str, Any]]:
    found = compared(records, "router, 1 at a time")
    if not found:
        return []
    return [
        goal("the router adds to TTFT, ms", found["added TTFT ms"], "<= 1.0"),
        goal("the router adds to ITL, ms", found["added ITL ms"], "<= 0.1"),
    ]


# ---- sentences -------------------------------------------------------------------------------------------------------


def _percent(found: Estimate) -> str:
    return f"{100 * found.value:.0f}% ({100 * found.low:.0f} to {100 * found.high:.0f})"


def _sentences(records: Records, choices: Sequence[Choice], cuts: Sequence[Cut]) -> list[str]:
    lines = []
    if choices:
        lines.append(
            f"adaptive: near the best static strategy in {sum(c.is_near for c in choices)} of {len(choices)} cells, "
            f"ahead of all in {sum(c.is_ahead for c in choices)}"
        )
    for against in dict.fromkeys(cut.against for cut in cuts):
        for statistic in ("mean", "p99"):
            some = [cut for cut in cuts if (cut.against, cut.statistic) == (against, statistic)]
            fair = [cut for cut in some if cut.keeps_up and cut.cut.low > 0]
            best = max(fair, key=lambda cut: cut.cut.low, default=None)
            if best is None:
                lines.append(f"{statistic} JCT against {against}: no cut that is told from chance where that keeps up")
            else:
                lines.append(
                    f"largest cut of {statistic} JCT against {against} that keeps up: {_percent(best.cut)}, by "
                    f"{best.strategy}, {best.where}; if no request ever waited it would be {100 * best.most:.0f}%"
                )
    engines = compared(records, "engines")
    for what in ("prefill", "decode") if engines else ():
        slow, cpu, other = (median(engines[f"{what} {kind}"]) for kind in ("s", "CPU", "CPU elsewhere"))
        lines.append(
            f"two busy engines: {what} takes {slow:.2f} times as long as alone; engines' CPU {cpu:.2f} times, "
            f"and {100 * other:.0f}% of that is what managers and control use beside them"
        )
    lines += _beside_engines(records)
    for name in sorted({what for what, _ in records.compared if what.startswith("router")}):
        found = {key: median(values) for key, values in compared(records, name).items()}
        lines.append(
            f"{name}: the router adds {found['added TTFT ms']:.2f} ms to a TTFT of {found['direct TTFT ms']:.1f} "
            f"and {found['added ITL ms']:.3f} ms to an ITL of {found['direct ITL ms']:.2f}"
        )
    return lines


def _beside_engines(records: Records) -> list[str]:
    """Return what all that is no engine and no client takes, over all blocks, and what the frontend adds."""
    cpu_s: Counter[str] = Counter()
    count = 0
    for each in records.measured.values():
        cpu_s.update(each.cpu_s)
        count += len(each.met)
    if not count:
        return []
    others = sum(seconds for kind, seconds in cpu_s.items() if kind not in ("engine", "client"))
    parts = ", ".join(f"{kind} {1e3 * cpu_s[kind] / count:.2f}" for kind in ("control", "manager", "engine", "client"))
    lines = [
        f"CPU ms a request: {parts}; of what serves, {100 * others / (others + cpu_s['engine']):.0f}% is no engine"
    ]
    if found := {name: median(values) for name, values in compared(records, "frontend").items()}:
        more = found["HTTP control CPU ms"] - found["bus control CPU ms"]
        ttft = found["HTTP TTFT ms"] - found["bus TTFT ms"]
        lines.append(
            f"with the frontend: {more:.2f} ms of CPU a request and {ttft:.2f} ms of TTFT more than over the bus"
        )
    return lines


# ---- files -----------------------------------------------------------------------------------------------------------


def _write(
    path: Path,
    records: Records,
    rows: Sequence[dict[str, Any]],
    goals: Sequence[dict[str, Any]],
    choices: Sequence[Choice],
    cuts: Sequence[Cut],
) -> None:
    found = {
        "bench": "strategies",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": records.setup.machine,
        "setup": {
            "shape": _plain(records.setup.shape),
            "budgets": records.setup.budgets,
            "requests a block": records.setup.num_requests,
            "simulated": records.setup.is_simulated,
        },
        "calibration": [_plain(each) for each in records.calibrated.values()],
        "rows": [_plain(row) for row in rows],
        "choices": [_plain(each) for each in choices],
        "cuts": [_plain(each) for each in cuts],
        "compared": [_plain(each) for _, each in sorted(records.compared.items())],
        "goals": goals,
    }
    path.write_text(json.dumps(found, indent=1) + "\n")


def _plain(value: Any) -> Any:
    """Return what JSON can say: an estimate is its value and its interval."""
    if isinstance(value, Estimate):
        return [float(f"{each:.5g}") for each in (value.value, value.low, value.high)]
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    names = getattr(value, "__struct_fields__", None) or getattr(value, "__dataclass_fields__", ())
    return {name: _plain(getattr(value, name)) for name in names} if names else value
