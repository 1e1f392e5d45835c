"""What ``callboard top`` shows: rates and shares, made of two looks at a fleet. ``--json`` prints one a line."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import msgspec

from callboard.actors.protocol import Counters, Entry
from callboard.actors.stats_protocol import FrontendStats, Percentiles


@dataclass(frozen=True, slots=True)
class Sample:
    """One look at a fleet. ``time`` is monotonic seconds, ``wall`` seconds since 1970."""

    time: float
    wall: float
    entries: tuple[Entry, ...]
    stats: dict[str, FrontendStats]
    """What each frontend that answered says, by its name."""

    def by_start(self) -> dict[tuple[str, float], Entry]:
        """Return the entries by name and start: one that was restarted is another, whose counters begin at 0."""
        return {(entry.name, entry.started): entry for entry in self.entries}


class EngineRow(msgspec.Struct, frozen=True):
    """An engine. Rates are per second."""

    name: str
    roles: tuple[str, ...]
    model: str
    state: str
    uptime_s: float | None
    num_running: int
    num_waiting: int
    requests_per_s: float
    """Sequences that ended, however."""
    prompt_tps: float
    """Prompt tokens that went through the model, also for other engines."""
    output_tps: float
    preemptions_per_s: float
    kv_usage: float | None
    """The share of its pool's blocks that is in use."""
    host: str = ""
    """The joined host that it runs on; empty where the fleet was started."""


class PoolRow(msgspec.Struct, frozen=True):
    """A KV manager's pool."""

    name: str
    device: str
    state: str
    num_blocks: int
    used_blocks: int
    """In use, without those that are quarantined."""
    cached_blocks: int
    quarantined_blocks: int
    hit_rate: float | None
    """Of the tokens looked for in its prefix cache lately, the share that was found; None: nothing was looked for."""
    queried_tps: float
    sent_bytes_per_s: float
    evicted_per_s: float
    lanes: str


class Latency(msgspec.Struct, frozen=True):
    """Of the last minute, in seconds; None where nothing happened."""

    count: int = 0
    mean: float | None = None
    p50: float | None = None
    p95: float | None = None
    p99: float | None = None


class FrontendRow(msgspec.Struct, frozen=True):
    """A frontend. What it says itself is None where it did not answer."""

    name: str
    state: str
    num_in_flight: int | None
    requests_per_s: float | None
    failed_per_s: float | None
    """Ended by an error of the server."""
    left_per_s: float | None
    """Ended by a client that did not wait."""
    ttft_s: Latency | None
    itl_s: Latency | None
    e2e_s: Latency | None


class RouterRow(msgspec.Struct, frozen=True):
    """A router, and which script it runs."""

    name: str
    state: str
    script: str
    version: str


class Frame(msgspec.Struct, frozen=True):
    """A fleet between two looks."""

    fleet: str
    time: float
    """Seconds since 1970."""
    interval_s: float
    """The time that the rates are of."""
    requests_per_s: float
    prompt_tps: float
    output_tps: float
    num_running: int
    num_waiting: int
    frontends: tuple[FrontendRow, ...]
    engines: tuple[EngineRow, ...]
    pools: tuple[PoolRow, ...]
    routers: tuple[RouterRow, ...]
    problem: str = ""


def frame_of(fleet: str, samples: Sequence[Sample], *, rates_s: float, problem: str = "") -> Frame:
    """Return what the last of ``samples`` shows; rates are of its last ``rates_s`` seconds, hit rates of all."""
    last = samples[-1]
    before = next((each for each in samples if last.time - each.time <= rates_s * 1.1), last)
    delta = Delta(before, last)
    long_delta = Delta(samples[0], last)
    engines = tuple(_engine(entry, delta) for entry in last.entries if entry.kind == "engine")
    frontends = tuple(_frontend(entry, delta) for entry in last.entries if entry.kind == "frontend")
    return Frame(
        fleet,
        last.wall,
        delta.seconds,
        round(sum(each.requests_per_s or 0.0 for each in frontends), 3),
        round(sum(each.prompt_tps for each in engines), 1),
        round(sum(each.output_tps for each in engines), 1),
        sum(each.num_running for each in engines),
        sum(each.num_waiting for each in engines),
        frontends,
        engines,
        tuple(_pool(entry, delta, long_delta) for entry in last.entries if entry.kind == "kv_manager"),
        tuple(_router(entry) for entry in last.entries if entry.kind == "router"),
        problem,
    )


