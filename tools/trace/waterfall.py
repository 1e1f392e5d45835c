"""A story as lines of a tree, each with its bar on one axis of time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from callboard.actors.protocol import ATTEMPTS_EACH

from .story import VERBS, Span, Story
from .words import ms, words_of

LEAST_SHARE = 0.01
"""Of the whole: what is shorter has no line, unless it is a sub-request, computes, sends, or failed."""
ALWAYS = frozenset((*VERBS, "http", "prefill", "compute", "decode", "send", "paused", "held", "credit", "take_pages"))
MANY = frozenset(("take_pages",))
"""Calls of which one sub-request may make hundreds, all alike: one line for all of them."""
INNER = frozenset(("generate", "compute_kv", "admit"))
"""Calls whose parts say more than they do."""
FULL, LEFT, RIGHT = "━", "╸", "╺"


@dataclass(slots=True)
class Line:
    """One span, or several of the same kind that were done for the same."""

    spans: list[Span]
    children: list["Line"] = field(default_factory=list)

    @property
    def span(self) -> Span:
        """The first."""
        return self.spans[0]

    @property
    def seconds(self) -> float | None:
        """Of all of them together; None while one is not over."""
        return None if any(span.end is None for span in self.spans) else sum(span.seconds for span in self.spans)

    @property
    def error(self) -> str:
        """How one of them ended badly."""
        return next((span.error for span in self.spans if span.error), "")

    @property
    def name(self) -> str:
        """What is done."""
        span = self.span
        if span.kind == "http":
            return f"{span.facts.get('method', 'HTTP')} {span.facts.get('path', '')}".strip()
        if span.name == "attempt" and span.parent is not None:
            # As the router counts: one that found no engine, and waited, goes on as the same.
            runs = [each for each in span.parent.children if each.name == "attempt"]
            number = span.facts.get("number")
            return f"attempt {(number % ATTEMPTS_EACH if isinstance(number, int) else runs.index(span)) + 1}"
        if span.name == "generate":
            return f"sequence {span.request_id}"
        return span.name if len(self.spans) == 1 else f"{span.name} x{len(self.spans)}"


def lines_of(story: Story) -> list[Line]:
    """Return the tree of a story that is worth a look."""
    whole = (story.last if story.end is None else story.end) - story.begin
    lines: list[Line] = []
    for root in story.roots:
        lines += _lines(root, story, whole)
    return _grouped(lines)


def num_hidden(story: Story, lines: Sequence[Line]) -> int:
    """Return how many spans have no line, other than ways and what only holds others."""
    shown = {id(span) for line in walk(lines) for span in line.spans}
    shown |= {id(span.parent) for line in walk(lines) for span in line.spans}
    return sum(
        span.kind not in ("bus", "serve") and span.name not in INNER and id(span) not in shown for span in story.spans
    )


def walk(lines: Sequence[Line]) -> Iterator[Line]:
    """Yield all lines of trees."""
    for line in lines:
        yield line
        yield from walk(line.children)


def _lines(span: Span, story: Story, whole: float) -> list[Line]:
    below: list[Line] = []
    for child in span.children:
        below += _lines(child, story, whole)
    below = _grouped(below)
    if _is_shown(span, story, whole):
        return [Line([span], below)]
    return below


def _is_shown(span: Span, story: Story, whole: float) -> bool:
    if span.kind in ("bus", "serve"):
        return False
    if span.kind == "http" or span.name in ALWAYS:
        return True
    if span.name == "generate":
        return sum(each.name == "generate" and each.kind == "call" for each in story.spans) > 1
    if span.name == "attempt":
        is_only = sum(each.name == "attempt" and each.request_id == span.request_id for each in story.spans) == 1
        return not is_only
    if span.is_tell:
        return False
    if span.error:
        return True
    if span.name in INNER:
        return False
    return (span.seconds if span.end is not None else whole) >= LEAST_SHARE * whole


def _grouped(lines: list[Line]) -> list[Line]:
    """Put the phases of one kind, of one actor, and for the same, on one line; and such calls as there are many of."""
    found: dict[object, Line] = {}
    for line in lines:
        span = line.span
        alike = (span.kind == "phase" and span.name != "attempt") or (span.kind == "call" and span.name in MANY)
        alike = alike and not line.children
        key = (span.name, span.actor, id(span.parent)) if alike else id(span)
        if key in found:
            found[key].spans += line.spans
        else:
            found[key] = line
    return sorted(found.values(), key=lambda line: line.span.begin)


# ---- drawing -----------------------------------------------------------------------------------------------------


def bar(spans: Sequence[Span], begin: float, end: float, width: int) -> str:
    """Return spans on the axis [begin, end) of so many cells, drawn by half cells; each has at least one."""
    halves = [False] * (2 * width)
    scale = len(halves) / (end - begin) if end > begin else 0.0
    for span in spans:
        until = end if span.end is None else span.end
        left = min(max(0, int((span.begin - begin) * scale)), len(halves) - 1)
        right = min(max(left + 1, round((until - begin) * scale)), len(halves))
        halves[left:right] = [True] * (right - left)
    cells = {(True, True): FULL, (True, False): LEFT, (False, True): RIGHT, (False, False): " "}
    return "".join(cells[halves[index], halves[index + 1]] for index in range(0, len(halves), 2))


def axis(seconds: float, width: int) -> str:
    """Return what stands above the bars: where they begin, and where they end."""
    end = ms(seconds)
    return "0" + end.rjust(width - 1) if width > len(end) + 1 else "0".ljust(width)


def after_compute(line: Line) -> float:
    """Return for how long pages were sent after the last layer had been computed, 0 where nothing was computed."""
    send = line.span
    caller = send.parent
    computed = [span.end for span in _below(caller) if span.name == "compute" and span.end is not None]
    if send.name != "send" or not computed:
        return 0.0
    last = max(computed)
    return sum(max(0.0, span.end - max(span.begin, last)) for span in line.spans if span.end is not None)


def _below(span: Span | None) -> Iterator[Span]:
    for child in span.children if span is not None else ():
        yield child
        yield from _below(child)


def said_of(line: Line) -> str:
    """Return what a line's spans did, in words."""
    said = words_of(line.spans)
    if (tail := after_compute(line)) > 0:
        said += f"; {ms(tail)} of it after the last layer"
    if line.seconds is None and line.span.kind != "http":
        said = f"{said}, not over" if said else "not over"
    return said
