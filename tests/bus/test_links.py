"""Links at their edges: nodes that stop while they are spoken to, no descriptors left, peers that do not read."""

import asyncio
import os
import resource
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import zmq

from callboard.bus import Address, Ask, BusError, LinkConfig, LinkLost, Message, Node, NotUnderstood, Ref
from callboard.bus.liveness import ProcessWatch, process_start
from callboard.bus.transports.contract import Connection
from callboard.bus.transports.zmq import ZmqTransport


class Text(Message, frozen=True):
    text: str


class Echo(Ask[Text], frozen=True):
    text: str


class Wait(Ask[Text], frozen=True):
    pass


class Server:
    def on_echo(self, message: Echo) -> Text:
        return Text(message.text)

    async def on_wait(self, message: Wait) -> Text:
        await asyncio.sleep(60)
        return Text("")


@pytest.fixture
async def a(tmp_path: Path) -> AsyncIterator[Node]:
    async with Node("a", endpoint=f"ipc://{tmp_path}/a.sock") as node:
        node.add("server", Server())
        yield node


async def _ask_until_stopped(ref: Ref) -> None:
    while True:
        try:
            await ref.ask(Wait(), timeout=60)
        except LinkLost as error:
            if "not running" in str(error):
                return


async def test_whoever_asks_again_while_the_node_stops_neither_hangs_nor_holds_it_up(a: Node) -> None:
    b = Node("b")
    await b.__aenter__()
    ref = b.ref(a.address_of("server"))
    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        for _ in range(3):
            group.create_task(_ask_until_stopped(ref))
        await ref.ask(Echo("they are under way"))
        await b.stop()


async def test_a_node_may_be_stopped_by_two_at_once(a: Node) -> None:
    async with Node("b") as b:
        await b.ref(a.address_of("server")).ask(Echo("x"))
        async with asyncio.timeout(5):
            await asyncio.gather(b.stop(), b.stop())


async def test_a_stop_that_is_cancelled_leaves_no_socket_open(a: Node) -> None:
    transport = ZmqTransport()
    b = await Node("b", transport=transport).__aenter__()
    await b.ref(a.address_of("server")).ask(Echo("x"))
    stopping = asyncio.create_task(b.stop())
    await asyncio.sleep(0)
    stopping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stopping
    assert transport._context.closed


async def test_a_link_that_cannot_be_dialled_breaks(a: Node) -> None:
    transport = ZmqTransport()
    async with Node("b", transport=transport) as b:
        ref = b.ref(a.address_of("server"))
        transport._context.set(zmq.MAX_SOCKETS, 1)
        for _ in range(2):
            async with asyncio.timeout(5):
                with pytest.raises(BusError, match="cannot dial"):
                    await ref.ask(Echo("x"))


async def test_dialling_where_nobody_listens_keeps_no_descriptors(tmp_path: Path) -> None:
    async with Node("b", links=LinkConfig(dial_s=0.0)) as b:
        before = len(os.listdir("/proc/self/fd"))
        for i in range(60):
            with pytest.raises(LinkLost):
                await b.ref(Address("x", f"ipc://{tmp_path}/{i}.sock", "x")).ask(Echo("x"))
        async with asyncio.timeout(10):  # ZeroMQ closes them in a thread of its own.
            while len(os.listdir("/proc/self/fd")) > before + 10:
                await asyncio.sleep(0.01)


async def test_an_endpoint_in_use_is_taken_and_a_dead_one_is_not(a: Node, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="in use"):
        await Node("thief", endpoint=a.endpoint).__aenter__()
    async with Node("b") as b:
        assert await b.ref(a.address_of("server")).ask(Echo("x"), timeout=5) == Text("x")
    await a.stop()
    async with Node("successor", endpoint=a.endpoint):
        pass


class Recorder:
    """A listener that only listens."""

    def __init__(self) -> None:
        self.connections: list[Connection] = []
        self.batches: list[bytes] = []

    def accepted(self, connection: Connection) -> None:
        self.connections.append(connection)

    def received(self, connection: Connection, batch: bytes) -> None:
        self.batches.append(batch)

    def closed(self, connection: Connection, reason: str) -> None:
        raise AssertionError(reason)


async def test_a_peer_that_does_not_read_swallows_nobodys_input(tmp_path: Path) -> None:
    transport, heard = ZmqTransport(), Recorder()
    endpoint = await transport.start(f"ipc://{tmp_path}/a.sock", heard)
    with zmq.Context() as context, context.socket(zmq.DEALER) as deaf, context.socket(zmq.DEALER) as other:
        deaf.linger = other.linger = 0
        deaf.connect(endpoint)
        deaf.send(b"first")
        async with asyncio.timeout(10):
            while not heard.connections:
                await asyncio.sleep(0.001)
            (full,) = heard.connections
            while full.send(bytes(60_000)):
                await asyncio.sleep(0)
            other.connect(endpoint)
            other.send(b"second")
            time.sleep(0.1)  # noqa: ASYNC251  It arrives while the loop is busy,
            while full.send(bytes(60_000)):  # and a send that fails sees it first, whatever had room meanwhile.
                pass
            while heard.batches[1:] != [b"second"]:
                await asyncio.sleep(0.001)
    await transport.stop()


@contextmanager
def one_descriptor_left() -> Iterator[None]:
    lowest = os.dup(0)
    os.close(lowest)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + 1, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_running_out_of_descriptors_is_nobodys_death() -> None:
    died: list[bool] = []
    process = await asyncio.create_subprocess_exec("sleep", "60")
    start = process_start(process.pid)
    assert start is not None
    with one_descriptor_left():
        watch = ProcessWatch(process.pid, start, lambda: died.append(True))
    await asyncio.sleep(0)
    watch.close()
    process.kill()
    await process.wait()
    assert not died


async def _serve_once(endpoint: str, listening: threading.Event) -> None:
    stop = asyncio.Event()

    class Once:
        def on_echo(self, message: Echo) -> Text:
            stop.set()
            return Text(message.text)

    async with Node("once", endpoint=endpoint) as node:
        node.add("server", Once())
        listening.set()
        await stop.wait()


@pytest.mark.parametrize("endpoint", ["ipc://{}/once.sock", "tcp://127.0.0.1:{}"])
async def test_the_last_words_of_a_node_that_stops_reach_a_busy_peer(tmp_path: Path, endpoint: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        endpoint = endpoint.format(tmp_path if endpoint.startswith("ipc") else free.getsockname()[1])
    listening = threading.Event()
    server = asyncio.create_task(asyncio.to_thread(asyncio.run, _serve_once(endpoint, listening)))
    await asyncio.to_thread(listening.wait, 10)
    async with Node("client") as client:
        ref = client.ref(Address("once", endpoint, "server"))
        with pytest.raises(NotUnderstood):
            await ref.ask(Wait())
        asked = asyncio.create_task(ref.ask(Echo("last")))
        for _ in range(3):
            await asyncio.sleep(0)
        time.sleep(0.3)  # noqa: ASYNC251  It answers and stops while nobody reads.
        assert await asked == Text("last")
        await server
