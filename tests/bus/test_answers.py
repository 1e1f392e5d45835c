"""Handlers and readers that do odd things: their callers hear of it at once, and nothing is left waiting."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from callboard.bus import ActorDied, Ask, BusError, Message, Node, Ref, Refusal, RemoteError, Stream, Tell
from callboard.bus.failures import error_of
from callboard.bus.frames import Fail


class Text(Message, frozen=True):
    text: Any


class Give(Ask[Text], frozen=True):
    what: str


class GiveLater(Ask[Text], frozen=True):
    what: str


class Note(Tell, frozen=True):
    pass


class Ticks(Stream[int], frozen=True):
    delay_s: float


class Stubborn(Stream[int], frozen=True):
    pass


class Named(Refusal):
    sentence = "{who.name} says no"


ANSWERS: dict[str, Callable[[], Any]] = {
    "an object": object,
    "too large": lambda: "x" * (17 * 1024 * 1024),
    "too deep": lambda: _nested(100_000),
}
REFUSALS: dict[str, Callable[[], Exception]] = {
    "with an object": lambda: Refusal(what=object()),
    "with a great number": lambda: Refusal(what=2**70),
}


def _nested(depth: int) -> list[Any]:
    nested: list[Any] = []
    for _ in range(depth):
        nested = [nested]
    return nested


class Server:
    def __init__(self) -> None:
        self.log: list[str] = []

    def on_give(self, message: Give) -> Text:
        if message.what in REFUSALS:
            raise REFUSALS[message.what]()
        if message.what == "a bug":
            raise ValueError("caf\udce9")
        return Text(ANSWERS[message.what]())

    async def on_give_later(self, message: GiveLater) -> Text:
        return self.on_give(Give(message.what))

    async def on_note(self, message: Note) -> None:
        try:
            self.log.append("begun")
            await asyncio.sleep(60)
        finally:
            self.log.append("ended")

    async def on_ticks(self, message: Ticks) -> AsyncIterator[int]:
        for i in range(1000):
            await asyncio.sleep(message.delay_s)
            yield i

    async def on_stubborn(self, message: Stubborn) -> AsyncIterator[int]:
        try:
            yield 1
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            yield 2
            yield 3


class Pair:
    def __init__(self, node: Node, server: Server, ref: Ref) -> None:
        self.node, self.server, self.ref = node, server, ref

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(5):
            while not condition():
                await asyncio.sleep(0.001)


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[Pair]:
    async with Node("a", endpoint=f"ipc://{tmp_path}/a.sock") as a, Node("b") as b:
        server = Server()
        yield Pair(a, server, b.ref(a.add("server", server).address))


@pytest.mark.parametrize("kind", [Give, GiveLater])
@pytest.mark.parametrize("what", [*ANSWERS, "a bug"])
async def test_an_answer_that_cannot_travel_is_a_bug_the_caller_hears_of(
    pair: Pair, kind: type[Give | GiveLater], what: str
) -> None:
    async with asyncio.timeout(5):
        with pytest.raises(ActorDied, match="crashed"):
            await pair.ref.ask(kind(what))


@pytest.mark.parametrize("kind", [Give, GiveLater])
@pytest.mark.parametrize("what", REFUSALS)
async def test_a_refusal_whose_facts_cannot_travel_arrives_as_its_sentence(
    pair: Pair, kind: type[Give | GiveLater], what: str
) -> None:
    async with asyncio.timeout(5):
        with pytest.raises(Refusal, match="refused"):
            await pair.ref.ask(kind(what))
    assert pair.node._server.names() == ["server"]


def test_a_refusal_that_cannot_be_rebuilt_arrives_as_a_remote_error() -> None:
    error = error_of(Fail(1, "refusal", "somebody says no", "Named", {"who": 3}))
    assert isinstance(error, RemoteError)
    assert "somebody says no" in str(error)


async def test_an_actor_taken_off_leaves_no_handler_of_a_tell_behind(pair: Pair) -> None:
    pair.ref.tell(Note())
    await pair.until(lambda: pair.server.log == ["begun"])
    pair.node.remove("server")
    await pair.until(lambda: pair.server.log == ["begun", "ended"])


async def test_a_stream_that_goes_on_after_its_cancellation_is_ended(pair: Pair) -> None:
    async with pair.ref.stream(Stubborn(), credit=1) as items:
        await anext(items)
    await pair.until(lambda: not pair.node._server._serving)


async def test_a_reader_that_was_cancelled_takes_nothing_from_the_next(pair: Pair) -> None:
    async with asyncio.timeout(5), pair.ref.stream(Ticks(0.02)) as items:
        first = asyncio.ensure_future(anext(items))
        await asyncio.sleep(0)
        first.cancel()
        assert await anext(items) == 0


async def test_whoever_still_reads_when_a_stream_is_left_hears_of_it(pair: Pair) -> None:
    async with pair.ref.stream(Ticks(60)) as items:
        reader = asyncio.ensure_future(anext(items))
        await asyncio.sleep(0)
    async with asyncio.timeout(5):
        for read in (reader, anext(items)):
            with pytest.raises(BusError, match="left"):
                await read
