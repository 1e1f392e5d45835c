"""What differs between a recording and its replay: per request and in all, as a table or as JSON."""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from callboard.tools.units import format_size

from .outcomes import Outcome

if TYPE_CHECKING:
    from rich.console import Console

WIDTH = 500
"""Wider than any table: a terminal wraps a long line, and no cell is cut off."""
MOST_ROWS = 20
PROGRESS_S = 0.1
MOST_ERROR = 60
"""Characters of an error in the table."""
SAME_SHARE = 0.05
SAME_S = 0.5e-3
"""Times closer than a twentieth, or than this, are the same."""


class Statistic(msgspec.Struct, frozen=True):
    """A quantity over all requests that have it in both."""

    mean: float
    p50: float
    p99: float


class Compared(msgspec.Struct, frozen=True):
    """A quantity, recorded and replayed. None: no request has it in both."""

    name: str
    unit: str
    num: int
    recorded: Statistic | None
    replayed: Statistic | None


class Row(msgspec.Struct, frozen=True):
    """One request."""

    id: str
    at_s: float
    """From the first request of the recording."""
    differs: tuple[str, ...]
    """In what: engines, ranges, ttft, jct, bytes, cached, error."""
    ttft_s: tuple[float | None, float | None]
    jct_s: tuple[float | None, float | None]
    num_bytes: tuple[int, int]
    num_cached_tokens: tuple[int | None, int | None]
    error: tuple[str, str]
    decisions: tuple[tuple[str, ...], tuple[str, ...]]


class Summary(msgspec.Struct, frozen=True):
    """All requests together."""

    num_requests: int
    num_engines_differ: int
    """Requests of which a verb went to another engine, or another verb was called."""
    num_ranges_differ: int
    """Requests that went to the same engines, with other ranges."""
    num_errors: tuple[int, int]
    num_unfinished: tuple[int, int]
    quantities: tuple[Compared, ...]


class Report(msgspec.Struct, frozen=True):
    """All that is said, as ``--json`` prints it."""

    recording: str
    fleet: str
    replayed_by: str
    script: str
    speed: float
    seed: int | None
    notes: tuple[str, ...]
    costs: tuple[str, ...]
    summary: Summary
    requests: tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class Pair:
    """A request's two outcomes, and when it was asked, from the first on."""

    recorded: Outcome
    replayed: Outcome
    at_s: float


# ---- comparing -----------------------------------------------------------------------------------------------------


def compare(pairs: Sequence[Pair]) -> tuple[Summary, tuple[Row, ...]]:
    """Return what differs in all, and of each request."""
    rows = tuple(_row(pair) for pair in pairs)
    ttfts = [(p.recorded.ttft_s, p.replayed.ttft_s) for p in pairs if _both_well(p)]
    jcts = [(p.recorded.jct_s, p.replayed.jct_s) for p in pairs if _both_well(p)]
    cached = [(p.recorded.num_cached_tokens, p.replayed.num_cached_tokens) for p in pairs]
    num_bytes = [(p.recorded.num_bytes, p.replayed.num_bytes) for p in pairs]
    quantities = (
        _compared("TTFT", "s", ttfts),
        _compared("JCT", "s", jcts),
        _compared("KV moved", "bytes", num_bytes),
        _compared("cached", "tokens", cached),
    )
    return (
        Summary(
            len(pairs),
            sum("engines" in row.differs for row in rows),
            sum("ranges" in row.differs and "engines" not in row.differs for row in rows),
            (sum(_failed(p.recorded) for p in pairs), sum(_failed(p.replayed) for p in pairs)),
            (sum(not p.recorded.is_whole for p in pairs), sum(not p.replayed.is_whole for p in pairs)),
            quantities,
        ),
        rows,
    )


def _failed(outcome: Outcome) -> bool:
    return outcome.error not in ("", "cancelled")


def _both_well(pair: Pair) -> bool:
    return not pair.recorded.error and not pair.replayed.error


def _row(pair: Pair) -> Row:
    old, new = pair.recorded, pair.replayed
    differs = []
    if _engines(old) != _engines(new):
        differs.append("engines")
    elif _ranges(old) != _ranges(new):
        differs.append("ranges")
    if _both_well(pair):
        differs += ["ttft"] * (not _is_same(old.ttft_s, new.ttft_s)) + ["jct"] * (not _is_same(old.jct_s, new.jct_s))
    differs += ["bytes"] * (old.num_bytes != new.num_bytes)
    differs += ["cached"] * (old.num_cached_tokens != new.num_cached_tokens)
    differs += ["error"] * (_failed(old) != _failed(new))
    return Row(
        old.id,
        round(pair.at_s, 6),
        tuple(differs),
        (_rounded(old.ttft_s), _rounded(new.ttft_s)),
        (_rounded(old.jct_s), _rounded(new.jct_s)),
        (old.num_bytes, new.num_bytes),
        (old.num_cached_tokens, new.num_cached_tokens),
        (old.error, new.error),
        (tuple(map(str, old.decisions)), tuple(map(str, new.decisions))),
    )


def _engines(outcome: Outcome) -> list[tuple[str, str]]:
    return sorted((decision.verb, decision.engine) for decision in outcome.decisions)


def _ranges(outcome: Outcome) -> list[str]:
    """Who did what, in no order: verbs that run side by side are asked in any."""
    return sorted(map(str, outcome.decisions))


def _is_same(old: float | None, new: float | None) -> bool:
    if old is None or new is None:
        return old is new
    return abs(old - new) <= max(SAME_S, SAME_SHARE * old)


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)


def _compared(name: str, unit: str, pairs: Sequence[tuple[float | None, float | None]]) -> Compared:
    known = [(old, new) for old, new in pairs if old is not None and new is not None]
    if not known:
        return Compared(name, unit, 0, None, None)
    return Compared(
        name, unit, len(known), _statistic([old for old, _ in known]), _statistic([new for _, new in known])
    )


