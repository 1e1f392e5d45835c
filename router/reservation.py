"""A reservation as a script holds it, and the call that makes it: nothing reserved is ever lost on the way."""

import asyncio
from collections.abc import Generator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from callboard.actors.protocol import Entry, KvAddr, PrepRecv
from callboard.bus import BusError, Ref

from .attempt import Attempt

ABANDON_S = 1.0
"""How long an answer is awaited that nobody wants any more, to give back what it brings."""


@dataclass(frozen=True, slots=True)
class Reserved:
    """A reservation. ``begin`` is the first token the receiver lacks: past ``end`` where a prefix hit reaches there."""

    addr: KvAddr
    begin: int
    end: int
    num_cached_tokens: int


class PrepRecvCall:
    """A prep_recv, to be awaited or entered, once."""

    def __init__(self, entry: Entry, attempt: Attempt, message: PrepRecv) -> None:
        self._entry = entry
        self._attempt = attempt
        self._message = message
        self._is_abandoned = False
        self._kv: Reserved | None = None
        self._answered_s = 0.0

    def __await__(self) -> Generator[Any, None, Reserved]:
        return self._reserve().__await__()

    async def __aenter__(self) -> Reserved:
        self._kv = await self._reserve()
        return self._kv

    async def __aexit__(self, kind: object, error: object, trace: TracebackType | None) -> None:
        if self._kv is not None:
            if isinstance(error, asyncio.CancelledError | GeneratorExit):
                self._attempt.release_later(self._kv.addr)  # A peer may hang, and who leaves may have many scopes.
            else:
                await self._attempt.release(self._kv.addr)
            self._attempt.unpick(self._entry.name)

    async def _reserve(self) -> Reserved:
        with self._attempt.call("prep_recv", self._entry, keeps_place=True) as span:
            manager = self._attempt.manager_of(self._entry)
            # A task of its own: cancelling an ask whose answer is under way would leak the reservation in it.
            task = self._attempt.spawn(self._ask(manager, self._attempt.node.clock.now()))
            try:
                outcome: Reserved | BusError = await asyncio.shield(task)
            except asyncio.CancelledError:
                self._abandon(task)
                raise
            self._attempt.note_turn(self._answered_s)
            if isinstance(outcome, BusError):
                raise outcome
            span.facts = {"num_reused_tokens": outcome.num_cached_tokens}
            self._attempt.shared.transfers.reserved(self._attempt.node.clock.now() - span.start_s)
            self._attempt.took(outcome.addr)
            return outcome

    def _abandon(self, task: "asyncio.Task[Reserved | BusError]") -> None:
        """See to it that a reservation made for nobody is released."""
        self._is_abandoned = True
        if not task.done():
            asyncio.get_running_loop().call_later(ABANDON_S, task.cancel)
        elif not task.cancelled() and isinstance(outcome := task.result(), Reserved):
            self._attempt.took(outcome.addr)

    async def _ask(self, manager: Ref, spawned_s: float) -> Reserved | BusError:
        self._attempt.note_turn(spawned_s)
        try:
            reply = await manager.ask(self._message, timeout=self._attempt.request.deadline)
        except BusError as error:
            return error
        finally:
            self._answered_s = self._attempt.node.clock.now()
        if self._is_abandoned:
            await self._attempt.spawn_detached(self._attempt.send_release(reply.kv))
        return Reserved(reply.kv, reply.begin, reply.end, reply.num_cached_tokens)
