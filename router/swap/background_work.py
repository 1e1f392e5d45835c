"""The background work of a script's version, for as long as the version is active.

A run of it holds what a request's run holds (attempt.py): all that it took is given back when it ends, however it
ends. What it raises is logged with the script's traceback, and it is started again, after a longer while each time.
"""

import asyncio
import logging

from callboard.actors.protocol import Generate, SamplingParams
from callboard.actors.route_protocol import BackgroundReport
from callboard.bus import BusError
from callboard.bus.watchdog import Hung
from callboard.router.attempt import Attempt
from callboard.router.background import Background
from callboard.router.errors import ScriptError
from callboard.router.fleet import Fleet
from callboard.router.request import Request
from callboard.router.script import Script
from callboard.router.script_trace import first_cause, in_one_line, is_being_cancelled, trace_of
from callboard.router.shared import Shared

log = logging.getLogger("callboard.router")

FIRST_RETRY_S = 1.0
LAST_RETRY_S = 30.0
VERB_S = 60.0
"""The limit of a verb that is called in the background."""
CLOSE_S = 5.0
"""How long a function may take to leave its scopes."""


class BackgroundWork:
    """All that one version does in the background, from now on. ``stop`` ends it."""

    def __init__(self, shared: Shared, script: Script) -> None:
        self._rounds = [_Rounds(shared, script, work) for work in script.backgrounds]

    def reports(self) -> tuple[BackgroundReport, ...]:
        """Return how each function does."""
        return tuple(each.report() for each in self._rounds)

    async def stop(self) -> None:
        """Cancel all of it, and wait until what it took is given back. A repeat does nothing."""
        for each in self._rounds:
            each.cancel()
        for each in self._rounds:
            await each.ended()


class _Rounds:
    """One function, run again and again."""

    def __init__(self, shared: Shared, script: Script, work: Background) -> None:
        self._shared = shared
        self._script = script
        self._work = work
        self._attempt: Attempt | None = None
        self._is_over = False
        self._num_runs = 0
        self._num_failures = 0
        self._last_error = ""
        self._task = shared.router.spawn(self._run())

    def report(self) -> BackgroundReport:
        work = self._work
        return BackgroundReport(work.name, work.every_s, self._num_runs, self._num_failures, self._last_error)

    def cancel(self) -> None:
        self._is_over = True
        self._task.cancel()

    async def ended(self) -> None:
        await asyncio.wait([self._task], timeout=CLOSE_S)
        if not self._task.done():
            what = "background %s of script %s was cancelled and goes on: it may ask for nothing more"
            log.error(what, self._work.name, self._script.name)
        if self._attempt is not None:
            await self._attempt.close()

    async def _run(self) -> None:
        clock, work = self._shared.node.clock, self._work
        retry_s = FIRST_RETRY_S
        while not self._is_over:  # Also where the function has swallowed its cancellation.
            try:
                await self._run_once()
                retry_s = FIRST_RETRY_S
                if work.every_s is None:
                    return
                await clock.sleep(work.every_s)
            except (Exception, SystemExit, asyncio.CancelledError, Hung, BaseExceptionGroup) as error:
                if isinstance(error, asyncio.CancelledError) and (self._is_over or is_being_cancelled()):
                    raise
                self._failed(error)
                await clock.sleep(retry_s * self._shared.node.rng.uniform(0.75, 1.25))
                retry_s = min(2 * retry_s, LAST_RETRY_S)

    async def _run_once(self) -> None:
        shared = self._shared
        self._num_runs += 1
        # No other router, and no later start of this one, may use the id: it names what is reserved under it.
        message = Generate(f"background/{self._work.name}/{shared.node.new_id()}", "", b"", SamplingParams())
        request = Request(message, attempt=0, remaining_s=lambda: VERB_S)
        self._attempt = attempt = Attempt(shared, request, shared.node.clock.now())
        try:
            await self._work.function(Fleet(attempt, shared.view))
        finally:
            await asyncio.shield(attempt.spawn_detached(attempt.close()))

    def _failed(self, error: BaseException) -> None:
        self._num_failures += 1
        self._last_error = trace_of(self._script.path, self._script.source, error)
        cause = first_cause(error)
        is_ours = not isinstance(cause, BusError) or isinstance(cause, ScriptError)
        level = logging.ERROR if is_ours else logging.WARNING  # Engines die: that is no fault of the script's.
        what = "background %s of script %s failed and starts again: %s"
        log.log(level, what, self._work.name, self._script.name, in_one_line(self._last_error))
