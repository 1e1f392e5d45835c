"""Requests at an OpenTelemetry collector: children of their callers' spans, named as the conventions have it."""

import argparse
import gzip
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import openai
import pytest
from opentelemetry import propagate
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span as Sent
from opentelemetry.proto.trace.v1.trace_pb2 import Status
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from served_fleet import ServedFleet
from synthetic_trace import Shape, Writer, disaggregated, facts_of, load
from waiting import PATIENCE_S

from callboard.actors.frontend.trace_context import parse
from callboard.bus.taps import SPAN
from callboard.tools.errors import CliError
from callboard.tools.trace import otlp
from callboard.tools.trace.event import Event
from callboard.tools.trace.otlp import Collector, Finishing, traces_url
from callboard.tools.trace.otlp_spans import is_sampled, spans_of
from callboard.tools.trace.story import Story, assemble

Eventually = Callable[..., None]
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Service:
    """A collector: what it was sent, by actor. ``status`` is what it answers."""

    def __init__(self) -> None:
        self.spans: list[tuple[dict[str, str], Sent]] = []
        self.status = 200
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                if service.status == 200 and self.path == "/v1/traces":
                    service.take(ExportTraceServiceRequest.FromString(body))
                self.send_response(service.status if self.path == "/v1/traces" else 404)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self._thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))
        self._thread.start()

    def take(self, request: ExportTraceServiceRequest) -> None:
        for group in request.resource_spans:
            resource = {each.key: each.value.string_value for each in group.resource.attributes}
            self.spans += [(resource, span) for scope in group.scope_spans for span in scope.spans]

    def named(self, name: str, kind: int) -> list[tuple[dict[str, str], Sent]]:
        return [(resource, span) for resource, span in self.spans if span.name == name and span.kind == kind]

    def one(self, name: str, kind: int) -> tuple[dict[str, str], Sent]:
        [found] = self.named(name, kind)
        return found

    def stop(self) -> None:
        self.server.shutdown()
        self._thread.join()
        self.server.server_close()


@pytest.fixture
def service() -> Iterator[Service]:
    made = Service()
    yield made
    made.stop()


@pytest.fixture(autouse=True)
def no_settings_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)


def story_of(events: list[Event]) -> Story:
    [story] = assemble(events).values()
    return story


def called_by(events: list[Event], **facts: Any) -> list[Event]:
    """Put facts into the http span."""
    made = []
    for event in events:
        if event.record.what == SPAN and event.record.name == "http":
            known: dict[str, Any] = {"method": "POST", "path": "/v1/chat/completions", "status": 200, "stream": True}
            record = event.record
            fields = {name: getattr(record, name) for name in record.__struct_fields__}
            event = replace(event, record=type(record)(**fields | {"facts": facts_of(known | facts)}))
        made.append(event)
    return made


def export(service: Service, *stories: Story, **options: str) -> None:
    collector = Collector(service.url)
    assert collector.send([span for story in stories for span in spans_of(story, **options)]) == ""
    collector.close()


def attributes(span: Sent) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value") or "string_value") for each in span.attributes}


# ---- one request --------------------------------------------------------------------------------------------------


def test_every_span_is_its_actors_and_has_its_parent(service: Service) -> None:
    story = story_of(disaggregated("r", 5.0, Shape()))
    export(service, story, fleet="demo")
    assert len(service.spans) == sum(span.kind != "bus" for span in story.spans)
    spans = {span.span_id: span for _, span in service.spans}
    assert len(spans) == len(service.spans)
    assert {resource["service.namespace"] for resource, _ in service.spans} == {"demo"}
    names = {resource["service.name"] for resource, _ in service.spans}
    assert names == {"frontend", "main", "kv-cpu0", "kv-cpu1", "prefill", "decode"}
    _, root = service.one("POST /v1/chat/completions", Sent.SPAN_KIND_SERVER)
    assert root.parent_span_id == b""
    for _, span in service.spans:
        assert span.trace_id == root.trace_id
        if span is not root:
            parent = spans[span.parent_span_id]
            assert parent.start_time_unix_nano <= span.start_time_unix_nano
        assert span.start_time_unix_nano <= span.end_time_unix_nano


