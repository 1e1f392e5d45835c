"""The chart: time to the right, an actor a lane, a bar for what each was asked, numbered as the sub-requests are.

What was done inside a bar lies over it: solid for work, a hatch for queues, marks for pages. All of it is a function
of the model, the view and a size; nothing here knows of the terminal.
"""

import math
from collections.abc import Sequence

from .bars import LINE
from .canvas import Canvas, shorten
from .density import draw_density
from .inside import engines_of
from .lanes import Lanes, Row, depths_of
from .model import Model, Tracked
from .painter import Chart, Painter
from .view import View, Window

LABEL_WIDTH = 18
FEW = 2
MOST_STORIES = 60
"""Requests whose inner phases are drawn; of more at a time, only the bars."""


def draw_chart(model: Model, view: View, shown: Sequence[Tracked], lanes: Lanes, width: int, height: int) -> Chart:
    """Draw the axis and the lanes of the requests that are shown into ``width`` by ``height`` cells."""
    canvas = Canvas(width, height)
    chart = Chart(canvas)
    lanes.place(shown)
    for tracked in shown[-3:]:
        for call, engine in engines_of(tracked.story()).items():
            if call in tracked.units:
                lanes.meet(tracked.units[call], engine)
    names = [lane.label for lane in lanes.in_order()]
    left = min(max((len(name) for name in names), default=8) + 1, LABEL_WIDTH, max(width // 3, 1))
    selected = model.requests.get(view.selected)
    window = view.window(width - left, selected)
    on_screen = [t for t in shown if window.overlaps(t.begin, view.now if t.is_running(view.now) else t.last)]
    bars = [(tracked, unit) for tracked in on_screen for unit in tracked.units.values()]
    depths = depths_of(bars, window, view.now)
    rows, num_hidden = lanes.rows(height - 1, depths, view.now)
    _draw_axis(canvas, window, left)
    crowded = {row.lane.name for row in rows if _is_crowded(row, depths.get(row.lane.name, 0))}
    for row in rows:
        name = row.lane.label
        canvas.put(0, 1 + row.top, shorten(name, left - 1), "bold" if not row.lane.serves else "")
        if row.lane.name in crowded:
            mine = [(u.begin, t.end_of(u, view.now)) for t, u in bars if u.actor == row.lane.name]
            top = 1 + row.top + (row.height > 1 and selected is not None)
            most = draw_density(canvas, window, left, top, 1 + row.top + row.height - top, mine)
            if row.height > 1:
                canvas.put(0, 2 + row.top, f" up to {most}", "dim")
    if num_hidden:
        canvas.put(0, height - 1, shorten(f"and {num_hidden} actors more, with no room here", width), "dim")
    painter = Painter(chart, view, window, left, {row.lane.name: row for row in rows}, crowded)
    with_story = {t.id for t in on_screen[-MOST_STORIES:]} | {view.selected}
    for tracked in sorted(on_screen, key=lambda each: each.id == view.selected):
        painter.draw(tracked, tracked.story() if tracked.id in with_story else None)
    if selected is not None and selected in on_screen:
        painter.draw_ways(selected)
    return chart


def _is_crowded(row: Row, depth: int) -> bool:
    """Return whether a lane is shown as a skyline. A few lines of waiting may lie over each other."""
    most = row.height + FEW if row.lane.kind in ("frontend", "router") else row.height
    return depth > most


def _draw_axis(canvas: Canvas, window: Window, left: int) -> None:
    length = window.end - window.begin
    step = _step(length / max(1, window.width // 14))
    if window.is_now:
        canvas.put(left, 0, f"{LINE * window.width}", "dim")
        for index in range(1, int(length / step) + 1):
            _tick(canvas, left + window.cell(window.end - index * step), f"-{_axis(index * step)}")
        canvas.put(left + window.width - 4, 0, " now", "bold")
        return
    canvas.put(left, 0, LINE * window.width, "dim")
    first = int((window.begin - window.origin) / step) - 1
    for index in range(first, first + int(length / step) + 3):
        time = window.origin + index * step
        if window.begin <= time < window.end:
            _tick(canvas, left + window.cell(time), _axis(index * step))


def _step(seconds: float) -> float:
    scale = 10.0 ** math.floor(math.log10(seconds))
    return next((step * scale for step in (1, 2, 5) if step * scale >= seconds * 0.999), 10 * scale)


def _tick(canvas: Canvas, x: int, text: str) -> None:
    if x + len(text) < canvas.width - 5 or canvas.is_free(x, 0):
        canvas.put(x, 0, f"╷{text} ", "")


def _axis(seconds: float) -> str:
    if seconds == 0:
        return "0"
    size = abs(seconds)
    return (
        f"{seconds:.6g} s"
        if size >= 0.9999
        else f"{seconds * 1e3:.4g} ms"
        if size >= 0.9999e-3
        else f"{seconds * 1e6:.3g} us"
    )
