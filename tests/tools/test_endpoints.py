"""Where nodes are reached: sockets of a run directory, or ports that stay theirs through every restart."""

import os
import socket
from pathlib import Path

import msgspec
import pytest
import zmq

from callboard.actors.node_spec import NodeSpec
from callboard.tools.endpoints import Endpoints, needs_keys, split_bus
from callboard.tools.errors import StartFailed


@pytest.mark.parametrize(
    ("bus", "address", "is_remote"),
    [
        ("tcp://127.0.0.1:7000", ("127.0.0.1", 7000), False),
        ("tcp://127.0.0.1:*", ("127.0.0.1", 0), False),
        ("tcp://localhost:0", ("127.0.0.1", 0), False),
        ("tcp://[::1]:7000", ("::1", 7000), False),
        ("tcp://10.0.0.1:7000", ("10.0.0.1", 7000), True),
        ("tcp://[2001:db8::1]:7000", ("2001:db8::1", 7000), True),
    ],
)
def test_a_bus_is_an_address_that_others_may_or_may_not_reach(
    bus: str, address: tuple[str, int], is_remote: bool
) -> None:
    assert split_bus(bus) == address
    assert needs_keys(bus) == is_remote


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_every_node_has_a_port_of_its_own_that_it_may_bind_again_and_again(host: str) -> None:
    with Endpoints(f"tcp://{host}:0", Path("/nowhere")) as endpoints, zmq.Context() as context:
        names = ["control", "kv-cpu0", "decode"]
        found = [endpoints.of(name) for name in names]
        assert found == [endpoints.of(name) for name in names]
        assert len(set(found)) == 3
        for endpoint in found * 2:  # As a node that was restarted does.
            with context.socket(zmq.ROUTER) as node:
                node.setsockopt(zmq.IPV6, "[" in host)
                _bind(node, endpoint)


def _bind(node: "zmq.Socket[bytes]", endpoint: str) -> None:
    for _ in range(500):  # ZeroMQ closes the listener of the last one in a thread of its own.
        try:
            node.bind(endpoint)
            break
        except zmq.ZMQError as error:
            if error.errno != zmq.EADDRINUSE:
                raise
            node.poll(10)
    else:
        raise AssertionError(f"{endpoint} stayed in use")


def test_a_held_port_is_given_to_nobody_else() -> None:
    with Endpoints("tcp://127.0.0.1:0", Path("/nowhere")) as endpoints:
        port = int(endpoints.of("control").rpartition(":")[2])
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
        for _ in range(50):
            with socket.create_server(("127.0.0.1", 0)) as any_port:
                assert any_port.getsockname()[1] != port
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))


def test_the_control_node_has_the_port_that_the_file_names() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with Endpoints(f"tcp://127.0.0.1:{port}", Path("/nowhere")) as endpoints:
            assert endpoints.of("decode") != f"tcp://127.0.0.1:{port}"
            with pytest.raises(StartFailed, match=rf"cannot listen at 127.0.0.1:{port} \(address already in use\)"):
                endpoints.of("control")
    with Endpoints(f"tcp://127.0.0.1:{port}", Path("/nowhere")) as endpoints:
        assert endpoints.of("control") == f"tcp://127.0.0.1:{port}"


def test_a_node_spec_carries_the_secret_and_does_not_show_it() -> None:
    secret = bytes(range(32))
    spec = NodeSpec("demo", "decode", "engine", "tcp://127.0.0.1:1", (), "log", keys=secret)
    assert msgspec.json.decode(msgspec.json.encode(spec), type=NodeSpec).keys == secret
    for shown in (repr(spec), str(spec), f"{[spec]}"):
        assert shown.strip("[]") == "NodeSpec('decode')"


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_the_socket_of_several_frontends_listens_and_is_the_same_every_time(host: str) -> None:
    with Endpoints("ipc", Path("/nowhere")) as endpoints:
        fd = endpoints.listen(host, 0)
        with socket.socket(fileno=os.dup(fd)) as shared:
            address = shared.getsockname()
            assert endpoints.listen(host, address[1]) == fd
            socket.create_connection(address[:2]).close()
        with Endpoints("ipc", Path("/elsewhere")) as others, pytest.raises(StartFailed) as refused:
            others.listen(host, address[1])
        assert str(refused.value).endswith("(address already in use): pass --port N for another one (0: any free one)")
        endpoints.stop_listening()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address[:2])


def test_a_port_that_others_share_among_themselves_is_taken() -> None:
    with socket.socket() as other, Endpoints("ipc", Path("/nowhere")) as endpoints:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(StartFailed, match=r"address already in use"):
            endpoints.listen("127.0.0.1", other.getsockname()[1])


def test_an_address_that_is_not_of_this_machine_is_said_so() -> None:
    with (
        Endpoints("ipc", Path("/nowhere")) as endpoints,
        pytest.raises(StartFailed, match=r"cannot listen on 192\.0\.2\.1"),
    ):
        endpoints.listen("192.0.2.1", 8000)
