"""A request's story as OpenTelemetry spans. Needs the extra ``callboard[otel]``.

The trace is the HTTP caller's, or one made of the request's id; span ids are those of the records, so that exporting
twice makes no second span. Names and attributes follow the semantic conventions for HTTP and generative AI where they
have some; all else is under ``callboard.``.
"""

import hashlib
import importlib.metadata
from functools import cache
from typing import Any

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState

from .cast import asker
from .story import Span, Story

_OPERATIONS = {"/v1/chat/completions": "chat", "/v1/completions": "text_completion"}
_MASK = (1 << 64) - 1


def is_sampled(story: Story) -> bool:
    """Return whether the caller records its part of the trace; True where it sent none."""
    return all(root.facts.get("sampled") is not False for root in story.roots)


def spans_of(story: Story, *, fleet: str = "", prefix: str = "") -> list[ReadableSpan]:
    """Return the spans of a request that are over. ``prefix`` stands before the actors' names in ``service.name``."""
    return _Exported(story, fleet, prefix).spans()


@cache
def _scope() -> InstrumentationScope:
    return InstrumentationScope("callboard", importlib.metadata.version("callboard"))


@cache
def _resource(fleet: str, prefix: str, actor: str, node: str) -> Resource:
    attributes = {"service.name": f"{prefix}.{actor}" if prefix else actor, "service.instance.id": f"{node}/{actor}"}
    if fleet:
        attributes["service.namespace"] = fleet
    attributes["service.version"] = importlib.metadata.version("callboard")
    return Resource(attributes)


class _Exported:
    """One request's spans while they are made."""

    def __init__(self, story: Story, fleet: str, prefix: str) -> None:
        self._story = story
        self._where = fleet, prefix
        self._http = next((span for span in story.spans if span.kind == "http"), None)
        facts = {} if self._http is None else self._http.facts
        self._trace_id = _hex(facts.get("trace_id"), 32) or _hash(story.request_id)
        self._caller = _hex(facts.get("parent_id"), 16)
        self._state = TraceState.from_header([str(facts.get("trace_state", ""))])
        self._wall_ns = round(story.wall * 1e9)

    def spans(self) -> list[ReadableSpan]:
        return [self._span(span) for span in self._story.spans if span.kind != "bus" and self._end(span) is not None]

    def _end(self, span: Span) -> float | None:
        return span.begin if span.end is None and span.is_tell else span.end

    def _ns(self, time: float) -> int:
        # Nanoseconds since 1970 have no room in a float.
        return self._wall_ns + round((time - self._story.begin) * 1e9)

    def _context(self, span_id: int, *, is_remote: bool = False) -> SpanContext:
        flags = TraceFlags(TraceFlags.SAMPLED)
        return SpanContext(self._trace_id, span_id & _MASK or 1, is_remote, flags, self._state)

    def _parent(self, span: Span) -> SpanContext | None:
        above = span.parent
        while above is not None and above.kind == "bus":
            above = above.parent
        if above is None and span is not self._http:
            above = self._http  # What it was done for is not known, but it was done for this request.
        if above is not None:
            return self._context(above.id, is_remote=above.node != span.node)
        return self._context(self._caller, is_remote=True) if self._caller else None

    def _span(self, span: Span) -> ReadableSpan:
        end = self._end(span)
        assert end is not None
        first = [Event("first_token", timestamp=self._ns(span.first))] if span.first else []
        return ReadableSpan(
            name=self._name(span),
            context=self._context(span.id),
            parent=self._parent(span),
            resource=_resource(*self._where, asker(span), span.node),
            attributes=self._attributes(span),
            events=first,
            kind=_kind(span),
            status=_status(span),
            start_time=self._ns(span.begin),
            end_time=self._ns(end),
            instrumentation_scope=_scope(),
        )

    def _name(self, span: Span) -> str:
        if span.kind == "http" and "path" in span.facts:
            return f"{span.facts.get('method', 'HTTP')} {span.facts['path']}"
        return span.name

    def _attributes(self, span: Span) -> dict[str, Any]:
        mine: dict[str, Any] = {"request_id": span.request_id, "actor": span.actor, "category": span.category}
        if span.kind == "call":
            mine["source"] = span.source
        numbers = {"num_bytes": span.num_bytes, "num_items": span.num_items}
        mine |= {name: value for name, value in numbers.items() if value}
        if span.error_s:
            mine["clock_error_s"] = span.error_s
        facts = self._http_attributes(span) if span.kind == "http" else {}
        taken = ("trace_id", "parent_id", "trace_state", "sampled", "category")
        mine |= {name: value for name, value in span.facts.items() if name not in taken}
        attributes = {f"callboard.{name}": value for name, value in mine.items() if value not in ("", None)}
        if span.kind in ("call", "serve") and not span.is_tell:
            attributes |= {"rpc.system.name": "callboard", "rpc.method": span.name}
        return {**attributes, **facts, **_error(span)}

    def _http_attributes(self, span: Span) -> dict[str, Any]:
        """Return what the conventions have names for."""
        story, facts = self._story, span.facts
        named = {
            "http.request.method": facts.get("method"),
            "url.path": facts.get("path"),
            "url.scheme": "http",
            "http.route": facts.get("path"),
            "http.response.status_code": facts.get("status"),
            "gen_ai.operation.name": _OPERATIONS.get(str(facts.get("path"))),
            "gen_ai.provider.name": "callboard",
            "gen_ai.request.model": facts.get("model"),
            "gen_ai.response.model": facts.get("model"),
            "gen_ai.response.id": story.request_id,
            "gen_ai.request.stream": facts.get("stream"),
            "gen_ai.usage.input_tokens": story.num_prompt_tokens,
            "gen_ai.usage.output_tokens": story.num_tokens,
            "gen_ai.response.time_to_first_chunk": story.ttft_s,
        }
        if isinstance(choices := facts.get("num_sequences"), int) and choices > 1:
            named["gen_ai.request.choice.count"] = choices
        return {name: value for name, value in named.items() if value is not None}


def _kind(span: Span) -> SpanKind:
    if span.kind == "call":
        return SpanKind.PRODUCER if span.is_tell else SpanKind.CLIENT
    if span.kind == "serve":
        return SpanKind.CONSUMER if span.is_tell else SpanKind.SERVER
    return SpanKind.SERVER if span.kind == "http" else SpanKind.INTERNAL


def _failed_with(span: Span) -> str:
    """Return what a span failed with. One that was cancelled, as by a client that has enough, did not fail."""
    if span.error:
        return "" if span.error.startswith("cancelled") else span.error
    status = span.facts.get("status") if span.kind == "http" else None
    return f"status {status}" if isinstance(status, int) and status >= 500 else ""


def _status(span: Span) -> Status:
    error = _failed_with(span)
    return Status(StatusCode.ERROR, error) if error else Status(StatusCode.UNSET)


def _error(span: Span) -> dict[str, str]:
    if not (error := _failed_with(span)):
        return {"callboard.ended": span.error} if span.error else {}
    return {"error.type": error.split(":")[0].removeprefix("status ")}


def _hex(text: Any, length: int) -> int:
    """Return the number that hexadecimal digits say; 0 for anything else."""
    try:
        return int(text, 16) if isinstance(text, str) and len(text) == length else 0
    except ValueError:
        return 0


def _hash(request_id: str) -> int:
    return int.from_bytes(hashlib.sha256(request_id.encode()).digest()[:16], "big") or 1
