"""W3C trace context at the HTTP door: a client's ``traceparent`` and ``tracestate`` in, those of the answer out.

By https://www.w3.org/TR/trace-context-2/: a header that breaks its rules is as good as none, and a new trace begins.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from random import Random

Headers = Iterable[tuple[bytes, bytes]]

MOST_STATE = 512
"""Characters of tracestate that are kept: what the specification asks for at least."""
_MOST_MEMBERS = 32
_LONG_MEMBER = 128
"""Members longer than this are the first to go where not all fit."""
_SAMPLED, _RANDOM = 0x01, 0x02
"""Flags: the caller may have recorded its part; the trace id's last 7 bytes are random."""

_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.DOTALL)
_MEMBER = re.compile(
    r"([a-z0-9][a-z0-9_\-*/@]{0,255})=([\x20-\x2b\x2d-\x3c\x3e-\x7e]{0,255}[\x21-\x2b\x2d-\x3c\x3e-\x7e])"
)
_BLANKS = " \t"


@dataclass(frozen=True, slots=True)
class TraceContext:
    """Which trace a request belongs to. ``parent_id``: the caller's span; None where the trace begins here."""

    trace_id: str
    """32 lowercase hex digits, not all 0."""
    parent_id: str | None = None
    """16 of them, not all 0."""
    flags: int = _SAMPLED | _RANDOM
    state: str = ""
    """The caller's tracestate, of at most MOST_STATE characters."""

    @property
    def is_sampled(self) -> bool:
        """Whether the caller may have recorded its part; what begins here is."""
        return bool(self.flags & _SAMPLED)

    def traceparent(self, span: int) -> str:
        """Return the header that names ``span`` (of 64 bits, not 0) as the parent of what follows."""
        return f"00-{self.trace_id}-{span:016x}-{self.flags:02x}"

    def headers(self, span: int) -> list[tuple[bytes, bytes]]:
        """Return the answer's headers: ``span`` is the request's root span."""
        value = self.traceparent(span).encode()
        return [(b"traceparent", value), (b"traceresponse", value)]

    def onward(self, span: int) -> dict[str, str]:
        """Return the headers of what is asked of others on behalf of ``span``; none where the trace begins here."""
        if self.parent_id is None:
            return {}
        state = {"tracestate": self.state} if self.state else {}
        return {"traceparent": self.traceparent(span), **state}

    def facts(self) -> dict[str, str | bool]:
        """Return what the root span says of its trace."""
        facts: dict[str, str | bool] = {"trace_id": self.trace_id}
        if self.parent_id is not None:
            facts |= {"parent_id": self.parent_id, "sampled": self.is_sampled}
        if self.state:
            facts["trace_state"] = self.state
        return facts


def accept(headers: Headers, rng: Random) -> TraceContext:
    """Return the trace that a request's headers name, or a new one. ``headers`` have lowercase names, as in ASGI."""
    parents: list[str] = []
    states: list[str] = []
    for name, value in headers:
        if name == b"traceparent":
            parents.append(value.decode("latin-1"))
        elif name == b"tracestate":
            states.append(value.decode("latin-1"))
    found = parse(parents[0], ",".join(states)) if len(parents) == 1 else None
    return found or TraceContext(f"{rng.getrandbits(128) or 1:032x}")


def parse(traceparent: str, tracestate: str = "") -> TraceContext | None:
    """Return what the two headers say; None for a traceparent that breaks the rules."""
    match = _TRACEPARENT.fullmatch(traceparent.strip(_BLANKS))
    if match is None:
        return None
    version, trace_id, parent_id, flags, rest = match.groups()
    # A later version may say more, after a dash; this one says nothing more.
    if version == "ff" or (version == "00" and rest is not None) or not int(trace_id, 16) or not int(parent_id, 16):
        return None
    return TraceContext(trace_id, parent_id, int(flags, 16) & (_SAMPLED | _RANDOM), _kept(tracestate))


def _kept(tracestate: str) -> str:
    """Return as much of a tracestate as is passed on; nothing of one that breaks the rules."""
    members = [member for each in tracestate.split(",") if (member := each.strip(_BLANKS))]
    matches = [_MEMBER.fullmatch(member) for member in members]
    keys = {match[1] for match in matches if match is not None}
    if len(members) > _MOST_MEMBERS or len(keys) < len(members):
        return ""
    # Those at the front are the newest, and the likeliest to be asked for.
    while _length(members) > MOST_STATE:
        long = [index for index, member in enumerate(members) if len(member) > _LONG_MEMBER]
        del members[long[-1] if long else -1]
    return ",".join(members)


def _length(members: list[str]) -> int:
    return sum(map(len, members)) + len(members) - 1 if members else 0
