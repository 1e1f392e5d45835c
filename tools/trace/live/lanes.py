"""The rows of the chart: which actors have one, in which order, how high, and which bar goes where."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from callboard.actors.protocol import Entry

from .model import Tracked, Unit
from .view import Window

MOST_SLOTS = 64
"""Bars side by side; more are only counted."""
EARLIER_S = 1.0
"""What begins so long before what is there already comes from the past: all is placed anew."""
OPEN_S = 60.0
"""The end of a bar may be lost: after so long others may lie over it."""
LINGER_S = 5.0
"""A row that was needed stays for a while, so that the others do not jump."""
CROWDED_ROWS = 3
"""Of a lane that has more bars than rows anyway: it shows a skyline."""
KINDS = ("frontend", "router", "engine", "kv_manager")
KIND_OF = {
    "http": "frontend",
    "Generate": "router",
    "PrepRecv": "kv_manager",
    "RemoteSend": "kv_manager",
    "OpenWrite": "kv_manager",
    "CloseWrite": "kv_manager",
    "Admit": "kv_manager",
    "Release": "kv_manager",
    "ComputeKv": "engine",
    "StartGenerate": "engine",
}


@dataclass(slots=True, eq=False)
class Lane:
    """An actor's rows."""

    name: str
    kind: str = ""
    is_prefill: bool = False
    is_decode: bool = False
    serves: str = ""
    """Of a KV manager: the engine it is shown under."""
    slots: list[Unit] = field(default_factory=list)
    """Who had each row last."""
    last_begin: float = 0.0
    needed: int = 1
    needed_at: float = 0.0

    @property
    def label(self) -> str:
        return f"└ {self.name}" if self.serves else self.name


@dataclass(frozen=True, slots=True)
class Row:
    """A lane's place on the screen."""

    lane: Lane
    top: int
    height: int


