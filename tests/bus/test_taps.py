"""Records: what nodes note of messages, for those who watch."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import pytest

from callboard.bus import (
    ActorDied,
    Ask,
    AskTimeout,
    Message,
    Node,
    Ref,
    Refusal,
    Stream,
    TapRecord,
    Tell,
    VirtualClock,
    current_call,
)
from callboard.bus.calls import enter_call
from callboard.bus.taps import (
    ANSWERED,
    ENDED,
    NUM_PER_REQUEST,
    RECEIVED,
    SENT,
    SPAN,
    WHAT,
    Trace,
    decode_facts,
    facts_of,
    finished,
)
from callboard.bus.testing import run_virtual
from callboard.bus.transports.inproc import InprocHub
from callboard.bus.transports.zmq import ZmqTransport


class Done(Message, frozen=True):
    seconds: float
    note: str = "short"


class Work(Ask[Done], frozen=True):
    request_id: str
    prompt: bytes = b""
    how: str = "well"


class Plain(Ask[Done], frozen=True):
    text: str


class Note(Tell, frozen=True):
    request_id: str


class Count(Stream[int], frozen=True):
    request_id: str
    to: int


class Bad(Refusal):
    sentence = "no"


class Worker:
    """Does as it is told; ``inner`` is somebody it asks in turn."""

    inner: Ref | None = None

    async def on_work(self, message: Work) -> Done:
        if message.how == "badly":
            raise Bad
        if message.how == "never":
            await asyncio.Event().wait()
        if self.inner is not None:
            await self.inner.ask(Plain("for it"))
        return Done(1.5)

    def on_plain(self, message: Plain) -> Done:
        return Done(0.5)

    def on_note(self, message: Note) -> None:
        return

    async def on_count(self, message: Count) -> AsyncIterator[int]:
        for number in range(message.to):
            yield number
        call, node = current_call(), self.node
        node.note(call, "count", node.clock.now() - 1, num=message.to)

    node: Node


@asynccontextmanager
async def nodes(*, is_zmq: bool = False) -> AsyncIterator[tuple[Node, Node, Ref, Worker]]:
    """Give a client, a server, and the client's ref to the server's worker."""
    hub = InprocHub()

    def node(name: str) -> Node:
        transport = ZmqTransport() if is_zmq else hub.transport()
        return Node(name, endpoint="tcp://127.0.0.1:*" if is_zmq else f"inproc://{name}", transport=transport)

    async with node("server") as server, node("client") as client:
        worker = Worker()
        worker.node = server
        yield client, server, client.ref(server.add("worker", worker).address), worker


def records_of(node: Node, request_id: str) -> list[TapRecord]:
    """Return what was noted, but for what depends on how busy the machine is (test_turns.py)."""
    records = [TapRecord(*row) for row in node.trace.of(request_id)]
    return [record for record in records if record.name not in ("turn", "dial")]


async def until_noted(node: Node, request_id: str, what: int) -> None:
    async with asyncio.timeout(5):
        while all(record.what != what for record in records_of(node, request_id)):
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("is_zmq", [False, True])
async def test_an_ask_of_a_request_leaves_two_records_at_each_node(is_zmq: bool) -> None:
    async with nodes(is_zmq=is_zmq) as (client, server, worker, _):
        await worker.ask(Work("r", prompt=bytes(4 * 300)))
        sent, ended = records_of(client, "r")
        received, answered = records_of(server, "r")
        assert [r.what for r in (sent, received, answered, ended)] == [SENT, RECEIVED, ANSWERED, ENDED]
        assert sent.span == received.span == answered.span == ended.span != 0
        assert sent.time <= received.time == answered.begin <= answered.time <= ended.time
        assert ended.begin == sent.time
        assert {r.name for r in (sent, received, answered, ended)} == {"Work"}
        assert {r.actor for r in (sent, received, answered, ended)} == {"worker"}
        assert received.peer == answered.peer == "client"
        assert sent.num_bytes >= 1200 <= received.num_bytes
        assert ended.num_bytes > 0
        assert decode_facts(sent.facts) == {"num_tokens": 300, "how": "well"}
        assert decode_facts(ended.facts) == {"seconds": 1.5, "note": "short"}
        assert not sent.error + ended.error + answered.error


async def test_a_message_of_no_request_leaves_none_unless_somebody_wants_everything() -> None:
    async with nodes() as (client, _, worker, _):
        seen: list[TapRecord] = []
        client.follow(lambda row, _: seen.append(TapRecord(*finished(row))))
        await worker.ask(Plain("x"))
        assert not seen
        assert not client.trace.request_ids()

        def follow(row: tuple[object, ...], message: object) -> None:
            seen.append(TapRecord(*finished(row)))

        client.follow(follow, everything=True)
        await worker.ask(Plain("x"))
        assert [WHAT[r.what] for r in seen] == ["sent", "ended"]
        assert not client.trace.request_ids()
        client.unfollow(follow)
        assert client.tap is None
        await worker.ask(Plain("x"))
        assert len(seen) == 2


async def test_what_is_done_for_a_request_names_what_it_is_done_for() -> None:
    async with nodes() as (client, server, worker, actor):
        actor.inner = server.ref(server.address_of("worker"))
        await worker.ask(Work("r"))
        outer = records_of(client, "r")[0]
        inner = [r for r in records_of(server, "r") if r.name == "Plain"]
        assert [r.what for r in inner] == [SENT, RECEIVED, ANSWERED, ENDED]
        assert inner[0].parent == inner[3].parent == outer.span
        assert inner[0].source == "worker"


async def test_a_root_gives_its_request_its_parent_and_its_trace_to_what_is_sent() -> None:
    async with nodes() as (client, server, worker, actor):
        seen: list[str] = []

        async def on_plain() -> None:
            enter_call(client.root("door", "r.1", span=7, trace="ab" * 16))
            await worker.ask(Work("another"))

        original = Worker.on_work

        async def on_work(self: Worker, message: Work) -> Done:
            call = current_call()
            assert call is not None
            seen.append(call.trace)
            return await original(self, message)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Worker, "on_work", on_work)
            server.remove("worker")
            server.add("worker", actor)
            await asyncio.create_task(on_plain())
        sent = records_of(client, "r.1")[0]
        assert (sent.parent, sent.source) == (7, "door")
        assert seen == ["ab" * 16]


async def test_a_stream_counts_its_items_and_says_when_the_first_came() -> None:
    async with nodes(is_zmq=True) as (client, server, worker, _):
        async with worker.stream(Count("r", 1000)) as items:
            assert len([item async for item in items]) == 1000
        await until_noted(server, "r", ANSWERED)
        sent, ended = records_of(client, "r")
        assert ended.num_items == 1000
        assert ended.num_bytes >= 1000
        assert sent.time <= ended.first <= ended.time
        names = [(WHAT[r.what], r.name) for r in records_of(server, "r")]
        assert names[0] == ("received", "Count")
        assert ("span", "credit") in names  # It has 256 items at a time.
        assert names[-2:] == [("span", "count"), ("answered", "Count")]


async def test_an_actors_span_has_the_ends_it_was_told() -> None:
    async with nodes() as (client, server, worker, _):
        async with worker.stream(Count("r", 3)) as items:
            assert [item async for item in items] == [0, 1, 2]
        [span] = [r for r in records_of(server, "r") if r.what == SPAN]
        assert (span.name, span.actor, decode_facts(span.facts)) == ("count", "worker", {"num": 3})
        assert span.time - span.begin >= 1
        assert span.parent == records_of(client, "r")[0].span != span.span


async def test_every_bad_end_is_told_once_at_each_node() -> None:
    async with nodes() as (client, server, worker, _):
        with pytest.raises(Bad):
            await worker.ask(Work("refused", how="badly"))
        with pytest.raises(AskTimeout):
            await worker.ask(Work("late", how="never"), timeout=0.02)
        left = asyncio.create_task(worker.ask(Work("left", how="never")))
        await until_noted(server, "left", RECEIVED)
        left.cancel()
        stopped = asyncio.create_task(worker.ask(Work("stopped", how="never")))
        await until_noted(server, "stopped", RECEIVED)
        server.remove("worker")
        with pytest.raises(ActorDied):
            await stopped
        ends = {}
        for request_id in ("refused", "late", "left", "stopped"):
            await until_noted(server, request_id, ANSWERED)
            [ended] = [r.error for r in records_of(client, request_id) if r.what == ENDED]
            [answered] = [r.error for r in records_of(server, request_id) if r.what == ANSWERED]
            ends[request_id] = (ended.split(":")[0], answered.split(":")[0])
        assert ends == {
            "refused": ("Bad", "Bad"),
            "late": ("AskTimeout", "cancelled"),
            "left": ("cancelled", "cancelled"),
            "stopped": ("ActorDied", "stopped"),
        }


async def test_a_tell_has_no_end() -> None:
    async with nodes() as (client, server, worker, _):
        worker.tell(Note("r"))
        await until_noted(server, "r", RECEIVED)
        assert [r.what for r in (*records_of(client, "r"), *records_of(server, "r"))] == [SENT, RECEIVED]


async def test_a_message_that_does_not_leave_is_not_recorded() -> None:
    async with nodes() as (client, _, worker, _):
        with pytest.raises(TypeError):
            await worker.ask(Work("r", how=object()))  # type: ignore[arg-type]
        assert not client.trace.request_ids()


def test_spans_of_all_nodes_have_ids_of_their_own() -> None:
    hub = InprocHub()

    async def story() -> None:
        made = [Node(str(i), transport=hub.transport(), clock=VirtualClock(), seed=1) for i in range(50)]
        ids = [node.new_span() for node in made for _ in range(100)]
        assert len(set(ids)) == len(ids)
        assert all(0 < each < 1 << 64 for each in ids)

    run_virtual(story)


def test_the_ring_drops_the_oldest_request_and_bounds_each() -> None:
    trace = Trace(keep=3)

    def add(request_id: str, number: int) -> None:
        trace.add((SPAN, float(number), 0.0, "", "", "", "x", request_id, 1, 0, 0, 0, 0.0, "", None, None))

    for number in range(2 * NUM_PER_REQUEST):
        add("long", number)
    assert [row[1] for row in trace.of("long")] == [float(n) for n in range(NUM_PER_REQUEST, 2 * NUM_PER_REQUEST)]
    for number in range(5):
        add(f"r{number}", number)
    assert trace.request_ids() == ["r2", "r3", "r4"]


def test_requests_of_many_records_do_not_fill_memory() -> None:
    trace = Trace(keep=100)
    for number in range(100):
        for _ in range(NUM_PER_REQUEST):
            trace.add((SPAN, 0.0, 0.0, "", "", "", "x", f"r{number}", 1, 0, 0, 0, 0.0, "", None, None))
    assert sum(len(trace.of(request_id)) for request_id in trace.request_ids()) <= 100 * 64
    assert trace.request_ids()[-1] == "r99"


def test_ids_as_long_as_messages_do_not_fill_memory() -> None:
    trace = Trace()
    for length in (256, 257):
        trace.add((SPAN, 0.0, 0.0, "", "", "", "x", "r" * length, 1, 0, 0, 0, 0.0, "", None, None))
    assert [len(request_id) for request_id in trace.request_ids()] == [256]


class Inner(msgspec.Struct):
    reservation_id: str


class Everything(Message, frozen=True):
    request_id: str
    whole: int
    real: float
    flag: bool
    text: str
    long: str
    prompt: bytes
    blob: bytes
    inner: Inner
    nothing: int | None
    pairs: dict[str, str]


def test_facts_are_numbers_and_short_texts_and_never_content() -> None:
    message = Everything("r", 3, 0.5, True, "a", "x" * 1000, bytes(40), b"secret", Inner("i"), None, {"k": "secret"})
    assert decode_facts(facts_of(message)) == {
        "whole": 3,
        "real": 0.5,
        "flag": True,
        "text": "a",
        "num_tokens": 10,
        "reservation": "i",
    }
    assert decode_facts(facts_of(7)) == {}
