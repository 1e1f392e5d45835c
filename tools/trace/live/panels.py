"""All of the screen but the chart: the head, the list of requests, what one request's sub-requests did, the legend."""

from collections.abc import Sequence
from dataclasses import dataclass

from callboard.tools.running import DEFAULT_NAME
from callboard.tools.trace.words import count

from .bars import LEGEND, colour_of
from .canvas import Canvas, shorten
from .model import Model, Tracked
from .view import View
from .words import short_id, state_of, took

NOTICE_S = 20.0
"""How long a notice stands in the head."""
COLUMNS = (
    ("REQUEST", 9),
    ("STATE", 15),
    ("TTFT", 8),
    ("TIME", 8),
    ("IN", 6),
    ("OUT", 6),
    ("MODEL", 16),
    ("SCRIPT", 16),
)
"""Of the list. Lengths in tokens are IN and OUT; the last two are cut where there is no room."""
RIGHT = ("TTFT", "TIME", "IN", "OUT")
SHORT_VERBS = "prep_recv reserves room · remote_send fills it with KV · start_generate decodes"
LONG_VERBS = (
    "prep_recv: look up the prefix cache, reserve room for the rest · remote_send: compute the KV that is missing and "
    "write it there · start_generate: adopt it and generate"
)


@dataclass(frozen=True, slots=True)
class Sizes:
    """How many rows each panel has."""

    chart: int
    legend: int
    list: int
    detail: int


def split(height: int, num_lanes: int, num_chart_rows: int, num_requests: int) -> Sizes:
    """Share out the rows of a screen, but for the head and the keys. ``num_chart_rows`` is what the lanes could use.

    What requests leave of the list tells of the selected one. Small screens lose the legend first.
    """
    rows = max(height - 2, 0)
    legend = 2 if rows >= 18 else 0
    rows -= legend
    chart = max(
        min(num_lanes + 1, rows * 2 // 5), min(rows * 3 // 5 if rows >= 30 else rows * 9 // 20, num_chart_rows + 1)
    )
    rows -= chart
    list_ = min(max(rows * 2 // 5 - 1, min(rows, 2)), 1 + max(num_requests, 1))
    return Sizes(chart, legend, list_, rows - list_)


def draw_head(model: Model, view: View, *, fleet: str, ended: str, num_actors: int, width: int) -> Canvas:
    """Draw what is followed, and what happened to it lately."""
    canvas = Canvas(width, 1)
    if ended:
        state, style = ended, "bold red"
    elif view.is_paused:
        state, style = "PAUSED", "bold reverse"
    elif view.mode == "follow":
        state, style = "following", "green"
    else:
        state, style = "f: follow again", "bold yellow"
    parts = [f"fleet {fleet}", count(num_actors, "actor"), count(model.num_seen, "request")]
    x = canvas.put(0, 0, " · ".join(parts) + " · ", "bold")
    x = canvas.put(x, 0, state, style)
    if view.wanted:
        x = canvas.put(x, 0, f" · only {view.wanted}", "yellow")
    told = [(time, text) for time, text in model.notices if view.now - time < NOTICE_S]
    right = told[-1][1] if told else ""
    if model.num_skipped:
        right = f"{count(model.num_skipped, 'request')} passed unseen while paused"
    elif model.num_lost and not right:
        right = f"{count(model.num_lost, 'record')} lost"
    if right:
        room = max(width - x - 2, min(width // 2, width - 2))
        right = shorten(right, room)
        canvas.put(width - len(right) - 1, 0, f" {right}", "yellow")
    return canvas


def draw_list(model: Model, view: View, shown: Sequence[Tracked], width: int, height: int) -> tuple[Canvas, list[str]]:
    """Draw the requests, the latest first, the selected one in sight; also return whose each row below the head is."""
    canvas = Canvas(width, height)
    columns, x = [], 1
    for title, size in COLUMNS:
        if x + min(size, 8) <= width:
            columns.append((title, x, min(size, width - x)))
        x += size + 1
    for title, at, size in columns:
        canvas.put(at, 0, title.rjust(size) if title in RIGHT else title, "bold")
    latest = list(shown)[::-1]
    num = max(height - 1, 0)
    index = next((i for i, tracked in enumerate(latest) if tracked.id == view.selected), 0)
    first = max(0, min(index - num // 2, len(latest) - num))
    if not view.is_chosen:
        first = 0
    rows = latest[first : first + num]
    for y, tracked in enumerate(rows, 1):
        cells = _cells(tracked, view.now)
        is_selected = tracked.id == view.selected
        base = "reverse" if is_selected else ""
        canvas.put(0, y, " " * width, base)
        for title, at, size in columns:
            text = shorten(cells[title], size)
            style = base
            if title == "REQUEST":
                style = f"bold {colour_of(tracked)} {base}"
            elif title == "STATE" and cells[title] == "failed":
                style = f"bold red {base}"
            canvas.put(at, y, text.rjust(size) if title in RIGHT else text, style)
    below = len(latest) - first - len(rows)
    if below > 0 and rows:
        text = f" {below} more "
        canvas.put(width - len(text), 0, text, "dim")
    return canvas, [tracked.id for tracked in rows]


def _cells(tracked: Tracked, now: float) -> dict[str, str]:
    story = tracked.story()
    is_running = tracked.is_running(now)
    seconds = story.jct_s if story.jct_s is not None else (now if is_running else tracked.last) - tracked.begin
    return {
        "REQUEST": short_id(tracked.id),
        "STATE": state_of(story, tracked.error, is_running=is_running, is_over=tracked.is_over),
        "TTFT": "" if story.ttft_s is None else took(story.ttft_s),
        "TIME": took(max(seconds, 0.0)),
        "IN": "" if story.num_prompt_tokens is None else f"{story.num_prompt_tokens}",
        "OUT": "" if story.num_tokens is None or not tracked.is_over else f"{story.num_tokens}",
        "MODEL": story.model,
        "SCRIPT": story.script,
    }


def draw_legend(width: int, height: int = 2) -> Canvas:
    """Draw what the marks of the chart mean, and what the verbs are for."""
    canvas = Canvas(width, height)
    x = 0
    for mark, text in LEGEND:
        canvas.put(x, 0, mark * 2, "bold")
        x = canvas.put(x + 3, 0, text, "dim") + 2
    canvas.put(x, 0, "1 2 3", "bold reverse")
    canvas.put(x + 6, 0, "sub-requests", "dim")
    canvas.put(0, 1, LONG_VERBS if width >= len(LONG_VERBS) else SHORT_VERBS, "dim")
    return canvas


def draw_waiting(fleet: str, width: int, height: int, *, is_filtered: bool) -> Canvas:
    """Draw what stands where requests will be."""
    canvas = Canvas(width, height)
    where = "" if fleet == DEFAULT_NAME else f"--fleet {fleet} "
    lines = (
        ["No request is shown: none that came is one you asked for.", "Press / and enter an empty line to see all."]
        if is_filtered
        else [
            "waiting for requests ...",
            "",
            "Send one from another terminal:",
            f'  callboard chat {where}"What is a callboard?"',
        ]
    )
    for y, line in enumerate(lines):
        canvas.put(max((width - 48) // 2, 0), max((height - len(lines)) // 2, 0) + y, line, "bold" if y == 0 else "")
    return canvas
