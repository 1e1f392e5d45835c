"""What a message or a phase means, in words, from its facts."""

from collections.abc import Callable
from typing import Any

from callboard.actors.protocol import ATTEMPTS_EACH, FIRST_DIRECT_ATTEMPT
from callboard.bus.taps import SPAN
from callboard.router.peer import HAND_ON_BITS
from callboard.tools.units import format_size

from .told import Reader, Told

Facts = dict[str, Any]
Phrase = Callable[[Told, Reader], str]
SLOW_S = 1e-3
"""Waiting shorter than this is not worth a word."""


def phrase(told: Told, reader: Reader) -> str:
    """Return the words; empty where the columns say it all."""
    record, is_phase = told.event.record, told.event.record.what == SPAN
    if told.error:
        return "cancelled by its caller" if told.error == "cancelled" else f"failed: {told.error}"
    words = ""
    if told.facts or record.num_items or is_phase:
        known = _PHASE if is_phase else _ENDED if told.is_end else _SENT
        try:
            words = known.get(told.verb, _generic)(told, reader)
        except (TypeError, ValueError, KeyError):  # A user's own message of that name, with facts of other kinds.
            words = _generic(told, reader)
    if is_phase or not told.is_end:
        return words
    return f"done: {words}" if words else "done"


def seconds(value: float) -> str:
    """Return a duration for people: ``3.1 ms``, ``1.24 s``."""
    if value < 0.9995e-3:
        return f"{value * 1e6:.0f} us"
    if value < 0.09995:
        return f"{value * 1e3:.1f} ms"
    if value < 0.9995:
        return f"{value * 1e3:.0f} ms"
    return f"{value:.2f} s" if value < 99.995 else f"{value:.0f} s"


def count(number: Any, noun: str) -> str:
    """Return ``1 token`` or ``2 tokens``."""
    return f"{number} {noun}{'s' * (number != 1)}"


def tokens_in(begin: Any, end: Any) -> str:
    """Return a range of tokens as protocol.py means it."""
    return f"[{begin}, {end})"


def _generic(told: Told, reader: Reader) -> str:
    return " ".join(f"{name}={_short(value)}" for name, value in told.facts.items() if name != "num_tokens")


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _end_of(facts: Facts) -> int | None:
    """Return where a range of the prompt ends, as a position from its begin."""
    end, num_tokens = facts.get("end"), facts.get("num_tokens")
    if not isinstance(end, int):
        return num_tokens if isinstance(num_tokens, int) else None
    return end + num_tokens if end < 0 and isinstance(num_tokens, int) else end


def _again(facts: Facts) -> str:
    words = _number_of(facts.get("attempt", 0))
    return f" ({', '.join(words)})" if words else ""


def _number_of(number: Any) -> list[str]:
    """Return what the number of an attempt says, beyond that it is the first one."""
    if not isinstance(number, int) or not 0 < number < FIRST_DIRECT_ATTEMPT:
        return []
    router, attempt = divmod(number % (1 << HAND_ON_BITS), ATTEMPTS_EACH)  # Above: of who handed the request on.
    after = [f"after {count(router, 'other router')}"] if router else []
    return [*after, f"attempt {attempt + 1}"] if attempt else after


def _waited(facts: Facts, *names: str) -> list[str]:
    return [
        f"{name.removesuffix('_s')} {seconds(value)}"
        for name in names
        if isinstance(value := facts.get(name), int | float) and value >= SLOW_S
    ]


# ---- messages that are sent ----------------------------------------------------------------------------------------


def _sent_generate(told: Told, reader: Reader) -> str:
    facts = told.facts
    return f"a request for {facts.get('model', 'a model')}: {count(facts.get('num_tokens', '?'), 'prompt token')}"


def _sent_prep_recv(told: Told, reader: Reader) -> str:
    facts = told.facts
    end = _end_of(facts)
    room = f"make room for the KV of {count(facts.get('num_tokens', '?'), 'token')}"
    part = f", {tokens_in(0, end)} to be received" if end is not None and end != facts.get("num_tokens") else ""
    return f"{room}{part}{_again(facts)}"


