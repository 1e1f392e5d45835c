"""What is looked at: which request is selected, and which stretch of time is on the screen."""

import math
from dataclasses import dataclass, replace
from typing import Literal

from .model import Model, Tracked
from .wanted import Wanted

LONGEST_S = 30.0
"""The longest stretch that is shown unasked."""
SHORTEST_S = 1e-4
DWELL_S = 2.0
"""A request that was selected by itself stays so long at least, to be read."""
SHRINK_S = 3.0
"""The stretch that follows shrinks only when less has been enough for so long."""
MARGIN = 0.03
VERBS = frozenset(("PrepRecv", "RemoteSend", "StartGenerate"))
NICE = (1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0)

Mode = Literal["follow", "fit", "free"]


@dataclass(frozen=True, slots=True)
class Window:
    """A stretch of time on ``width`` cells. Seconds on the reader's clock."""

    begin: float
    end: float
    width: int
    origin: float
    """What the axis calls 0."""
    is_now: bool
    """Whether the axis is told as seconds before now; else since the selected request came."""

    def cell(self, time: float) -> int:
        """Return the cell of a moment; it may be off the screen."""
        return math.floor((time - self.begin) / (self.end - self.begin) * self.width + 1e-6)

    def overlaps(self, begin: float, end: float) -> bool:
        """Return whether some of [begin, end] is on the screen."""
        return end >= self.begin and begin < self.end


def nice(seconds: float) -> float:
    """Return the smallest round stretch that holds this one."""
    scale = 10.0 ** math.floor(math.log10(max(seconds, 1e-9)))
    return next((step * scale for step in NICE if step * scale >= seconds * 0.999), 10 * scale)