class Lanes:
    """All actors that take part, as they become known."""

    def __init__(self) -> None:
        self._lanes: dict[str, Lane] = {}
        self._order: list[Lane] | None = None

    def know(self, entries: Mapping[str, Entry]) -> None:
        """Take in what the directory says of actors."""
        managers = {e.address: e.name for e in entries.values() if e.kind == "kv_manager"}
        for entry in entries.values():
            if entry.kind not in KINDS:
                continue  # Who takes part all the same is met at work.
            lane = self._lane(entry.name)
            lane.kind = entry.kind
            lane.is_prefill, lane.is_decode = "prefill" in entry.roles, "decode" in entry.roles
            if entry.manager is not None and (name := managers.get(entry.manager)):
                manager = self._lane(name)
                manager.serves = manager.serves or entry.name
        self._order = None

    def meet(self, unit: Unit, engine: str = "") -> None:
        """Take in what a bar says of its actor; ``engine`` is whom a KV manager did it for."""
        lane = self._lane(unit.actor)
        kind = KIND_OF.get(unit.name, "")
        if (kind and not lane.kind) or (engine and not lane.serves):
            lane.kind = lane.kind or kind
            lane.serves = lane.serves or (engine if lane.kind == "kv_manager" else "")
            self._order = None
        if unit.name == "ComputeKv" and not (lane.is_prefill or lane.is_decode):
            lane.is_prefill, self._order = True, None

    def _lane(self, name: str) -> Lane:
        if name not in self._lanes:
            self._lanes[name] = Lane(name)
            self._order = None
        return self._lanes[name]

    def in_order(self) -> list[Lane]:
        """Return the lanes as people think of them: the door, the router, engines each with its KV manager."""
        if self._order is None:
            engines = sorted((e for e in self._lanes.values() if e.kind == "engine"), key=_engine_rank)
            below = {engine.name: [m for m in self._lanes.values() if m.serves == engine.name] for engine in engines}
            order = [lane for kind in ("frontend", "router") for lane in self._of_kind(kind)]
            for engine in engines:
                order += [engine, *sorted(below[engine.name], key=lambda lane: lane.name)]
            order += [lane for lane in sorted(self._lanes.values(), key=lambda each: each.name) if lane not in order]
            self._order = order
        return self._order

    def _of_kind(self, kind: str) -> list[Lane]:
        return sorted((lane for lane in self._lanes.values() if lane.kind == kind), key=lambda lane: lane.name)

    def place(self, requests: Iterable[Tracked]) -> None:
        """Give each bar that has no row yet the first free one; those that overlap get different ones."""
        units = [unit for tracked in requests for unit in tracked.units.values()]
        fresh = [unit for unit in units if unit.slot < 0]
        for unit in fresh:
            self.meet(unit)
        if any(unit.begin < self._lane(unit.actor).last_begin - EARLIER_S for unit in fresh):
            for lane in self._lanes.values():
                lane.slots.clear()
            fresh = units
        for unit in sorted(fresh, key=lambda unit: unit.begin):
            lane = self._lane(unit.actor)
            lane.last_begin = max(lane.last_begin, unit.begin)
            index = next((i for i, holder in enumerate(lane.slots) if _is_free(holder, unit.begin)), len(lane.slots))
            unit.slot = min(index, MOST_SLOTS)
            if index < MOST_SLOTS:
                lane.slots[index : index + 1] = [unit]

    def num_rows(self) -> int:
        """Return how many rows the lanes could use, a blank one between any two."""
        return sum(lane.needed + 1 for lane in self.in_order()) - 1

    def rows(self, height: int, depths: Mapping[str, int], now: float) -> tuple[list[Row], int]:
        """Share out ``height`` rows; ``depths`` is how many each lane could use. Also returns how many lanes lack one.

        Every lane has one before any has two; engines come before others; with room to spare, lanes stand apart.
        """
        lanes = self.in_order()
        for lane in lanes:
            depth = max(1, depths.get(lane.name, 0))
            if depth >= lane.needed or now - lane.needed_at > LINGER_S:
                lane.needed, lane.needed_at = depth, now
        num_hidden = 0
        if len(lanes) > height:
            busy = sorted(lanes, key=lambda lane: not depths.get(lane.name, 0))[: max(height - 1, 0)]
            num_hidden = len(lanes) - len(busy)
            lanes = [lane for lane in lanes if lane in busy]
        heights = {lane.name: 1 for lane in lanes}
        spare = height - len(lanes) - (num_hidden > 0)
        for kinds in (("engine", "kv_manager"), ("frontend", "router", "")):
            spare = _grow(
                [lane for lane in lanes if lane.kind in kinds or (lane.kind not in KINDS and "" in kinds)],
                heights,
                spare,
            )
        rows, top = [], 0
        has_gaps = spare >= len(lanes) - 1
        has_groups = spare >= sum(map(_begins_group, lanes))
        for index, lane in enumerate(lanes):
            top += index > 0 and (has_gaps or (has_groups and _begins_group(lane)))
            rows.append(Row(lane, top, heights[lane.name]))
            top += heights[lane.name]
        return rows, num_hidden


def _begins_group(lane: Lane) -> bool:
    return lane.kind == "engine"


def _grow(lanes: list[Lane], heights: dict[str, int], spare: int) -> int:
    """Give lanes the rows they could use, one after another; those that stay crowded get few. Return what is left."""
    while spare > 0:
        lacking = [lane for lane in lanes if heights[lane.name] < lane.needed]
        if not lacking:
            break
        heights[min(lacking, key=lambda lane: (heights[lane.name], lane.kind != "engine")).name] += 1
        spare -= 1
    for lane in lanes:
        if heights[lane.name] < lane.needed and heights[lane.name] > CROWDED_ROWS:
            spare += heights[lane.name] - CROWDED_ROWS
            heights[lane.name] = CROWDED_ROWS
    return spare


def _is_free(holder: Unit, begin: float) -> bool:
    return (holder.begin + OPEN_S if holder.end is None else holder.end) <= begin


def depths_of(bars: Iterable[tuple[Tracked, Unit]], window: Window, now: float) -> dict[str, int]:
    """Return how many rows each actor's bars on the screen take."""
    depths: dict[str, int] = {}
    for tracked, unit in bars:
        if window.overlaps(unit.begin, tracked.end_of(unit, now)):
            depths[unit.actor] = max(depths.get(unit.actor, 0), unit.slot + 1)
    return depths


def _engine_rank(lane: Lane) -> tuple[int, str]:
    return (
        0 if lane.is_prefill and not lane.is_decode else 2 if lane.is_decode and not lane.is_prefill else 1
    ), lane.name