def _sent_remote_send(told: Told, reader: Reader) -> str:
    facts = told.facts
    to = reader.engine_of(facts.get("reservation", "")) or "the receiver"
    return f"write the KV of tokens {tokens_in(facts.get('begin', 0), _end_of(facts))} to {to}, compute what is missing"


def _sent_start_generate(told: Told, reader: Reader) -> str:
    facts = told.facts
    begin, num_tokens = facts.get("begin"), facts.get("num_tokens", "?")
    if not isinstance(begin, int):
        return f"compute what is not cached of {count(num_tokens, 'token')}, and generate{_again(facts)}"
    if begin == num_tokens:
        return f"take over that KV, and generate{_again(facts)}"
    return f"take over that KV, compute tokens {tokens_in(begin, num_tokens)}, and generate{_again(facts)}"


def _sent_compute_kv(told: Told, reader: Reader) -> str:
    return f"compute the KV of tokens {tokens_in(told.facts.get('num_cached_tokens', 0), told.facts.get('num_tokens'))}"


def _sent_open_write(told: Told, reader: Reader) -> str:
    return f"may tokens {tokens_in(told.facts.get('begin'), told.facts.get('end'))} be written?"


def _sent_close_write(told: Told, reader: Reader) -> str:
    return "all is written" if told.facts.get("is_complete") else "no more is written, and not all is there"


def _sent_admit(told: Told, reader: Reader) -> str:
    blocks = f"blocks for {count(told.facts.get('num_tokens', '?'), 'token')}"
    return f"{blocks}, those reserved among them" if "reservation" in told.facts else blocks


# ---- how they ended ------------------------------------------------------------------------------------------------


def _tokens_came(told: Told, reader: Reader) -> str:
    event = told.event
    num = event.record.num_items
    first = f", first after {seconds(event.first - event.begin)}" if event.first else ""
    return f"{count(num, 'token')}{first}"


def _ended_prep_recv(told: Told, reader: Reader) -> str:
    facts = told.facts
    begin, end, cached = facts.get("begin"), facts.get("end"), facts.get("num_cached_tokens", 0)
    lacks = f"lacks {tokens_in(begin, end)}" if begin != end else "lacks nothing"
    return f"{cached} of {count(told.asked.get('num_tokens', '?'), 'token')} cached, {lacks}"


def _ended_remote_send(told: Told, reader: Reader) -> str:
    facts = told.facts
    sent = f"{format_size(facts.get('num_bytes', 0))} of KV by {facts.get('lane', '?')}"
    tokens = f"{facts.get('num_computed_tokens', 0)} computed, {facts.get('num_reused_tokens', 0)} reused"
    times = _waited(facts, "queue_s", "compute_s", "send_s")
    return f"{sent}, {tokens}" + (f" ({', '.join(times)})" if times else "")


def _ended_admit(told: Told, reader: Reader) -> str:
    return f"{told.facts.get('num_cached_tokens', 0)} tokens in place"


# ---- phases --------------------------------------------------------------------------------------------------------


def _http(told: Told, reader: Reader) -> str:
    facts = told.facts
    asked = " ".join(str(facts[name]) for name in ("method", "path") if name in facts)
    first = facts.get("first_s")
    event = told.event
    late = f", first token after {seconds(first - event.record.begin)}" if isinstance(first, float) and first else ""
    return f"{asked} answered {facts.get('status', '?')}{late}"


def _prefill(told: Told, reader: Reader) -> str:
    facts = told.facts
    cached = facts.get("num_cached_tokens", 0)
    if not facts.get("num_tokens"):
        return f"all {cached} prompt tokens were in place: computed the first token" if cached else ""
    return f"computed the prompt{_steps(facts)}" + (f", {cached} were in place" if cached else "")


def _compute(told: Told, reader: Reader) -> str:
    return f"computed KV to send{_steps(told.facts)}"


def _decode(told: Told, reader: Reader) -> str:
    return f"generated the rest{_steps(told.facts)}"


