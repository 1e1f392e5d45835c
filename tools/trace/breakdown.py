"""Where a request's time went: every instant belongs to one thing that was done, or to none that is known.

Nothing is computed by subtraction. Only spans with both ends recorded count, and of those only what is no container
of others: what actors say they did, ways over the bus, and short asks while they are served. Where several go on at
once (pages leave while the next layers compute), the instant belongs to the first by PRIORITY, so the parts sum up.
"""

from collections import defaultdict
from dataclasses import dataclass

from .story import Category, Span, Story

PRIORITY: tuple[Category, ...] = (*("compute", "send", "credit", "queue", "bus", "kv", "script", "frontend", "client"),)
_RANK = {category: rank for rank, category in enumerate(PRIORITY)}


@dataclass(frozen=True, slots=True)
class Part:
    """Seconds that went to one thing."""

    category: Category
    actor: str
    name: str
    """Of the spans: ``prefill``, ``place``, ``request``..."""
    seconds: float
    num_spans: int
    """How many spans of this kind had some of the time."""


@dataclass(frozen=True, slots=True)
class Gap:
    """A stretch of time nothing is known of. ``after`` and ``before`` are the recorded events it lies between."""

    begin: float
    end: float
    after: str
    before: str

    @property
    def seconds(self) -> float:
        """How long it is."""
        return self.end - self.begin


@dataclass(frozen=True, slots=True)
class Breakdown:
    """``jct_s`` is the sum of ``explained_s`` (the sum of parts) and ``unexplained_s`` (the sum of gaps)."""

    parts: list[Part]
    """The largest first."""
    gaps: list[Gap]
    """By begin."""
    jct_s: float
    explained_s: float
    unexplained_s: float
    is_over: bool
    """Otherwise it is explained until the last record."""

    @property
    def share(self) -> float:
        """The explained share of the whole, 1 for nothing at all."""
        return self.explained_s / self.jct_s if self.jct_s > 0 else 1.0

    def by_category(self) -> dict[Category, float]:
        """Return the seconds of each category that has some, the largest first."""
        seconds: dict[Category, float] = defaultdict(float)
        for part in self.parts:
            seconds[part.category] += part.seconds
        return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def breakdown(story: Story, *, until: float | None = None) -> Breakdown:
    """Return where a request's time went, from its begin to its end, or to the last record where it has none.

    With ``until`` it is the time up to then.
    """
    begin = story.begin
    end = max(begin, story.last) if story.end is None else story.end
    if until is not None:
        end = max(begin, min(end, until))
    leaves = [span for span in story.spans if _counts(span) and span.begin < end and (span.end or begin) > begin]
    seconds: dict[tuple[Category, str, str], float] = defaultdict(float)
    holders: dict[tuple[Category, str, str], set[int]] = defaultdict(set)
    gaps: list[tuple[float, float]] = []
    for left, right, span in _sweep(leaves, begin, end):
        if span is not None:
            key = span.category, span.actor, span.name
            seconds[key] += right - left
            holders[key].add(id(span))
        elif gaps and gaps[-1][1] == left:
            gaps[-1] = gaps[-1][0], right
        else:
            gaps.append((left, right))
    parts = [Part(*key, each, len(holders[key])) for key, each in seconds.items()]
    return Breakdown(
        parts=sorted(parts, key=lambda part: -part.seconds),
        gaps=_named(gaps, story),
        jct_s=end - begin,
        explained_s=sum(part.seconds for part in parts),
        unexplained_s=sum(right - left for left, right in gaps),
        is_over=story.end is not None,
    )


def _counts(span: Span) -> bool:
    return span.category in _RANK and span.end is not None and span.end > span.begin and not span.is_tell


def _sweep(leaves: list[Span], begin: float, end: float) -> list[tuple[float, float, Span | None]]:
    """Return the stretches of [begin, end), each with whose it is: the first by priority, then the one begun last."""
    opening: dict[float, list[Span]] = defaultdict(list)
    closing: dict[float, list[Span]] = defaultdict(list)
    for span in leaves:
        assert span.end is not None
        opening[max(begin, span.begin)].append(span)
        closing[min(end, span.end)].append(span)
    stretches: list[tuple[float, float, Span | None]] = []
    active: dict[int, Span] = {}
    left = begin
    for time in sorted({*opening, *closing, end}):
        if time > left:
            first = min(active.values(), key=lambda span: (_RANK[span.category], -span.begin), default=None)
            stretches.append((left, time, first))
            left = time
        for span in closing.get(time, ()):
            active.pop(id(span), None)
        for span in opening.get(time, ()):
            active[id(span)] = span
    return stretches


_WHO = {
    "http": "the HTTP request",
    "call": "{name} asked of {actor}",
    "serve": "{name} served by {actor}",
    "bus": "the {name}'s way, of what {actor} was asked",
    "phase": "{name} of {actor}",
}


def _named(gaps: list[tuple[float, float]], story: Story) -> list[Gap]:
    if not gaps:
        return []
    points = []
    for span in story.spans:
        who = _WHO[span.kind].format(name=span.name, actor=span.actor)
        points.append((span.begin, f"begin of {who}"))
        if span.end is not None:
            points.append((span.end, f"end of {who}"))
    points.sort()
    named = []
    for left, right in gaps:
        after = [text for time, text in points if time == left] or ["the begin"]
        before = [text for time, text in points if time == right] or ["the last record"]
        named.append(Gap(left, right, after[-1], before[0]))
    return named
