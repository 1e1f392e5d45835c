"""The socket of the HTTP door: a frontend binds its own, or has one from the launcher, at which several accept."""

import socket
from errno import EADDRINUSE

from callboard.bus import Refusal

UNSENT_BYTES = 16 << 10
"""What the kernel takes beyond what the client's side has room for: else megabytes of tokens pass for read."""
BACKLOG = 2048
"""Connections that wait to be accepted."""


class CannotListen(Refusal):
    """The address of the HTTP door cannot be had. Fields: host, port, reason."""

    sentence = "cannot listen on {host}:{port}: {reason}"


class PortTaken(CannotListen):
    """Somebody listens there already. Fields: host, port."""

    sentence = "port {port} on {host} is taken: stop what listens there, or choose another port"


def bind(host: str, port: int) -> socket.socket:
    """Return a listening socket; port 0 takes a free one. Raises PortTaken, CannotListen."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise CannotListen(host=host, port=port, reason=error.strerror) from None
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)  # Connections inherit it.
        bound.bind(address)
        bound.listen(BACKLOG)
        bound.setblocking(False)
    except OSError as error:
        bound.close()
        if error.errno == EADDRINUSE:
            raise PortTaken(host=host, port=port) from None
        raise CannotListen(host=host, port=port, reason=error.strerror or str(error)) from None
    return bound
