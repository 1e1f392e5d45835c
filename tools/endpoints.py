"""Where the nodes of a fleet are reached: sockets in its run directory, or ports of one address of this machine.

A port is held by a socket of the launcher's that is bound and never listens: the kernel gives it to nobody else, and
the node, also one that comes back after a crash, may bind it beside that (SO_REUSEADDR, which ZeroMQ sets).
"""

import ipaddress
import re
import socket
from pathlib import Path
from typing import Self

from callboard.bus.transports.curve import is_loopback

from .errors import FleetFileError, StartFailed

IPC = "ipc"
CONTROL = "control"
MAX_PATH = 100
"""A unix socket's path has 107 bytes, and a pool's socket is named after its manager."""

_TCP = re.compile(r"tcp://(\[[0-9A-Fa-f:.]+\]|[^\[\]:/]+):(\d{1,5}|\*)")
_EXAMPLE = 'write for example "tcp://10.0.0.1:7000", or "ipc" for this machine alone'


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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
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
            self._held[node] = _hold(host, port if node == CONTROL else 0)
        shown = f"[{host}]" if ":" in host else host
        return f"tcp://{shown}:{self._held[node].getsockname()[1]}"


def _hold(host: str, port: int) -> socket.socket:
    held = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        held.bind((host, port))
    except OSError as error:
        held.close()
        reason = (error.strerror or "").lower()
        raise StartFailed(f"the bus cannot listen at {host}:{port} ({reason}): change [listen] bus") from None
    return held
