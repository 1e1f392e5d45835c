"""A script in the shadow of the active one: it decides for the same requests, nothing of it is sent, all is compared.

What it would hear of the fleet it hears from what is known already: the loads by which the real run chooses its first
engine, and how much of the prompt is cached as far as the real run has asked. Its tokens are one last token. It may not
slow, fail or starve the requests: few run at a time, in a share of the time, and whatever they raise is counted.
"""

import asyncio
import contextvars
import copy
import dataclasses
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Generator
from typing import Any, cast

from callboard.actors.protocol import Probe, Reserved, StartGenerate
from callboard.actors.route_protocol import Differing, ShadowReport
from callboard.bus import Address
from callboard.bus.clock import Clock
from callboard.bus.watchdog import Hung
from callboard.router.attempt import Attempt
from callboard.router.fleet import Fleet
from callboard.router.known.loads import Loads
from callboard.router.request import Request
from callboard.router.script import Script
from callboard.router.script_trace import first_cause, trace_of
from callboard.router.shared import Shared
from callboard.router.spans import Spans

from .decisions import decision_of, noting
from .shadow_node import ShadowNode, shadow_stage

MOST_AT_ONCE = 8
"""Shadows under way; a request that comes meanwhile has none."""
MOST_DECISIONS = 100
"""Lines that are kept of one run."""
NUM_DIFFERING = 5
SHADOW_S = 30.0
"""How long one may take."""
SHARE = 0.05
"""Of the router's time that shadows may take."""
BURST_S = 0.5
"""What they may take beyond it."""
LONGEST_STEP_S = 0.25
"""One that holds up everything for longer was the last."""


