"""What one request's sub-requests did, in sentences, and where its time went."""

import textwrap
from collections.abc import Iterator

from callboard.tools.trace.breakdown import breakdown
from callboard.tools.trace.explained import rows_of
from callboard.tools.trace.story import Story
from callboard.tools.trace.words import CATEGORIES

from .bars import colour_of
from .canvas import Canvas, shorten
from .model import Tracked
from .words import Sentence, sentences, took

Row = tuple[tuple[str, str], ...]
"""Texts with their styles, one behind the other."""


def draw_detail(tracked: Tracked | None, now: float, width: int, height: int) -> Canvas:
    """Draw what was done for a request. Where rows are few, the sentences come before all else."""
    canvas = Canvas(width, height)
    if tracked is None or height < 2:
        return canvas
    story, colour = tracked.story(), colour_of(tracked)
    title = f"Request {shorten(tracked.id, 32)}: "
    _put(canvas, 0, ((title, f"bold {colour}"), (_summary(tracked, story, now, width - len(title)), "")))
    blocks = list(_blocks(tracked, story, now, width, colour))
    y, is_all = 1, 1 + sum(map(len, blocks)) <= height
    for index, block in enumerate(blocks):
        if not is_all and y + len(block) > height - 1:
            num = len(blocks) - index
            if index == 0:  # A part of it is better than nothing.
                y, num = _put_all(canvas, y, block[: height - 1 - y]), num - 1
            if num:
                _put(canvas, y, ((f"… and {num} more: x explains all", "dim"),))
            return canvas
        y = _put_all(canvas, y, block)
    if y < height and story.notes:
        noted = ", ".join(f"{name} = {value}" for name, value in story.notes.items())
        canvas.put(0, y, shorten(f"The script noted: {noted}", width))
        y += 1
    if y < height and tracked.is_over:
        _draw_shares(canvas, y, story, colour)
    return canvas


def _put(canvas: Canvas, y: int, row: Row) -> None:
    x = 0
    for text, style in row:
        x = canvas.put(x, y, text, style)


def _put_all(canvas: Canvas, y: int, rows: list[Row]) -> int:
    for row in rows:
        _put(canvas, y, row)
        y += 1
    return y


def _blocks(tracked: Tracked, story: Story, now: float, width: int, colour: str) -> Iterator[list[Row]]:
    """Return what is to be said, each in some rows."""
    told = sentences(story, now)
    error = tracked.error or story.error
    if error and error != "cancelled" and not any(each.is_failed for each in told):
        yield [((line, "bold red"),) for line in textwrap.wrap(f"It failed: {error}", width=max(20, width))[:3]]
    elif not told:
        here = "It ended without a sub-request." if tracked.is_over else "No sub-request yet."
        yield [((here, "dim"),)]
    for each in told:
        yield _rows(each, width, colour)


def _rows(each: Sentence, width: int, colour: str) -> list[Row]:
    """Return a sentence, what follows its first row indented."""
    who = f" → {each.to}, {took(each.seconds)}: "
    begin = len(f"{each.number} {each.verb}{who}")
    style = "bold red" if each.is_failed else "italic" if each.is_running else ""
    first, *others = textwrap.wrap(each.text, width=max(20, width - 2), initial_indent=" " * (begin - 2)) or [""]
    head = ((f"{each.number}", f"bold reverse {colour}"), (f" {each.verb}", "bold"), (who, ""))
    return [(*head, (first[begin - 2 :], style)), *((("  ", ""), (line, style)) for line in others)]


def _summary(tracked: Tracked, story: Story, now: float, width: int) -> str:
    parts = []
    if story.num_prompt_tokens is not None:
        parts.append(f"{story.num_prompt_tokens} prompt tokens")
    if tracked.is_over and story.num_tokens is not None:
        parts.append(f"{story.num_tokens} generated")
    if story.ttft_s is not None:
        parts.append(f"the first after {took(story.ttft_s)}")
    if tracked.error or story.error:
        parts.append("cancelled" if "cancelled" in (tracked.error, story.error) else "failed")
    elif story.jct_s is not None:
        parts.append(f"all in {took(story.jct_s)}")
    elif tracked.is_running(now):
        parts.append(f"running for {took(max(now - tracked.begin, 0.0))}")
    if story.script and len(", ".join((*parts, f"script {story.script}"))) <= width:
        parts.append(f"script {story.script}")
    return shorten(", ".join(parts), width)


def _draw_shares(canvas: Canvas, y: int, story: Story, colour: str) -> None:
    """Draw where the time went: in a line, or with room to spare as a bar for each actor."""
    found = breakdown(story)
    width, room = canvas.width, canvas.height - y
    if found.jct_s <= 0:
        return
    rows = [(f"{CATEGORIES[category]} {actor}", seconds) for category, actor, seconds, _ in rows_of(found)]
    rows = [row for row in rows if row[1] >= 0.0005 * found.jct_s] + [("unknown", found.unexplained_s)]
    if room >= min(len(rows), 3) + 2:
        canvas.put(0, y + 1, "Where the time went", "bold")
        canvas.put(21, y + 1, "x: in detail", "dim")
        left = max(len(name) for name, _ in rows) + 1
        for index, (name, seconds) in enumerate(rows[: room - 2], y + 2):
            canvas.put(0, index, f"{name:{left}}{took(seconds):>8} {_percent(seconds / found.jct_s):>5}")
            filled = round(seconds / found.jct_s * (width - left - 18))
            canvas.put(left + 16, index, "█" * filled, colour)
        return
    shares = [(category, seconds / found.jct_s) for category, seconds in found.by_category().items()]
    words = [f"{CATEGORIES[category]} {_percent(share)}" for category, share in shares if share >= 0.001]
    words += [f"unknown {_percent(found.unexplained_s / found.jct_s)}"]
    text = shorten("time went to: " + ", ".join(words), width - 10)
    canvas.put(0, y, text)
    canvas.put(len(text) + 2, y, "x: more", "dim")


def _percent(share: float) -> str:
    return f"{share * 100:.0f}%" if share >= 0.0995 else f"{share * 100:.1f}%"
