"""What all calls of the microserving door share: the engines by name, and the reservations clients hold."""

import asyncio
import contextvars
from collections.abc import Callable, Coroutine
from functools import cache
from itertools import count
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from callboard.actors.protocol import FIRST_DIRECT_ATTEMPT, Entry, KvAddr, PrepRecv, Release, Reserved
from callboard.actors.registration import DirectoryView
from callboard.bus import BusError, Ref

from .answer import Backend
from .errors import RETRY_AFTER_S, ApiError
from .microserving_held import Held, HeldReservations
from .requests import CompletionRequest, decoding

RELEASE_S = 2.0
"""Limit of a release: the lease on the reservation ends it anyway."""
ABANDON_S = 1.0
"""How long an answer is awaited that nobody wants any more, to give back what it brings."""
SERVING = ("ready", "draining")

_decoder = cache(decoding)
Spawn = Callable[[Coroutine[Any, Any, Any]], "asyncio.Task[Any]"]


class EngineRequest(CompletionRequest, frozen=True, kw_only=True):
    """An OpenAI completion request to one engine, whose model it need not name."""

    model: str | None = None  # type: ignore[assignment]
    user: Annotated[str, Meta(max_length=512)] | None = None
    """The request's id: it ties prep_recv, remote_send and start_generate together."""


Body = TypeVar("Body", bound=EngineRequest)


class EngineDoor:
    """The engines of ``view``. ``spawn`` runs a task of the frontend's, which outlives the request it is for."""

    def __init__(self, backend: Backend, view: DirectoryView, spawn: Spawn) -> None:
        self.backend = backend
        self.held = HeldReservations()
        self._view = view
        self._spawn = spawn
        self._attempts = count(FIRST_DIRECT_ATTEMPT)

    def engine(self, name: str, *, is_new: bool = True) -> Entry:
        """Return a ready engine; one that is being emptied takes nothing new. Raises ApiError (404, 503)."""
        entry = self._view.get(name)
        if entry is None or entry.kind != "engine":
            known = ", ".join(f"'{each.name}'" for each in self._view.entries("engine")) or "none"
            raise ApiError(404, f"There is no engine '{name}'. Known: {known}.", code="engine_not_found")
        if entry.state not in SERVING[: 1 if is_new else None]:
            text = f"The engine '{name}' is {entry.state}."
            raise ApiError(503, text, code="unavailable", retry_after_s=RETRY_AFTER_S)
        return entry

    def decode(self, kind: type[Body], engine: Entry, body: bytes) -> Body:
        """Return a checked request to an engine. Raises ApiError."""
        request: Body = _decoder(kind)(body)
        if request.model not in (None, engine.model):
            text = f"The engine '{engine.name}' serves '{engine.model}' and not '{request.model}'."
            raise ApiError(404, text, param="model", code="model_not_found")
        return msgspec.structs.replace(request, model=engine.model)

    def manager_of(self, engine: Entry) -> Ref:
        """Return the KV manager of an engine. Raises ApiError (503)."""
        if engine.manager is None:
            text = f"The engine '{engine.name}' has no KV manager."
            raise ApiError(503, text, code="unavailable", retry_after_s=RETRY_AFTER_S)
        return self.backend.node.ref(engine.manager)

    def new_attempt(self) -> int:
        """Return a number that no other attempt has."""
        return next(self._attempts)

    # ---- reservations: what is taken is released, by whoever had it last or by its lease

    async def reserve(self, manager: Ref, message: PrepRecv, timeout_s: float) -> Reserved:
        """Ask for a reservation. When the caller is cancelled, what may still come is released."""
        # A task of its own: cancelling an ask whose answer is under way would leak the reservation in it.
        task = self._spawn(_outcome(manager, message, timeout_s))
        try:
            outcome: Reserved | BusError = await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(self._release_abandoned)
            asyncio.get_running_loop().call_later(ABANDON_S, task.cancel)
            raise
        if isinstance(outcome, BusError):
            raise outcome
        return outcome

    def hold(self, held: Held) -> None:
        """Keep a reservation until its client comes for it."""
        for dropped in self.held.put(held):
            self.release(dropped.kv)

    def let_go(self, held: Held) -> None:
        """Release a reservation that is of no use any more. A repeat does nothing."""
        self.held.forget(held)
        self.release(held.kv)

    def release(self, kv: KvAddr) -> None:
        """Give a reservation back, whatever becomes of the request."""
        contextvars.Context().run(self._spawn, self._send_release(kv))

    async def _send_release(self, kv: KvAddr) -> None:
        try:
            await self.backend.node.ref(kv.manager).ask(Release(kv), timeout=RELEASE_S)
        except BusError:
            pass  # Gone with its manager, or its lease will end it.

    def _release_abandoned(self, task: "asyncio.Task[Reserved | BusError]") -> None:
        if not task.cancelled() and isinstance(outcome := task.result(), Reserved):
            self.release(outcome.kv)


async def _outcome(manager: Ref, message: PrepRecv, timeout_s: float) -> Reserved | BusError:
    try:
        return await manager.ask(message, timeout=timeout_s)
    except BusError as error:
        return error
