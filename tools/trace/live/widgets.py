"""What the live view's screen is made of: panels that hold a canvas, and the keys."""

from typing import ClassVar

from textual.binding import Binding, BindingType
from textual.screen import Screen
from textual.strip import Strip
from textual.widget import Widget

from .canvas import Canvas


class Panel(Widget):
    """A canvas on the screen."""

    ALLOW_SELECT = False
    can_focus = False

    def __init__(self, name: str) -> None:
        super().__init__(id=name)
        self._rows: list[Strip] = []
        self.num_repaints = 0

    def show(self, canvas: Canvas) -> None:
        """Put this on the screen, if it is not what is there."""
        rows = [Strip(row, canvas.width) for row in canvas.rows()]
        if rows != self._rows:
            self._rows = rows
            self.num_repaints += 1
            self.refresh()

    def render_line(self, y: int) -> Strip:
        """Return one row."""
        return self._rows[y] if y < len(self._rows) else Strip.blank(self.size.width)

    def text(self) -> list[str]:
        """Return what stands there, for tests."""
        return [row.text.rstrip() for row in self._rows]


class Board(Screen[None]):
    """The main screen: it has the keys, so that a line that is typed keeps its letters."""

    AUTO_FOCUS = ""
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,k", "app.move(-1)", "select", key_display="↑↓"),
        Binding("down,j", "app.move(1)", show=False),
        Binding("pageup", "app.move(-10)", show=False),
        Binding("pagedown", "app.move(10)", show=False),
        Binding("x,enter", "app.explain", "explain", key_display="x"),
        Binding("space", "app.pause", "pause", key_display="spc"),
        Binding("left,h", "app.scroll(-0.25)", "time", key_display="←→+-"),
        Binding("right,l", "app.scroll(0.25)", show=False),
        Binding("plus,equals_sign", "app.zoom(0.5)", show=False),
        Binding("minus,underscore", "app.zoom(2.0)", show=False),
        Binding("f,end", "app.follow", "follow", key_display="f"),
        Binding("slash", "app.filter", "filter", key_display="/"),
        Binding("e", "app.errors", "errors"),
        Binding("question_mark,f1", "app.help", "help", key_display="?"),
        Binding("q", "app.quit", "quit"),
        Binding("escape", "app.clear", "show all", key_display="esc"),
    ]