def _steps(facts: Facts) -> str:
    steps = f" in {count(facts['num_steps'], 'step')}" if "num_steps" in facts else ""
    batch = facts.get("batch")
    others = f"{batch - 1:.1f}".removesuffix(".0") if isinstance(batch, int | float) else "0"
    beside = f" beside {others} other{'s' * (others != '1')}" if others != "0" else ""
    waits = _waited(facts, "between_s")
    return steps + beside + (f", {waits[0]} between steps".replace("between ", "", 1) if waits else "")


def _send(told: Told, reader: Reader) -> str:
    facts = told.facts
    parts = [f"to {facts['to']}"] if "to" in facts else []
    if "layer_begin" in facts:
        parts.append(f"layers {tokens_in(facts['layer_begin'], facts.get('layer_end'))}")
    if "token_begin" in facts:
        parts.append(f"tokens {tokens_in(facts['token_begin'], facts.get('token_end'))}")
    if "lane" in facts:
        parts.append(f"by {facts['lane']}")
    return " ".join(parts)


def _attempt(told: Told, reader: Reader) -> str:
    facts = told.facts
    why = ", ".join(f"{name[4:]}={_short(value)}" for name, value in facts.items() if name.startswith("why."))
    words = ", ".join([f"ran script {facts.get('script', '?')}", *_number_of(facts.get("number", 0))])
    return words + (f": {why}" if why else "")


def _reroute(told: Told, reader: Reader) -> str:
    facts = told.facts
    return f"went on with {facts.get('to', 'another router')}: {facts.get('why', 'the one before is gone')}"


def _says(text: str) -> Phrase:
    def say(told: Told, reader: Reader) -> str:
        return text

    return say


def _blocks(told: Told, reader: Reader) -> str:
    facts = told.facts
    blocks = f"{count(facts['num_blocks'], 'block')} to be free" if "num_blocks" in facts else "free blocks"
    return f"waited for {blocks}" + (f", for {facts['purpose']}" if "purpose" in facts else "")


def _tier(told: Told, reader: Reader) -> str:
    num_tokens = told.facts.get("num_tokens", 0)
    return f"brought back {count(num_tokens, 'token')} from a tier" if num_tokens else "waited for a tier in vain"


_SENT: dict[str, Phrase] = {
    "generate": _sent_generate,
    "prep_recv": _sent_prep_recv,
    "remote_send": _sent_remote_send,
    "start_generate": _sent_start_generate,
    "compute_kv": _sent_compute_kv,
    "open_write": _sent_open_write,
    "close_write": _sent_close_write,
    "admit": _sent_admit,
}
_ENDED: dict[str, Phrase] = {
    "generate": _tokens_came,
    "start_generate": _tokens_came,
    "prep_recv": _ended_prep_recv,
    "remote_send": _ended_remote_send,
    "compute_kv": _says(""),
    "open_write": _says(""),
    "close_write": _says(""),
    "release": _says(""),
    "admit": _ended_admit,
}
_PHASE: dict[str, Phrase] = {
    "http": _http,
    "read": _says("read the request's body"),
    "tokenise": _says("made tokens of the text"),
    "open": _says("asked the router for its sequences"),
    "write": _says("wrote the end of the answer"),
    "client": _says("waited for the client to read"),
    "wait": _says("waited for an engine to be there"),
    "reroute": _reroute,
    "attempt": _attempt,
    "script": _says("ran the script's own code"),
    "blocks": _blocks,
    "tier": _tier,
    "pages": _says("waited for KV to arrive"),
    "send": _send,
    "turn": _says("waited for its turn in a busy process"),
    "tie": _says("tied itself to the other pool"),
    "lend": _says("gave the engine its blocks"),
    "settle": _says("closed what was written"),
    "verify": _says("held the pages against their sender's digests"),
    "dial": _says("dialled"),
    "accept": _says("waited until the engine was ready for it"),
    "place": _says("waited for a place in the batch"),
    "queue": _says("waited for its first step"),
    "prefill": _prefill,
    "compute": _compute,
    "decode": _decode,
    "handover": _says("handed the last token over"),
    "paused": _says("nobody read its tokens: it was not scheduled"),
    "held": _says("held it until its KV was at another engine"),
    "credit": _says("waited for its reader"),
}
