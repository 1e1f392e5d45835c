"""A sheet of character cells with styles: what everything on the screen is drawn on, and what tests read."""

from functools import lru_cache

from rich.cells import cell_len
from rich.segment import Segment
from rich.style import Style

PLAIN = ""


@lru_cache(1024)
def style_of(text: str) -> Style:
    """Return a style by its words, such as ``bold black on cyan``. Colours are the terminal's own sixteen."""
    return Style.parse(text) if text else Style.null()


def clean(text: str) -> str:
    """Return text with one cell a character: names and errors come from elsewhere, and may hold anything."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(char if char.isprintable() and cell_len(char) == 1 else "?" for char in text)


def shorten(text: str, width: int) -> str:
    """Return text cut to ``width`` cells, with an ellipsis where something is missing."""
    if len(text) <= width:
        return text
    return text[: width - 1] + "…" if width > 1 else text[: max(width, 0)]


class Canvas:
    """``height`` rows of ``width`` cells, blank at first. What is put beyond its edges is cut off."""

    def __init__(self, width: int, height: int) -> None:
        self.width = width
        self.height = height
        self._chars = [[" "] * width for _ in range(height)]
        self._styles = [[PLAIN] * width for _ in range(height)]

    def put(self, x: int, y: int, text: str, style: str = PLAIN) -> int:
        """Write text from cell x of row y on; return the cell behind it."""
        text = clean(text)
        end = x + len(text)
        if 0 <= y < self.height and x < self.width and end > 0:
            begin = max(x, 0)
            kept = text[begin - x : self.width - x]
            self._chars[y][begin : begin + len(kept)] = kept
            self._styles[y][begin : begin + len(kept)] = [style] * len(kept)
        return end

    def is_free(self, x: int, y: int, width: int = 1) -> bool:
        """Return whether nothing is there; beyond the edges nothing is free."""
        if not (0 <= y < self.height and x >= 0 and x + width <= self.width):
            return False
        return all(char == " " for char in self._chars[y][x : x + width]) and not any(self._styles[y][x : x + width])

    def at(self, x: int, y: int) -> tuple[str, str]:
        """Return the character and the style of a cell."""
        return self._chars[y][x], self._styles[y][x]

    def text(self) -> list[str]:
        """Return the rows without styles, and without the blanks at their ends."""
        return ["".join(row).rstrip() for row in self._chars]

    def rows(self) -> list[list[Segment]]:
        """Return the rows as segments of equal style."""
        return [self._row(chars, styles) for chars, styles in zip(self._chars, self._styles, strict=True)]

    @staticmethod
    def _row(chars: list[str], styles: list[str]) -> list[Segment]:
        segments, begin = [], 0
        for index in range(1, len(chars) + 1):
            if index == len(chars) or styles[index] != styles[begin]:
                segments.append(Segment("".join(chars[begin:index]), style_of(styles[begin])))
                begin = index
        return segments
