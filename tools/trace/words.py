"""What a span did, in a few words for people."""

from collections.abc import Sequence
from typing import Any

from callboard.tools.units import format_size

from .story import Category, Span

CATEGORIES: dict[Category, str] = {
    "compute": "computing",
    "send": "sending",
    "credit": "unread",
    "queue": "queueing",
    "bus": "bus",
    "kv": "KV manager",
    "script": "script",
    "frontend": "frontend",
    "client": "client",
}
WAITS = {
    "wait": "until an engine was there",
    "reroute": "until another router was asked",
    "accept": "until the engine was ready for it",
    "place": "for a place among those that run",
    "queue": "for its first step",
    "paused": "nobody read its tokens",
    "held": "until its KV was at another engine",
    "credit": "nobody read its tokens",
    "client": "for the client to read",
    "pages": "for pages that were on their way",
}


def ms(seconds: float) -> str:
    """Return a duration for people, with its unit."""
    if seconds >= 10:
        return f"{seconds:.1f} s"
    if seconds >= 0.1:
        return f"{seconds * 1e3:.0f} ms"
    return f"{seconds * 1e3:.1f} ms" if seconds >= 0.001 or not seconds else f"{seconds * 1e6:.0f} us"


def count(number: float, noun: str) -> str:
    """Return ``1 token``, ``2 tokens``."""
    return f"{number:,.0f} {noun}" + ("" if number == 1 else "s")


def per_second(amount: float, seconds: float) -> float | None:
    """Return a rate, None where no time has passed."""
    return amount / seconds if seconds > 0 else None


def words_of(spans: Sequence[Span]) -> str:
    """Return what a span did, or several of the same kind one after another; empty where its name says it all."""
    span = spans[0]
    facts = span.facts
    writer = _WORDS.get(span.name) if span.kind in ("call", "phase", "http") else None
    said = writer(spans) if writer else WAITS.get(span.name, "")
    if span.name == "blocks" and span.kind == "phase":
        said = f"for {count(facts['num_blocks'], 'free block')}" if "num_blocks" in facts else "for free blocks"
    return said


def _http(spans: Sequence[Span]) -> str:
    facts = spans[0].facts
    return ", ".join(str(each) for each in (facts.get("status"), "streamed" if facts.get("stream") else "") if each)


def _prep_recv(spans: Sequence[Span]) -> str:
    facts = spans[0].facts
    if not {"num_cached_tokens", "num_tokens", "begin", "end"} <= facts.keys():
        return _tokens(facts)
    missing = max(0, facts["end"] - facts["begin"])
    cached = f"{facts['num_cached_tokens']:,} of {count(facts['num_tokens'], 'token')} in its cache"
    return f"{cached}, takes {missing:,}" if missing else f"{cached}, nothing to receive"


def _remote_send(spans: Sequence[Span]) -> str:
    facts = spans[0].facts
    if "num_computed_tokens" not in facts:
        return _tokens(facts)
    said = [f"{count(facts['num_computed_tokens'], 'token')} computed, {facts.get('num_reused_tokens', 0):,} reused"]
    if facts.get("num_bytes"):
        said.append(f"{format_size(facts['num_bytes'])} by {facts.get('lane') or 'no lane'}")
    return "; ".join(said)


def _start_generate(spans: Sequence[Span]) -> str:
    span = spans[0]
    if not span.num_items:
        return _tokens(span.facts)
    said = count(span.num_items, "token")
    return f"{said}, the first after {ms(span.first - span.begin)}" if span.first else said


def _computing(spans: Sequence[Span]) -> str:
    facts, seconds = spans[0].facts, sum(span.seconds for span in spans)
    if "num_tokens" not in facts:
        return ""
    num_tokens, num_steps = _sum(spans, "num_tokens"), _sum(spans, "num_steps")
    said = [count(num_tokens, "token")]
    if cached := facts.get("num_cached_tokens"):
        said[0] = f"{said[0]} ({cached:,} cached)" if num_tokens else f"all {count(cached, 'token')} cached"
    if num_preemptions := spans[-1].facts.get("num_preemptions"):
        said[0] += f", preempted {count(num_preemptions, 'time')}"
    if num_tokens and (rate := per_second(num_tokens, seconds)):
        said.append(f"{rate:,.0f} tokens/s" if rate >= 10 else f"{rate:.1f} tokens/s")
    if num_steps:
        step_s, between_s = _sum(spans, "step_s"), _sum(spans, "between_s")
        steps = count(num_steps, "step")
        if between_s >= 0.01 * seconds:
            steps += f" ({ms(step_s)} in steps, {ms(between_s)} between)"
        said.append(steps)
        batched = sum(span.facts.get("batch", 0.0) * span.facts.get("num_steps", 0) for span in spans)
        if batched:
            said.append(f"mean batch {batched / num_steps:.1f}")
    return "; ".join(said)


def _sum(spans: Sequence[Span], name: str) -> float:
    return float(sum(span.facts.get(name, 0) for span in spans))


def _send(spans: Sequence[Span]) -> str:
    size = sum(span.num_bytes for span in spans)
    facts, seconds = spans[0].facts, sum(span.seconds for span in spans)
    said = format_size(size)
    if facts.get("lane"):
        said += f" by {facts['lane']}"
    if facts.get("to"):
        said += f" to {facts['to']}"
    rate = per_second(size, seconds)
    return f"{said}, {format_size(int(rate))}/s" if rate else said


def _tier(spans: Sequence[Span]) -> str:
    num_tokens = _sum(spans, "num_tokens")
    return f"{count(num_tokens, 'token')} from a tier" if num_tokens else "for nothing: the tier was too slow"


def _tokens(facts: dict[str, Any]) -> str:
    return f"for {count(facts['num_tokens'], 'prompt token')}" if isinstance(facts.get("num_tokens"), int) else ""


_WORDS = {
    "http": _http,
    "prep_recv": _prep_recv,
    "remote_send": _remote_send,
    "start_generate": _start_generate,
    "prefill": _computing,
    "compute": _computing,
    "decode": _computing,
    "send": _send,
    "tier": _tier,
}
