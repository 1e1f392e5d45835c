"""Thousands of strangers at a node with keys: none gets a word of the bus, all are counted, and nobody else suffers."""

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from random import Random

import pytest
import zmq
from waiting import PATIENCE_S

from callboard.bus import Address, Ask, Message, Node
from callboard.bus.frames import MAX_FRAME_BYTES, PROTOCOL_VERSION, Hello, encode_batch
from callboard.bus.keys import FleetKeys
from callboard.bus.transports.keyed import PART_BYTES, KeyedTransport

SECRET = bytes(range(32))
KEYS = FleetKeys(SECRET, "test")
OTHERS = FleetKeys(bytes(32), "test")
HANDSHAKE_S = 0.7
MIB = 1 << 20


class Report(Message, frozen=True):
    num_strangers: int
    num_links: int


class Inspect(Ask[Report], frozen=True):
    pass


class Server:
    def __init__(self, node: Node) -> None:
        self.node = node

    def on_inspect(self, message: Inspect) -> Report:
        return Report(self.node.num_strangers, len(self.node._links._links))


async def serve() -> None:
    """Run the node that is besieged, until standard input ends. Run in a process of its own."""
    transport = KeyedTransport(KEYS, "server", handshake_s=HANDSHAKE_S)
    async with Node("server", endpoint="tcp://127.0.0.1:*", fleet="test", transport=transport, keys=KEYS) as node:
        node.add("server", Server(node))
        print(node.endpoint, flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


class Besieged:
    """The node in its process, and what this process does to it."""

    def __init__(self, pid: int, endpoint: str, friend: Node, context: "zmq.Context[zmq.Socket[bytes]]") -> None:
        self.pid = pid
        self.endpoint = endpoint
        self.port = int(endpoint.rpartition(":")[2])
        self.server = friend.ref(Address("server", endpoint, "server"))
        self.context = context
        self.num_served = 0
        self.slowest_s = 0.0

    def tcp(self) -> socket.socket:
        """Connect without ZeroMQ. Whoever sends is not held up by a server that reads no more."""
        made = socket.create_connection(("127.0.0.1", self.port))
        made.settimeout(5)
        return made

    def rss(self) -> int:
        """Return the bytes of memory of its process."""
        pages = Path(f"/proc/{self.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    async def num_strangers(self) -> int:
        return (await self.server.ask(Inspect(), timeout=10)).num_strangers

    async def until_counted(self, number: int) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while await self.num_strangers() < number:
                await asyncio.sleep(0.005)

    @asynccontextmanager
    async def being_served(self) -> AsyncIterator[None]:
        """Ask without a pause meanwhile, and dial anew now and then: an honest peer's life."""

        async def live() -> None:
            clock = asyncio.get_running_loop().time
            while True:
                began = clock()
                async with Node("newcomer", fleet="test", keys=KEYS) as node:
                    await node.ref(Address("server", self.endpoint, "server")).ask(Inspect(), timeout=10)
                self.slowest_s = max(self.slowest_s, clock() - began)
                self.num_served += 1
                await asyncio.sleep(0.01)

        living = asyncio.create_task(live())
        try:
            yield
            assert not living.done(), living.exception()
        finally:
            living.cancel()
            await asyncio.wait([living])

    @contextmanager
    def dealers(
        self, number: int, prepare: Callable[["zmq.Socket[bytes]"], object]
    ) -> Iterator[list["zmq.Socket[bytes]"]]:
        """Connect that many sockets, each of which sends a Hello."""
        hello = Hello(PROTOCOL_VERSION, "test", "stranger", "i", "", proof=KEYS.proof("stranger", "i"))
        made = []
        try:
            for _ in range(number):
                dealer = self.context.socket(zmq.DEALER)
                made.append(dealer)
                dealer.setsockopt(zmq.LINGER, 0)
                dealer.setsockopt(zmq.RECONNECT_IVL, -1)
                prepare(dealer)
                dealer.connect(self.endpoint)
                with suppress(zmq.Again):  # It may have been turned away already.
                    dealer.send(encode_batch(("i", 0, [hello])), zmq.NOBLOCK)
            yield made
            for dealer in made:
                assert not dealer.poll(0)
        finally:
            for dealer in made:
                dealer.close()


@pytest.fixture(scope="module")
def process() -> Iterator[tuple[int, str]]:
    """The besieged node's process, which outlives every siege: its pid and endpoint."""
    pipe = subprocess.PIPE
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, __file__]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment) as running:
        assert running.stdout is not None
        yield running.pid, running.stdout.readline().strip()
        running.kill()


@pytest.fixture
async def besieged(process: tuple[int, str]) -> AsyncIterator[Besieged]:
    pid, endpoint = process
    async with Node("friend", fleet="test", keys=KEYS) as friend:
        with zmq.Context() as context:
            yield Besieged(pid, endpoint, friend, context)


