"""Calls at their edges: handlers that give up inside a plain function, timeouts and credit that make no sense."""

import asyncio
import gc
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from raw_peer import RawDialler, RawListener

from callboard.bus import (
    ActorDied,
    Address,
    Ask,
    BusError,
    LinkConfig,
    Message,
    Node,
    NotUnderstood,
    Ref,
    Stream,
    VirtualClock,
    current_call,
)
from callboard.bus.calls import Served
from callboard.bus.frames import ASK, Answer, Fail, Items, Post
from callboard.bus.outbox import Outbox
from callboard.bus.testing import run_virtual
from callboard.bus.transports.inproc import InprocHub


class Text(Message, frozen=True):
    text: str


class Echo(Ask[Text], frozen=True):
    text: str


class GiveUp(Ask[Text], frozen=True):
    pass


class EndMyself(Ask[Text], frozen=True):
    pass


class Odd(Ask[Text], frozen=True):
    number: int

    def __post_init__(self) -> None:
        {}[self.number]


class Numbers(Stream[int], frozen=True):
    count: int


class Server:
    def on_echo(self, message: Echo) -> Text:
        return Text(message.text)

    def on_give_up(self, message: GiveUp) -> Text:
        raise asyncio.CancelledError

    def on_end_myself(self, message: EndMyself) -> Text:
        call = current_call()
        assert call is not None
        call.fail(ActorDied("it is over"))
        return Text("not any more")

    def on_odd(self, message: Odd) -> Text:
        return Text("")

    async def on_numbers(self, message: Numbers) -> AsyncIterator[int]:
        for number in range(message.count):
            yield number


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    async with Node("a", endpoint=f"ipc://{tmp_path}/a.sock") as node:
        node.add("server", Server())
        yield node


@pytest.fixture
async def ref(node: Node) -> AsyncIterator[Ref]:
    async with Node("b") as b:
        yield b.ref(node.address_of("server"))


def post(call_id: int, message: Any) -> Post:
    return Post(call_id, ASK, "server", msgspec.Raw(msgspec.msgpack.encode(message)))


async def test_a_plain_handler_that_is_cancelled_ends_its_call_alone(node: Node) -> None:
    raw = RawDialler(node.endpoint)
    await raw.hello()
    await raw.send(post(1, GiveUp()), post(2, Echo("same batch")))
    fail = await raw.next(Fail, seconds=5)
    assert (fail.id, fail.kind) == (1, "actor_died")
    assert (await raw.next(Answer, seconds=5)).id == 2
    raw.close()


async def test_a_plain_handler_that_ends_its_call_answers_no_more(node: Node) -> None:
    raw = RawDialler(node.endpoint)
    await raw.hello()
    await raw.send(post(1, EndMyself()), post(2, Echo("x")))
    heard = [await raw.next() for _ in range(2)]
    assert [(type(frame), frame.id) for frame in heard] == [(Fail, 1), (Answer, 2)]
    raw.close()


async def test_a_message_whose_own_check_breaks_is_refused_and_the_link_stays(node: Node) -> None:
    raw = RawDialler(node.endpoint)
    await raw.hello()
    body = msgspec.Raw(msgspec.msgpack.encode(["Odd", 1]))
    await raw.send(Post(1, ASK, "server", body), post(2, Echo("x")))
    fail = await raw.next(Fail, seconds=5)
    assert (fail.id, fail.name) == (1, "NotUnderstood")
    assert (await raw.next(Answer, seconds=5)).id == 2
    raw.close()


@pytest.mark.parametrize("timeout", [float("-inf"), -1.0, 0.0])
async def test_a_timeout_in_the_past_ends_at_once_and_leaves_nothing(ref: Ref, timeout: float) -> None:
    async with asyncio.timeout(5):
        with pytest.raises(BusError):
            await ref.ask(GiveUp(), timeout=timeout)
    node: Any = ref._node
    assert not any(link.asked for link in node._links._links)


async def test_a_timeout_that_is_no_number_is_never_sent(ref: Ref) -> None:
    assert await ref.ask(Echo("x")) == Text("x")
    with pytest.raises(TypeError):
        await ref.ask(Echo("x"), timeout="5")  # type: ignore[arg-type]
    node: Any = ref._node
    assert not any(link.asked for link in node._links._links)
    assert await ref.ask(Echo("y")) == Text("y")


@pytest.mark.parametrize("credit", [0, -1])
async def test_a_stream_without_credit_is_the_callers_error(ref: Ref, credit: int) -> None:
    with pytest.raises(ValueError, match="credit"):
        async with ref.stream(Numbers(1), credit=credit):
            pass


async def test_good_items_before_a_bad_one_of_the_same_run_arrive(tmp_path: Path) -> None:
    raw = RawListener(f"ipc://{tmp_path}/raw.sock")
    async with Node("a") as node:
        ref = node.ref(Address("raw", raw.endpoint, "server"))
        async with ref.stream(Numbers(5), timeout=10) as items:
            await raw.welcome()
            call_id = (await raw.next(Post)).id
            await raw.send(Items(call_id, msgspec.Raw(msgspec.msgpack.encode([0, 1, "two", 3]))))
            assert [await anext(items), await anext(items)] == [0, 1]
            with pytest.raises(NotUnderstood):
                await anext(items)
        async with ref.stream(Numbers(5), timeout=10, credit=2) as items:
            call_id = (await raw.next(Post)).id
            await raw.send(Items(call_id, msgspec.Raw(msgspec.msgpack.encode([0, 1, 2]))))
            assert [await anext(items), await anext(items)] == [0, 1]
            with pytest.raises(NotUnderstood, match="credit"):
                await anext(items)
    raw.close()


