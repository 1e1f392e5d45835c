"""What several frontends of one port have in common: the launcher's socket, their counts, the ids of their requests."""

import socket
from pathlib import Path

import msgspec

from callboard.actors.registration import DirectoryView
from callboard.bus import Node, Ref

from .acceptor import Counts
from .all_metrics import OtherFrontends
from .claimed_ids import ClaimedIds


class SharedPort(msgspec.Struct, frozen=True):
    """A port at which several frontends accept: ``fd`` is the launcher's listening socket, which all inherit."""

    fd: int
    names: tuple[str, ...]
    """Of all of them."""
    folder: str
    """The fleet's run directory, where they keep what they must agree on."""


class PortShare:
    """One frontend's share of a port."""

    def __init__(self, port: SharedPort, *, name: str, node: Node, view: DirectoryView, directory: Ref) -> None:
        folder = Path(port.folder)
        self.listener = socket.socket(fileno=port.fd)
        self.others = OtherFrontends(node, view, directory, names=port.names, own=name)
        self.claimed = ClaimedIds(folder / "requests", name)
        self.counts = Counts(folder / "connections", num=len(port.names), own=port.names.index(name))
        self._names = port.names

    def places(self) -> list[int]:
        """Return which of the others accept connections, by their places among all."""
        ready = self.others.ready()
        return [place for place, name in enumerate(self._names) if name in ready]
