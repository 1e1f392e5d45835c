"""Records: what nodes note of messages, for those who watch."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest

from callboard.bus import (
    ActorDied,
    Ask,
    AskTimeout,
    Message,
    Node,
    NotUnderstood,
    Ref,
    Refusal,
    Stream,
    TapRecord,
    Tell,
    VirtualClock,
    current_call,
)
from callboard.bus.calls import enter_call
from callboard.bus.frames import TracedPost, decode_batch, encode_batch
from callboard.bus.links import Links
from callboard.bus.taps import (
    ANSWERED,
    ENDED,
    RECEIVED,
    SENT,
    SPAN,
    WHAT,
    decode_facts,
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


async def test_what_cannot_be_written_down_ends_neither_a_call_nor_a_record() -> None:
    async with nodes() as (_, server, worker, _):
        local = server.ref(worker.address)
        assert await local.ask(Work("r", how="\ud800")) == Done(1.5)  # Not encoded on its way.
        call = server.root("worker", "r", span=7)
        server.note(call, "said", 0.0, error="\ud800", why="\ud800")
        records = records_of(server, "r")
        assert [(r.name, r.error, decode_facts(r.facts)) for r in records if r.what == SPAN] == [
            ("said", "?", {"why": "?"})
        ]
        assert decode_facts(records[0].facts) == {"num_tokens": 0, "how": "?"}
        assert msgspec.msgpack.encode(records)
        assert await local.ask(Work("half \ud800")) == Done(1.5)
        assert server.trace.request_ids() == ["r"]


async def test_an_answer_that_is_none_is_not_taken_for_a_caller_that_left() -> None:
    class Wrong(Message, frozen=True):
        text: str

    class Liar:
        async def on_work(self, message: Work) -> Done:
            return Wrong("x")  # type: ignore[return-value]

        async def on_count(self, message: Count) -> AsyncIterator[int]:
            yield "one"  # type: ignore[misc]

    async with nodes(is_zmq=True) as (client, server, _, _):
        liar = client.ref(server.add("liar", Liar()).address)
        with pytest.raises(NotUnderstood):
            await liar.ask(Work("asked"))
        async with liar.stream(Count("read", 1)) as items:
            with pytest.raises(NotUnderstood):
                await anext(items)
        for request_id in ("asked", "read"):
            [error] = [r.error for r in records_of(client, request_id) if r.what == ENDED]
            assert error.startswith("NotUnderstood: ")


async def test_credit_that_never_came_was_waited_for() -> None:
    async with nodes() as (_, server, worker, _):
        async with worker.stream(Count("r", 100), credit=1):
            await until_noted(server, "r", RECEIVED)
            await asyncio.sleep(0.05)
        await until_noted(server, "r", SPAN)
        [credit] = [r for r in records_of(server, "r") if r.name == "credit"]
        assert credit.time - credit.begin > 0.04


async def test_a_peer_that_names_no_span_has_its_call_recorded_from_begin_to_end() -> None:
    async with nodes() as (client, server, _, _):
        link = client._link(server.address_of("worker"))
        link.post(TracedPost(link.next_id(), 1, "worker", Work("r"), 1.0, "r"))  # type: ignore[arg-type]
        await until_noted(server, "r", ANSWERED)
        received, answered = records_of(server, "r")
        assert received.span == answered.span != 0


@pytest.mark.parametrize(("span", "trace"), [(-1, ""), (1, "a" * 33)])
def test_a_peer_cannot_send_spans_and_traces_that_are_none(span: int, trace: str) -> None:
    post = TracedPost(1, 1, "worker", msgspec.Raw(b"\xc0"), None, "r", 0, span, trace)
    with pytest.raises(msgspec.ValidationError):
        decode_batch(encode_batch(("0", 0, [post])))


@pytest.mark.parametrize("is_zmq", [False, True])
async def test_what_a_peer_sends_is_taken_in_no_call_whatever_this_node_was_at(
    is_zmq: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[str] = []
    received = Links.received

    def watched(self: Links, connection: Any, batch: bytes) -> None:
        call = current_call()
        taken.append("" if call is None else call.request_id)
        received(self, connection, batch)

    monkeypatch.setattr(Links, "received", watched)
    async with nodes(is_zmq=is_zmq) as (client, _, worker, _):

        async def ask(number: int) -> None:
            enter_call(client.root("door", f"r{number}", span=number + 1))
            for _ in range(20):
                await worker.ask(Plain("x"))

        await asyncio.gather(*(ask(number) for number in range(20)))
    assert len(taken) > 20
    assert set(taken) == {""}
