"""The live view in a terminal: keys, the mouse, the clock. What is drawn is decided in the files beside this one."""

import asyncio
import signal
import time
from collections.abc import Callable, Collection
from typing import ClassVar

from textual import events
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.screen import Screen
from textual.widgets import Footer, Input

from callboard.bus import BusError
from callboard.tools.errors import CliError
from callboard.tools.trace.event import Event
from callboard.tools.trace.notice import Notice
from callboard.tools.trace.story import verb_of

from .chart import draw_chart
from .detail import draw_detail
from .lanes import Lanes
from .model import Model, Tracked
from .pages import Page, explanation, help_text
from .painter import Chart
from .panels import Sizes, draw_head, draw_legend, draw_list, draw_waiting, split
from .sources import BATCH, Source
from .view import View
from .wanted import Wanted
from .widgets import Board, Panel

Check = Callable[[Collection[str], Collection[str], Collection[str]], Wanted]
"""Given the requests, actors and verbs that are known, says what to show. Raises CliError for names that nobody has."""
EVERY_S = 0.1
"""Between two looks at whether something changed; nothing is drawn otherwise."""
BUSY_SHARE = 0.2
"""Of the time, at most so much goes into drawing."""
KEYED = ("move", "explain", "pause", "scroll", "zoom", "follow", "filter", "errors", "help")
SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


