"""An HTTP client that takes little: completions over kept connections, their events counted and not parsed."""

import asyncio
import re
import time
from dataclasses import dataclass, field
from typing import cast

from .events import request

LENGTH = re.compile(rb"(?i)\r\ncontent-length: *(\d+)")
EVENT = b"data: {"
LAST_CHUNK = b"\r\n0\r\n\r\n"
TIMEOUT_S = 60.0


@dataclass
class Answer:
    """What came, and when: seconds from the request to the first event, and to the end."""

    num_events: int = 0
    first_s: float = 0.0
    seconds: float = 0.0


class Connection(asyncio.Protocol):
    """A connection that is asked one thing after the other."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport
        self._done: asyncio.Future[Answer] | None = None
        self._answer = Answer()
        self._begin = 0.0
        self._head = b""
        self._left: int | None = None
        """Bytes of the body that have not come; None while the head has not come, -1 of one in chunks."""
        self._tail = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but name.

    async def ask(self, *parts: bytes) -> Answer:
        """Send a request, in so many writes, and return what came.

        Raises RuntimeError for an answer that is no success, ConnectionError, TimeoutError.
        """
        self._answer, self._head, self._left, self._tail = Answer(), b"", None, b""
        self._done = asyncio.get_running_loop().create_future()
        self._begin = time.perf_counter()
        for part in parts:
            self._transport.write(part)
        async with asyncio.timeout(TIMEOUT_S):
            return await self._done

    def close(self) -> None:
        self._transport.close()

    def data_received(self, data: bytes) -> None:
        # Hot: once per piece of an answer, of any side.
        if self._left is None:
            self._head += data
            head, end, data = self._head.partition(b"\r\n\r\n")
            if not end:
                return
            if b" 200 " not in head[:20]:
                self._fail(RuntimeError(self._head[:500].decode(errors="replace")))
                return
            found = LENGTH.search(head)
            self._left = int(found[1]) if found else -1
        data = self._tail + data
        if count := data.count(EVENT):
            if not self._answer.num_events:
                self._answer.first_s = time.perf_counter() - self._begin
            self._answer.num_events += count
        if self._left >= 0:
            self._left -= len(data)
            is_over = self._left <= 0
        else:
            self._tail = data[1 - len(EVENT) :]
            is_over = data.endswith(LAST_CHUNK)
        if is_over and self._done is not None and not self._done.done():
            self._answer.seconds = time.perf_counter() - self._begin
            self._done.set_result(self._answer)

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(exc or ConnectionError("the connection was closed"))

    def _fail(self, error: Exception) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(error)


async def connect(port: int) -> Connection:
    """Return a connection to this machine's port."""
    _, connection = await asyncio.get_running_loop().create_connection(Connection, "127.0.0.1", port)
    return connection


@dataclass
class Load:
    """What so many connections met."""

    seconds: float = 0.0
    answers: list[Answer] = field(default_factory=list)

    @property
    def num_events(self) -> int:
        return sum(answer.num_events for answer in self.answers)


async def requests_for(port: int, num_at_once: int, seconds: float) -> Load:
    """Ask for single tokens, not streamed, on so many connections that each wait for their answers."""
    load, whole = Load(), request("127.0.0.1", "free", 1, is_streamed=False)
    begin = time.perf_counter()

    async def one() -> None:
        connection = await connect(port)
        while time.perf_counter() - begin < seconds:
            load.answers.append(await connection.ask(whole))
        connection.close()

    async with asyncio.TaskGroup() as group:
        for _ in range(num_at_once):
            group.create_task(one())
    load.seconds = time.perf_counter() - begin
    return load


async def streams(port: int, model: str, num_streams: int, num_events: int) -> Load:
    """Have so many streams at once. Raises RuntimeError if one has more or fewer events than asked for."""
    load, streamed = Load(), request("127.0.0.1", model, num_events, is_streamed=True)
    connections = [await connect(port) for _ in range(num_streams)]
    begin = time.perf_counter()
    load.answers = list(await asyncio.gather(*(connection.ask(streamed) for connection in connections)))
    load.seconds = time.perf_counter() - begin
    for connection in connections:
        connection.close()
    if wrong := [answer.num_events for answer in load.answers if answer.num_events != num_events]:
        raise RuntimeError(f"{wrong[0]} events came, not {num_events}")
    return load


async def one_by_one(port: int, count: int) -> list[float]:
    """Return the seconds until the first event of so many streams, one after the other on a connection that is kept.

    A request's head and body are written apart, as many clients do: where Nagle's algorithm meets delayed
    acknowledgements, what follows waits for 40 ms.
    """
    connection = await connect(port)
    head, end, body = request("127.0.0.1", "free", 2, is_streamed=True).partition(b"\r\n\r\n")
    found = [(await connection.ask(head + end, body)).first_s for _ in range(count)]
    connection.close()
    return found
