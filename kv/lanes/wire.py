"""What carries packed pages between two processes: an outlet here, an inlet there, and nothing but bytes under tags.

UCX is one (ucx.py); tests have others. Neither end addresses the other's memory: the receiver says where each message
goes, into a buffer of its own. Messages are announced over the bus, so that keys, deadlines and liveness are its alone.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from .contract import PageWrite

WIRES = "wires"
"""Where the exchange of nodes that share a process has what makes their wires, if those are no real ones."""
TRAILER_BYTES = 8
"""After the pages of a message: its tag again, by which one that is too short is found out."""


class WireBroken(Exception):
    """The wire is closed, or the far end is gone: nothing more goes over it."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a write that travels in one message: ``num_bytes`` of pages, packed as ``dtype``, and the trailer."""

    token_begin: int
    token_end: int
    layers: range
    tag: int
    num_bytes: int
    dtype: str


Announce = Callable[[PageWrite, Piece], Awaitable[None]]
"""Tells the receiver that a piece is on its way; returns when it is in its slots, raises what it refused with."""


class Wire(Protocol):
    """The sending end."""

    async def send(self, tag: int, data: memoryview) -> None:
        """Send; return or raise WireBroken only when ``data`` will not be read any more. Not to be cancelled."""

    def close(self) -> None:
        """End all that is under way. A repeat does nothing."""


class Inlet(Protocol):
    """The receiving end, for one sender."""

    async def receive(self, tag: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with the message under ``tag``.

        Returns, or raises WireBroken, only when nothing will be written into ``buffer`` any more. Not to be cancelled.
        """

    def close(self) -> None:
        """End all that is under way. A repeat does nothing."""


@dataclass(frozen=True, slots=True)
class Invitation:
    """Where a sender may dial, once, and what it must show there."""

    address: str
    secret: bytes
    inlet: Inlet


class Wires(Protocol):
    """Where the wires of one process begin and end. Nothing is loaded before the first."""

    @property
    def is_usable(self) -> bool:
        """Whether there can be any here."""

    async def invite(self) -> Invitation:
        """Get ready for a sender. Raises WiresMissing."""

    async def connect(self, address: str, secret: bytes) -> Wire:
        """Dial a receiver. Raises WiresMissing, WireBroken."""

    def new_tag(self) -> int:
        """Return 64 bits that nobody can guess."""

    async def close(self) -> None:
        """End everything, and return when it has ended. A repeat does nothing."""


class WiresMissing(Exception):
    """What wires are made of is not installed here; the text is a sentence with the remedy."""