class LiveView(App[None]):
    """``callboard trace`` in a terminal."""

    TITLE = "callboard trace"
    BINDINGS: ClassVar[list[BindingType]] = [Binding("ctrl+c", "quit", show=False, priority=True)]
    ENABLE_COMMAND_PALETTE = False
    CSS = """
    Screen { layout: vertical; overflow: hidden; background: ansi_default; color: ansi_default; }
    Panel { width: 100%; background: ansi_default; color: ansi_default; }
    #head { height: 1; }
    #detail { height: 1fr; }
    Input { display: none; height: 1; border: none; padding: 0; background: ansi_default; color: ansi_default; }
    Input.-shown { display: block; }
    Footer { background: ansi_default; color: ansi_default; }
    FooterKey { background: ansi_default; color: ansi_default; }
    FooterKey .footer-key--key { background: ansi_default; color: ansi_magenta; }
    FooterKey .footer-key--description { background: ansi_default; color: ansi_default; }
    """

    def __init__(
        self,
        source: Source,
        *,
        wanted: Wanted = Wanted(),  # noqa: B008 - frozen
        check: Check | None = None,
        num_past: int | None = None,
        clock: Callable[[], float] | None = time.monotonic,
        lag_s: float = 0.0,
        is_live: bool = True,
    ) -> None:
        super().__init__(ansi_color=True)
        self.model = Model(takes=wanted.names if wanted.request else None)
        self.view = View(wanted)
        self.lanes = Lanes()
        self.ended = ""
        """Why nothing more comes, once that is so."""
        self.source = source
        self.refused: CliError | None = None
        """Why what was asked for cannot be shown, once that is known: the view has ended."""
        self._check = check
        self._lag_s = lag_s
        """So long after it happened an event is here: before, nothing is known, and nothing is drawn."""
        self._num_past = num_past
        self.clock = clock if is_live else None
        self._chart: Chart | None = None
        self._listed: list[str] = []
        self._drawn: tuple[object, ...] = ()
        self._sizes: Sizes | None = None
        self._num_rows = 0
        self.num_paints = 0
        self._next_paint = 0.0
        self._is_stale = True
        self._is_ready = False

    # ---- the screen --------------------------------------------------------------------------------------------

    def get_default_screen(self) -> Screen[None]:
        """Return the main screen."""
        return Board()

    def compose(self) -> ComposeResult:
        """Make the panels, from the top."""
        for name in ("head", "chart", "legend", "list", "detail"):
            yield Panel(name)
        yield Input(placeholder="a request, an actor, a verb, a model or a script; empty for all", id="filter")
        yield Footer(compact=True, show_command_palette=False)

    def on_mount(self) -> None:
        """Begin to read, and to draw."""
        self._is_ready = True
        loop = asyncio.get_running_loop()
        if not self.is_headless:
            for number in SIGNALS:
                loop.add_signal_handler(number, self.exit)
        self.set_focus(None)
        self.run_worker(self._read(), exit_on_error=True)
        self.set_interval(EVERY_S, self.paint)

    def on_resize(self, _: events.Resize) -> None:
        """Share out the room anew."""
        self._is_stale = True
        self.call_after_refresh(self.paint)

    def now(self) -> float:
        """Return the time on the events' clock; of a recording, its last moment."""
        return self.clock() - self._lag_s if self.clock is not None and not self.ended else self.model.last

    async def _read(self) -> None:
        try:
            async for batch in self.source:
                self.lanes.know(self.source.entries)
                for begin in range(0, len(batch), BATCH):
                    self._take(batch[begin : begin + BATCH])
                    await asyncio.sleep(0)
            self._know_past()
            self.ended = self.ended or ("" if self.clock is None else "nothing follows")
        except BusError as error:
            self.ended = f"cut off: {error}"
        except CliError as error:  # A recording that is damaged.
            self._refuse(error)
        self._is_stale = True

    def _refuse(self, error: CliError) -> None:
        self.refused = error
        self.exit()

    def _take(self, items: list[Event | Notice]) -> None:
        self.model.add(item for item in items if isinstance(item, Event))
        for item in items:
            if isinstance(item, Event):
                continue
            if item.kind == "following":
                self._know_past()
                continue
            if item.kind == "ended":
                self.ended = item.text
                self.model.lose("", item.text)
            elif item.kind in ("died", "stopped") and item.node:
                self.model.lose(item.node, f"{item.node} {item.kind}")
            self.model.say(item.text, at=item.time, num_lost=item.num_lost)

    def _know_past(self) -> None:
        """Once all of the past has been told: see whether what was asked for is there."""
        check, self._check = self._check, None
        num_past, self._num_past = self._num_past, None
        if num_past is not None:
            self.model.keep_last(num_past)
        if check is not None:
            requests = self.model.requests.values()
            actors = {*self.source.entries, *(name for each in requests for name in each.actors)}
            verbs = {verb_of(name) for each in requests for name in each.names}
            try:
                self.view.wanted = check(self.model.known_ids(), actors, verbs)
            except CliError as error:
                self._refuse(error)

    def paint(self) -> None:
        """Draw what changed."""
        if not self._is_ready:
            return
        view, model, now = self.view, self.model, self.now()
        # A moment is another one when it is in another cell; and seconds are told in halves.
        cell = (view.end - view.begin) / max(self.size.width, 1)
        moment = int(now / 5)
        if self.clock is not None and any(each.is_running(now) for each in list(model.requests.values())[-50:]):
            moment = max(int(now / max(cell, EVERY_S)), int(now * 2))
        state = (moment, model.version, self.ended) if not view.is_paused else (int(now), self.ended)
        if not self._is_stale and (state == self._drawn or time.monotonic() < self._next_paint):
            return
        begun = time.monotonic()
        self.num_paints += 1
        self._drawn, self._is_stale = state, False
        shown = view.shown(model)
        view.advance(shown, now, horizon=model.horizon)
        if view.is_paused:
            shown = view.shown(model)
        model.pinned = view.selected
        self._draw(shown)
        took_s = time.monotonic() - begun
        self._next_paint = begun + took_s / BUSY_SHARE

    def _draw(self, shown: list[Tracked]) -> None:
        model, view, lanes, panel = self.model, self.view, self.lanes, self.panel
        width, height = self.size
        lanes.place(shown)
        num_lanes = len(lanes.in_order())
        # It only grows, so that the panels below stay where they are.
        self._num_rows = max(self._num_rows, lanes.num_rows())
        sizes = split(height, num_lanes, self._num_rows, len(shown))
        if sizes != self._sizes:
            self._sizes = sizes
            for name, rows in (("chart", sizes.chart), ("legend", sizes.legend), ("list", sizes.list)):
                panel(name).styles.height = rows
        self._chart = draw_chart(model, view, shown, lanes, width, sizes.chart)
        self._is_stale = lanes.num_rows() > self._num_rows
        name, selected = self.source.name, model.requests.get(view.selected)
        panel("head").show(draw_head(model, view, fleet=name, ended=self.ended, num_actors=num_lanes, width=width))
        panel("chart").show(self._chart.canvas)
        panel("legend").show(draw_legend(width, sizes.legend))
        listed, self._listed = draw_list(model, view, shown, width, sizes.list)
        panel("list").show(listed)
        if shown:
            panel("detail").show(draw_detail(selected, view.now, width, sizes.detail))
        else:
            panel("detail").show(
                draw_waiting(name, width, sizes.detail, is_filtered=bool(view.wanted and model.requests))
            )

    def panel(self, name: str) -> Panel:
        """Return one of the panels: head, chart, legend, list, detail."""
        return self.screen_stack[0].query_one(f"#{name}", Panel)

    def _changed(self) -> None:
        self._is_stale = True
        self.paint()

    # ---- keys and the mouse ------------------------------------------------------------------------------------

    def action_move(self, by: int) -> None:
        """Select another request."""
        self.view.move(self.model, by)
        self._changed()

    def action_pause(self) -> None:
        """Stand still, or go on."""
        self.view.pause(self.model)
        self._changed()

    def action_scroll(self, share: float) -> None:
        """Look at another stretch of time."""
        self.view.scroll(share)
        self._changed()

    def action_zoom(self, factor: float) -> None:
        """Look at more or less time."""
        self.view.zoom(factor, self.model.requests.get(self.view.selected))
        self._changed()

    def action_follow(self) -> None:
        """Look at what happens now."""
        self.view.follow(self.model)
        self._changed()

    def action_errors(self) -> None:
        """Show only what failed, or all again."""
        self.view.want(only_errors=not self.view.wanted.only_errors)
        self.refresh_bindings()
        self._changed()

    def action_filter(self) -> None:
        """Ask for words that requests must have."""
        line = self.query_one("#filter", Input)
        line.value = self.view.wanted.text
        line.add_class("-shown")
        line.focus()
        self.refresh_bindings()

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Return whether a key does something now: while a line is typed, it belongs to the line."""
        is_typing = self.is_running and bool(self.screen_stack) and isinstance(self.screen.focused, Input)
        if action == "clear":
            return is_typing or bool(self.view.wanted.text or self.view.wanted.only_errors)
        return not is_typing or action not in KEYED

    def action_clear(self) -> None:
        """Show all again."""
        self._close_filter()
        self.view.want(text="", only_errors=False)
        self._changed()

    def _close_filter(self) -> None:
        # First hidden: what it says from then on is no wish of anybody's.
        self.query_one("#filter", Input).remove_class("-shown")
        self.set_focus(None)
        self.refresh_bindings()

    def on_input_changed(self, event: Input.Changed) -> None:
        """Filter while it is typed."""
        if event.input.has_class("-shown"):
            self.view.want(text=event.value)
            self._changed()

    def on_input_submitted(self) -> None:
        """Keep the filter, and give the keys back."""
        self._close_filter()

    def action_explain(self) -> None:
        """Show where the selected request's time went."""
        tracked = self.model.requests.get(self.view.selected)
        if tracked is not None:
            self.push_screen(Page(lambda width: explanation(tracked.story(), width)))

    def action_help(self) -> None:
        """Show what the screen means, and the last notices."""
        notices = [text for _, text in self.model.notices]
        self.push_screen(Page(lambda width: help_text(notices, width)))

    def on_click(self, event: events.Click) -> None:
        """Select the request that was clicked, in the list or in the chart."""
        widget, request_id = event.widget, None
        if widget is self.panel("list") and 0 < event.y <= len(self._listed):
            request_id = self._listed[event.y - 1]
        elif widget is self.panel("chart") and self._chart is not None:
            request_id = self._chart.request_at(event.x, event.y)
        if request_id is not None and (tracked := self.model.requests.get(request_id)) is not None:
            self.view.choose(tracked)
            self._changed()

    def on_mouse_scroll_up(self, event: events.MouseScrollUp) -> None:
        """Scroll the list, or zoom into time under the mouse."""
        self._wheel(event, -1)

    def on_mouse_scroll_down(self, event: events.MouseScrollDown) -> None:
        """Scroll the list, or zoom out."""
        self._wheel(event, 1)

    def _wheel(self, event: events.MouseEvent, by: int) -> None:
        if event.widget is self.panel("chart"):
            self.view.scroll(0.1 * by)
        else:
            self.view.move(self.model, by)
        self._changed()
