"""What a link promises: a greeting, an incarnation, numbered batches of bounded size. Bare sockets break it."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
from raw_peer import RawDialler, RawListener, hello

from callboard.bus import Address, Ask, Message, Node, Stream, Tell
from callboard.bus.frames import (
    ASK,
    MAX_BATCH_BYTES,
    PROTOCOL_VERSION,
    Answer,
    Ping,
    Post,
    Refused,
    Welcome,
)
from callboard.bus.transports.zmq import ZmqTransport


class Text(Message, frozen=True):
    text: str


class Echo(Ask[Text], frozen=True):
    text: str


class Numbers(Stream[int], frozen=True):
    count: int


class Say(Tell, frozen=True):
    text: str


class Add(Tell, frozen=True):
    number: int


class Server:
    def __init__(self) -> None:
        self.added: list[int] = []

    def on_echo(self, message: Echo) -> Text:
        return Text(message.text)

    async def on_numbers(self, message: Numbers) -> AsyncIterator[int]:
        for number in range(message.count):
            yield number

    def on_add(self, message: Add) -> None:
        self.added.append(message.number)


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    async with Node("a", endpoint=f"ipc://{tmp_path}/a.sock") as node:
        node.add("server", Server())
        yield node


def echo(call_id: int, text: str) -> Post:
    return Post(call_id, ASK, "server", msgspec.Raw(msgspec.msgpack.encode(Echo(text))))


# ---- the greeting ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("greeting", "reason"),
    [
        (hello("raw", version=PROTOCOL_VERSION + 1), "protocol version"),
        (hello("raw", fleet="another"), "fleet"),
        (hello("another"), "incarnation"),
        (Welcome(PROTOCOL_VERSION, "", "raw", "raw", ""), "greeting"),
        (Ping(), "greeting"),
        (echo(1, "no greeting"), "greeting"),
    ],
)
async def test_whoever_does_not_greet_as_it_must_is_told_why_and_turned_away(
    node: Node, greeting: Any, reason: str
) -> None:
    raw = RawDialler(node.endpoint)
    await raw.send(greeting)
    refused = await raw.next()
    assert type(refused) is Refused
    assert reason in refused.reason
    assert not node._links._links
    raw.close()


async def test_a_second_greeting_ends_the_link(node: Node) -> None:
    raw = RawDialler(node.endpoint)
    await raw.hello()
    await raw.send(hello("raw"))
    assert "greeted twice" in (await raw.next(Refused)).reason
    raw.close()


# ---- order -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("off_by", [1, -1, 1000])
async def test_a_batch_out_of_order_ends_the_link_and_is_not_taken(node: Node, off_by: int) -> None:
    raw = RawDialler(node.endpoint)
    await raw.hello()
    await raw.send(echo(1, "in order"))
    assert type(await raw.next()) is Answer
    raw.sequence += off_by
    await raw.send(echo(2, "out of order"))
    assert "out of order" in (await raw.next()).reason
    raw.close()


async def test_a_batch_of_another_incarnation_ends_the_link_and_is_not_taken(node: Node) -> None:
    raw = RawDialler(node.endpoint)
    await raw.hello()
    raw.incarnation = "predecessor"
    await raw.send(echo(1, "of old"))
    assert "out of order" in (await raw.next()).reason
    raw.close()


# ---- bounds, and a transport that says no for no reason ------------------------------------------------------------


async def test_batches_are_capped_whatever_is_sent_in_one_pass(node: Node, tmp_path: Path) -> None:
    raw = RawListener(f"ipc://{tmp_path}/raw.sock")
    ref = node.ref(Address("raw", raw.endpoint, "server"))
    words = [Say("x" * size) for size in (10, 300, 5000, MAX_BATCH_BYTES - 100, MAX_BATCH_BYTES, 4 * MAX_BATCH_BYTES)]
    sent = words * 20
    for word in sent:
        ref.tell(word)
    await raw.welcome()
    for word in sent:
        assert msgspec.msgpack.decode((await raw.next(Post)).body, type=Say) == word
    # What is too large for a batch of many is a batch of its own.
    assert all(size <= MAX_BATCH_BYTES or num_frames == 1 for size, num_frames in raw.batches)
    assert len(raw.batches) < len(sent)
    raw.close()


class FickleSocket(zmq.backend.Socket):
    """A ZeroMQ socket that has no room now and then, although it has, and once more when it is asked again."""

    num_sends = 0

    def send(self, data: Any, flags: int = 0, *args: Any, **kwargs: Any) -> Any:
        # The second part of a message always finds the room that the first one found.
        if flags & zmq.SNDMORE or self.type == zmq.DEALER:
            FickleSocket.num_sends += 1
            if FickleSocket.num_sends % 7 in (3, 5, 6):
                raise zmq.Again
        return zmq.backend.Socket.send(self, data, flags, *args, **kwargs)


async def test_a_socket_that_has_no_room_for_no_reason_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("callboard.bus.transports.zmq.Socket", FickleSocket)
    ends = [ZmqTransport(), ZmqTransport()]
    server = Server()
    async with (
        Node("a", endpoint=f"ipc://{tmp_path}/a.sock", transport=ends[0]) as a,
        Node("b", transport=ends[1]) as b,
    ):
        ref = b.ref(a.add("server", server).address)

        async def ask(first: int) -> None:
            for number in range(first, first + 100):
                assert await ref.ask(Echo(str(number)), timeout=10) == Text(str(number))

        before = FickleSocket.num_sends
        async with asyncio.timeout(30):
            await asyncio.gather(*(ask(100 * worker) for worker in range(5)))
            for number in range(1000):
                ref.tell(Add(number))
                if number % 10 == 0:
                    await asyncio.sleep(0)
            async with ref.stream(Numbers(2000), timeout=10, credit=16) as items:
                assert [number async for number in items] == list(range(2000))
        assert FickleSocket.num_sends > before + 200
        assert server.added == list(range(1000))
