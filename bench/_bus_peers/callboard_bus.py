"""Callboard through its public interface: ``Ref.ask`` and ``Ref.stream``, with the defaults of ``Node``.

Asks are answered by a plain function or by a coroutine (a task each), streams by async generators. Events of one
loop pass share a ZeroMQ message without the application's help, and each stream is under credit.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import uvloop
from _bus_load import (
    TEXT,
    TOKENS,
    TURN,
    Asker,
    Echo,
    EchoTokens,
    Event,
    Free,
    InlineEcho,
    Listener,
    Reply,
    Steps,
    TokensReply,
    all_streams,
    check_count,
    follow_orders,
    out_of_order,
    ready,
)

from callboard.bus import Address, Node


class Server:
    """The far side."""

    def on_inline_echo(self, message: InlineEcho) -> Reply:
        return Reply(message.text)

    async def on_echo(self, message: Echo) -> Reply:
        return Reply(message.text)

    def on_tokens(self, message: EchoTokens) -> TokensReply:
        return TokensReply(message.tokens)

    async def on_steps(self, message: Steps) -> AsyncIterator[Event]:
        for index in range(message.count):
            yield Event(index, TEXT)
            await asyncio.sleep(0)

    async def on_free(self, message: Free) -> AsyncIterator[Event]:
        for index in range(message.count):
            yield Event(index, TEXT)
            if index % TURN == TURN - 1:
                await asyncio.sleep(0)


def serve(address: str) -> None:
    async def run() -> None:
        async with Node("server", endpoint=address) as node:
            node.add("server", Server())
            ready()
            await asyncio.Event().wait()

    uvloop.run(run())


def client(address: str, pids: Sequence[int]) -> None:
    async def run() -> None:
        async with Node("client") as node:
            ref = node.ref(Address("server", address, "server"))

            def listener(kind: type[Any]) -> Listener:
                async def listen(stream: int, count: int) -> None:
                    num_events = 0
                    async with ref.stream(kind(count)) as events:
                        async for event in events:
                            if event.index != num_events:
                                raise out_of_order(event.index, num_events)
                            num_events += 1
                    check_count(num_events, count)

                return all_streams(listen)

            askers: dict[str, Asker] = {
                "plain": lambda: ref.ask(InlineEcho(TEXT)),
                "coroutine": lambda: ref.ask(Echo(TEXT)),
                "tokens": lambda: ref.ask(EchoTokens(TOKENS)),
            }
            await follow_orders(askers, {"steps": listener(Steps), "free": listener(Free)}, pids)

    uvloop.run(run())