def test_a_call_is_a_client_span_and_its_serving_a_server_span_in_it(service: Service) -> None:
    export(service, story_of(disaggregated("r", 5.0, Shape())))
    asker, call = service.one("remote_send", Sent.SPAN_KIND_CLIENT)
    server, serve = service.one("remote_send", Sent.SPAN_KIND_SERVER)
    _, send = service.named("send", Sent.SPAN_KIND_INTERNAL)[0]
    assert (asker["service.name"], server["service.name"]) == ("main", "kv-cpu0")
    assert (serve.parent_span_id, send.parent_span_id) == (call.span_id, serve.span_id)
    assert call.start_time_unix_nano < serve.start_time_unix_nano < serve.end_time_unix_nano < call.end_time_unix_nano
    assert attributes(call)["rpc.method"] == "remote_send"
    assert attributes(call)["callboard.lane"] == "shm"
    assert attributes(send)["callboard.num_bytes"] == (312 - 16) * 4096 // 5


def test_times_are_wall_clock_times_to_the_microsecond(service: Service) -> None:
    story = story_of(disaggregated("r", 5.0, Shape()))
    export(service, story)
    _, root = service.one("POST /v1/chat/completions", Sent.SPAN_KIND_SERVER)
    assert story.jct_s is not None
    assert story.ttft_s is not None
    assert root.start_time_unix_nano == pytest.approx((1.7e9 + 5.0) * 1e9, abs=1000)
    assert root.end_time_unix_nano - root.start_time_unix_nano == pytest.approx(story.jct_s * 1e9, abs=1)
    [event] = root.events
    assert event.name == "first_token"
    assert event.time_unix_nano - root.start_time_unix_nano == pytest.approx(story.ttft_s * 1e9, abs=1)


def test_what_the_conventions_have_names_for_has_them(service: Service) -> None:
    export(service, story_of(disaggregated("r", 5.0, Shape())))
    told = attributes(service.one("POST /v1/chat/completions", Sent.SPAN_KIND_SERVER)[1])
    wanted = {
        "http.request.method": "POST",
        "url.path": "/v1/chat/completions",
        "http.response.status_code": 200,
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": "smollm2-135m",
        "gen_ai.usage.input_tokens": 312,
        "gen_ai.usage.output_tokens": 32,
        "gen_ai.response.id": "r",
        "gen_ai.request.stream": True,
    }
    assert {name: told.get(name) for name in wanted} == wanted
    assert told["gen_ai.response.time_to_first_chunk"] == pytest.approx(0.321, abs=0.001)


def test_an_error_is_a_status_and_a_client_that_left_is_none(service: Service) -> None:
    export(service, story_of(disaggregated("r", 5.0, Shape(error="ActorDied: decode is dead"))))
    _, failed = service.one("start_generate", Sent.SPAN_KIND_CLIENT)
    assert (failed.status.code, failed.status.message) == (Status.STATUS_CODE_ERROR, "ActorDied: decode is dead")
    assert attributes(failed)["error.type"] == "ActorDied"
    assert service.one("prep_recv", Sent.SPAN_KIND_CLIENT)[1].status.code == Status.STATUS_CODE_UNSET
    service.spans.clear()
    export(service, story_of(disaggregated("r", 5.0, Shape(error="cancelled"))))
    _, left = service.one("start_generate", Sent.SPAN_KIND_CLIENT)
    assert left.status.code == Status.STATUS_CODE_UNSET
    assert attributes(left)["callboard.ended"] == "cancelled"


def test_the_trace_is_the_callers_or_one_of_the_request(service: Service) -> None:
    events = called_by(disaggregated("a", 5.0, Shape()), trace_id=TRACE, parent_id=PARENT, trace_state="v=1")
    export(service, story_of(events), story_of(called_by(disaggregated("b", 6.0, Shape()))))
    (_, of_caller), (_, own) = service.named("POST /v1/chat/completions", Sent.SPAN_KIND_SERVER)
    assert (of_caller.trace_id.hex(), of_caller.parent_span_id.hex()) == (TRACE, PARENT)
    assert of_caller.trace_state == "v=1"
    assert own.parent_span_id == b""
    before = {span.span_id for _, span in service.spans}
    export(service, story_of(called_by(disaggregated("b", 6.0, Shape()))))
    assert {span.span_id for _, span in service.spans} == before
    assert {span.trace_id.hex() for _, span in service.spans} == {TRACE, own.trace_id.hex()}