class View:
    """The state of the screen that is not in the model."""

    def __init__(self, wanted: Wanted = Wanted()) -> None:  # noqa: B008 - frozen
        self.wanted = wanted
        self.mode: Mode = "follow"
        self.is_paused = False
        self.selected = ""
        self.is_chosen = False
        """Whether somebody selected it, or it is just the latest."""
        self.now = 0.0
        self.begin, self.end = 0.0, 1.0
        self._selected_at = 0.0
        self._zoom_s: float | None = None
        self._follow_s = 1.0
        self._enough_since = 0.0
        self._is_idle = False
        self._num_frozen = 0

    def shown(self, model: Model) -> list[Tracked]:
        """Return the requests that are to be shown, the oldest first."""
        # What comes from the past comes node by node, in no order.
        requests = sorted(model.requests.values(), key=lambda each: each.begin)
        if self.is_paused:
            requests = [each for each in requests if each.number <= self._num_frozen]
        return [each for each in requests if self.wanted.matches(each, self.now)] if self.wanted else requests

    def advance(self, shown: list[Tracked], now: float, *, horizon: float = 0.0) -> None:
        """Let time pass: select, and move the window, which reaches back to ``horizon`` unasked; unless paused."""
        if self.is_paused:
            return
        self.now = now
        self._select(shown, now)
        selected = next((each for each in reversed(shown) if each.id == self.selected), None)
        if self.mode == "follow":
            self._follow(shown, selected, now, max(now - horizon, SHORTEST_S))
        elif self.mode == "fit" and selected is not None:
            end = now if selected.is_running(now) else selected.last
            length = max(end - selected.begin, SHORTEST_S)
            if selected.is_running(now):
                length = nice(length)
            self.begin, self.end = selected.begin - MARGIN * length, selected.begin + (1 + MARGIN) * length

    def _select(self, shown: list[Tracked], now: float) -> None:
        current = next((each for each in reversed(shown) if each.id == self.selected), None)
        if current is not None:
            dwell_s = LONGEST_S if current.is_running(now) else DWELL_S
            if self.is_chosen or now - self._selected_at < dwell_s:
                return
        told = (each for each in reversed(shown[-50:]) if each.is_over or each.names & VERBS)
        latest = next(told, shown[-1] if shown else None)  # Of the very latest there is nothing to read yet.
        if latest is None or latest is not current:
            self.selected = latest.id if latest else ""
            self.is_chosen = False
            self._selected_at = now

    def _follow(self, shown: list[Tracked], selected: Tracked | None, now: float, longest_s: float) -> None:
        running = [each for each in shown[-200:] if each.is_running(now)]
        self._is_idle = not running
        edge = now if running else max((each.last for each in shown[-200:]), default=now)
        if self._is_idle:
            # Time stands still when nothing happens: the last thing that did stays to be looked at.
            begin = selected.begin if selected else edge - 1.0
            for each in reversed(shown):
                if each.last >= begin:
                    begin = min(begin, each.begin)
            length = min(max(edge - begin, SHORTEST_S), LONGEST_S)
            self.begin, self.end = edge - (1 + MARGIN) * length, edge + MARGIN * length
            self._follow_s, self._enough_since = nice(length), now
            return
        begins = [each.begin for each in running]
        begins += [selected.begin] if selected is not None and edge - selected.begin < LONGEST_S else []
        needed = nice(min(max((edge - min(begins)) * (1 + MARGIN), 0.1), LONGEST_S))
        if needed >= self._follow_s:
            self._follow_s, self._enough_since = needed, now
        elif now - self._enough_since > SHRINK_S:
            self._follow_s = needed
        length = self._zoom_s or min(self._follow_s, longest_s)
        self.begin, self.end = edge - length, edge

    def window(self, width: int, selected: Tracked | None) -> Window:
        """Return the stretch on the screen; while time passes it moves by whole cells."""
        width = max(width, 1)
        begin, end = self.begin, self.end
        is_now = self.mode == "follow" and not self._is_idle
        if is_now:
            cell = (end - begin) / width
            end = math.ceil(end / cell - 1e-6) * cell
            begin = end - width * cell
        origin = end if is_now or selected is None else selected.begin
        return Window(begin, end, width, origin, is_now or selected is None)

    # ---- what people do ----------------------------------------------------------------------------------------

    def want(self, *, text: str | None = None, only_errors: bool | None = None) -> None:
        """Change which requests are shown."""
        wanted = self.wanted
        self.wanted = replace(
            wanted,
            text=wanted.text if text is None else text,
            only_errors=wanted.only_errors if only_errors is None else only_errors,
        )

    def choose(self, tracked: Tracked) -> None:
        """Select a request, and show all of it."""
        self.selected, self.is_chosen, self.mode = tracked.id, True, "fit"
        was_paused, self.is_paused = self.is_paused, False
        self.advance([tracked], self.now)
        self.is_paused = was_paused

    def move(self, model: Model, by: int) -> None:
        """Select the request ``by`` places further down the list, which shows the latest first."""
        shown = self.shown(model)[::-1]
        if not shown:
            return
        index = next((i for i, each in enumerate(shown) if each.id == self.selected), 0)
        self.choose(shown[min(max(index + by, 0), len(shown) - 1)])

    def pause(self, model: Model) -> None:
        """Stand still, or go on where things are by now."""
        self.is_paused = not self.is_paused
        if self.is_paused:
            self._num_frozen = model.num_seen
            model.is_held = True
        else:
            model.release()

    def follow(self, model: Model) -> None:
        """Go back to what happens now."""
        if self.is_paused:
            self.pause(model)
        self.mode, self.is_chosen, self._zoom_s, self._selected_at = "follow", False, None, 0.0

    def zoom(self, factor: float, selected: Tracked | None) -> None:
        """Show a stretch ``factor`` times as long: up to now while following, else from where the request begins.

        Where that is not on the screen, the middle stays in place.
        """
        length = self.end - self.begin
        wanted = min(max(length * factor, SHORTEST_S), 100 * LONGEST_S)
        if self.mode == "follow" and not self.is_paused and not self._is_idle:
            self._zoom_s = wanted
            self.begin = self.end - wanted
            return
        is_there = selected is not None and self.begin <= selected.begin < self.end
        fixed = selected.begin if selected is not None and is_there else (self.begin + self.end) / 2
        share = (fixed - self.begin) / length
        self.mode, self.begin, self.end = "free", fixed - share * wanted, fixed + (1 - share) * wanted

    def scroll(self, share: float) -> None:
        """Move by a share of the stretch on the screen, to the later if positive."""
        step = (self.end - self.begin) * share
        self.mode, self.begin, self.end = "free", self.begin + step, self.end + step
