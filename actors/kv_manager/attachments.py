"""The engines attached to a KV manager: where they are, and what happens to their blocks when they go."""

import asyncio
from collections.abc import AsyncGenerator

from callboard.actors.protocol import Attach, Attached, BadRequest, Recall
from callboard.bus import Address, Call, LinkLost, UnknownActor
from callboard.kv.accounts import EngineAccount

from .pool_actor import PoolActor


class _Attachment:
    """One engine's standing tie."""

    def __init__(self, account: EngineAccount, address: Address) -> None:
        self.account = account
        self.address = address
        self.num_recalled = 0
        self.is_replaced = False
        """Somebody else attached under the engine's name."""
        self.wanted = asyncio.Event()


class Attachments:
    """Serves Attach for one manager."""

    def __init__(self, manager: PoolActor) -> None:
        self._manager = manager
        self._attachments: dict[str, _Attachment] = {}
        self._fingerprint = manager.config.fingerprint

    async def serve(self, message: Attach, call: Call) -> AsyncGenerator[Attached | Recall, None]:
        """Keep an engine's account for as long as its tie stands.

        Raises BadRequest for another layout or model, LinkLost when another engine attaches under the name.
        """
        manager = self._manager
        if message.layout != manager.config.layout:
            raise BadRequest(reason=f"the pool of {manager.name} has another layout than engine {message.engine}")
        self._fingerprint = self._fingerprint or message.fingerprint
        if message.fingerprint != self._fingerprint:
            raise BadRequest(reason=f"the pool of {manager.name} holds the KV of another model than {message.engine}'s")
        account = manager.blocks.attach(message.engine, call.caller_incarnation, call.caller)
        attachment = _Attachment(account, message.address)
        before = self._attachments.get(message.engine)
        if before is not None:  # It may be alive, and would go on without an account for ever.
            before.is_replaced = True
            before.wanted.set()
        self._attachments[message.engine] = attachment
        manager.changed()
        try:
            named = attachment.account.attachment
            yield Attached(manager.epoch, manager.config.num_blocks, manager.pool_path, named)
            while True:
                await attachment.wanted.wait()
                attachment.wanted.clear()
                if attachment.is_replaced:
                    raise LinkLost(f"another engine {message.engine} attached itself to {manager.name}")
                yield Recall(attachment.num_recalled)
        finally:
            # A link that broke, a deadline, or this manager's own end says nothing about what the engine is doing.
            is_known = call.ended in ("cancelled", "actor_died")
            manager.blocks.detach(attachment.account, is_known=is_known)
            if self._attachments.get(message.engine) is attachment:
                del self._attachments[message.engine]
            manager.changed()

    def address(self, engine: str) -> Address:
        """Return where an attached engine is. Raises UnknownActor."""
        attachment = self._attachments.get(engine)
        if attachment is None:
            raise UnknownActor(actor=engine, node=self._manager.node.name)
        return attachment.address

    def recall(self, count: int) -> bool:
        """Ask each engine for up to ``count`` unused blocks; return whether any of them has some."""
        is_asked = False
        for engine, num_blocks in self._manager.blocks.slabs().items():
            attachment = self._attachments.get(engine)
            if num_blocks and attachment is not None:
                attachment.num_recalled = count
                attachment.wanted.set()
                is_asked = True
        return is_asked
