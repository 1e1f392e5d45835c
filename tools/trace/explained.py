"""An explained request: for people, as text with bars, and for machines, as JSON."""

import json
import math
import time
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.text import Text

from .breakdown import Breakdown, breakdown
from .story import Category, Span, Story
from .waterfall import Line, axis, bar, lines_of, num_hidden, said_of, walk
from .words import CATEGORIES, count, ms

STYLES: dict[Category, str] = {
    "compute": "green",
    "send": "blue",
    "credit": "magenta",
    "queue": "yellow",
    "bus": "bright_black",
    "kv": "cyan",
    "script": "white",
    "frontend": "white",
    "client": "magenta",
}
ERROR = "bold red"
NARROWEST, WIDEST = 16, 40
"""Cells of a bar."""
MOST_GAPS = 3


def print_text(
    story: Story, console: Console, *, missing: Mapping[str, str] | None = None, now: float | None = None
) -> None:
    """Print where a request's time went. ``now`` is the reader's clock, where the request may go on."""
    found = breakdown(story)
    for text in _head(story, found, now):
        console.print(text, soft_wrap=True)
    console.print()
    _print_tree(story, found, console)
    console.print()
    _print_parts(found, _of_ttft(story), console)
    for note in _notes(story, missing or {}):
        console.print(Text(note, style="yellow"))


# ---- the head ----------------------------------------------------------------------------------------------------


def _head(story: Story, found: Breakdown, now: float | None) -> list[Text]:
    first = Text.assemble("Request ", (story.request_id, "bold"))
    if story.wall:
        moment = time.strftime("%H:%M:%S", time.localtime(story.wall))
        first.append(f" at {moment}.{int(story.wall % 1 * 1000):03d}")
    if story.model:
        first.append(f", model {story.model}")
    if story.num_prompt_tokens is not None:
        first.append(f", {count(story.num_prompt_tokens, 'prompt token')}")
    if story.num_tokens is not None:
        first.append(f", {count(story.num_tokens, 'output token')}")
    lines = [first]
    if story.error:
        lines.append(Text(f"It failed: {story.error}", style=ERROR))
    times = []
    if story.ttft_s is not None:
        times.append(f"TTFT {ms(story.ttft_s)}")
    if story.jct_s is None:
        so_far = "" if now is None else f" after {ms(now - story.begin)}"
        times.append(f"not over{so_far}: explained until its last record, {ms(found.jct_s)} after its begin")
    else:
        times.append(f"JCT {ms(story.jct_s)}")
    if (itl := mean_itl_s(story)) is not None:
        times.append(f"ITL {ms(itl)} on average")
    times.append(f"{_percent(found.share)} of the time is explained")
    lines.append(Text("; ".join(times)))
    if story.script:
        script = f"Script {story.script} {story.version}".rstrip()
        if options := _options(story):
            script += f" ({options})"
        if story.notes:
            script += ", noted " + ", ".join(f"{name}={value}" for name, value in story.notes.items())
        lines.append(Text(script))
    if engines := engines_of(story):
        lines.append(Text("Engines: " + ", ".join(f"{name} ({' and '.join(did)})" for name, did in engines.items())))
    return lines


def _percent(share: float) -> str:
    """Return a share; never 100% for less."""
    return f"{math.floor(share * 1000) / 10:.1f}%" if share < 1 - 1e-9 else "100%"


def _options(story: Story) -> str:
    try:
        options = json.loads(story.options)
    except ValueError:
        return story.options
    return ", ".join(f"{name}={value}" for name, value in options.items()) if isinstance(options, dict) else ""


def mean_itl_s(story: Story) -> float | None:
    """Return the mean gap between two tokens while decoding, over all sequences; None where none was recorded."""
    decodes = [span for span in story.spans if span.name == "decode" and span.kind == "phase"]
    num_tokens = sum(span.facts.get("num_tokens", 0) for span in decodes)
    return sum(span.seconds for span in decodes) / num_tokens if num_tokens else None


def engines_of(story: Story) -> dict[str, list[str]]:
    """Return the engines that took part, in that order, and which verbs they were for."""
    engines: dict[str, list[str]] = {}
    for span in story.sub_requests:
        name = span.facts.get("engine", "") if span.name != "start_generate" else span.actor
        if name and span.name not in engines.setdefault(name, []):
            engines[name].append(span.name)
    return engines


# ---- the tree ----------------------------------------------------------------------------------------------------