def test_what_its_caller_does_not_sample_is_left_out() -> None:
    for sampled in (True, False):
        events = called_by(disaggregated("a", 5.0, Shape()), trace_id=TRACE, parent_id=PARENT, sampled=sampled)
        assert is_sampled(story_of(events)) is sampled
    assert is_sampled(story_of(disaggregated("a", 5.0, Shape())))


@pytest.mark.parametrize("seed", range(5))
def test_whatever_was_lost_what_is_over_is_exported(service: Service, seed: int) -> None:
    events = [event for index, event in enumerate(load(10, rate=50, seed=seed)) if index * 7919 % 10 < 6]
    stories = list(assemble(events).values())
    export(service, *stories)
    over = sum(s.kind != "bus" and (s.end is not None or s.is_tell) for story in stories for s in story.spans)
    assert len(service.spans) == over > 50


# ---- when a request is over ----------------------------------------------------------------------------------------


def test_a_request_is_told_once_when_all_of_it_has_come() -> None:
    finishing = Finishing(since=0.0)
    events = disaggregated("r", 5.0, Shape())
    late = events.pop(len(events) // 2)
    for event in events:
        finishing.add(event, now=event.time)
    assert finishing.take(events[-1].time) == []
    finishing.add(late, now=events[-1].time + 0.5)
    [story] = finishing.take(events[-1].time + otlp.SETTLE_S)
    assert len(story.spans) == len(story_of([*events, late]).spans)
    finishing.add(late, now=100.0)
    assert finishing.take(float("inf")) == []


def test_what_was_over_before_is_not_told() -> None:
    finishing = Finishing(since=6.0)
    before, after = disaggregated("before", 1.0, Shape()), disaggregated("after", 5.0, Shape())
    for event in [*before, *after]:
        finishing.add(event, now=event.time)
    assert [story.request_id for story in finishing.take(float("inf"))] == ["after"]


def test_requests_with_numbered_names_are_told_each_when_it_is_over() -> None:
    finishing = Finishing(since=0.0)
    one, two = disaggregated("run.1", 5.0, Shape()), disaggregated("run.2", 6.0, Shape())
    for event in sorted([*one, *two], key=lambda event: event.time):
        if event.time <= one[-1].time:
            finishing.add(event, now=event.time)
    assert [story.request_id for story in finishing.take(float("inf"))] == ["run.1"]
    for event in two:
        if event.time > one[-1].time:
            finishing.add(event, now=event.time)
    [story] = finishing.take(float("inf"))
    assert story.request_id == "run.2"
    assert len(story.spans) == len(story_of(two).spans)


def test_an_id_may_come_again() -> None:
    finishing = Finishing(since=0.0)
    for at in (5.0, 50.0):
        for event in disaggregated("again", at, Shape()):
            finishing.add(event, now=event.time)
        assert [story.begin for story in finishing.take(float("inf"))] == [at]


def test_requests_that_never_end_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(otlp, "MOST_OPEN", 10)
    finishing = Finishing(since=0.0)
    for index in range(100):
        writer = Writer(f"r{index}", iter(range(1000 * index + 1, 2000 * index + 2000)))
        writer.call("Generate", "main", "frontend", float(index), 0)
        for event in writer.events:
            finishing.add(event, now=event.time)
    assert finishing.num_given_up == 90


# ---- the command --------------------------------------------------------------------------------------------------


def test_without_the_extra_it_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(CliError, match=r'needs the extra "otel": pip install "callboard\[otel\]"$'):
        otlp.run(argparse.Namespace(output=None, endpoint=None))


@pytest.mark.parametrize("url", ["localhost:4318", "ftp://x", "http://", "http://x:0", "http://[", "http://x:99999999"])
def test_an_endpoint_that_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(CliError, match="is no URL of a collector"):
        traces_url(url)


def test_a_url_without_a_path_is_a_collectors() -> None:
    assert traces_url("http://x:4318") == traces_url("http://x:4318/") == "http://x:4318/v1/traces"
    assert traces_url("https://x/otlp/v1/traces") == "https://x/otlp/v1/traces"


def test_a_request_is_a_child_of_its_callers_span(fleet: ServedFleet, service: Service) -> None:
    provider = TracerProvider(resource=Resource({"service.name": "caller"}))
    provider.add_span_processor(SimpleSpanProcessor(OTLPSpanExporter(endpoint=traces_url(service.url))))
    with openai.OpenAI(base_url=f"{fleet.url}/v1", api_key="none") as client:
        with provider.get_tracer("test").start_as_current_span("a question"):
            headers: dict[str, str] = {}
            propagate.inject(headers)
            answer = client.completions.with_raw_response.create(
                model="tiny", prompt="the quick brown fox", max_tokens=6, extra_headers=headers
            )
    provider.shutdown()
    named = answer.headers["x-request-id"]
    exported = fleet.place.callboard("trace", "export", "otlp", named, "--endpoint", service.url, "--no-follow")
    assert (exported.returncode, exported.stdout) == (0, ""), exported.stderr
    assert "spans of 1 request exported" in exported.stderr

    _, caller = service.one("a question", Sent.SPAN_KIND_INTERNAL)
    resource, root = service.one("POST /v1/completions", Sent.SPAN_KIND_SERVER)
    assert (root.trace_id, root.parent_span_id) == (caller.trace_id, caller.span_id)
    assert resource["service.name"] == "frontend"
    returned = parse(answer.headers["traceresponse"])
    assert returned is not None
    assert (returned.trace_id, returned.parent_id) == (root.trace_id.hex(), root.span_id.hex())
    assert caller.start_time_unix_nano <= root.start_time_unix_nano
    assert root.end_time_unix_nano <= caller.end_time_unix_nano
    ids = {span.span_id for _, span in service.spans}
    verbs = {span.name: resource["service.name"] for resource, span in service.spans if span.kind == 3}
    assert verbs["prep_recv"] == verbs["remote_send"] == verbs["start_generate"] == "main"
    assert all(span.parent_span_id in ids for _, span in service.spans if span is not caller)
    assert all(span.trace_id == caller.trace_id for _, span in service.spans)


def test_requests_are_exported_as_they_finish(fleet: ServedFleet, service: Service, eventually: Eventually) -> None:
    fleet.complete("before anybody follows", request_id="before")
    following = fleet.place.start("trace", "export", "otlp", "--endpoint", service.url, "--service-name", "lab")
    try:
        assert following.stderr is not None
        assert "as they finish" in following.stderr.readline()
        for number in range(3):
            fleet.complete(f"question {number}", request_id=f"after-{number}")
        eventually(lambda: len(service.named("POST /v1/completions", Sent.SPAN_KIND_SERVER)) == 3)
        roots = service.named("POST /v1/completions", Sent.SPAN_KIND_SERVER)
        assert sorted(attributes(root)["callboard.request_id"] for _, root in roots) == [
            "after-0",
            "after-1",
            "after-2",
        ]
        assert {resource["service.name"] for resource, _ in roots} == {"lab.frontend"}
        service.status = 400
        fleet.complete("nobody takes this", request_id="refused")
        assert "does not take spans" in following.stderr.readline()
        service.status = 200
        fleet.complete("at last", request_id="at-last")
        assert "takes spans again, 1 requests were lost" in following.stderr.readline()
        fleet.complete("just before the end", request_id="last")
    finally:
        following.send_signal(signal.SIGINT)
        _, said = following.communicate(timeout=PATIENCE_S)
    assert following.returncode == 0
    assert "of 5 requests exported; 1 were not taken" in said
    told = {attributes(span)["callboard.request_id"] for _, span in service.spans}
    assert told == {"after-0", "after-1", "after-2", "at-last", "last"}


def test_a_collector_that_is_not_there_is_one_sentence(fleet: ServedFleet) -> None:
    fleet.complete("hello")
    for words, sentence in (
        (("otlp", "--no-follow", "--endpoint", "http://127.0.0.1:9"), "the collector at http://127.0.0.1:9/v1/traces"),
        (("otlp", "--no-follow", "--endpoint", "nowhere"), '"nowhere" is no URL of a collector'),
        (("otlp", "-o", "file"), "otlp goes to a collector"),
        (("otlp", "nobody", "--endpoint", "http://127.0.0.1:9"), 'no node remembers a request "nobody"'),
        (("perfetto", "--endpoint", "http://127.0.0.1:9"), "--endpoint is for otlp"),
    ):
        ran = fleet.place.run("trace", "export", *words)
        assert (ran.returncode, ran.stdout) == (2, ""), ran.stderr
        assert sentence in ran.stderr
        assert len(ran.stderr.splitlines()) == 1
