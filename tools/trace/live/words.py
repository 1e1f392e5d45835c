"""What was done for a request, in sentences: one a sub-request, for people who have read no manual."""

from dataclasses import dataclass
from typing import Any

from callboard.tools.trace.past import bare_id
from callboard.tools.trace.story import Span, Story
from callboard.tools.units import format_size

VERBS = (
    ("prep_recv", "looks the prompt up in the prefix cache, reserves room"),
    ("remote_send", "computes the KV that is missing, writes it there"),
    ("start_generate", "takes the room over and generates tokens"),
)
"""What each verb is for, in a line."""


@dataclass(frozen=True, slots=True)
class Sentence:
    """One sub-request: ``1 prep_recv → decode, 0.8 ms:`` and what became of it."""

    number: int
    verb: str
    to: str
    seconds: float
    """That it took, or has taken so far."""
    text: str
    is_failed: bool = False
    is_running: bool = False


def took(seconds: float) -> str:
    """Return a duration for people: ``0.8 ms``, ``41 ms``, ``1.9 s``."""
    if seconds < 0.0095:
        return f"{seconds * 1000:.1f} ms"
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    return f"{seconds:.2f} s" if seconds < 9.995 else f"{seconds:.1f} s" if seconds < 600 else f"{seconds / 60:.0f} min"


def tokens(num: int) -> str:
    """Return a number of tokens."""
    return f"{num:,} token{'s' * (num != 1)}"


def sentences(story: Story, now: float) -> list[Sentence]:
    """Return what each sub-request did, in the order they were made."""
    found = []
    engines = {
        span.facts["reservation"]: receiver(span)
        for span in story.sub_requests
        if span.name == "prep_recv" and "reservation" in span.facts
    }
    for number, span in enumerate(story.sub_requests, 1):
        seconds = span.seconds
        if span.end is None:
            text, seconds = f"{_so_far(span)} ...", max(0.0, now - span.begin)
        elif span.error == "cancelled":
            text = "cancelled: who asked for it left"
        elif span.error:
            text = f"failed: {span.error}"
        else:
            text = _TELLERS[span.name](span, engines.get(span.facts.get("reservation"), ""))
        failed = bool(span.error) and span.error != "cancelled"
        found.append(Sentence(number, span.name, receiver(span), seconds, text, failed, span.end is None))
    return found


def receiver(span: Span) -> str:
    """Return the engine a sub-request is for: KV managers act in the name of one."""
    engine = span.facts.get("engine")
    return engine if isinstance(engine, str) and engine else span.actor


def _number(facts: dict[str, Any], name: str) -> int | None:
    value = facts.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _prepared(span: Span, _: str) -> str:
    facts = span.facts
    cached, begin, end = (_number(facts, name) for name in ("num_cached_tokens", "begin", "end"))
    prompt = _number(facts, "num_tokens")
    if cached is None or begin is None or end is None:
        return "reserved room"
    whole = f"{prompt} prompt tokens" if prompt is not None else "the prompt"
    matched = f"found {cached or 'none'} of {whole} in its prefix cache"
    blocks = _number(facts, "num_blocks")
    room = f"{blocks} blocks" if blocks else "room"
    reserved = f"reserved {room} for [{begin}, {end})" if end > begin else "lacks nothing"
    return f"{matched}, {reserved}{_waited(span)}"


def _sent(span: Span, to: str) -> str:
    facts = span.facts
    computed, reused = _number(facts, "num_computed_tokens") or 0, _number(facts, "num_reused_tokens") or 0
    begin, end, size = (_number(facts, name) for name in ("begin", "end", "num_bytes"))
    compute_s, queue_s, tail_s = (facts.get(name) or 0.0 for name in ("compute_s", "queue_s", "tail_s"))
    if computed:
        did = f"computed {tokens(computed)} in {took(compute_s)}"
        did += f" after {took(queue_s)} in the queue" if queue_s >= max(0.005, 0.05 * span.seconds) else ""
        did += f", reused {reused} from its cache" if reused else ""
    else:
        did = f"had all {tokens(reused)} in its cache" if reused else "had nothing to compute"
    where = f"the KV of [{begin}, {end})" if begin is not None and end is not None else "their KV"
    lane = f" through {facts['lane']}" if facts.get("lane") else ""
    did += f"; sent {where}, {format_size(size or 0)}, into {to or 'the receiver'}'s pool{lane}"
    if computed:
        after = f"{took(tail_s)} after" if tail_s >= 0.0001 else "with"
        did += f", layer by layer, done {after} the last layer"
    return did


def _generated(span: Span, _: str) -> str:
    parts = []
    phases = {each.name: each for each in _below(span) if each.kind == "phase"}
    num = _number(phases["prefill"].facts, "num_tokens") if "prefill" in phases else None
    if "reservation" in span.facts:
        parts.append("took over the reserved room" + (" with the whole prompt in it" if num == 0 else ""))
    queued = sum(each.seconds for each in _below(span) if each.category == "queue")
    if queued >= max(0.005, 0.02 * span.seconds):
        parts.append(f"waited {took(queued)} in the queue")
    if num:
        parts.append(f"computed {num} prompt token{'s' * (num != 1)}")
    first = f", the first after {took(span.first - span.begin)}" if span.first else ""
    parts.append(f"generated {tokens(span.num_items)}{first}")
    return ", ".join(parts)


def _so_far(span: Span) -> str:
    """Return what an unfinished sub-request is at. A phase is only heard of when it is over."""
    over = {each.name for each in _below(span) if each.kind == "phase"}
    if span.name == "prep_recv":
        return "looks up the prompt, and waits for free blocks"
    if span.name == "remote_send":
        if "compute" in over:
            return "has computed, sends the last pages"
        return "computes and sends" if "queue" in over or "send" in over else "waits for its turn, or computes"
    if "prefill" in over:
        return "generates tokens"
    return "computes the rest of the prompt" if "queue" in over else "waits for its turn, or computes"


def _waited(span: Span) -> str:
    waited = sum(each.seconds for each in _below(span) if each.name == "blocks")
    return f" after waiting {took(waited)} for free blocks" if waited >= 0.001 else ""


_TELLERS = {"prep_recv": _prepared, "remote_send": _sent, "start_generate": _generated}


def _below(span: Span) -> list[Span]:
    found = []
    for child in span.children:
        found += [child, *_below(child)]
    return found


def state_of(story: Story, error: str, *, is_running: bool, is_over: bool) -> str:
    """Return how a request stands, in a word or two."""
    error = error or story.error
    if error:
        return "cancelled" if error == "cancelled" else "failed"
    if is_over:
        return "done"
    if not is_running:
        return "no end known"
    last = next((span for span in reversed(story.sub_requests) if span.end is None), None)
    return last.name if last else "running"


def short_id(request_id: str) -> str:
    """Return the part of an id that tells requests apart: ``chatcmpl-4f1d22c0a9e34b11`` is ``4f1d22c0``."""
    return bare_id(request_id)[:8]