def _print_tree(story: Story, found: Breakdown, console: Console) -> None:
    lines = lines_of(story)
    rows = [row for line in lines for row in _rows(line, "", "")]
    name_width = max([len(name) for name, _ in rows] + [11])
    actor_width = max([len(line.span.actor) for _, line in rows] + [5])
    said = [said_of(line) for _, line in rows]
    fixed = name_width + actor_width + 24
    width = min(WIDEST, max(NARROWEST, console.width - fixed - 2 - max(map(len, said), default=0)))
    begin, end = story.begin, story.begin + found.jct_s
    header = f"{'SUB-REQUEST':{name_width}}  {'ACTOR':{actor_width}}  {'AT MS':>8}  {'MS':>8}  "
    console.print(Text(header + axis(found.jct_s, width), style="bold"), soft_wrap=True)
    for (name, line), words in zip(rows, said, strict=True):
        seconds = line.seconds
        took = "..." if seconds is None else f"{seconds * 1e3:.1f}"
        at = f"{(line.span.begin - story.begin) * 1e3:.1f}"
        text = Text(f"{name:{name_width}}  {line.span.actor:{actor_width}}  {at:>8}  {took:>8}  ")
        text.append(bar(line.spans, begin, end, width), style=STYLES.get(line.span.category, ""))
        if words:
            is_narrow = console.is_terminal and fixed + width + 2 + len(words) > console.width
            text.append(f"\n{'':{name_width}}  {words}" if is_narrow else f"  {words}", style="dim")
        if line.error:
            # The whole sentence stands where it happened; those above pass it on.
            is_below = any(each.error for each in walk(line.children))
            text.append("  failed" if is_below else f"  failed: {line.error}", style=ERROR)
        console.print(text, soft_wrap=True)
    if hidden := num_hidden(story, lines):
        console.print(Text(f"{count(hidden, 'span')} shorter than 1% not shown here, counted below", style="dim"))


def _rows(line: Line, first: str, rest: str) -> list[tuple[str, Line]]:
    rows = [(first + line.name, line)]
    for index, child in enumerate(line.children):
        is_last = index == len(line.children) - 1
        rows += _rows(child, rest + ("└ " if is_last else "├ "), rest + ("  " if is_last else "│ "))
    return rows


# ---- where the time went -----------------------------------------------------------------------------------------


def rows_of(found: Breakdown) -> list[tuple[Category, str, float, dict[str, float]]]:
    """Return category, actor, seconds, and the seconds of each name within; the largest first."""
    rows: dict[tuple[Category, str], dict[str, float]] = defaultdict(dict)
    for part in found.parts:
        # Which way a message went says less than that it was under way: all of the bus is one.
        key = part.category, "" if part.category == "bus" else part.actor
        rows[key][part.name] = rows[key].get(part.name, 0.0) + part.seconds
    made = [(category, actor, sum(names.values()), names) for (category, actor), names in rows.items()]
    return sorted(made, key=lambda row: -row[2])


def _of_ttft(story: Story) -> Breakdown | None:
    """Return where the time to the first token went, where that is not the whole."""
    if story.ttft_s is None or story.ttft_s >= 0.99 * (story.jct_s or math.inf):
        return None
    return breakdown(story, until=story.begin + story.ttft_s)


def _print_parts(found: Breakdown, first: Breakdown | None, console: Console) -> None:
    rows = rows_of(found)
    until_first = {} if first is None else {row[:2]: row[2] for row in rows_of(first)}
    width = max([len(actor) for _, actor, _, _ in rows] + [5])
    header = f"{'WHERE IT WENT':13}  {'ACTOR':{width}}  {'MS':>9}  {'%':>6}"
    console.print(Text(header if first is None else f"{header}  {'OF TTFT':>9}", style="bold"))

    def row(what: str, actor: str, seconds: float, of_ttft: float, style: str) -> Text:
        share = _share(seconds / found.jct_s if found.jct_s else 0.0)
        text = Text.assemble((f"{what:13}", style), f"  {actor:{width}}  {seconds * 1e3:9.1f}  {share:>6}")
        return text if first is None else text.append(f"  {of_ttft * 1e3:9.1f}")

    for category, actor, seconds, names in rows:
        of_ttft = until_first.get((category, actor), 0.0)
        text = row(CATEGORIES[category], actor, seconds, of_ttft, STYLES[category])
        if len(names) > 1 and category != "bus":
            each = (f"{name} {ms(taken)}" for name, taken in sorted(names.items(), key=lambda item: -item[1]))
            text.append("  " + ", ".join(each), style="dim")
        console.print(text, soft_wrap=True)
    text = row("unexplained", "", found.unexplained_s, first.unexplained_s if first else 0.0, "bold")
    longest = sorted(found.gaps, key=lambda gap: -gap.seconds)[:MOST_GAPS]
    if found.share < 0.98 and longest:
        text.append("  longest: " + ", ".join(f"{ms(gap.seconds)} after {gap.after}" for gap in longest), style="dim")
    console.print(text, soft_wrap=True)
    console.print(row("in all", "", found.jct_s, first.jct_s if first else 0.0, ""), soft_wrap=True)


