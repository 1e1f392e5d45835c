"""What the chart wants to know of a story: the number of every call's sub-request, and what was done within."""

from dataclasses import dataclass, field

from callboard.tools.trace.story import Span, Story


@dataclass(frozen=True, slots=True)
class Inside:
    """By the number of a call, as in the records (of ``http``: its own)."""

    numbers: dict[int, int] = field(default_factory=dict)
    """Which sub-request it was made for, from 1."""
    phases: dict[int, list[Span]] = field(default_factory=dict)
    """What its actor did for it, by begin."""


def inside_of(story: Story) -> Inside:
    """Return it for all calls of a story."""
    found = Inside()
    for number, span in enumerate(story.sub_requests, 1):
        _mark(span, number, found.numbers)
    for span in story.spans:
        if span.kind == "phase" and span.category:
            host = span.parent
            while host is not None and host.kind not in ("call", "http"):
                host = host.parent
            if host is not None and host.actor == span.actor:
                found.phases.setdefault(host.id, []).append(span)
    return found


def _mark(span: Span, number: int, numbers: dict[int, int]) -> None:
    if span.kind == "call":
        numbers[span.id] = number
    for child in span.children:
        _mark(child, number, numbers)


def engines_of(story: Story) -> dict[int, str]:
    """Return by call the engine that its KV manager serves."""
    found = {span.id: span.facts.get("engine") for span in story.sub_requests}
    found |= {span.id: span.source for span in story.spans if span.kind == "call" and span.name == "admit"}
    return {call: engine for call, engine in found.items() if isinstance(engine, str) and engine}
