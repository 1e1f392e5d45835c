"""NATS: nats-py on uvloop at both ends and a nats-server between them, over loopback TCP (it has no unix sockets).

Requests are NATS requests, answered by the callback of one subscription; an event is a message to the subject of its
stream, and the client has a subscription, so a task, for each of the 64. nats-py gathers what is published in one
pass of the loop, and sends it together. Messages are msgspec structs, the same as Callboard's. No JetStream, nothing is
stored or acknowledged. The broker's processor time counts.
"""

import asyncio
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import uvloop
from _bus_load import (
    STREAMS,
    TEXT,
    TURN,
    Asker,
    Echo,
    Event,
    Free,
    Listener,
    Reply,
    Steps,
    follow_orders,
    out_of_order,
    ready,
)
from _bus_sides import nats_server
from msgspec.msgpack import Decoder, Encoder

TIMEOUT_S = 30.0
encode = Encoder().encode


def broker(address: str) -> None:
    """Become nats-server, on a free port that it writes to a file."""
    path = nats_server()
    assert path is not None
    folder = _folder(address)
    folder.mkdir()
    ready()
    log = str(folder / "log")
    os.execv(path, [path, "-a", "127.0.0.1", "-p", "-1", "--ports_file_dir", str(folder), "-l", log])


def _folder(address: str) -> Path:
    return Path(address.removeprefix("ipc://"))


def _url(address: str) -> str:
    """Return where the broker listens, once it does. Raises TimeoutError."""
    end = time.monotonic() + TIMEOUT_S
    while time.monotonic() < end:
        for file in _folder(address).glob("*.ports"):
            if text := file.read_text():
                return str(json.loads(text)["nats"][0])
        time.sleep(0.01)
    raise TimeoutError("nats-server did not say where it listens")


def serve(address: str) -> None:
    import nats

    decode_echo, decode_steps, decode_free = Decoder(Echo).decode, Decoder(Steps).decode, Decoder(Free).decode

    async def run() -> None:
        connection = await nats.connect(_url(address), allow_reconnect=False)
        tasks: set[asyncio.Task[None]] = set()

        async def echo(message: Any) -> None:
            await connection.publish(message.reply, encode(Reply(decode_echo(message.data).text)))

        async def steps(subject: str, count: int) -> None:
            for index in range(count):
                await connection.publish(subject, encode(Event(index, TEXT)))
                await asyncio.sleep(0)

        async def free(subject: str, count: int) -> None:
            for index in range(count):
                await connection.publish(subject, encode(Event(index, TEXT)))
                if index % TURN == TURN - 1:
                    await asyncio.sleep(0)

        def start(producer: Any, count: int) -> None:
            tasks.clear()
            tasks.update(asyncio.create_task(producer(f"events.{stream}", count)) for stream in range(STREAMS))

        async def on_steps(message: Any) -> None:
            start(steps, decode_steps(message.data).count)

        async def on_free(message: Any) -> None:
            start(free, decode_free(message.data).count)

        await connection.subscribe("echo", cb=echo)
        await connection.subscribe("steps", cb=on_steps)
        await connection.subscribe("free", cb=on_free)
        await connection.flush()
        ready()
        await asyncio.Event().wait()

    uvloop.run(run())


def client(address: str, pids: Sequence[int]) -> None:
    import nats

    decode_reply, decode_event = Decoder(Reply).decode, Decoder(Event).decode

    async def run() -> None:
        connection = await nats.connect(_url(address), allow_reconnect=False)
        readers = [_Reader(decode_event) for _ in range(STREAMS)]
        for stream, reader in enumerate(readers):
            await connection.subscribe(f"events.{stream}", cb=reader.take)
        await connection.flush()

        async def ask() -> Reply:
            message = await connection.request("echo", encode(Echo(TEXT)), timeout=TIMEOUT_S)
            return decode_reply(message.data)

        def listener(subject: str, request: type[Any]) -> Listener:
            async def listen(count: int) -> None:
                ends = [reader.expect(count) for reader in readers]
                await connection.publish(subject, encode(request(count)))
                await asyncio.gather(*ends)

            return listen

        askers: dict[str, Asker] = {"": ask}
        await follow_orders(askers, {"steps": listener("steps", Steps), "free": listener("free", Free)}, pids)

    uvloop.run(run())


class _Reader:
    """Counts the events of one stream; ``take`` is its subscription's callback."""

    def __init__(self, decode: Any) -> None:
        self._decode = decode
        self._count = self._num_events = 0
        self._end: asyncio.Future[None] | None = None

    def expect(self, count: int) -> asyncio.Future[None]:
        """Begin a stream of so many events; the future is done when all are here."""
        self._count, self._num_events = count, 0
        self._end = asyncio.get_running_loop().create_future()
        return self._end

    async def take(self, message: Any) -> None:
        event = self._decode(message.data)
        if self._end is None or event.index != self._num_events:
            raise out_of_order(event.index, self._num_events)
        self._num_events += 1
        if self._num_events == self._count:
            self._end.set_result(None)
