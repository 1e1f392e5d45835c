"""What a script decided, read off the messages of its verbs: which verb went where, with which range.

A node of this kind stands between a run of a script and the bus. The one of a real run notes and passes on; the one
of a shadow (shadow.py) notes and answers by itself.
"""

import sys
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeVar, cast

from callboard.actors.actor import Actor
from callboard.actors.protocol import Generate, PrepRecv, RemoteSend, StartGenerate
from callboard.bus import Address, Ask, Items, Node, Ref, Stream
from callboard.kv.tokens import num_tokens

R = TypeVar("R")
I = TypeVar("I")  # noqa: E741

OnAsked = Callable[[Address, Any, int | None], None]
"""Hears of the address, the message, and the script's line where that was looked for."""
OnAnswered = Callable[[Address, Any, Any], None]


def decision_of(address: Address, message: Any) -> str | None:
    """Return a line for a message that a script decided on, None for others."""
    if isinstance(message, PrepRecv):
        end = num_tokens(message.prompt) if message.end is None else message.end
        return f"prep_recv      {message.engine or address.actor} [0, {end})"
    if isinstance(message, RemoteSend):
        end = num_tokens(message.prompt) if message.end is None else message.end
        return f"remote_send    {message.engine} [{message.begin}, {end})"
    if isinstance(message, StartGenerate):
        begin = "what it lacks" if message.begin is None else f"[{message.begin}, {num_tokens(message.prompt)})"
        return f"start_generate {address.actor} {begin}"
    if isinstance(message, Generate):
        return f"router         {address.actor}"
    return None


class _NotingRef(Ref):
    """A ref that tells what is asked by it, and what comes back."""

    __slots__ = ("_line", "_on_answered", "_on_asked")

    def __init__(self, ref: Ref, on_asked: OnAsked, on_answered: OnAnswered, line: int | None) -> None:
        super().__init__(ref._node, ref.address)
        self._line = line
        self._on_asked = on_asked
        self._on_answered = on_answered

    async def ask(self, message: Ask[R], *, timeout: float | None = None) -> R:
        self._on_asked(self.address, message, self._line)
        answer = await super().ask(message, timeout=timeout)
        self._on_answered(self.address, message, answer)
        return answer

    def stream(
        self, message: Stream[I], *, timeout: float | None = None, **options: Any
    ) -> AbstractAsyncContextManager[Items[I]]:
        self._on_asked(self.address, message, self._line)
        return super().stream(message, timeout=timeout, **options)


class _NotingNode:
    """A node whose refs note; in all else the node itself."""

    def __init__(self, node: Node, on_asked: OnAsked, on_answered: OnAnswered, path: str | None) -> None:
        self._node = node
        self._path = path
        self._on_asked = on_asked
        self._on_answered = on_answered

    def ref(self, address: Address) -> Ref:
        return _NotingRef(self._node.ref(address), self._on_asked, self._on_answered, _line_now(self._path))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._node, name)


class Stage(Actor):
    """A router as one run of a script is given it: another node, the same tasks."""

    def __init__(self, router: Actor, node: Any) -> None:
        self.node = cast(Node, node)
        self.name = router.name
        self.directory = router.directory
        self._tasks = router._tasks


def noting(router: Actor, on_asked: OnAsked, on_answered: OnAnswered, *, path: str | None = None) -> Stage:
    """Return the router with a node that notes what is asked, and passes it on.

    With a ``path`` it is looked from which line of that file each verb is called, which takes a little.
    """
    return Stage(router, _NotingNode(router.node, on_asked, on_answered, path))


def _line_now(path: str | None) -> int | None:
    """Return the innermost line of a file among what is running."""
    frame = None if path is None else sys._getframe()
    while frame is not None and frame.f_code.co_filename != path:
        frame = frame.f_back
    return None if frame is None else frame.f_lineno