def _share(share: float) -> str:
    return "<0.1%" if 0 < share < 0.0005 else f"{share:.1%}"


def _notes(story: Story, missing: Mapping[str, str]) -> list[str]:
    notes = []
    if story.end is None:
        running = [f"{span.name} of {span.actor}" for span in story.sub_requests if span.end is None]
        if running:
            notes.append(f"Under way: {', '.join(running)}. What an engine computes now is told when it is done.")
    for span in story.sub_requests:
        if span.error.startswith("ActorDied") and not any(child.kind == "serve" for child in span.children):
            notes.append(f"{span.actor} died: what it had noted of {span.name} died with it.")
    if story.clock_error_s:
        errors: dict[str, float] = {}
        for span in (each for each in story.spans if each.kind != "bus"):
            errors[span.node] = max(errors.get(span.node, 0.0), span.error_s)
        far = [f"{node} by {ms(error)}" for node, error in errors.items() if error]
        notes.append(f"Other hosts' clocks may be off: {', '.join(far)}. No effect is shown before its cause.")
    notes += [f"{node} could not be asked, what it knows is missing: {why}" for node, why in missing.items()]
    return notes


# ---- for machines ------------------------------------------------------------------------------------------------


def as_json(story: Story, *, missing: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return all of it as plain data. Times are milliseconds from the request's begin."""
    found, first = breakdown(story), _of_ttft(story)

    def at(time: float | None) -> float | None:
        return None if time is None else round((time - story.begin) * 1e3, 6)

    def span_of(span: Span) -> dict[str, Any]:
        return {
            "id": f"{span.id:016x}",
            "parent": None if span.parent is None else f"{span.parent.id:016x}",
            "kind": span.kind,
            "name": span.name,
            "category": span.category,
            "actor": span.actor,
            "source": span.source,
            "node": span.node,
            "sequence": span.request_id,
            "begin_ms": at(span.begin),
            "end_ms": at(span.end),
            "first_ms": at(span.first) if span.first else None,
            "error": span.error,
            "num_bytes": span.num_bytes,
            "num_items": span.num_items,
            "clock_error_ms": span.error_s * 1e3,
            "facts": span.facts,
        }

    def breakdown_of(found: Breakdown) -> dict[str, Any]:
        return {
            "whole_ms": milli(found.jct_s),
            "explained_ms": milli(found.explained_s),
            "unexplained_ms": milli(found.unexplained_s),
            "explained_share": round(found.share, 6),
            "parts": [
                {
                    "category": part.category,
                    "actor": part.actor,
                    "name": part.name,
                    "ms": milli(part.seconds),
                    "num_spans": part.num_spans,
                }
                for part in found.parts
            ],
            "gaps": [
                {"begin_ms": at(gap.begin), "end_ms": at(gap.end), "after": gap.after, "before": gap.before}
                for gap in found.gaps
            ],
        }

    def milli(seconds: float | None) -> float | None:
        return None if seconds is None else round(seconds * 1e3, 6)

    return {
        "request_id": story.request_id,
        "model": story.model,
        "wall": story.wall,
        "is_over": story.end is not None,
        "error": story.error,
        "num_prompt_tokens": story.num_prompt_tokens,
        "num_tokens": story.num_tokens,
        "ttft_ms": milli(story.ttft_s),
        "jct_ms": milli(story.jct_s),
        "itl_mean_ms": milli(mean_itl_s(story)),
        "script": {"name": story.script, "version": story.version, "options": story.options, "notes": story.notes},
        "engines": engines_of(story),
        "clock_error_ms": story.clock_error_s * 1e3,
        "missing_nodes": dict(missing or {}),
        "breakdown": breakdown_of(found),
        "ttft_breakdown": None if first is None else breakdown_of(first),
        "spans": [span_of(span) for span in story.spans],
    }