def _statistic(values: Sequence[float]) -> Statistic:
    ordered = sorted(values)

    def percentile(share: float) -> float:
        return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 6)

    return Statistic(round(sum(ordered) / len(ordered), 6), percentile(0.5), percentile(0.99))


# ---- showing -------------------------------------------------------------------------------------------------------


def show(report: Report, *, as_json: bool) -> None:
    """Print a report."""
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(report)).decode())
        return
    from rich.console import Console

    console = Console(highlight=False, width=WIDTH, soft_wrap=True)
    console.print(f"Recorded: {report.recording}", markup=False)
    console.print(f"Replayed: {report.replayed_by}, script {report.script}", markup=False)
    for line in report.costs:
        console.print(f"  {line}", markup=False, style="dim")
    for note in report.notes:
        console.print(f"Note: {note}", markup=False, style="yellow")
    console.print()
    _show_summary(console, report.summary)
    _show_rows(console, report)


def _show_summary(console: "Console", summary: Summary) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(f"{summary.num_requests} REQUEST{'S' * (summary.num_requests != 1)}", no_wrap=True)
    for title in ("MEAN", "P50", "P99"):
        table.add_column(f"{title} RECORDED", justify="right", no_wrap=True)
        table.add_column("REPLAYED", justify="right", no_wrap=True)
        table.add_column("", justify="right", no_wrap=True)
    for each in summary.quantities:
        if each.recorded is None or each.replayed is None:
            continue
        cells = []
        for name in ("mean", "p50", "p99"):
            old, new = getattr(each.recorded, name), getattr(each.replayed, name)
            cells += [_shown(old, each.unit), _shown(new, each.unit), _change(old, new, is_time=each.unit == "s")]
        table.add_row(f"{each.name}", *cells)
    console.print(table)
    console.print()
    same = summary.num_requests - summary.num_engines_differ - summary.num_ranges_differ
    console.print(
        f"Decisions: {same} of {summary.num_requests} the same; {summary.num_engines_differ} went to other engines, "
        f"{summary.num_ranges_differ} to the same ones with other ranges.",
        markup=False,
    )
    for what, (old, new) in (("Failed", summary.num_errors), ("Not over", summary.num_unfinished)):
        if old or new:
            console.print(f"{what}: {old} recorded, {new} replayed.", markup=False)


def _show_rows(console: "Console", report: Report) -> None:
    from rich.markup import escape
    from rich.table import Table

    differing = [row for row in report.requests if row.differs]
    if not differing:
        return
    differing.sort(key=_rank)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("REQUEST", "AT S", "TTFT MS", "JCT MS", "KV MOVED", "CACHED", "DECISIONS"):
        table.add_column(title, justify="right" if title == "AT S" else "left", no_wrap=True)
    for row in differing[:MOST_ROWS]:
        old, new = row.decisions
        table.add_row(
            escape(row.id),
            f"{row.at_s:.2f}",
            _both(*(_ms(value) for value in row.ttft_s)),
            _both(*(_ms(value) for value in row.jct_s)),
            _both(*(format_size(value) for value in row.num_bytes)),
            _both(*("-" if value is None else str(value) for value in row.num_cached_tokens)),
            escape(_paths(old, new, row.error)),
        )
    console.print()
    num = len(differing)
    title = f"{num} request{'s differ' if num != 1 else ' differs'}"
    console.print(title + (f"; the {MOST_ROWS} that differ most (--json has all):" if num > MOST_ROWS else ":"))
    console.print(table)


def _rank(row: Row) -> tuple[bool, bool, float, str]:
    """Other engines first, then other ranges, then by how much longer it took."""
    old, new = row.jct_s
    change = abs(new - old) / max(old, 1e-9) if old is not None and new is not None else 1e9
    return "engines" not in row.differs and "error" not in row.differs, "ranges" not in row.differs, -change, row.id


def _paths(old: tuple[str, ...], new: tuple[str, ...], errors: tuple[str, str]) -> str:
    """Return what was decided otherwise, verb by verb where they are the same verbs."""
    parts = []
    if [each.split(" ", 1)[0] for each in old] == [each.split(" ", 1)[0] for each in new]:
        for one, other in zip(old, new, strict=True):
            if one != other:
                parts.append(f"{one} → {other.split(' ', 1)[1]}")
    else:
        parts.append(f"{', '.join(old) or 'nothing'} → {', '.join(new) or 'nothing'}")
    if errors[0] != errors[1]:
        parts.append(_both(*(error[:MOST_ERROR] or "no error" for error in errors)))
    return ", ".join(parts) or "the same"


def _both(old: str, new: str) -> str:
    return old if old == new else f"{old} → {new}"


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1000:.1f}"


def _shown(value: float, unit: str) -> str:
    if unit == "s":
        return f"{value * 1000:.1f} ms"
    return format_size(round(value)) if unit == "bytes" else f"{value:.0f}"


def _change(old: float, new: float, *, is_time: bool) -> str:
    if not old:
        return ""
    change = (new - old) / old
    is_small = abs(change) <= SAME_SHARE
    color = "dim" if is_small else "cyan" if not is_time else "red" if change > 0 else "green"
    return f"[{color}]{change:+.0%}[/]"


class Progress:
    """How far it is, in one line of a terminal that is written anew, a few times a second."""

    def __init__(self) -> None:
        self._is_shown = sys.stderr.isatty()
        self._next = 0.0

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def __call__(self, text: str) -> None:
        """Show a text in place of the last one."""
        now = time.monotonic()
        if self._is_shown and now >= self._next:
            self._next = now + PROGRESS_S
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
