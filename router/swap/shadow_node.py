"""The bus as a shadow finds it: every ask is answered here, every stream has one token, nothing leaves."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from callboard.actors.actor import Actor
from callboard.actors.protocol import (
    Abort,
    Done,
    Generate,
    KvAddr,
    PrepRecv,
    Probe,
    Probed,
    Release,
    RemoteSend,
    Reserved,
    Sent,
    StartGenerate,
    Token,
)
from callboard.bus import Address, Node, Ref, Tell
from callboard.kv.layout import KvLayout
from callboard.kv.tokens import num_tokens
from callboard.router.errors import RouteRefused

from .decisions import Stage, decision_of

NumCached = Callable[[Address], Awaitable[int]]

_LAYOUT = KvLayout(1, 1, 2)
"""Of reservations that are none."""


class ShadowNode:
    """Stands for a router's node. ``num_cached`` says how much of the prompt a KV manager has."""

    def __init__(self, node: Node, num_cached: NumCached, *, most: int) -> None:
        self.name = node.name
        self.clock = node.clock
        self.rng = node.rng
        self.decisions: list[str] = []
        self._node = node
        self._num_cached = num_cached
        self._most = most
        self._num_ids = 0

    def ref(self, address: Address) -> Ref:
        """Return a ref that leads nowhere."""
        return _ShadowRef(self, address)

    def new_id(self) -> str:
        """Return an id; the router's own are drawn as if there were no shadow."""
        self._num_ids += 1
        return f"shadow-{self._num_ids}"

    def note(self, *_: Any, **__: Any) -> None:
        """Records are of what happens."""

    note_turn = begin_turn = note

    def asked(self, address: Address, message: Any) -> None:
        """Note what the script decided."""
        line = decision_of(address, message)
        if line is not None and len(self.decisions) < self._most:
            self.decisions.append(line)

    async def answer(self, address: Address, message: Any) -> Any:
        """Return what an actor might answer. Raises RouteRefused for what cannot be made up."""
        if isinstance(message, Probe):
            return Probed(await self._num_cached(address), 0, 0)
        if isinstance(message, PrepRecv):
            num_cached = await self._num_cached(address)
            end = num_tokens(message.prompt) if message.end is None else message.end
            addr = KvAddr(address, "shadow", self.new_id(), _LAYOUT, min(num_cached, end), end, ())
            return Reserved(addr, num_cached, end, num_cached)
        if isinstance(message, RemoteSend):
            return Sent(0, "shadow", 0, 0, 0.0, 0.0, 0.0, 0.0)
        if isinstance(message, Release | Abort):
            return Done()
        raise RouteRefused(reason=f"a shadow is given no answer to {type(message).__name__}")


class _ShadowRef(Ref):
    __slots__ = ("_shadow",)

    def __init__(self, shadow: ShadowNode, address: Address) -> None:
        super().__init__(shadow._node, address)
        self._shadow = shadow

    def tell(self, message: Tell) -> None:
        return

    async def ask(self, message: Any, *, timeout: float | None = None) -> Any:
        self._shadow.asked(self.address, message)
        return await self._shadow.answer(self.address, message)

    def stream(self, message: Any, *, timeout: float | None = None, **options: Any) -> AbstractAsyncContextManager[Any]:
        self._shadow.asked(self.address, message)
        return _one_token(message)


@asynccontextmanager
async def _one_token(message: Any) -> AsyncIterator[AsyncIterator[Token]]:
    if not isinstance(message, StartGenerate | Generate):
        raise RouteRefused(reason=f"a shadow is given no answer to {type(message).__name__}")

    async def tokens() -> AsyncIterator[Token]:
        yield Token(message.num_output_tokens, 0, None, "length")

    yield tokens()


def shadow_stage(router: Actor, node: ShadowNode) -> Stage:
    """Return the router with a node that leads nowhere."""
    return Stage(router, node)
