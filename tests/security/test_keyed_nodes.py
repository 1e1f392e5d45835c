"""Nodes with keys: they speak to holders of the same ones, each under its own name, and to nobody else."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import pytest
import zmq
from waiting import PATIENCE_S
from zmq.utils import z85

from callboard.bus import Address, Ask, LinkConfig, LinkLost, Message, Node, Ref, Stream
from callboard.bus.frames import PROTOCOL_VERSION, Hello, Refused, Welcome, decode_batch, encode_batch
from callboard.bus.keys import FleetKeys
from callboard.bus.transports.contract import Connection
from callboard.bus.transports.curve import ZAP_DOMAIN, Census, answer_zap
from callboard.bus.transports.keyed import PART_BYTES, KeyedTransport

KEYS = FleetKeys(bytes(range(32)), "test")
OTHERS = FleetKeys(bytes(32), "test")
SOON = LinkConfig(dial_s=0.2)
"""A link whose handshake failed is dialled again for so long."""


class Text(Message, frozen=True):
    text: str


class Echo(Ask[Text], frozen=True):
    text: str


class Repeat(Stream[Text], frozen=True):
    text: str
    count: int


class Server:
    def on_echo(self, message: Echo) -> Text:
        return Text(message.text)

    async def on_repeat(self, message: Repeat) -> AsyncIterator[Text]:
        for _ in range(message.count):
            yield Text(message.text)


@pytest.fixture(params=["tcp://127.0.0.1:*", "ipc://{}/a.sock", "tcp://[::1]:*"])
async def a(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Node]:
    async with Node("a", endpoint=request.param.format(tmp_path), fleet="test", keys=KEYS) as node:
        node.add("server", Server())
        yield node


@pytest.fixture
async def tcp() -> AsyncIterator[Node]:
    async with Node("a", endpoint="tcp://127.0.0.1:*", fleet="test", keys=KEYS) as node:
        node.add("server", Server())
        yield node


def server_of(node: Node, asker: Node, name: str = "a") -> Ref:
    return asker.ref(Address(name, node.endpoint, "server"))


async def test_holders_of_the_same_keys_are_served_on_every_endpoint(a: Node) -> None:
    async with Node("b", fleet="test", keys=KEYS) as b:
        assert await server_of(a, b).ask(Echo("x"), timeout=5) == Text("x")
    assert a.num_strangers == 0


@pytest.mark.parametrize("size", [PART_BYTES - 100, PART_BYTES, PART_BYTES + 1, 1 << 20])
async def test_messages_larger_than_a_part_arrive_whole_in_both_directions(a: Node, size: int) -> None:
    text = "".join(chr(65 + i * i % 57) for i in range(size))
    async with Node("b", fleet="test", keys=KEYS) as b:
        assert await server_of(a, b).ask(Echo(text), timeout=10) == Text(text)
        async with server_of(a, b).stream(Repeat(text, 5), timeout=10) as items:
            assert [item async for item in items] == [Text(text)] * 5


async def test_a_peer_of_another_fleet_is_told_that_its_key_was_refused(a: Node) -> None:
    for keys in (OTHERS, FleetKeys(bytes(range(32)), "other")):
        async with Node("b", fleet="test", keys=keys, links=SOON) as b:
            with pytest.raises(LinkLost, match="the key was refused"):
                await server_of(a, b).ask(Echo("x"), timeout=30)
    assert a.num_strangers > 0


async def test_a_peer_without_keys_is_asked_whether_it_lacks_them(tcp: Node) -> None:
    async with Node("b", fleet="test", links=SOON) as b:
        with pytest.raises(LinkLost, match="does it take the fleet's keys"):
            await server_of(tcp, b).ask(Echo("x"), timeout=30)


async def test_a_peer_with_keys_does_not_speak_to_a_node_without() -> None:
    near = Node("b", fleet="test", keys=KEYS, links=SOON)
    async with Node("a", endpoint="tcp://127.0.0.1:*", fleet="test") as a, near as b:
        a.add("server", Server())
        with pytest.raises(LinkLost, match=r"the key was refused \(other keys are used there, or none\)"):
            await server_of(a, b).ask(Echo("x"), timeout=30)


async def test_a_node_is_reached_under_its_own_name_alone(tcp: Node) -> None:
    async with Node("b", fleet="test", keys=KEYS, links=SOON) as b:
        with pytest.raises(LinkLost, match="the key was refused"):
            await server_of(tcp, b, name="c").ask(Echo("x"), timeout=30)


async def test_who_answers_with_another_name_than_its_key_is_turned_away() -> None:
    transport = KeyedTransport(KEYS, "a")
    liar = Node("c", endpoint="tcp://127.0.0.1:*", fleet="test", transport=transport, keys=KEYS)
    async with liar, Node("b", fleet="test", keys=KEYS) as b:
        with pytest.raises(LinkLost, match="has not shown the key of node 'a'"):
            await server_of(liar, b).ask(Echo("x"), timeout=30)


@pytest.mark.parametrize(
    ("hello", "answer"),
    [
        (Hello(PROTOCOL_VERSION, "test", "control", "i", "", proof=KEYS.proof("control", "i")), Welcome),
        (Hello(PROTOCOL_VERSION, "test", "control", "i", "", proof=KEYS.proof("decode", "i")), Refused),
        (Hello(PROTOCOL_VERSION, "test", "control", "i", "", proof=KEYS.proof("control", "j")), Refused),
        (Hello(PROTOCOL_VERSION, "test", "control", "i", "", proof=OTHERS.proof("control", "i")), Refused),
        (Hello(PROTOCOL_VERSION, "test", "control", "i", ""), Refused),
    ],
)
async def test_who_dials_must_show_the_key_of_the_name_it_gives(tcp: Node, hello: Hello, answer: type) -> None:
    with zmq.Context() as context, context.socket(zmq.DEALER) as member:
        member.setsockopt(zmq.LINGER, 0)
        member.setsockopt(zmq.CURVE_SERVERKEY, KEYS.of("a").public)
        member.setsockopt(zmq.CURVE_PUBLICKEY, KEYS.member.public)
        member.setsockopt(zmq.CURVE_SECRETKEY, KEYS.member.secret)
        member.connect(tcp.endpoint)
        member.send(encode_batch(("i", 0, [hello])))
        async with asyncio.timeout(PATIENCE_S):
            while not member.poll(0):
                await asyncio.sleep(0.001)
        (first, *_) = decode_batch(member.recv())[2]
        assert type(first) is answer


# ---- where keys must be ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "endpoint", ["tcp://*:*", "tcp://0.0.0.0:*", "tcp://10.0.0.1:7000", "tcp://[::]:*", "tcp://eth0:*"]
)
async def test_without_keys_nobody_listens_or_dials_beyond_this_machine(endpoint: str) -> None:
    with pytest.raises(OSError, match='make them with "callboard keys new"'):
        await Node("a", endpoint=endpoint).__aenter__()
    async with Node("b") as b:
        with pytest.raises(LinkLost, match='make them with "callboard keys new"'):
            await b.ref(Address("a", endpoint, "server")).ask(Echo("x"))


async def test_with_keys_a_node_may_listen_on_every_interface() -> None:
    async with Node("a", endpoint="tcp://0.0.0.0:*", fleet="test", keys=KEYS) as a:
        a.add("server", Server())
        async with Node("b", fleet="test", keys=KEYS) as b:
            endpoint = a.endpoint.replace("0.0.0.0", "127.0.0.1")
            assert await b.ref(Address("a", endpoint, "server")).ask(Echo("x"), timeout=5) == Text("x")


@pytest.mark.parametrize("endpoint", ["ipc://@abstract", "udp://127.0.0.1:1", "inproc://a", "nonsense"])
async def test_endpoints_that_anybody_could_reach_are_refused_with_or_without_keys(endpoint: str) -> None:
    for keys in (None, KEYS):
        with pytest.raises(OSError, match=r"give a path|begins with"):
            await Node("a", endpoint=endpoint, keys=keys).__aenter__()


async def test_a_socket_is_bound_in_a_directory_of_its_users_own(tmp_path: Path) -> None:
    folder = tmp_path / "sockets"
    async with Node("a", endpoint=f"ipc://{folder}/a.sock") as a:
        a.add("server", Server())
        assert folder.stat().st_mode & 0o777 == 0o700
        async with Node("b") as b:
            assert await server_of(a, b).ask(Echo("x"), timeout=5) == Text("x")
            folder.chmod(0o755)  # Meanwhile others may have put a socket of theirs there.
            async with Node("c") as c:
                with pytest.raises(LinkLost, match=f"a stranger could listen there: .* run chmod 700 {folder}"):
                    await server_of(a, c).ask(Echo("x"), timeout=5)
    with pytest.raises(OSError, match=rf"open to other users \(mode 0755\): run chmod 700 {folder}"):
        await Node("a", endpoint=f"ipc://{folder}/a.sock").__aenter__()
    with pytest.raises(OSError, match="/tmp is shared by all users"):
        await Node("a", endpoint="ipc:///tmp/callboard-test.sock").__aenter__()


# ---- what is decided, without sockets --------------------------------------------------------------------------------


def zap(*, domain: bytes = ZAP_DOMAIN, mechanism: bytes = b"CURVE", credentials: tuple[bytes, ...] = ()) -> bytes:
    """Return the status that ZAP gives."""
    request = (b"1.0", b"7", domain, b"127.0.0.1", b"", mechanism, *credentials)
    version, request_id, status, *rest = answer_zap(request, KEYS)
    assert (version, request_id, len(rest)) == (b"1.0", b"7", 3)
    return status


def test_zap_lets_in_the_members_key_and_nothing_else() -> None:
    member = z85.decode(KEYS.member.public)
    assert zap(credentials=(member,)) == b"200"
    assert zap(credentials=(z85.decode(OTHERS.member.public),)) == b"400"
    assert zap(credentials=(z85.decode(KEYS.of("control").public),)) == b"400"
    assert zap(credentials=(member, member)) == zap() == b"400"
    assert zap(domain=b"", credentials=(member,)) == b"400"
    assert zap(mechanism=b"NULL") == zap(mechanism=b"PLAIN", credentials=(member,)) == b"400"


ACCEPTED, SUCCEEDED, CLOSED = zmq.EVENT_ACCEPTED, zmq.EVENT_HANDSHAKE_SUCCEEDED, zmq.EVENT_DISCONNECTED
FAILED, DENIED = zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL, zmq.EVENT_HANDSHAKE_FAILED_AUTH


@pytest.mark.parametrize(
    ("events", "num_strangers"),
    [
        ([(ACCEPTED, 5), (SUCCEEDED, 0), (CLOSED, 5)], 0),
        ([(ACCEPTED, 5), (FAILED, 1), (CLOSED, 5)], 1),
        ([(ACCEPTED, 5), (CLOSED, 5)], 1),
        ([(ACCEPTED, 5), (SUCCEEDED, 0), (ACCEPTED, 6), (CLOSED, 6), (CLOSED, 5)], 1),
        ([(ACCEPTED, 5), (ACCEPTED, 6), (SUCCEEDED, 0), (CLOSED, 6), (CLOSED, 5)], 1),
        ([(ACCEPTED, 5), (ACCEPTED, 6), (DENIED, 400), (SUCCEEDED, 0), (CLOSED, 5), (CLOSED, 6)], 1),
        ([(ACCEPTED, 5), (ACCEPTED, 6), (FAILED, 1), (CLOSED, 6), (FAILED, 1), (CLOSED, 5)] * 3, 6),
    ],
)
def test_the_census_counts_each_stranger_once(events: list[tuple[int, int]], num_strangers: int) -> None:
    census = Census()
    for event, value in events:
        census.take(event, value)
    assert census.num_strangers == num_strangers
    assert not census._under_way


class Nobody:
    """A listener that hears of nothing."""

    def accepted(self, connection: Connection) -> None:
        raise AssertionError

    def received(self, connection: Connection, batch: bytes | bytearray) -> None:
        raise AssertionError

    def closed(self, connection: Connection, reason: str) -> None:
        raise AssertionError


async def test_a_transport_stops_though_more_strangers_came_than_it_could_count() -> None:
    transport = KeyedTransport(KEYS, "a")
    endpoint = await transport.start("tcp://127.0.0.1:*", Nobody())
    address = ("127.0.0.1", int(endpoint.rpartition(":")[2]))
    num_refused = 0
    while num_refused < 4:  # The loop stands still meanwhile, and in the end ZeroMQ's thread waits for it.
        try:
            with socket.create_connection(address, timeout=0.2) as stranger, suppress(ConnectionError):
                stranger.sendall(b"GET / HTTP/1.1\r\nHost: callboard\r\n\r\n")
                num_refused = 0
        except TimeoutError:
            num_refused += 1
    async with asyncio.timeout(PATIENCE_S):
        await transport.stop()
    assert transport.num_strangers > 500
