"""An engine's tie to its KV manager: the pool it may map, for as long as one stream lasts."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from callboard.actors.protocol import Attach, Attached, BadRequest, Recall
from callboard.bus import FOREVER, ActorDied, BusError, Call, LinkLost, Node, Ref
from callboard.kv.lanes import INPROC
from callboard.kv.page_store import PageStore
from callboard.kv.pool_socket import WrongPool, fetch_pool

FIRST_RETRY_S = 0.05
LAST_RETRY_S = 2.0


class Attachment:
    """Keeps the Attach stream open, and the pool mapped while it is.

    ``on_attached(store)`` runs before ``wait()`` returns. ``on_lost(error)`` must let go of the pool, with no step
    under way, before it returns: attaching again tells the manager that nothing is written any more.
    """

    def __init__(
        self,
        node: Node,
        manager: Ref,
        message: Attach,
        *,
        on_attached: Callable[[PageStore], Awaitable[None]],
        on_recall: Callable[[int], None],
        on_lost: Callable[[BusError], Awaitable[None]],
    ) -> None:
        self.manager = manager
        self.is_attached = False
        self.count = 0
        """Of attachments so far: an answer from before the present one is about blocks that are gone."""
        self.named = ""
        """The manager's name for the last one: what is said of its blocks says it."""
        self._node = node
        self._message = message
        self._on_attached = on_attached
        self._on_recall = on_recall
        self._on_lost = on_lost
        self._attached = asyncio.Event()
        self._is_shared = False

    async def wait(self) -> None:
        """Wait until the engine is attached."""
        await self._attached.wait()

    def is_current(self, count: int) -> bool:
        """Return whether the attachment of that count lasts."""
        return self.is_attached and self.count == count

    def require(self, call: Call | None, named: str) -> None:
        """Raise unless a call is the manager's own, under the present attachment: only it knows whose blocks are whose.

        Raises BadRequest for anybody else's, LinkLost where the attachment is over.
        """
        if call is None or call.caller != self.manager.address.node:
            raise BadRequest(reason=f"only its KV manager may have {self._message.engine} compute KV")
        if not self.is_attached or named != self.named:
            raise LinkLost(f"{self._message.engine} is not attached to its KV manager, or has been anew")

    async def run(self) -> None:
        """Attach, and again whenever that ends. Raises BadRequest if the manager will never have this engine."""
        retry_s = FIRST_RETRY_S
        while True:
            error: BusError = LinkLost(f"{self.manager.address} ended the attachment")
            store: PageStore | None = None
            try:
                async with self.manager.stream(self._message, timeout=FOREVER) as items:
                    try:
                        async for item in items:
                            if isinstance(item, Recall):
                                self._on_recall(item.num_blocks)
                                continue
                            store = await self._map(item)
                            await self._on_attached(store)
                            self.is_attached, self.count, self.named = True, self.count + 1, item.attachment
                            self._attached.set()
                            retry_s = FIRST_RETRY_S
                    except asyncio.CancelledError:
                        # Leaving the stream tells the manager that nothing is written any more.
                        await self._on_lost(ActorDied(f"{self._message.engine} was stopped"))
                        raise
            except BadRequest:
                raise
            except (BusError, OSError, WrongPool) as reason:
                error = reason if isinstance(reason, BusError) else LinkLost(f"the pool cannot be mapped: {reason}")
            self.is_attached = False
            self._attached.clear()
            await self._on_lost(error)
            if store is not None and not self._is_shared:
                store.close()
            await self._node.clock.sleep(retry_s * self._node.rng.uniform(0.75, 1.25))
            retry_s = min(2 * retry_s, LAST_RETRY_S)

    async def _map(self, attached: Attached) -> PageStore:
        self._is_shared = attached.pool_path.startswith(INPROC)
        if not self._is_shared:
            return await fetch_pool(attached.pool_path, epoch=attached.epoch)
        exchange: dict[str, Any] = self._node.exchange or {}
        store = exchange.get(attached.pool_path)
        if not isinstance(store, PageStore):
            raise LinkLost(f"there is no pool {attached.pool_path} in this process")
        return store