class Delta:
    """What has happened between two looks. Where an actor was restarted, its counters began at 0 in between."""

    def __init__(self, before: Sample, after: Sample) -> None:
        self.before = before
        self.after = after
        self.seconds = round(after.time - before.time, 3)
        self._known = before.by_start()

    def count(self, entry: Entry, field: str) -> int:
        """Return by how much a counter of ``entry``, of the later look, has grown."""
        known = self._known.get((entry.name, entry.started))
        before = Counters() if known is None else known.counters
        return _number(entry.counters, field) - _number(before, field)

    def rate(self, entry: Entry, field: str) -> float:
        """Return the same per second."""
        return self.per_s(self.count(entry, field))

    def per_s(self, number: float) -> float:
        """Return ``number`` per second of the time between."""
        return round(max(0.0, number) / self.seconds, 3) if self.seconds else 0.0


def _number(counters: Counters, field: str) -> int:
    value: int | dict[str, int] = getattr(counters, field)
    return sum(value.values()) if isinstance(value, dict) else value


def _engine(entry: Entry, delta: Delta) -> EngineRow:
    load = entry.load
    usage = (load.num_blocks - load.free_blocks) / load.num_blocks if load.num_blocks else None
    return EngineRow(
        entry.name,
        entry.roles,
        entry.model,
        entry.state,
        max(0.0, round(delta.after.wall - entry.started, 1)) if entry.started else None,
        load.num_running,
        load.num_waiting,
        delta.rate(entry, "num_finished"),
        delta.rate(entry, "num_computed_tokens"),
        delta.rate(entry, "num_generated_tokens"),
        delta.rate(entry, "num_preemptions"),
        usage if usage is None else round(usage, 4),
        entry.host,
    )


def _pool(entry: Entry, delta: Delta, lately: Delta) -> PoolRow:
    load, num_queried = entry.load, lately.count(entry, "num_queried_tokens")
    return PoolRow(
        entry.name,
        entry.device,
        entry.state,
        load.num_blocks,
        load.num_blocks - load.free_blocks - load.quarantined_blocks,
        load.cached_blocks,
        load.quarantined_blocks,
        round(lately.count(entry, "num_hit_tokens") / num_queried, 4) if num_queried > 0 else None,
        delta.rate(entry, "num_queried_tokens"),
        delta.rate(entry, "num_bytes_sent"),
        delta.rate(entry, "num_evicted_blocks"),
        entry.detail.get("lanes", ""),
    )


def _frontend(entry: Entry, delta: Delta) -> FrontendRow:
    found = delta.after.stats.get(entry.name)
    if found is None:
        return FrontendRow(entry.name, entry.state, *([None] * 7))
    now, then = found.everything, delta.before.stats.get(entry.name)
    before = then.everything if then is not None and then.everything.num_ended <= now.num_ended else None
    num_ended, num_failed, num_left = (
        (0, 0, 0) if before is None else (before.num_ended, before.num_failed, before.num_left)
    )
    return FrontendRow(
        entry.name,
        entry.state,
        now.num_in_flight,
        delta.per_s(now.num_ended - num_ended),
        delta.per_s(now.num_failed - num_failed),
        delta.per_s(now.num_left - num_left),
        _latency(now.ttft),
        _latency(now.itl),
        _latency(now.e2e),
    )


def _latency(found: Percentiles) -> Latency:
    values = (found.mean, found.p50, found.p95, found.p99)
    return Latency(found.count, *(None if value is None else round(value, 6) for value in values))


def _router(entry: Entry) -> RouterRow:
    return RouterRow(entry.name, entry.state, entry.detail.get("script", ""), entry.detail.get("version", ""))


def in_order(engines: Iterable[EngineRow], key: str) -> list[EngineRow]:
    """Return engines by one of observe_commands.SORTS: by name, or the busiest first."""
    by = {
        "output": lambda row: row.output_tps,
        "prompt": lambda row: row.prompt_tps,
        "load": lambda row: row.num_running + row.num_waiting,
        "kv": lambda row: row.kv_usage or 0.0,
    }.get(key)
    rows = sorted(engines, key=lambda row: row.name)
    return rows if by is None else sorted(rows, key=by, reverse=True)
