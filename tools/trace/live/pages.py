"""Pages over the live view: a request explained, and help."""

import io
from collections.abc import Callable, Sequence
from typing import ClassVar

from rich.console import Console
from rich.text import Text
from textual import events
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.screen import Screen
from textual.widgets import Footer, Static

from callboard.tools.trace.explained import print_text
from callboard.tools.trace.story import Story

from .bars import CREDIT, LEGEND
from .words import VERBS

KEYS = (
    ("↑ ↓, click", "select a request: see all of it, and what was done"),
    ("x, enter", "explain it: where its time went, to the millisecond"),
    ("space", "pause, or go on"),
    ("← →, wheel", "scroll through time"),
    ("+ -", "zoom"),
    ("f, end", "follow what happens now"),
    ("/", "show only requests with these words: of an id, an actor, a verb"),
    ("e", "show only what failed"),
    ("escape", "show all again"),
    ("q", "leave; the fleet runs on"),
)


class Page(Screen[None]):
    """A text over everything, made anew for each width."""

    CSS = """
    Page { background: ansi_default; color: ansi_default; }
    Page VerticalScroll { background: ansi_default; padding: 0 1; scrollbar-size-vertical: 1; }
    Page Static { background: ansi_default; color: ansi_default; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,x,enter,q,question_mark", "close", "back", key_display="esc"),
        Binding("up,k", "by(-1)", "scroll", key_display="↑↓"),
        Binding("down,j", "by(1)", show=False),
        Binding("pageup", "by(-10)", show=False),
        Binding("pagedown,space", "by(10)", show=False),
    ]

    def __init__(self, make: Callable[[int], Text]) -> None:
        super().__init__()
        self._make = make
        self.text = Text()

    def compose(self) -> ComposeResult:
        """Make the page."""
        yield VerticalScroll(Static(id="text"), can_focus=False)
        yield Footer(compact=True, show_command_palette=False)

    def on_resize(self, event: events.Resize) -> None:
        """Write it anew."""
        self.text = self._make(max(event.size.width - 3, 20))
        self.query_one("#text", Static).update(self.text)

    def action_close(self) -> None:
        """Go back to the live view."""
        self.dismiss()

    def action_by(self, by: int) -> None:
        """Scroll."""
        self.query_one(VerticalScroll).scroll_relative(y=by, animate=False)


def explanation(story: Story, width: int) -> Text:
    """Return what ``callboard trace explain`` says of a request."""
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=True, color_system="standard", highlight=False)
    print_text(story, console)
    return Text.from_ansi(out.getvalue())


def help_text(notices: Sequence[str], width: int) -> Text:
    """Return what the screen means."""
    text = Text()
    text.append("What you see\n", "bold")
    text.append(
        "Time goes to the right; every actor of the fleet has a lane, every request a colour. A bar is what an actor "
        "was asked for, a number says for which of the request's sub-requests:\n"
    )
    for verb, what in VERBS:
        text.append(f"  {verb:15}", "bold").append(f"{what}\n")
    text.append("Inside a bar:\n")
    for mark, what in LEGEND:
        text.append(f"  {mark * 2:4}", "bold").append(f"{what}\n")
    text.append(f"  {CREDIT * 2:4}", "bold").append("waits for a reader who is slow\n")
    text.append("  ▸   ", "bold").append("is not over: what an actor does is told when it is done\n")
    text.append("  ▃▅▇ ", "bold").append("more bars than rows: how many there were at once\n\n")
    text.append("Keys\n", "bold")
    for key, what in KEYS:
        text.append(f"  {key:12}", "bold").append(f"{what}\n")
    if notices:
        text.append("\nNotices, the latest last\n", "bold")
        for notice in notices:
            text.append(f"  {notice}\n")
    return text
