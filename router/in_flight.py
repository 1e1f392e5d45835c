"""The requests that a router has admitted, and the end of those whose script outlives its cancellation.

A script runs in the task that serves its request. One that catches its cancellation and goes on cannot be ended from
outside; but after a while it is given up: its place goes to another request, what it has taken is given back, it may
ask for nothing more, and it counts as failed by its own fault.
"""

import asyncio
import contextvars
import logging
from typing import Any

from callboard.actors.actor import Actor
from callboard.bus import BusError, Call

from .attempt import Attempt
from .deadline import Deadline
from .errors import QueueFull, ScriptError
from .request import Request
from .script import Script
from .swap.routes import Routes

log = logging.getLogger("callboard.router")

GIVEN_UP_S = 10.0
"""How long a script may go on after its request was cancelled, or its deadline has passed: to leave its scopes."""
LOOK_S = 1.0


class Admitted:
    """A request that is served, and the run of a script that is under way for it."""

    __slots__ = ("_over_s", "_run", "call", "deadline", "is_given_up", "task")

    def __init__(self, call: Call, deadline: Deadline, task: "asyncio.Task[Any]") -> None:
        self.call = call
        self.deadline = deadline
        self.task = task
        self.is_given_up = False
        """Its run is counted already."""
        self._over_s: float | None = None
        """Since when it has been over, as far as that was seen."""
        self._run: tuple[Script, Request, Attempt, Any] | None = None

    def runs(self, script: Script, request: Request, attempt: Attempt, route: Any) -> None:
        """Note that a run begins."""
        self._run = script, request, attempt, route

    def ends_run(self) -> bool:
        """Note that the run is over; return whether that is still to be counted."""
        self._run = None
        return not self.is_given_up

    def is_overdue(self, now: float) -> bool:
        """Return whether its script has gone on for too long."""
        if not self.call.ended and self.deadline.remaining_s():
            return False
        if self._over_s is None:
            self._over_s = now
        return now - self._over_s >= GIVEN_UP_S

    def give_up(self, routes: Routes) -> None:
        """End what is not its script, and count that as the script's failure."""
        if self._run is not None:
            self.is_given_up = True
            script, request, attempt, route = self._run
            frame = getattr(route, "ag_frame", None)
            error = ScriptError(
                file=script.path,
                line=None if frame is None else frame.f_lineno,
                reason=f"it has gone on for {GIVEN_UP_S:.0f} s after its request was cancelled",
                remedy="Raise every CancelledError again that you catch",
            )
            what = "script %s (version %d) is given up, and may ask for nothing more: %s"
            log.error(what, script.name, script.number, error, extra={"request_id": request.id})
            self.call.fail(error)
            attempt.spawn_detached(_give_back(attempt))
            routes.ended(script, request, error, is_finished=False)
        self.task.cancel()  # It may have caught but one.


async def _give_back(attempt: Attempt) -> None:
    try:
        await attempt.close()
    except BusError as error:
        log.warning("what a script had taken is left to its leases: %s", error)


class InFlight:
    """All of them. ``enter`` and ``leave`` a request.

    Its place is free from its last token on, whatever its script still does: whoever has an answer may ask again.
    """

    def __init__(self, router: Actor, routes: Routes, most: int) -> None:
        self._router = router
        self._routes = routes
        self._most = most
        self._admitted: dict[Admitted, None] = {}
        self._places: dict[Admitted, None] = {}
        self._looking: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        return len(self._places)

    def check(self) -> None:
        """Raise QueueFull if there is no place for another."""
        if len(self._places) >= self._most:
            raise QueueFull(num_in_flight=len(self._places), max_queue=self._most)

    def enter(self, call: Call, deadline: Deadline) -> Admitted:
        """Admit the request that the present task serves."""
        # Hot: once per request.
        task = asyncio.current_task()
        assert task is not None
        admitted = Admitted(call, deadline, task)
        self._admitted[admitted] = self._places[admitted] = None
        if self._looking is None or self._looking.done():
            # Not of this request: it looks for all.
            self._looking = contextvars.Context().run(self._router.spawn, self._look())
        return admitted

    def answered(self, admitted: Admitted) -> None:
        """Note that its last token goes out."""
        self._places.pop(admitted, None)

    def leave(self, admitted: Admitted) -> None:
        """Note that it was served. A repeat does nothing."""
        self._admitted.pop(admitted, None)
        self._places.pop(admitted, None)

    async def _look(self) -> None:
        """Give up what is overdue, as long as anything is in flight."""
        clock = self._router.node.clock
        while self._admitted:
            await clock.sleep(LOOK_S)
            now = clock.now()
            for admitted in [each for each in self._admitted if each.is_overdue(now)]:
                self.leave(admitted)
                admitted.give_up(self._routes)
