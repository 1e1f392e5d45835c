"""Where the nodes of a fleet are reached: sockets in its run directory, or ports of one address of this machine.

A port is held by a socket of the launcher's that is bound and never listens: the kernel gives it to nobody else, and
the node, also one that comes back after a crash, may bind it beside that (SO_REUSEADDR, which ZeroMQ sets).
That of HTTP, where several frontends serve it, is held by a socket that listens, and is handed to each of them.
"""

import ipaddress
import re
import socket
from pathlib import Path
from typing import Self

from callboard.actors.frontend.listener import CannotListen, PortTaken, bind
from callboard.bus.transports.curve import is_loopback

from .errors import CliError, FleetFileError, StartFailed

IPC = "ipc"
CONTROL = "control"
MAX_PATH = 100
"""A unix socket's path has 107 bytes, and a pool's socket is named after its manager."""

_TCP = re.compile(r"tcp://(\[[0-9A-Fa-f:.]+\]|[^\[\]:/]+):(\d{1,5}|\*)")
_EXAMPLE = 'write for example "tcp://10.0.0.1:7000", or "ipc" for this machine alone'
OTHER_PORT = "pass --port N for another one (0: any free one)"


def split_bus(bus: str) -> tuple[str, int]:
    """Return address and port of ``tcp://ADDRESS:PORT``; port 0 takes any free one. Raises ValueError."""
    match = _TCP.fullmatch(bus)
    if match is None or (match[2] != "*" and int(match[2]) > 65535):
        raise ValueError(f'"{bus}" is no address of a bus: {_EXAMPLE}')
    host = "127.0.0.1" if match[1] == "localhost" else match[1].strip("[]")
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        raise ValueError(f'"{host}" is no IP address, and a bus listens at one: {_EXAMPLE}') from None
    if address.is_unspecified:
        raise ValueError(f'nobody can dial "{host}": write the address by which the other nodes reach this machine')
    return host, 0 if match[2] == "*" else int(match[2])


def needs_keys(bus: str) -> bool:
    """Say whether other machines can reach a bus that ``split_bus`` takes."""
    return bus != IPC and not is_loopback(split_bus(bus)[0])


class Endpoints:
    """The endpoints of one fleet's nodes. Use as a context, for as long as its nodes may be started."""

    def __init__(self, bus: str, run_dir: Path) -> None:
        self._bus = bus
        self._run_dir = run_dir
        self._held: dict[str, socket.socket] = {}
        self._http: socket.socket | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop_listening()
        for held in self._held.values():
            held.close()

    def of(self, node: str) -> str:
        """Return where a node is reached, the same every time. Raises StartFailed, FleetFileError."""
        if self._bus == IPC:
            path = self._run_dir / f"{node}.sock"
            if len(str(path)) >= MAX_PATH:
                what = "shorten the name of the fleet or of"
                raise FleetFileError([f"{path} is too long for a unix socket: {what} {node}"])
            return f"ipc://{path}"
        host, port = split_bus(self._bus)
        if node not in self._held:
            at = port if node == CONTROL else 0
            try:
                self._held[node] = _hold(host, at)
            except OSError as error:
                reason = f"the bus cannot listen at {host}:{at} ({_reason(error)})"
                raise StartFailed(f"{reason}: change [listen] bus") from None
        return endpoint_at(host, self._held[node].getsockname()[1])

    def listen(self, host: str, port: int) -> int:
        """Listen for HTTP, and return the descriptor of the socket, the same every time. Raises StartFailed."""
        if self._http is None:
            try:
                self._http = bind(host, port)
            except CannotListen as error:
                reason = (
                    "address already in use" if isinstance(error, PortTaken) else str(error.fields["reason"]).lower()
                )
                raise StartFailed(f"cannot listen on {host}:{port} ({reason}): {OTHER_PORT}") from None
        return self._http.fileno()

    def stop_listening(self) -> None:
        """Let the port of HTTP go, as far as it is held here."""
        if self._http is not None:
            self._http.close()


class JoinedEndpoints(Endpoints):
    """The endpoints of a joined host's nodes, at ``listen``, and of the control node, which is elsewhere.

    With a ``port`` the nodes take that one and those after it, in the order in which they are asked for.
    """

    def __init__(self, control: str, listen: str, port: int) -> None:
        super().__init__(endpoint_at(listen, port), Path())
        self._control = control
        self._listen = listen
        self._port = port

    def of(self, node: str) -> str:
        """Return where a node is reached, the same every time. Raises CliError."""
        if node == CONTROL:
            return self._control
        if node not in self._held:
            port = self._port + len(self._held) if self._port else 0
            if port > 65535:
                raise CliError(f"there are not enough ports from {self._port} on: pass --listen with a smaller one")
            try:
                self._held[node] = _hold(self._listen, port)
            except OSError as error:
                reason = f"{node} cannot listen at {endpoint_at(self._listen, port)} ({_reason(error)})"
                what = "an address" if port == 0 else "a port"
                raise CliError(f"{reason}: pass --listen with {what} of this machine that is free") from None
        return endpoint_at(self._listen, self._held[node].getsockname()[1])


def _hold(host: str, port: int) -> socket.socket:
    held = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        held.bind((host, port))
    except OSError:
        held.close()
        raise
    return held


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()


def parse_listen(text: str) -> tuple[str, int]:
    """Return address and port (0: any) of ``10.0.0.2``, ``10.0.0.2:7100`` or ``[fd00::2]:7100``. Raises ValueError."""
    try:
        endpoint = endpoint_at(str(ipaddress.ip_address(text.strip("[]"))), 0)
    except ValueError:
        endpoint = f"tcp://{text}"
        if _TCP.fullmatch(endpoint) is None:
            raise ValueError(f'"{text}" is no address: write for example 10.0.0.2, or 10.0.0.2:7100') from None
    return split_bus(endpoint)


def resolve(endpoint: str) -> tuple[str, int]:
    """Return IP address and port of ``tcp://HOST:PORT``, looking the name up. Raises OSError."""
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    *_, address = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
    return str(address[0]), int(port)


def address_towards(host: str, port: int) -> str:
    """Return the address of this machine from which ``host`` is reached, by its routes. Raises OSError."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))  # Nothing is sent: the kernel chooses the route.
        return str(probe.getsockname()[0])


def endpoint_at(host: str, port: int) -> str:
    """Return ``tcp://HOST:PORT`` of an IP address."""
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"
