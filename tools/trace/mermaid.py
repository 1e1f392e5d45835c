"""One request as a Mermaid sequence diagram: who asked whom, the sub-requests by number, and what took how long.

Mermaid's grammar ends a text at a line's end, ``;`` or ``#``; entity codes (``#59;``) stand for what it would take
for its own.
"""

from collections.abc import Iterator, Sequence

from callboard.actors.protocol import Entry

from .cast import asker, cast_of
from .story import Span, Story
from .words import ms, words_of

LEAST_S = 0.0005
"""Phases that took less have no note, unless they failed."""
MOST_NOTES = 3
"""Of one name, one actor and one call."""
_TITLES = {"frontend": "frontend", "router": "router", "kv_manager": "KV manager", "engine": "engine"}
_PLAIN = frozenset(" .,:_-→()/=+±'") | frozenset("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")


def diagram(story: Story, entries: Sequence[Entry] = ()) -> str:
    """Return the diagram, with a line end at its end."""
    cast = cast_of([story], entries)
    used = {asker(span) for span in story.spans} | {span.actor for span in story.spans}
    ids = {name: f"a{index}" for index, name in enumerate(name for name in cast if name in used)}
    lines = ["sequenceDiagram", "    participant client"]
    for name, each in ids.items():
        kind = _TITLES.get(cast[name], "")
        title = escaped(name) if not kind or kind == name else f"{escaped(name)}<br/>{kind}"
        lines.append(f"    participant {each} as {title}")
    numbers = {id(span): number for number, span in enumerate(story.sub_requests, 1)}
    lines += [f"    {line}" for line in _Diagram(story, ids, numbers).lines()]
    return "\n".join(lines) + "\n"


def escaped(text: str) -> str:
    """Return a text that Mermaid shows as it is."""
    return "".join(char if char in _PLAIN else " " if char.isspace() else f"#{ord(char)};" for char in text)


class _Diagram:
    """Messages and notes in the order of time."""

    def __init__(self, story: Story, ids: dict[str, str], numbers: dict[int, int]) -> None:
        self._story = story
        self._ids = ids
        self._numbers = numbers
        self._found: list[tuple[float, int, str]] = []

    def lines(self) -> Iterator[str]:
        for root in self._story.roots:
            self._add(root)
        for _, _, line in sorted(self._found, key=lambda each: each[:2]):
            yield line

    def _say(self, at: float, line: str) -> None:
        self._found.append((at, len(self._found), line))

    def _add(self, span: Span) -> None:
        if span.kind == "http":
            self._http(span)
        elif span.kind == "call":
            self._call(span)
        elif span.kind == "phase" and span.category:
            self._note(span)
        else:
            self._below(span)

    def _below(self, span: Span) -> None:
        noted: dict[tuple[str, str], list[Span]] = {}
        for child in span.children:
            if child.kind == "phase" and child.category and not child.children:
                noted.setdefault((child.name, child.actor), []).append(child)
            else:
                self._add(child)
        for same in noted.values():
            for each in same if len(same) <= MOST_NOTES else []:
                self._note(each)
            if len(same) > MOST_NOTES:
                self._notes(same)

    def _http(self, span: Span) -> None:
        door = self._ids[span.actor]
        what = f"{span.facts.get('method', '')} {span.facts.get('path', '')}".strip() or "request"
        self._say(span.begin, f"client->>+{door}: {escaped(what)}")
        self._below(span)
        if span.first:
            self._say(span.first, f"{door}-->>client: first token after {escaped(ms(span.first - span.begin))}")
        if span.end is not None:
            status = span.facts.get("status", "")
            text = f"{status} {span.error}".strip()
            arrow = "--x" if span.error else "-->>"
            self._say(span.end, f"{door}{arrow}-client: {escaped(f'{text} after {ms(span.seconds)}')}")

    def _call(self, span: Span) -> None:
        source, target = self._ids[asker(span)], self._ids[span.actor]
        number = f"({self._numbers[id(span)]}) " if id(span) in self._numbers else ""
        if span.is_tell:
            self._say(span.begin, f"{source}-){target}: {escaped(number + span.name)}")
            self._below(span)
            return
        self._say(span.begin, f"{source}->>+{target}: {escaped(number + span.name)}")
        self._below(span)
        if span.end is None:
            return
        words = words_of([span]) if number else ""
        text = f"{number}{ms(span.seconds)}" + (f": {words}" if words else "")
        if span.error:
            text += f" - {span.error}"
        self._say(span.end, f"{target}{'--x' if span.error else '-->>'}-{source}: {escaped(text)}")

    def _note(self, span: Span) -> None:
        if span.end is None or (span.seconds < LEAST_S and not span.error):
            self._below(span)
            return
        words = words_of([span])
        text = f"{span.name} {ms(span.seconds)}" + (f": {words}" if words else "")
        if span.error:
            text += f" - {span.error}"
        self._say(span.end, f"Note over {self._ids[span.actor]}: {escaped(text)}")
        self._below(span)

    def _notes(self, spans: list[Span]) -> None:
        """One note for many of a kind."""
        over = [span for span in spans if span.end is not None]
        seconds = sum(span.seconds for span in over)
        if seconds < LEAST_S:
            return
        words = words_of(over)
        text = f"{spans[0].name} {len(spans)} times, {ms(seconds)}" + (f": {words}" if words else "")
        at = max(span.end for span in over if span.end is not None)
        self._say(at, f"Note over {self._ids[spans[0].actor]}: {escaped(text)}")
