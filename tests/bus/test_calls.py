"""Tells, asks and streams between two nodes, over both transports: what arrives, what fails, and that it ends once."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from callboard.actors.actor import Actor, start_actor
from callboard.bus import (
    FOREVER,
    ActorDied,
    Address,
    Ask,
    AskTimeout,
    LinkLost,
    Message,
    Node,
    NotUnderstood,
    Ref,
    Refusal,
    Stream,
    Tell,
    UnknownActor,
    current_call,
)
from callboard.bus.transports.inproc import InprocHub


class Text(Message, frozen=True):
    text: str


class Echo(Ask[Text], frozen=True):
    text: str


class EchoLater(Ask[Text], frozen=True):
    text: str
    delay_s: float = 0.0


class Note(Tell, frozen=True):
    text: str


class Count(Stream[int], frozen=True):
    stop: int


class Forward(Ask[Text], frozen=True):
    to: Ref
    text: str


class Foreign(Ask[Text], frozen=True):
    text: str


class TooMany(Refusal):
    sentence = "{asked} is more than {allowed}"


class Break(Ask[Text], frozen=True):
    pass


class Server:
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.num_cancelled = 0
        self.num_produced = 0
        self.ended: list[str] = []

    def on_echo(self, message: Echo) -> Text:
        if message.text == "refuse":
            raise TooMany(asked=3, allowed=2)
        return Text(message.text)

    async def on_echo_later(self, message: EchoLater) -> Text:
        call = current_call()
        assert call is not None
        try:
            await asyncio.sleep(message.delay_s)
        except asyncio.CancelledError:
            self.ended.append(call.ended)
            raise
        return Text(message.text)

    def on_note(self, message: Note) -> None:
        self.notes.append(message.text)

    async def on_count(self, message: Count) -> AsyncIterator[int]:
        try:
            for i in range(message.stop):
                self.num_produced += 1
                yield i
        finally:
            self.num_cancelled += self.num_produced < message.stop

    async def on_forward(self, message: Forward) -> Text:
        return await message.to.ask(Echo(message.text))

    async def on_break(self, message: Break) -> Text:
        raise ZeroDivisionError("a bug")


class Pair:
    """Two nodes; ``server`` is an actor on the first, ``ref`` its ref as the second sees it."""

    def __init__(self, first: Node, second: Node, server: Server, ref: Ref) -> None:
        self.first, self.second, self.server, self.ref = first, second, server, ref


@pytest.fixture(params=["inproc", "ipc", "tcp"])
async def pair(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Pair]:
    hub = InprocHub()

    def node(name: str) -> Node:
        match request.param:
            case "inproc":
                return Node(name, endpoint=f"inproc://{name}", transport=hub.transport())
            case "ipc":
                return Node(name, endpoint=f"ipc://{tmp_path}/{name}.sock")
            case _:
                return Node(name, endpoint="tcp://127.0.0.1:*")

    async with AsyncExitStack() as stack:
        first, second = [await stack.enter_async_context(node(name)) for name in ("first", "second")]
        server = Server()
        address = first.add("server", server).address
        yield Pair(first, second, server, second.ref(address))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)


async def test_an_ask_is_answered_by_a_plain_function_and_by_a_coroutine(pair: Pair) -> None:
    assert await pair.ref.ask(Echo("a")) == Text("a")
    assert await pair.ref.ask(EchoLater("b")) == Text("b")


async def test_tells_of_one_link_arrive_in_order(pair: Pair) -> None:
    for i in range(2000):
        pair.ref.tell(Note(str(i)))
    await pair.ref.ask(Echo("after"))
    assert pair.server.notes == [str(i) for i in range(2000)]


async def test_a_refusal_arrives_as_itself_and_the_actor_lives(pair: Pair) -> None:
    with pytest.raises(TooMany, match="3 is more than 2") as caught:
        await pair.ref.ask(Echo("refuse"))
    assert (caught.value.asked, caught.value.allowed) == (3, 2)
    assert await pair.ref.ask(Echo("still here")) == Text("still here")


async def test_a_message_nobody_handles_is_refused_at_the_door(pair: Pair) -> None:
    with pytest.raises(NotUnderstood, match="Foreign"):
        await pair.ref.ask(Foreign("x"))
    nobody = pair.second.ref(pair.first.address_of("nobody"))
    with pytest.raises(UnknownActor, match="nobody"):
        await nobody.ask(Echo("x"))


async def test_a_field_of_the_wrong_type_is_refused_at_the_door(pair: Pair) -> None:
    with pytest.raises(NotUnderstood):
        await pair.ref.ask(Echo(5))  # type: ignore[arg-type]
    assert await pair.ref.ask(Echo("fine")) == Text("fine")


async def test_a_bug_stops_the_actor_and_its_callers_hear_of_it(pair: Pair) -> None:
    async with asyncio.TaskGroup() as group:
        waiting = group.create_task(_error_of(pair.ref, EchoLater("x", 60)))
        await until(lambda: True)
        with pytest.raises(ActorDied, match="a bug"):
            await pair.ref.ask(Break())
    assert isinstance(waiting.result(), ActorDied)
    with pytest.raises(UnknownActor):
        await pair.ref.ask(Echo("x"))


async def _error_of(ref: Ref, message: Ask[Text]) -> Exception | None:
    try:
        await ref.ask(message)
    except Exception as error:
        return error
    return None


async def test_a_deadline_ends_the_ask_here_and_the_handler_there(pair: Pair) -> None:
    with pytest.raises(AskTimeout):
        await pair.ref.ask(EchoLater("x", 60), timeout=0.05)
    await until(lambda: bool(pair.server.ended))
    assert pair.server.ended[0] in ("timeout", "cancelled")


async def test_cancelling_an_ask_cancels_its_handler(pair: Pair) -> None:
    task = asyncio.ensure_future(pair.ref.ask(EchoLater("x", 60)))
    await pair.ref.ask(Echo("the other one has arrived"))
    task.cancel()
    await until(lambda: pair.server.ended == ["cancelled"])


async def test_a_stream_brings_every_item_in_order_and_ends(pair: Pair) -> None:
    async with pair.ref.stream(Count(3000)) as items:
        assert [item async for item in items] == list(range(3000))


async def test_credit_holds_the_sender_back(pair: Pair) -> None:
    async with pair.ref.stream(Count(100_000), credit=10) as items:
        assert await anext(items) == 0
        await pair.ref.ask(Echo("everything under way has arrived"))
        assert pair.server.num_produced <= 20


async def test_leaving_a_stream_ends_its_handler(pair: Pair) -> None:
    async with pair.ref.stream(Count(100_000)) as items:
        await anext(items)
    await until(lambda: pair.server.num_cancelled == 1)


async def test_refs_travel_in_messages_and_deadlines_with_calls(pair: Pair) -> None:
    other = Server()
    mine = pair.second.add("mine", other)
    assert await pair.ref.ask(Forward(mine, "round")) == Text("round")


async def test_a_node_that_stops_ends_what_is_asked_of_it(pair: Pair) -> None:
    task = asyncio.ensure_future(_error_of(pair.ref, EchoLater("x", 60)))
    await pair.ref.ask(Echo("arrived"))
    await pair.first.stop()
    assert isinstance(await task, ActorDied)
    with pytest.raises(LinkLost, match="nobody listens"):
        await pair.ref.ask(Echo("x"))


async def test_a_caller_that_stops_ends_what_is_done_for_it(pair: Pair) -> None:
    task = asyncio.ensure_future(_error_of(pair.ref, EchoLater("x", 60)))
    await pair.ref.ask(Echo("arrived"))
    await pair.second.stop()
    await until(lambda: bool(pair.server.ended))
    assert isinstance(await task, LinkLost)


async def test_nothing_is_left_after_calls_have_ended(pair: Pair) -> None:
    async with asyncio.TaskGroup() as group:
        for i in range(50):
            group.create_task(pair.ref.ask(EchoLater(str(i), 0.001 * (i % 5))))
            group.create_task(_error_of(pair.ref, EchoLater("late", 60))).cancel()
    async with pair.ref.stream(Count(5), timeout=FOREVER) as items:
        await anext(items)
    await pair.ref.ask(Echo("settled"))
    await asyncio.sleep(0.05)
    for node in (pair.first, pair.second):
        for link in node._links._by_connection.values():
            assert not link.asked
            assert not link.served
        assert not node._server._serving


class Maybe(Ask[Text], frozen=True):
    request_id: str | None = None


class Asker:
    def on_maybe(self, message: Maybe) -> Text:
        return Text(str(message.request_id))


async def test_an_absent_request_id_is_no_protocol_error(pair: Pair) -> None:
    ref = pair.second.ref(pair.first.add("asker", Asker()).address)
    assert await ref.ask(Maybe()) == Text("None")


async def test_a_peer_that_is_cut_off_hears_of_it_and_may_dial_again(pair: Pair) -> None:
    pending = asyncio.ensure_future(_error_of(pair.ref, EchoLater("x", 60)))
    await pair.ref.ask(Echo("arrived"))
    (link,) = pair.second._links._by_connection.values()
    assert link.connection is not None
    link.connection.send(b"no batch at all")
    async with asyncio.timeout(5):
        assert isinstance(await pending, LinkLost)
    assert pair.first._links.num_refused >= 1
    assert await pair.ref.ask(Echo("again")) == Text("again")


async def test_nodes_of_different_fleets_refuse_each_other(tmp_path: Path) -> None:
    async with (
        Node("a", endpoint=f"ipc://{tmp_path}/a.sock", fleet="red") as a,
        Node("b", fleet="blue") as b,
    ):
        ref = b.ref(a.add("server", Server()).address)
        with pytest.raises(LinkLost, match="red"):
            await ref.ask(Echo("x"), timeout=5)


async def test_a_node_without_an_endpoint_is_answered_and_called_back(tmp_path: Path) -> None:
    async with Node("a", endpoint=f"ipc://{tmp_path}/a.sock") as a, Node("b") as b:
        ref = b.ref(a.add("server", Server()).address)
        mine = b.add("mine", Server())
        assert await ref.ask(Forward(mine, "back")) == Text("back")


async def test_an_actor_of_the_same_node_is_reached_without_a_link(tmp_path: Path) -> None:
    async with Node("a") as a:
        server = Server()
        ref = a.add("server", server)
        assert await ref.ask(Echo("x")) == Text("x")
        async with ref.stream(Count(1000), credit=8) as items:
            assert [item async for item in items] == list(range(1000))
        with pytest.raises(TooMany):
            await ref.ask(Echo("refuse"))


async def test_a_bug_ends_the_tasks_of_its_actor(tmp_path: Path) -> None:
    class Worker(Actor):
        is_cancelled = False

        async def start(self) -> None:
            self.spawn(self.work())

        async def work(self) -> None:
            try:
                await asyncio.sleep(60)
            finally:
                self.is_cancelled = True

        async def on_break(self, message: Break) -> Text:
            raise ZeroDivisionError("a bug")

    crashes: list[str] = []
    async with Node("a", on_crash=lambda name, error: crashes.append(name)) as a:
        worker = Worker()
        ref = await start_actor(a, "worker", worker)
        with pytest.raises(ActorDied):
            await ref.ask(Break())
        await until(lambda: worker.is_cancelled)
    assert crashes == ["worker"]


async def test_a_node_that_was_dialled_too_early_is_reached_when_it_listens(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/late.sock"
    async with Node("client") as client:
        asked = asyncio.ensure_future(client.ref(Address("late", endpoint, "server")).ask(Echo("x"), timeout=5))
        await asyncio.sleep(0.3)  # Some dials have failed by now.
        async with Node("late", endpoint=endpoint) as late:
            late.add("server", Server())
            assert await asked == Text("x")
