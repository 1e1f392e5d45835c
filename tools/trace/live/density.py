"""A lane with more bars than rows: how many went on at each moment, as a skyline."""

from collections.abc import Iterable

from .canvas import Canvas
from .view import Window

LEVELS = " ▁▂▃▄▅▆▇█"


def draw_density(
    canvas: Canvas, window: Window, left: int, top: int, height: int, spans: Iterable[tuple[float, float]]
) -> int:
    """Draw how many of the spans (begin and end, seconds) cover each cell; return how many were most at once."""
    changes = [0] * (window.width + 1)
    for begin, end in spans:
        first, last = max(window.cell(begin), 0), min(window.cell(end) + 1, window.width)
        if last > first:
            changes[first] += 1
            changes[last] -= 1
    counts, count = [], 0
    for change in changes[:-1]:
        count += change
        counts.append(count)
    most = max(counts, default=0)
    for index, count in enumerate(counts):
        filled = round(count / most * height * 8) if most else 0
        filled = max(filled, 1) if count else 0
        for row in range(height):
            level = min(max(filled - 8 * (height - 1 - row), 0), 8)
            if level:
                canvas.put(left + index, top + row, LEVELS[level])
    return most
