"""Who plays in some requests, in the order people think of them: frontends, routers, KV managers, engines, others."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

from callboard.actors.protocol import Entry

from .story import Span, Story

KINDS = ("frontend", "router", "kv_manager", "engine", "")
"""As the directory knows them; the last is whoever else."""
_KIND_OF_PHASE = {
    "http": "frontend",
    "read": "frontend",
    "tokenise": "frontend",
    "write": "frontend",
    "reroute": "frontend",
    "attempt": "router",
    "script": "router",
    "blocks": "kv_manager",
    "tier": "kv_manager",
    "pages": "kv_manager",
    "verify": "kv_manager",
    "place": "engine",
    "queue": "engine",
    "prefill": "engine",
    "compute": "engine",
    "decode": "engine",
    "paused": "engine",
    "held": "engine",
}
_KIND_OF_SERVED = {
    "generate": "router",
    "prep_recv": "kv_manager",
    "remote_send": "kv_manager",
    "open_write": "kv_manager",
    "take_pages": "kv_manager",
    "close_write": "kv_manager",
    "admit": "kv_manager",
    "release": "kv_manager",
    "start_generate": "engine",
    "compute_kv": "engine",
}


def cast_of(stories: Iterable[Story], entries: Sequence[Entry] = ()) -> dict[str, str]:
    """Return the kind of every actor in the stories, in order: the directory's word, else what it did tells.

    Of engines, those that only compute for others come first, and those that only generate last.
    """
    kinds: dict[str, str] = {}
    serves: dict[str, set[str]] = defaultdict(set)
    for story in stories:
        for span in story.spans:
            for name in (asker(span), span.actor):
                kinds.setdefault(name, "")
            if span.kind == "serve":
                serves[span.actor].add(span.name)
            known = _KIND_OF_PHASE if span.kind in ("http", "phase") else _KIND_OF_SERVED
            if not kinds[span.actor]:
                kinds[span.actor] = known.get(span.name, "")
    kinds |= {entry.name: entry.kind for entry in entries if entry.name in kinds and entry.kind in KINDS}

    def order(name: str) -> tuple[int, int, tuple[str, int, str]]:
        rank = ("start_generate" in serves[name]) - ("compute_kv" in serves[name])
        return KINDS.index(kinds[name]), rank, _natural(name)

    return {name: kinds[name] for name in sorted(kinds, key=order)}


def asker(span: Span) -> str:
    """Return who did what a span says: of a call, who asked; its node, where that is not known."""
    if span.kind not in ("call", "bus"):
        return span.actor
    return span.source or (span.node if span.kind == "call" or span.parent is None else asker(span.parent))


def _natural(name: str) -> tuple[str, int, str]:
    stem = name.rstrip("0123456789")
    digits = name[len(stem) :]
    return stem, int(digits) if digits else -1, name
