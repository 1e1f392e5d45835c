"""Batches that no Callboard node would send: refused, answered where an answer is possible, and nobody else suffers."""

import asyncio
import math
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from callboard.bus import Ask, Message, Node, Ref
from callboard.bus.frames import (
    ASK,
    PROTOCOL_VERSION,
    TELL,
    Fail,
    Frame,
    Hello,
    Ping,
    Pong,
    Post,
    Refused,
    Welcome,
    decode_batch,
    encode_batch,
)
from callboard.bus.liveness import local_host


class Text(Message, frozen=True):
    text: str


class Echo(Ask[Text], frozen=True):
    text: str


class Later(Ask[Text], frozen=True):
    pass


class Server:
    def on_echo(self, message: Echo) -> Text:
        return Text(message.text)

    async def on_later(self, message: Later) -> Text:
        await asyncio.sleep(60)
        return Text("")


class Stranger:
    """A bare DEALER that sends whatever it likes."""

    def __init__(self, endpoint: str) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.connect(endpoint)
        self._sent = 0
        self._heard: list[Any] = []

    def raw(self, frames: bytes) -> None:
        """Send a batch whose list of frames is these bytes."""
        batch = encode_batch(("i", self._sent, [])).removesuffix(b"\x90")
        self._socket.send(batch + frames)
        self._sent += 1

    def send(self, *frames: Frame) -> None:
        self.raw(msgspec.msgpack.encode(frames))

    async def hello(self, *, host: str = "", pid: int = 0) -> None:
        self.send(Hello(PROTOCOL_VERSION, "", "stranger", "i", "", host, pid))
        assert type(await self.next()) is Welcome

    async def next(self) -> Any:
        """Return the next frame that is no Ping."""
        async with asyncio.timeout(5):
            while not self._heard:
                while not self._socket.poll(0):
                    await asyncio.sleep(0.001)
                self._heard = [frame for frame in decode_batch(self._socket.recv())[2] if type(frame) is not Ping]
        return self._heard.pop(0)

    def close(self) -> None:
        self._socket.close(0)
        self._context.term()


@pytest.fixture
async def ref(tmp_path: Path) -> AsyncIterator[Ref]:
    """The server, as another node sees it. At the end it must be alive, and no loop callback have failed."""
    failed: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: failed.append(context))
    async with Node("a", endpoint=f"ipc://{tmp_path}/a.sock") as a, Node("b") as b:
        seen = b.ref(a.add("server", Server()).address)
        yield seen
        assert await seen.ask(Echo("alive"), timeout=5) == Text("alive")
    assert not failed


@pytest.fixture
def stranger(ref: Ref) -> Iterator[Stranger]:
    stranger = Stranger(ref.address.endpoint)
    yield stranger
    stranger.close()


def echo(call_id: int, kind: int) -> Post:
    return Post(call_id, kind, "server", msgspec.Raw(msgspec.msgpack.encode(Echo("x"))))


DEEP = b"\x91" * 20_000 + b"\x01"


@pytest.mark.parametrize(
    "frames",
    [
        b"\x91\x95\x04\x01\x01\xa1s" + DEEP,  # a Post's body
        b"\x91\x96\x08\x01\xa1a\xa1a\xa1a\x81\xa1k" + DEEP,  # a Fail's fields
        b"\x91\x92\x03\xa1\xff",  # no UTF-8
        b"\xc1",
    ],
)
async def test_a_batch_that_does_not_decode_cuts_its_link_alone(stranger: Stranger, frames: bytes) -> None:
    await stranger.hello()
    stranger.raw(frames)
    assert type(await stranger.next()) is Refused


async def test_a_message_of_an_unknown_kind_is_refused_and_its_actor_lives(stranger: Stranger) -> None:
    await stranger.hello()
    stranger.send(echo(1, 7))
    fail = await stranger.next()
    assert type(fail) is Fail
    assert fail.name == "NotUnderstood"


async def test_an_ask_sent_as_a_tell_is_dropped_without_an_answer(stranger: Stranger) -> None:
    await stranger.hello()
    stranger.send(echo(1, TELL), Ping())
    assert type(await stranger.next()) is Pong


async def test_a_deadline_that_is_no_number_is_refused(stranger: Stranger) -> None:
    await stranger.hello()
    stranger.send(Post(1, ASK, "server", msgspec.Raw(msgspec.msgpack.encode(Later())), math.nan), Ping())
    assert type(await stranger.next()) is Fail
    assert type(await stranger.next()) is Pong


async def test_a_pid_that_cannot_be_is_no_error(stranger: Stranger) -> None:
    await stranger.hello(host=local_host(), pid=2**40)
    stranger.send(Ping())
    assert type(await stranger.next()) is Pong


async def test_a_timeout_that_is_no_number_is_the_callers_error(ref: Ref) -> None:
    with pytest.raises(ValueError, match="number"):
        await ref.ask(Echo("x"), timeout=math.nan)