def no_keys(dealer: "zmq.Socket[bytes]") -> None:
    pass


def keys_of_another_fleet(dealer: "zmq.Socket[bytes]") -> None:
    dealer.setsockopt(zmq.CURVE_SERVERKEY, OTHERS.of("server").public)
    dealer.setsockopt(zmq.CURVE_PUBLICKEY, OTHERS.member.public)
    dealer.setsockopt(zmq.CURVE_SECRETKEY, OTHERS.member.secret)


def the_nodes_public_key_alone(dealer: "zmq.Socket[bytes]") -> None:
    public, secret = zmq.curve_keypair()
    dealer.setsockopt(zmq.CURVE_SERVERKEY, KEYS.of("server").public)
    dealer.setsockopt(zmq.CURVE_PUBLICKEY, public)
    dealer.setsockopt(zmq.CURVE_SECRETKEY, secret)


def the_key_of_a_node_instead_of_the_members(dealer: "zmq.Socket[bytes]") -> None:
    own = KEYS.of("stranger")
    dealer.setsockopt(zmq.CURVE_SERVERKEY, KEYS.of("server").public)
    dealer.setsockopt(zmq.CURVE_PUBLICKEY, own.public)
    dealer.setsockopt(zmq.CURVE_SECRETKEY, own.secret)


def a_password(dealer: "zmq.Socket[bytes]") -> None:
    dealer.setsockopt(zmq.PLAIN_USERNAME, b"callboard")
    dealer.setsockopt(zmq.PLAIN_PASSWORD, b"callboard")


GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"CURVE".ljust(20, b"\0") + bytes(32)
LONG_COMMAND = b"\x06"
"""ZMTP 3 (rfc.zeromq.org/spec/23): a greeting, and the flags of a command whose length has eight bytes."""
KINDS = (
    no_keys,
    keys_of_another_fleet,
    the_nodes_public_key_alone,
    the_key_of_a_node_instead_of_the_members,
    a_password,
)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_stranger_gets_no_word_is_counted_and_leaves_nothing(
    besieged: Besieged, kind: Callable[..., object]
) -> None:
    before = await besieged.num_strangers()
    with besieged.dealers(10, kind):
        await besieged.until_counted(before + 10)
    report = await besieged.server.ask(Inspect())
    assert (report.num_strangers, report.num_links) == (before + 10, 1)


async def storm(besieged: Besieged, rounds: int, rng: Random) -> int:
    """Come from all sides; return how many connections that were."""
    number, before = 0, await besieged.num_strangers()
    for _ in range(rounds):
        for kind in KINDS:
            with besieged.dealers(40, kind):
                number += 40
                await besieged.until_counted(before + number)
        for _ in range(40):
            with besieged.tcp() as stranger:
                stranger.sendall(rng.randbytes(rng.randint(20, 500)))
        number += 40
        await besieged.until_counted(before + number)
    return number


async def test_thousands_of_strangers_cost_no_memory_and_no_peer(besieged: Besieged) -> None:
    rng = Random(7)
    async with besieged.being_served():
        await storm(besieged, 2, rng)
        before, num_before, num_served = besieged.rss(), await besieged.num_strangers(), besieged.num_served
        number = await storm(besieged, 10, rng)
        assert number >= 2000
        assert besieged.rss() - before < 8 * MIB
        served = besieged.num_served - num_served
        assert served > 5
        # A peer that leaves in the middle of it may be taken for one of them.
        assert number <= await besieged.num_strangers() - num_before <= number + served + 1
    assert besieged.slowest_s < 10


async def test_connections_that_never_shake_hands_are_cut_and_nobody_waits_for_them(besieged: Besieged) -> None:
    before = await besieged.num_strangers()
    with ExitStack() as stack:
        silent = [stack.enter_context(besieged.tcp()) for _ in range(150)]
        for half in silent[::3]:
            half.sendall(GREETING)
        for half in silent[1::3]:
            half.sendall(GREETING[:11])
        async with besieged.being_served():
            await besieged.until_counted(before + 150)
        assert besieged.num_served > 0
        for half in silent:
            with suppress(ConnectionResetError):
                while half.recv(1000):  # libzmq's own greeting: nothing of the bus, which would be longer.
                    pass


async def test_a_stranger_cannot_make_the_node_gather_large_frames(besieged: Besieged) -> None:
    before = besieged.rss()
    with ExitStack() as stack:
        for size in (MAX_FRAME_BYTES, PART_BYTES):
            for _ in range(30):
                stranger = stack.enter_context(besieged.tcp())
                with suppress(ConnectionError):
                    stranger.sendall(GREETING + LONG_COMMAND + size.to_bytes(8, "big") + bytes(size - 1))
        await besieged.server.ask(Inspect())
        assert besieged.rss() - before < 8 * MIB


if __name__ == "__main__":
    asyncio.run(serve())
