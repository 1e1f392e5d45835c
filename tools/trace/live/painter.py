"""Draws requests onto the lanes of the chart: their bars, and the ways of messages and pages between lanes."""

from dataclasses import dataclass, field

from callboard.tools.trace.story import Story

from .bars import ARRIVE, BOOKKEEPING, Bar, colour_of
from .canvas import Canvas
from .inside import Inside, inside_of
from .lanes import Row
from .model import Tracked, Unit
from .view import View, Window

CALLS = ("generate", "prep_recv", "remote_send", "compute_kv", "start_generate")
"""Whose ways are drawn, of the selected request."""


@dataclass(frozen=True, slots=True)
class Hit:
    """Where a request is on the screen."""

    y: int
    begin: int
    end: int
    request_id: str


@dataclass(slots=True)
class Chart:
    """What was drawn, and where."""

    canvas: Canvas
    hits: list[Hit] = field(default_factory=list)

    def request_at(self, x: int, y: int) -> str | None:
        """Return whose bar is at a cell."""
        return next((hit.request_id for hit in reversed(self.hits) if hit.y == y and hit.begin <= x < hit.end), None)


class Painter:
    """Knows where everything goes. Row 0 is the axis."""

    def __init__(
        self, chart: Chart, view: View, window: Window, left: int, rows: dict[str, Row], crowded: set[str]
    ) -> None:
        self._chart = chart
        self._canvas = chart.canvas
        self._view = view
        self._window = window
        self._left = left
        self._rows = rows
        self._crowded = crowded
        """Lanes that have more bars than rows: only the selected request's are drawn."""
        tops = sorted((row.top, row.height) for row in rows.values())
        self._is_spread = len(tops) > 1 and tops[1][0] > sum(tops[0])
        """Whether there is a blank row between any two lanes."""
        self._names: list[tuple[Bar, str]] = []
        """Names that found no room on their bars."""

    def draw(self, tracked: Tracked, story: Story | None) -> None:
        """Draw one request's bars, and with its story what is known of their inside."""
        inside = inside_of(story) if story is not None else Inside()
        for unit in sorted(tracked.units.values(), key=lambda each: (each.name not in BOOKKEEPING, each.begin)):
            bar = self._bar(tracked, unit)
            if bar is None:
                continue
            self._chart.hits.append(Hit(bar.y, bar.x0, bar.x1, tracked.id))
            name = bar.draw(story, inside.numbers.get(unit.number), inside.phases.get(unit.number, []))
            if name and bar.is_selected:
                self._names.append((bar, name))
        if story is not None and not self._crowded:
            self._draw_arrivals(story, f"{self._weight(tracked)}{colour_of(tracked)}")

    def _weight(self, tracked: Tracked) -> str:
        return "bold " if tracked.id == self._view.selected else "dim " if self._view.is_chosen else ""

    def _bar(self, tracked: Tracked, unit: Unit) -> Bar | None:
        """Return a bar's place; None where it has none."""
        row, now, is_selected = self._rows.get(unit.actor), self._view.now, tracked.id == self._view.selected
        end = tracked.end_of(unit, now)
        if row is None or not self._window.overlaps(unit.begin, end):
            return None
        is_crowded = unit.actor in self._crowded
        if is_crowded and not is_selected:
            return None
        begin = self._left + self._window.cell(unit.begin)
        x0 = max(begin, self._left)
        x1 = max(min(self._left + self._window.cell(end), self._canvas.width), begin + 1)
        if x1 <= x0:
            return None
        return Bar(
            *(self._canvas, self._window, self._left, tracked, unit, end, x0, x1),
            y=1 + row.top + (0 if is_crowded else min(unit.slot, row.height - 1)),
            colour=colour_of(tracked),
            weight=self._weight(tracked),
            is_selected=is_selected,
            is_running=unit.end is None and tracked.is_running(now),
        )

    def _draw_arrivals(self, story: Story, style: str) -> None:
        """Mark where pages come in, at whom they are sent to."""
        for span in story.spans:
            if span.name != "send" or span.kind != "phase" or span.end is None:
                continue
            row = self._rows.get(str(span.facts.get("to", "")))
            if row is None or not self._window.overlaps(span.begin, span.end):
                continue
            x0 = self._left + self._window.cell(span.begin)
            x1 = max(self._left + self._window.cell(span.end), x0 + 1)
            for x in range(max(x0, self._left), min(x1, self._canvas.width)):
                if self._canvas.is_free(x, 1 + row.top):
                    self._canvas.put(x, 1 + row.top, ARRIVE, style)

    def draw_ways(self, tracked: Tracked) -> None:
        """Draw where the messages of its sub-requests go, through cells that are free; then names, where room is."""
        style = colour_of(tracked)
        for span in tracked.story().spans:
            if span.kind != "call" or span.name not in CALLS or not {span.actor, span.source} <= self._rows.keys():
                continue
            x = self._left + self._window.cell(span.begin)
            if self._left <= x < self._canvas.width:
                self._draw_way(x, self._rows[span.source], self._rows[span.actor], style)
        for bar, name in self._names:
            if self._canvas.is_free(bar.x1, bar.y, len(name) + 2):
                self._canvas.put(bar.x1 + 1, bar.y, name, bar.line)

    def _draw_way(self, x: int, source: Row, target: Row, style: str) -> None:
        is_down = target.top > source.top
        above, below = (source, target) if is_down else (target, source)
        between = list(range(above.top + above.height, below.top))
        for y in between if is_down else reversed(between):
            if self._canvas.is_free(x, 1 + y):
                # Where lanes stand close, the last cell belongs to another's lane: a head there would mislead.
                is_last = y == (between[-1] if is_down else between[0])
                self._canvas.put(x, 1 + y, ("▼" if is_down else "▲") if is_last and self._is_spread else "│", style)