async def test_late_batches_of_a_link_that_was_replaced_are_nobodys_fault(
    node: Node, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = RawDialler(node.endpoint), RawDialler(node.endpoint)
    await first.hello()
    await second.hello()  # The same node, which dials anew.
    with caplog.at_level(logging.WARNING):
        for number in range(20):
            await first.send(post(number + 1, Echo("late")))
        await second.send(post(1, Echo("x")))
        assert (await second.next(Answer)).id == 1
        await asyncio.sleep(0.1)
    assert node._links.num_refused == 0
    assert not caplog.records
    assert len(node._links._links) == 1
    # Whoever goes on all the same is told that the link is no more.
    assert "is no more" in str((await first.next()).reason)
    first.close()
    second.close()


async def test_a_welcome_that_finds_no_room_at_first_is_sent_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from callboard.bus.transports import zmq as transport

    send_to = transport.BoundRouter.send_to
    refusals = [False, False, False]

    def fickle(self: Any, *args: Any) -> bool:
        return refusals.pop() if refusals else send_to(self, *args)

    monkeypatch.setattr(transport.BoundRouter, "send_to", fickle)
    async with Node("a", endpoint=f"ipc://{tmp_path}/a.sock") as a, Node("b") as b:
        a.add("server", Server())
        assert await b.ref(a.address_of("server")).ask(Echo("x"), timeout=5) == Text("x")
    assert not refusals


class Full:
    """A connection without room."""

    def __init__(self) -> None:
        self.num_asked = 0

    def send(self, batch: bytes | bytearray) -> bool:
        self.num_asked += 1
        return False

    def close(self) -> None:
        return


def test_a_transport_without_room_is_asked_again_by_one_timer() -> None:
    async def run() -> None:
        box = Outbox(msgspec.msgpack.Encoder().encode_into, "me", 1 << 30)
        full = Full()
        box.connection, box.is_open = full, True
        box.is_calm = False
        for _ in range(20):  # Much of one pass: a part leaves early, and finds no room; so does the rest.
            box.post(Answer(7, "x" * 10_000))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        full.num_asked = 0
        await asyncio.sleep(0.1)
        assert 45 <= full.num_asked <= 51

    run_virtual(run)


def test_a_peer_heard_of_after_this_node_hung_is_not_excused_for_the_time_to_come() -> None:
    async def run() -> None:
        hub = InprocHub()
        config = LinkConfig(ping_s=1.0, silent_s=5.0)
        async with Node("a", endpoint="a", transport=hub.transport(), clock=VirtualClock(), links=config) as a:
            a.add("server", Server())
            clock = VirtualClock()
            async with Node("b", transport=hub.transport(), clock=clock, links=config) as b:
                await b.ref(a.address_of("server")).ask(Echo("x"))
                (link,) = b._links._links
                loop: Any = asyncio.get_running_loop()
                loop.now += 100.0
                link.last_heard = clock.now()  # It was read first.
                for _ in range(10):
                    await asyncio.sleep(0)
                    assert link.last_heard <= clock.now()

    run_virtual(run)


class Breaks:
    """An actor with a bug, and its clean-up that asks somebody."""

    def __init__(self, other: Ref) -> None:
        self.other = other
        self.done: asyncio.Future[Text] = asyncio.get_running_loop().create_future()

    async def on_echo(self, message: Echo) -> Text:
        raise RuntimeError("a bug")

    async def clean_up(self) -> None:
        assert current_call() is None
        self.done.set_result(await self.other.ask(Echo("cleaned")))


async def test_what_an_actor_does_after_its_crash_has_no_part_in_the_call_it_crashed_in(node: Node, ref: Ref) -> None:
    breaks = Breaks(node.ref(node.address_of("server")))
    node.add("breaks", breaks, after_crash=breaks.clean_up)
    with pytest.raises(ActorDied):
        await ref._node.ref(node.address_of("breaks")).ask(Echo("x"), timeout=5)  # type: ignore[attr-defined]
    async with asyncio.timeout(5):
        assert await breaks.done == Text("cleaned")


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("not even its text")


class BreaksBadly:
    async def on_echo(self, message: Echo) -> Text:
        raise Unprintable


async def test_an_error_without_a_text_crashes_its_actor_like_any_other(node: Node, ref: Ref) -> None:
    node.add("badly", BreaksBadly())
    badly = ref._node.ref(node.address_of("badly"))  # type: ignore[attr-defined]
    with pytest.raises(ActorDied, match="crashed: Unprintable"):
        await badly.ask(Echo("x"), timeout=5)


class Relay(Ask[Text], frozen=True):
    target: Ref


class Relays:
    async def on_relay(self, message: Relay) -> Text:
        return await message.target.ask(Echo("on its way"))


async def test_a_link_does_not_keep_the_call_in_which_it_was_dialled(tmp_path: Path, node: Node, ref: Ref) -> None:
    async with Node("c", endpoint=f"ipc://{tmp_path}/c.sock") as c:
        relay = ref._node.ref(c.add("relay", Relays()).address)  # type: ignore[attr-defined]
        assert await relay.ask(Relay(node.ref(node.address_of("server"))), timeout=5) == Text("on its way")
        await asyncio.sleep(0)
        gc.collect()
        assert not [each for each in gc.get_objects() if type(each) is Served]
