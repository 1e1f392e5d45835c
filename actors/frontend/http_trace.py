"""The root of a request's records: what the HTTP door did for it, and the trace of its caller that it belongs to."""

from collections.abc import Callable, MutableMapping
from http import HTTPStatus
from typing import Any

from callboard.bus import Node
from callboard.bus.traced import Root

from . import trace_context

SLOW_S = 0.002
"""A client's socket that takes so long is worth a record."""
MOST_SLOW = 64


class HttpTrace:
    """One request at the door. Recorded when it ends, if it came so far as to have an id."""

    def __init__(self, node: Node, actor: str, scope: MutableMapping[str, Any]) -> None:
        self.span = node.new_span()
        self.context = trace_context.accept(scope["headers"], node.rng)
        self.request_id = ""
        self.facts: dict[str, Any] = {"method": scope["method"], "path": scope["path"]}
        self._node = node
        self._actor = actor
        self._begin = node.clock.now()
        self._first: float | None = None
        self._last_token: float | None = None
        self._prepared_s: float | None = None
        self._opened_s: float | None = None
        self._phases: list[tuple[str, float, float]] = []

    def root(self, request_id: str) -> Root:
        """Return what is made current in the task of one sequence: what it sends is this request's."""
        return self._node.root(self._actor, request_id, span=self.span, trace=self.context.trace_id)

    def phase(self, name: str, begin: float | None = None) -> float:
        """Note a phase that ends now; by default it began with the request. Returns the time."""
        now = self._node.clock.now()
        self._phases.append((name, self._begin if begin is None else begin, now))
        return now

    def prepared(self, begin: float) -> None:
        """Note that the prompt is tokens, since ``begin``, and its sequences are to be asked for."""
        self._prepared_s = self.phase("tokenise", begin)

    def opened(self) -> None:
        """Note that a sequence has been asked for."""
        self._opened_s = self._node.clock.now()

    def has_all_tokens(self, last_s: float) -> None:
        """Note that nothing more is generated since ``last_s``: what is left is to write."""
        self._last_token = last_s or self._node.clock.now()

    def watching(self, send: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Return an ASGI ``send`` that notes when the first body left, and when the client's socket is slow.

        It tells the client, whatever the answer is, which trace the request belongs to and which span of it is ours.
        """
        now = self._node.clock.now
        is_answer = False

        async def watched(event: Any) -> None:
            nonlocal is_answer
            begin = now()
            if event["type"] == "http.response.start":
                event = {**event, "headers": [*event["headers"], *self.context.headers(self.span)]}
                is_answer = event["status"] == HTTPStatus.OK
            elif is_answer and self._first is None and event["type"] == "http.response.body":
                self._first = begin
            await send(event)
            if now() - begin > SLOW_S and len(self._phases) < MOST_SLOW:
                self.phase("client", begin)

        return watched

    def ended(self, status: int, error: str = "") -> None:
        """Record all of it."""
        if not self.request_id:
            return
        if self._prepared_s is not None and self._opened_s is not None:
            self._phases.append(("open", self._prepared_s, self._opened_s))
        if self._last_token is not None:
            self.phase("write", self._last_token)
        node, root = self._node, self.root(self.request_id)
        for name, begin, end in self._phases:
            node.note(root, name, begin, end=end)
        facts = {**self.facts, "status": status, **self.context.facts()}
        if self._first is not None and self.facts.get("stream"):  # Else the first body has all tokens: no TTFT.
            facts["first_s"] = self._first
        outside = node.root(self._actor, self.request_id, span=0)
        node.note(outside, "http", self._begin, span=self.span, error=error, **facts)
