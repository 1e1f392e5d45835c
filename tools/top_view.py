"""How a Frame looks, on a terminal and in a pipe: what the fleet answers, its engines, its pools."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .fitting import Fitting
from .top_frame import EngineRow, Frame, FrontendRow, Latency, PoolRow, in_order
from .units import format_count, format_size, format_span

BAR_WIDTH = 24
_BLOCKS = " ▁▂▃▄▅▆▇█"
SPARE_LATENCIES = ("p95", "LEFT/S", "REQ/S", "FAILED/S", "p99")
SPARE_ENGINES = ("MODEL", "UP", "REQ/S", "ROLE", "PROMPT/S")
SPARE_POOLS = ("EVICTED/S", "LANES", "SENT/S", "BLOCKS")
"""What a narrow terminal goes without, the first one first."""
_GOOD, _BUSY, _FULL = 0.7, 0.9, 1.0


def view(frame: Frame, *, sort: str, history: Sequence[float] = (), note: str = "") -> RenderableType:
    """Return all of a frame. ``history``: output tokens per second of the last frames, the newest last."""
    parts: list[RenderableType] = [_summary(frame, history), ""]
    if frame.frontends:
        parts += [Fitting(_latencies(frame.frontends), SPARE_LATENCIES), ""]
    parts.append(Fitting(_engines(in_order(frame.engines, sort), sort), SPARE_ENGINES))
    if frame.pools:
        legend = (
            "█ used  ▒ cached: can be had  · free    HITS: share of tokens found    latencies, HITS: the last minute"
        )
        parts += ["", Fitting(_pools(frame.pools), SPARE_POOLS), Text(legend, style="dim")]
    for text in filter(None, (frame.problem, note)):
        parts += ["", Text(text, style="bold red")]
    return Group(*parts)


def _summary(frame: Frame, history: Sequence[float]) -> Text:
    num_ready = sum(row.state == "ready" for row in frame.engines)
    text = Text.assemble(("Fleet ", ""), (frame.fleet, "bold"), f"   {num_ready} of {len(frame.engines)} engines ready")
    for router in frame.routers:
        text.append(f"   router {router.name}: {router.script} {router.version}")
    text.append("\n")
    in_flight = sum(row.num_in_flight or 0 for row in frame.frontends)
    for name, number, unit in (
        ("requests", _rate(frame.requests_per_s), "/s"),
        ("in flight", str(in_flight), ""),
        ("running", str(frame.num_running), ""),
        ("waiting", str(frame.num_waiting), ""),
        ("prompt", format_count(frame.prompt_tps), " tok/s"),
        ("output", format_count(frame.output_tps), " tok/s"),
    ):
        text.append(f"{name} ", "dim")
        text.append(f"{number}{unit}   ", "bold")
    if history:
        text.append(sparkline(history), "cyan")
    return text


def _table(*titles: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in titles:
        is_left = title in ("FRONTEND", "ENGINE", "POOL", "HOST", "ROLE", "MODEL", "STATE", "BLOCKS", "LANES", "KV")
        table.add_column(title, justify="left" if is_left else "right", no_wrap=True)
    return table


def _latencies(frontends: Sequence[FrontendRow]) -> Table:
    titles = [title for what in ("TTFT", "ITL", "E2E") for title in (f"{what} p50", "p95", "p99")]
    table = _table("FRONTEND", "REQ/S", "FAILED/S", "LEFT/S", *titles)
    for row in frontends:
        times = [_seconds(value) for found in (row.ttft_s, row.itl_s, row.e2e_s) for value in _three(found)]
        rates = [_rate(value) for value in (row.requests_per_s, row.failed_per_s, row.left_per_s)]
        if row.failed_per_s:
            rates[1] = f"[bold red]{rates[1]}[/]"
        table.add_row(row.name, *rates, *times)
    return table


def _engines(engines: Sequence[EngineRow], sort: str) -> Table:
    titles = ["ENGINE", "ROLE", "MODEL", "STATE", "UP", "RUN", "WAIT", "REQ/S", "PROMPT/S", "OUTPUT/S", "KV"]
    sorted_by = {"name": "ENGINE", "output": "OUTPUT/S", "prompt": "PROMPT/S", "load": "RUN", "kv": "KV"}[sort]
    has_hosts = len({row.host for row in engines}) > 1
    table = _table(titles[0], *(["HOST"] if has_hosts else []), *titles[1:])
    for column in table.columns:
        if column.header == sorted_by:
            column.header = Text(sorted_by, style="bold underline")
    for row in engines:
        state = f"[{'green' if row.state == 'ready' else 'yellow'}]{row.state}[/]"
        if row.preemptions_per_s:
            state += f" [red]{_rate(row.preemptions_per_s)} preempted/s[/]"
        table.add_row(
            row.name,
            *([row.host or "-"] if has_hosts else []),
            row.roles[0] if len(row.roles) == 1 else "both",
            row.model,
            state,
            "" if row.uptime_s is None else format_span(row.uptime_s),
            str(row.num_running),
            str(row.num_waiting) if not row.num_waiting else f"[yellow]{row.num_waiting}[/]",
            "-" if row.roles == ("prefill",) else _rate(row.requests_per_s),
            format_count(row.prompt_tps),
            format_count(row.output_tps),
            "" if row.kv_usage is None else _share_bar(row.kv_usage),
        )
    return table


def _pools(pools: Sequence[PoolRow]) -> Table:
    table = _table("POOL", "BLOCKS", "USED", "CACHED", "OF", "HITS", "SENT/S", "EVICTED/S", "LANES")
    for row in pools:
        lanes = row.lanes
        if row.quarantined_blocks:
            lanes = f"[red]{row.quarantined_blocks} quarantined[/] {lanes}"
        table.add_row(
            row.name,
            pool_bar(row),
            str(row.used_blocks),
            str(row.cached_blocks),
            str(row.num_blocks),
            "-" if row.hit_rate is None else f"{row.hit_rate:.0%}",
            format_size(round(row.sent_bytes_per_s)),
            _rate(row.evicted_per_s),
            lanes,
        )
    return table


def pool_bar(row: PoolRow) -> Text:
    """Return a bar of a pool: used, quarantined, cached, free."""
    bar = Text()
    upto, drawn = 0, 0
    for number, mark, style in (
        (row.used_blocks, "█", _heat(row.used_blocks / max(1, row.num_blocks))),
        (row.quarantined_blocks, "▓", "red"),
        (row.cached_blocks, "▒", "blue"),
    ):
        upto += number
        # What is there shows, however little it is.
        until = min(BAR_WIDTH, max(drawn + (number > 0), round(BAR_WIDTH * upto / max(1, row.num_blocks))))
        bar.append(mark * (until - drawn), style)
        drawn = until
    return bar.append("·" * (BAR_WIDTH - drawn), "dim")


def _share_bar(share: float) -> Text:
    width = 10
    full = round(width * share)
    bar = Text("█" * full, _heat(share))
    return bar.append("·" * (width - full), "dim").append(f" {share:4.0%}")


def _heat(share: float) -> str:
    return "green" if share < _GOOD else "yellow" if share < _BUSY else "red"


def sparkline(values: Sequence[float]) -> str:
    """Return a small graph of ``values``, scaled to the largest."""
    most = max(values, default=0.0)
    return "".join(_BLOCKS[round(value / most * (len(_BLOCKS) - 1)) if most else 0] for value in values)


def _three(found: Latency | None) -> tuple[float | None, float | None, float | None]:
    return (None, None, None) if found is None else (found.p50, found.p95, found.p99)


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}" if value < 99.95 else format_count(value)


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    if value < 0.0995:
        return f"{value * 1e3:.1f} ms"
    return f"{value * 1e3:.0f} ms" if value < 0.9995 else f"{value:.3g} s"