class Watch:
    """A real run with a shadow: what it decides, and what it hears."""

    def __init__(self, shared: Shared, on_end: Callable[["Watch"], None]) -> None:
        self.shared = dataclasses.replace(
            shared,
            router=noting(shared.router, self._asked, self._answered),
            loads=cast(Loads, _UntilPick(shared.loads, self._picks)),
        )
        """The router's, for the real run: with a node and with loads that tell this."""
        self._books = shared
        self._loads: Loads | None = None
        self.request_id = ""
        self.decisions: list[str] = []
        self.shadow_decisions: list[str] | None = None
        """None until the shadow has ended well."""
        self.is_finished = False
        """Its last token has come."""
        self.is_moved = False
        """Something of it was handed over to another engine: what that asked for is among its decisions."""
        self.has_ended = False
        self.is_shadow_over = False
        self._cached: dict[Address, int] = {}
        self._has_begun = False
        """It generates: what it has not asked for by now it will not ask for."""
        self._news = asyncio.Event()
        self._on_end = on_end

    def end(self) -> None:
        """Note that the real run's script is over; what it left behind has not been given back yet."""
        self.has_ended = True
        self._picks()
        self._tell()
        self._on_end(self)

    async def loads_at_choice(self) -> Loads:
        """Wait until the real run is about to choose its first engine; return the loads by which it chooses."""
        while self._loads is None:
            await self._news.wait()
        return self._loads

    async def num_cached(self, manager: Address) -> int:
        """Return how much of the prompt a KV manager has, as the real run hears it; 0 where it does not ask."""
        while manager not in self._cached and not self._has_begun and not self.has_ended:
            await self._news.wait()
        return self._cached.get(manager, 0)

    def _picks(self) -> None:
        if self._loads is None:
            self._loads = self._books.loads.copy()
            self._tell()

    def _asked(self, address: Address, message: Any, _: int | None) -> None:
        line = decision_of(address, message)
        if line is not None and len(self.decisions) < MOST_DECISIONS:
            self.decisions.append(line)
        if isinstance(message, StartGenerate):
            self._has_begun = True
            self._tell()

    def _answered(self, address: Address, message: Any, answer: Any) -> None:
        if isinstance(answer, Reserved) or isinstance(message, Probe):
            self._cached[address] = answer.num_cached_tokens
            self._tell()

    def _tell(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()


class Shadow:
    """One version in the shadow, over all requests."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self._num_running = 0
        self._counts = dict.fromkeys(("compared", "agreed", "skipped", "unlike", "failed", "moved"), 0)
        self._last_error = ""
        self._differing: deque[Differing] = deque(maxlen=NUM_DIFFERING)
        self._is_stopped = False
        self._begin_s: float | None = None
        self._spent_s = 0.0

    def report(self) -> ShadowReport:
        """Return how it compares."""
        counts = self._counts
        return ShadowReport(
            counts["compared"],
            counts["agreed"],
            counts["skipped"],
            counts["unlike"],
            counts["failed"],
            self._last_error,
            tuple(self._differing),
            counts["moved"],
        )

    def watch(self, shared: Shared, request: Request) -> Watch | None:
        """Begin a shadow of a request whose script is about to run; None if there is none for this one."""
        if request.attempt or request.num_output_tokens:
            return None
        now = shared.node.clock.now()
        self._begin_s = now if self._begin_s is None else self._begin_s
        is_over = self._spent_s > SHARE * (now - self._begin_s) + BURST_S
        if self._is_stopped or is_over or self._num_running >= MOST_AT_ONCE:
            self._counts["skipped"] += 1
            return None
        watch = Watch(shared, self._settle)
        watch.request_id = request.id
        own = copy.copy(request)
        own.notes = {}
        self._num_running += 1
        # Not of the request's call: nothing of it may be cancelled with it, or get into its records.
        contextvars.Context().run(shared.router.spawn, self._run(watch, shared, own))
        return watch

    async def _run(self, watch: Watch, shared: Shared, request: Request) -> None:
        node = ShadowNode(shared.node, watch.num_cached, most=MOST_DECISIONS)
        try:
            async with asyncio.timeout(SHADOW_S):
                shared = dataclasses.replace(
                    shared,
                    router=shadow_stage(shared.router, node),
                    loads=await watch.loads_at_choice(),
                    transfers=shared.transfers.copy(),
                    spans=Spans(1),
                    generations={},
                )
                await _Timed(self._decide(shared, request), shared.node.clock, self._spend)
            watch.shadow_decisions = node.decisions
        except (Exception, SystemExit, KeyboardInterrupt, Hung, BaseExceptionGroup) as error:
            self._counts["failed"] += 1
            self._is_stopped |= isinstance(first_cause(error), Hung)
            self._last_error = trace_of(self.script.path, self.script.source, error)
        finally:
            self._num_running -= 1
            watch.is_shadow_over = True
            self._settle(watch)

    async def _decide(self, shared: Shared, request: Request) -> None:
        attempt = Attempt(shared, request, shared.node.clock.now())
        route: Any = self.script.route(request, Fleet(attempt, shared.view))
        try:
            async for _ in route:
                pass
        finally:
            try:
                await route.aclose()
            finally:
                await attempt.close()

    def _spend(self, seconds: float) -> None:
        self._spent_s += seconds
        if seconds > LONGEST_STEP_S:
            self._is_stopped = True
            self._last_error = f"a step of it took {seconds:.2f} s, and held up all requests: the shadow has ended"

    def _settle(self, watch: Watch) -> None:
        if not watch.has_ended or not watch.is_shadow_over or watch.shadow_decisions is None:
            return
        if not watch.is_finished:
            self._counts["unlike"] += 1
            return
        if watch.is_moved:  # The router did, because an engine drains, or the script, for which a shadow has no tokens.
            self._counts["moved"] += 1
            return
        self._counts["compared"] += 1
        if watch.decisions == watch.shadow_decisions:
            self._counts["agreed"] += 1
        else:
            differing = Differing(watch.request_id, tuple(watch.decisions), tuple(watch.shadow_decisions))
            self._differing.append(differing)


class _UntilPick:
    """Loads that tell of the first pick, before it counts."""

    def __init__(self, loads: Loads, on_pick: Callable[[], None]) -> None:
        self._loads = loads
        self._on_pick = on_pick

    def take(self, *arguments: Any, **named: Any) -> None:
        self._on_pick()
        self._loads.take(*arguments, **named)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loads, name)


class _Timed(Awaitable[None]):
    """Runs a coroutine, and tells how long each of its steps takes."""

    def __init__(self, coroutine: Coroutine[Any, Any, None], clock: Clock, spend: Callable[[float], None]) -> None:
        self._coroutine = coroutine
        self._clock = clock
        self._spend = spend

    def __await__(self) -> Generator[Any, Any, None]:
        step: Callable[[Any], Any] = self._coroutine.send
        value: Any = None
        while True:
            begin = self._clock.now()
            try:
                awaited = step(value)
            except StopIteration:
                return
            finally:
                self._spend(self._clock.now() - begin)
            try:
                step, value = self._coroutine.send, (yield awaited)
            except BaseException as error:
                step, value = self._coroutine.throw, error
