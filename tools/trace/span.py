"""Spans, and the stories they make up: what all that show requests have in common."""

import re
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

from callboard.actors import protocol
from callboard.bus import Tell

Category = Literal["", "queue", "compute", "send", "credit", "bus", "script", "frontend", "client", "kv"]
Kind = Literal["http", "call", "serve", "bus", "phase"]

CATEGORY_OF: dict[str, Category] = {
    "read": "frontend",
    "tokenise": "frontend",
    "write": "frontend",
    "client": "client",
    "wait": "queue",
    "reroute": "queue",
    "script": "script",
    "blocks": "queue",
    "tier": "kv",
    "pages": "send",
    "send": "send",
    "accept": "queue",
    "place": "queue",
    "queue": "queue",
    "prefill": "compute",
    "compute": "compute",
    "decode": "compute",
    "paused": "credit",
    "held": "send",
    "credit": "credit",
    "open": "frontend",
    "turn": "bus",
    "dial": "bus",
    "handover": "bus",
    "tie": "kv",
    "lend": "kv",
    "settle": "kv",
    "verify": "kv",
}
"""Of the spans that actors note; others (``http``, ``attempt``) hold spans."""
VERBS = ("prep_recv", "remote_send", "start_generate")
SHORT_ASKS = frozenset(
    (
        "prep_recv",
        "open_write",
        "take_pages",
        "close_write",
        "admit",
        "release",
        "probe",
        "refill",
        "give",
        "seal",
        "finish",
        "abort",
        "freeze",
        "thaw",
    )
)
"""What is done where it is served, but for the waiting that is a span of its own."""


@dataclass(slots=True, eq=False)
class Span:
    """Something with a begin and an end. Times are seconds on the reader's clock.

    A ``call`` is as its asking side saw it (or, where that is lost, its serving side); its children are its ``serve``
    (as the serving side saw it), which holds what was done for it, and ``bus``: its way there and its answer's back.
    """

    id: int
    """Of a call and of a phase, as in the records; ``serve`` and ``bus`` have ids made of their call's."""
    parent: "Span | None"
    kind: Kind
    name: str
    category: Category
    actor: str
    source: str
    node: str
    begin: float
    end: float | None
    """None: it is not over, or its end was lost."""
    error: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    num_bytes: int = 0
    """On the bus: the message and what was answered. Of a ``send``: the pages."""
    num_items: int = 0
    first: float = 0.0
    """When the first item of a stream came to who asked; of ``http``, when the first token left. 0: none did."""
    children: list["Span"] = field(default_factory=list)
    request_id: str = ""
    """Of its sequence: ``ID.1`` within the story of ``ID``."""
    is_tell: bool = False
    error_s: float = 0.0
    """Its node's clock is known to plus or minus this."""

    @property
    def seconds(self) -> float:
        """How long it took; 0 while its end is not known."""
        return 0.0 if self.end is None else self.end - self.begin

    def __repr__(self) -> str:
        end = "..." if self.end is None else f"{self.end:.6f}"
        return f"Span({self.kind} {self.name} @{self.actor} {self.begin:.6f}-{end})"


@dataclass(slots=True)
class Story:
    """What is known of one request. Times are seconds on the reader's clock."""

    request_id: str
    roots: list[Span]
    spans: list[Span]
    """All of them, by begin."""
    begin: float
    end: float | None
    """None: it is not over, or its end was lost."""
    error: str
    ttft_s: float | None
    jct_s: float | None
    num_prompt_tokens: int | None
    num_tokens: int | None
    """That were generated, of all sequences."""
    script: str
    version: str
    notes: dict[str, str]
    """Why the script chose as it did."""
    clock_error_s: float
    sub_requests: list[Span]
    """The calls of the three verbs, by begin."""
    last: float = 0.0
    """Of the latest record."""
    model: str = ""
    options: str = ""
    """The script's, as JSON."""
    wall: float = 0.0
    """Seconds since 1970 at ``begin``."""


@cache
def verb_of(name: str) -> str:
    """Return a message's name as users write it: ``PrepRecv`` is ``prep_recv``."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


@cache
def is_tell(name: str) -> bool:
    """Return whether a message of this type has no answer."""
    kind = getattr(protocol, name, None)
    return isinstance(kind, type) and issubclass(kind, Tell)
