"""Requests as one web page that stands alone: people send it to a colleague, who needs nothing but a browser.

The page (page.html, page.css, and SCRIPTS) fetches nothing. What its list shows is JSON in it; the details,
which are many, are deflated in blocks, and a block is inflated when one of its requests is looked at.
"""

import base64
import hashlib
import importlib.metadata
import importlib.resources
import zlib
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import msgspec

from callboard.actors.protocol import Entry

from .breakdown import Breakdown, Part, breakdown
from .cast import asker, cast_of
from .story import VERBS, Span, Story
from .words import CATEGORIES, words_of

NUM_PER_BLOCK = 16
SCRIPTS = ("formats.js", "waterfall.js", "page.js")
VERB_WORDS = {
    "prep_recv": "asks the side that will generate to make room: it looks the prompt up in its prefix cache, "
    "and reserves blocks for what it lacks",
    "remote_send": "has the other side compute the missing KV, and write it into that room layer by layer, "
    "while it computes",
    "start_generate": "starts decoding where the KV now is; from there the tokens stream back",
}
"""What the verbs do, in one line each."""

_encode = msgspec.json.Encoder().encode


def page(stories: Sequence[Story], *, entries: Sequence[Entry] = (), fleet: str = "") -> bytes:
    """Return the page, as UTF-8."""
    index = {
        "fleet": fleet,
        "version": importlib.metadata.version("callboard"),
        "clockErrorUs": max((story.clock_error_s for story in stories), default=0.0) * 1e6,
        "colours": [*({"compute": "computing", "decode": "decoding"} | CATEGORIES).items()],
        "verbs": [[verb, VERB_WORDS[verb]] for verb in VERBS],
        "actors": list(cast_of(stories, entries).items()),
        "perBlock": NUM_PER_BLOCK,
        "requests": [_line(story) for story in stories],
    }
    blocks = [
        base64.b64encode(zlib.compress(_encode([_details(story) for story in stories[at : at + NUM_PER_BLOCK]]), 6))
        for at in range(0, len(stories), NUM_PER_BLOCK)
    ]
    style, script = _read("page.css"), b"".join(map(_read, SCRIPTS))
    parts = {
        b"{{policy}}": _policy(style, script),
        b"{{style}}": style,
        b"{{index}}": _safe(_encode(index)),
        b"{{blocks}}": _safe(_encode([block.decode() for block in blocks])),
        b"{{script}}": script,
    }
    text = _read("page.html")
    made = []
    for name, part in parts.items():  # In their order in the file: what is put in is never looked through again.
        before, text = text.split(name)
        made += [before, part]
    return b"".join([*made, text])


def _read(name: str) -> bytes:
    return importlib.resources.files("callboard.tools.trace").joinpath(name).read_bytes()


def _safe(data: bytes) -> bytes:
    """Return JSON that cannot end the element it is in, nor begin a comment."""
    return data.replace(b"<", b"\\u003c").replace(b">", b"\\u003e")


def _policy(style: bytes, script: bytes) -> bytes:
    """Return a content security policy that lets this style and this script be, and nothing else."""

    def sha(data: bytes) -> str:
        return base64.b64encode(hashlib.sha256(data).digest()).decode()

    rules = f"default-src 'none'; style-src 'sha256-{sha(style)}'; script-src 'sha256-{sha(script)}'"
    return f"{rules}; base-uri 'none'; form-action 'none'".encode()


# ---- what the page is told ---------------------------------------------------------------------------------------


def _us(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e6, 3)


def _line(story: Story) -> dict[str, Any]:
    """Return what the list shows of a request."""
    found = breakdown(story)
    return {
        "id": story.request_id,
        "at": round(story.wall * 1e3, 3),
        "jct": _us(story.jct_s),
        "ttft": _us(story.ttft_s),
        "prompt": story.num_prompt_tokens,
        "tokens": story.num_tokens,
        "model": story.model,
        "script": story.script,
        "error": story.error,
        "spent": _by_colour(found),
        "rest": _us(found.unexplained_s),
        "actors": sorted({span.actor for span in story.spans}),
    }


def _details(story: Story) -> dict[str, Any]:
    """Return what is shown of the request that is selected. Times are microseconds from its begin.

    Where clocks are wrong beyond repair, what seems to precede it is the begin.
    """
    found = breakdown(story)
    place = {id(span): index for index, span in enumerate(story.spans)}
    last = story.last if story.end is None else story.end
    zero = min([story.begin, *(span.begin for span in story.spans)])
    return {
        "version": story.version,
        "options": story.options,
        "notes": story.notes,
        "clockErrorUs": _us(story.clock_error_s),
        "length": _us(max(last, *(span.end or span.begin for span in story.spans)) - zero),
        "spans": [_span(span, story.request_id, zero, place) for span in story.spans],
        "subRequests": [place[id(span)] for span in story.sub_requests],
        "parts": _parts(found),
        "gaps": [[_us(gap.begin - zero), _us(gap.seconds), gap.after, gap.before] for gap in found.gaps],
    }


def _colour(part: Part) -> str:
    """Return the part's category; decoding has a colour of its own, for it is most of what is computed."""
    return "decode" if part.name == "decode" else part.category


def _by_colour(found: Breakdown) -> list[list[Any]]:
    seconds: dict[str, float] = defaultdict(float)
    for part in found.parts:
        seconds[_colour(part)] += part.seconds
    order = ["compute", "decode", *CATEGORIES]
    return [[colour, _us(seconds[colour])] for colour in sorted(seconds, key=order.index)]


def _parts(found: Breakdown) -> list[tuple[str, str, str, float | None, int]]:
    """Return colour, name, actor, microseconds and how often, the largest first. The bus is one part."""
    own = [part for part in found.parts if part.category != "bus"]
    if len(own) < len(found.parts):
        bus = [part for part in found.parts if part.category == "bus"]
        seconds, number = sum(part.seconds for part in bus), sum(part.num_spans for part in bus)
        own.append(Part("bus", "on their way", "bus", seconds, number))
    own.sort(key=lambda part: -part.seconds)
    return [(_colour(part), part.name, part.actor, _us(part.seconds), part.num_spans) for part in own]


def _span(span: Span, request_id: str, zero: float, place: dict[int, int]) -> list[Any]:
    """Return a span as the page has it: see FIELDS in waterfall.js."""
    end = None if span.end is None else _us(span.end - span.begin)
    return [
        None if span.parent is None else place[id(span.parent)],
        span.kind,
        span.name,
        span.category,
        asker(span),
        span.actor,
        _us(span.begin - zero),
        0 if end is None and span.is_tell else end,
        words_of([span]),
        span.error,
        "" if span.request_id == request_id else span.request_id,
        span.num_bytes,
        span.num_items,
        _us(span.first - span.begin) if span.first else 0,
        span.facts,
    ]
