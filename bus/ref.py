"""Refs: how an actor is spoken to. They travel inside messages and work wherever they arrive."""

from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol, TypeVar

from .address import Address
from .calls import DEFAULT_CREDIT, PendingAsk
from .messages import Ask, Stream, Tell

R = TypeVar("R")
I = TypeVar("I")  # noqa: E741
I_co = TypeVar("I_co", covariant=True)


class Items(Protocol[I_co]):
    """What a stream gives inside its scope."""

    def __aiter__(self) -> "Items[I_co]": ...

    async def __anext__(self) -> I_co: ...

    def take_ready(self) -> list[Any]:
        """Return all items that are here now, without waiting; perhaps none."""


class Sender(Protocol):
    """What a ref needs of its node."""

    def send_tell(self, to: Address, message: Tell) -> None:
        """See Ref.tell."""

    def start_ask(self, to: Address, message: Ask[Any], timeout: float | None) -> PendingAsk:
        """See Ref.ask."""

    def open_stream(
        self, to: Address, message: Stream[Any], timeout: float | None, credit: int
    ) -> AbstractAsyncContextManager[Items[Any]]:
        """See Ref.stream."""


class Ref:
    """An actor, wherever it is, as seen from one node."""

    __slots__ = ("_node", "address")

    def __init__(self, node: Sender, address: Address) -> None:
        self._node = node
        self.address = address

    def tell(self, message: Tell) -> None:
        """Send one way, at most once. Never raises for a peer that is gone."""
        self._node.send_tell(self.address, message)

    async def ask(self, message: Ask[R], *, timeout: float | None = None) -> R:
        """Send, and return the one answer.

        ``timeout`` in seconds; by default what remains of the call being served, else 30. Raises what the far side
        refused with, ActorDied, LinkLost or AskTimeout. Cancelling cancels the far side.
        """
        pending = self._node.start_ask(self.address, message, timeout)
        try:
            answer: R = await pending.future
            if pending.note is not None:
                pending.note.resumed()
            return answer
        finally:
            if pending.is_open:
                pending.cancel()

    def stream(
        self, message: Stream[I], *, timeout: float | None = None, credit: int = DEFAULT_CREDIT
    ) -> AbstractAsyncContextManager[Items[I]]:
        """Open a stream as a scope: ``async with ref.stream(m) as items: async for item in items``.

        Leaving the scope cancels the far side. ``credit`` items at most are under way or waiting here. Iterating
        raises what ended the stream badly, as ``ask`` does.
        """
        return self._node.open_stream(self.address, message, timeout, credit)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ref) and other.address == self.address

    def __hash__(self) -> int:
        return hash(self.address)

    def __repr__(self) -> str:
        return f"Ref({self.address})"
