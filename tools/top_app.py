"""The live view of ``callboard top``."""

from collections import deque
from typing import ClassVar

from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.widgets import Footer, Static

from .errors import CliError
from .observe_commands import SORTS
from .running import RunningFleet
from .top_frame import Frame
from .top_view import view
from .top_watch import FleetEnded, watching

HISTORY = 40
"""Frames that the small graph shows."""


class TopApp(App[None]):
    """Shows frames as they come. ``error`` is what ended it, None if the user did."""

    CSS = "#frame { padding: 1 1; width: auto; }"
    ENABLE_COMMAND_PALETTE = False
    BINDINGS: ClassVar[list[BindingType]] = [
        ("q", "quit", "Quit"),
        ("s", "sort", "Sort"),
        ("space", "pause", "Pause"),
        Binding("ctrl+c", "quit", show=False, priority=True),
    ]

    def __init__(self, fleet: RunningFleet, interval_s: float, sort: str = "name") -> None:
        super().__init__()
        self.title = f"callboard top {fleet.state.name}"
        self.error: FleetEnded | CliError | None = None
        self._fleet = fleet
        self._interval_s = interval_s
        self._sort = sort
        self._is_paused = False
        self._frame: Frame | None = None
        self._history: deque[float] = deque(maxlen=HISTORY)

    def compose(self) -> ComposeResult:
        with VerticalScroll():
            yield Static(f"Looking at fleet {self._fleet.state.name} ...", id="frame", markup=False)
        yield Footer()

    def on_mount(self) -> None:
        self.run_worker(self._watch(), exit_on_error=True)

    async def _watch(self) -> None:
        try:
            async with watching(self._fleet, self._interval_s) as watcher:
                async for frame in watcher.frames():
                    self.show(frame)
        except (FleetEnded, CliError) as end:
            self.error = end
            self.exit()

    def show(self, frame: Frame) -> None:
        """Take in a frame, and draw it unless the view is paused."""
        self._history.append(frame.output_tps)
        if not self._is_paused:
            self._frame = frame
            self._draw()

    def _draw(self) -> None:
        if self._frame is not None:
            note = "Paused: space goes on." if self._is_paused else ""
            shown = view(self._frame, sort=self._sort, history=list(self._history), note=note)
            self.query_one("#frame", Static).update(shown)

    def action_sort(self) -> None:
        """Sort the engines by the next key."""
        self._sort = SORTS[(SORTS.index(self._sort) + 1) % len(SORTS)]
        self._draw()

    def action_pause(self) -> None:
        """Stop drawing, or go on."""
        self._is_paused = not self._is_paused
        self._draw()
