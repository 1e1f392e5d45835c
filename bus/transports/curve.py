"""Who may speak over ZeroMQ's sockets: where keys must be, who is let in by them, and how many were not.

ZAP (rfc.zeromq.org/spec/27) asks once per connection, in the middle of its handshake. With any but the members' key
libzmq ends the connection, and nothing of it reaches the node.
"""

import functools
import ipaddress
import operator
from collections.abc import Sequence
from pathlib import Path

import zmq
from zmq.utils import z85

from callboard.bus.keys import FleetKeys
from callboard.bus.private import make_private, why_open

ZAP_ENDPOINT = "inproc://zeromq.zap.01"
ZAP_DOMAIN = b"callboard"
ZAP_VERSION = b"1.0"

_FAILED = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL,
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL,
    zmq.EVENT_HANDSHAKE_FAILED_AUTH,
)
CENSUS_EVENTS: int = functools.reduce(
    operator.or_, (*_FAILED, zmq.EVENT_ACCEPTED, zmq.EVENT_HANDSHAKE_SUCCEEDED, zmq.EVENT_DISCONNECTED)
)


def is_loopback(host: str) -> bool:
    """Say whether a host, an address or a name, is this machine as it speaks to itself."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_listening(endpoint: str, *, has_keys: bool) -> None:
    """Raise PermissionError, an OSError, where others than the fleet's could come in; make an ipc directory private."""
    path = _check(endpoint, has_keys=has_keys)
    if path is not None:
        make_private(path.parent)


def check_dialling(endpoint: str, *, has_keys: bool) -> None:
    """Raise PermissionError, an OSError, where others than the fleet's could listen."""
    path = _check(endpoint, has_keys=has_keys)
    if path is None or has_keys or not path.parent.exists():
        return
    if reason := why_open(path.parent, path.parent.stat()):
        raise PermissionError(f"a stranger could listen there: {reason}")


def _check(endpoint: str, *, has_keys: bool) -> Path | None:
    """Return the path of an ipc endpoint, None for another that may be used."""
    scheme, _, rest = endpoint.partition("://")
    if scheme == "ipc":
        if rest.startswith("@"):
            raise PermissionError("every user of this machine may connect to an abstract socket: give a path")
        return Path(rest)
    if scheme != "tcp":
        raise PermissionError('an endpoint begins with "ipc://" or "tcp://"')
    host = rest.rpartition(";")[2].rpartition(":")[0].strip("[]")
    if not has_keys and not is_loopback(host):
        raise PermissionError(
            'other machines can reach it, and there it takes keys: make them with "callboard keys new", and give '
            "them to every node of the fleet"
        )
    return None


def secure_router(socket: "zmq.Socket[bytes]", keys: FleetKeys, node: str) -> None:
    """Have a socket that will be bound speak to holders of the keys alone. A ZAP handler must be there before."""
    own = keys.of(node)
    socket.setsockopt(zmq.CURVE_SERVER, 1)
    socket.setsockopt(zmq.CURVE_SECRETKEY, own.secret)
    socket.setsockopt(zmq.ZAP_DOMAIN, ZAP_DOMAIN)
    # Without it libzmq lets everybody in who knows the node's key, should nobody answer ZAP.
    socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)


def secure_dealer(socket: "zmq.Socket[bytes]", keys: FleetKeys, node: str) -> None:
    """Have a socket that will be connected speak to the node of that name alone."""
    socket.setsockopt(zmq.CURVE_SERVERKEY, keys.of(node).public)
    socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.member.public)
    socket.setsockopt(zmq.CURVE_SECRETKEY, keys.member.secret)


def answer_zap(request: Sequence[bytes], keys: FleetKeys) -> tuple[bytes, ...]:
    """Return ZAP's reply: 200 to a dialler with the members' key, 400 to any other."""
    version, request_id, domain, _, _, mechanism, *credentials = request
    is_member = (version, domain, mechanism) == (ZAP_VERSION, ZAP_DOMAIN, b"CURVE") and (
        credentials == [z85.decode(keys.member.public)]
    )
    status, text, user = (b"200", b"OK", b"member") if is_member else (b"400", b"not of this fleet", b"")
    return version, request_id, status, text, user, b""


class Census:
    """Counts the connections that ended without having shown the key, by the events of a bound socket's monitor.

    libzmq does not say everything: who speaks no ZMTP at all just disconnects, and a success names no connection. So
    one that disconnects without an event of failure counts if not all that are under way have succeeded.
    """

    def __init__(self) -> None:
        self.num_strangers = 0
        self._under_way: dict[int, None] = {}
        """Descriptors of accepted connections not known to have shown the key."""
        self._num_succeeded = 0
        """How many of those have."""
        self._num_failed = 0
        """How many of those have been counted, and are about to disconnect."""

    def take(self, event: int, value: int) -> None:
        """Note one event of the monitor, in order; ``value`` is what came with it."""
        if event == zmq.EVENT_ACCEPTED:
            self._under_way[value] = None
        elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._num_succeeded += 1
        elif event in _FAILED:
            self.num_strangers += 1
            self._num_failed += 1
        elif event == zmq.EVENT_DISCONNECTED and value in self._under_way:
            del self._under_way[value]
            if self._num_failed:
                self._num_failed -= 1
            elif self._num_succeeded <= len(self._under_way):
                self.num_strangers += 1
            else:
                self._num_succeeded -= 1
        self._num_failed = min(self._num_failed, len(self._under_way))
        if not self._num_failed and self._num_succeeded >= len(self._under_way):
            self._under_way.clear()
            self._num_succeeded = 0
