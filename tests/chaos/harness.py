"""One seed: a fleet of production actors, a load and faults drawn from it, and what must hold whatever happens."""

import asyncio
import gc
import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from callboard.actors.protocol import SamplingParams
from callboard.bus.testing import VirtualLoop, without_a_word
from callboard.bus.transports.sim import SimConnection, Weather

from .changes import Changes
from .faults import Faults
from .invariants import broken_now, not_given_back
from .load import Load, Request, send_everywhere
from .log import lines_of
from .schedule import LOAD_S, Asking, Schedule
from .strategies import draw
from .world import Records, World

Planted = Callable[[], AbstractContextManager[object]]
"""Breaks production code while it is entered (see planted.py): entered before a run makes anything, left after it."""

LOOK_S = 0.05
"""How often it is looked whether all is over; and the invariants every LOOKS times."""
LOOKS = 4
MOST_S = 60.0
"""Virtual time within which all must have ended, once nothing goes wrong any more."""
MOST_STEPS = 2_000_000
NUM_LAST = 3
"""Requests that follow when all is well again: they must succeed."""


@dataclass
class Outcome:
    """What became of one seed. It passed if ``problems`` is empty."""

    seed: int
    num_requests: int = 0
    num_finished: int = 0
    """Requests that brought all their tokens."""
    num_failed: int = 0
    """Requests that ended with an error, as faults may cause, or whose client left."""
    lost: int = 0
    """Requests with tokens missing or wrong, or that never ended."""
    repeated: int = 0
    """Requests with a token twice, or with two ends."""
    leaked: int = 0
    """Pools with blocks that are nobody's, lent twice, or not given back."""
    hung: int = 0
    """Requests, or whole runs, that did not end in virtual time."""
    problems: list[str] = field(default_factory=list)
    """One sentence for each thing that is wrong; empty when the seed passed."""
    log_digest: str = ""
    """SHA-256 over the message log and every batch: equal for equal seeds."""
    log: list[str] = field(default_factory=list)
    """The schedule and the message log, empty unless asked for."""
    faults: dict[str, int] = field(default_factory=dict)
    """How many faults struck, by kind."""
    changes: dict[str, int] = field(default_factory=dict)
    """What people changed meanwhile, by kind."""
    num_continued: int = 0
    """How often an engine went on behind tokens of another one, after its death or a hand-over."""
    num_held: int = 0
    """How often a sequence was held, to be handed over."""
    num_messages: int = 0
    num_seen: int = 0
    """Records that a watcher got."""
    num_stories: int = 0
    """What it made of them."""
    virtual_s: float = 0.0


def run_seed(seed: int, *, planted: Planted | None = None, with_log: bool = False, is_watched: bool = False) -> Outcome:
    """Run one seed on a virtual clock of its own, to its end, and return what became of it; never raises.

    With ``planted``, production code is broken in that way during the run; with ``is_watched``, somebody follows all
    nodes, and is bothered, too. No torch, no files, no real time.
    """
    return run_schedule(draw(seed), planted=planted, with_log=with_log, is_watched=is_watched)


def run_schedule(
    schedule: Schedule, *, planted: Planted | None = None, with_log: bool = False, is_watched: bool = False
) -> Outcome:
    """Do as ``run_seed`` does, for a schedule drawn or written by hand."""
    with _undisturbed():
        run = _Run(schedule, with_log=with_log, is_watched=is_watched)
        with ExitStack() as stack:
            if planted is not None:
                stack.enter_context(planted())
            loop = VirtualLoop(most_steps=MOST_STEPS)
            loop.set_exception_handler(run.on_loop_error)
            try:
                loop.run_until_complete(run.main())
            except Exception as error:
                run.end_badly(error)
            finally:
                run.is_over = True
        outcome = run.outcome
        del run
        loop.set_exception_handler(None)
        with without_a_word():
            loop.bury()
            del loop
            gc.collect()
    return outcome


class _Run:
    """One run of one schedule."""

    world: World
    load: Load
    faults: Faults
    changes: Changes

    def __init__(self, schedule: Schedule, *, with_log: bool, is_watched: bool) -> None:
        self.schedule = schedule
        self.outcome = Outcome(schedule.seed)
        self.is_over = False
        self._with_log = with_log
        self._is_watched = is_watched
        self._digest = hashlib.sha256()
        self._seen: set[str] = set()

    async def main(self) -> None:
        self.world = world = World(self.schedule, is_watched=self._is_watched)
        self.load, self.faults = Load(world), Faults(world)
        world.hub.on_send = self._on_send
        records = Records(world)
        log = logging.getLogger("callboard")
        log.addHandler(records)
        try:
            await world.start()
            self.changes = Changes(world)
            self.faults.arm()
            self.changes.arm()
            for asking in self.schedule.requests:
                self.load.start(asking)
            if await self._all_end() and await self._all_hear() and await self._all_settles(may_quarantine=True):
                world.is_calm, world.hub.weather, world.has_watched = True, Weather(), True
                world.mend_wires()
                await self.changes.mend()
                await send_everywhere(world)
                for asking in self._last_requests():
                    self.load.start(asking)
                if await self._all_end():
                    await self._all_settles()
            await world.close()
        finally:
            log.removeHandler(records)
            self._conclude()

    def end_badly(self, error: Exception) -> None:
        """Note an exception of the run itself: of the loop, when nothing can happen any more, or of a check."""
        self.outcome.problems.append(f"hung: the run ended with {error!r}")
        self.outcome.hung += 1

    def on_loop_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Take an exception that nobody retrieved."""
        if not self.is_over:
            self.world.problem(f"the loop says: {context['message']} {context.get('exception')!r}")

    # ---- phases --------------------------------------------------------------------------------------------------

    async def _all_end(self) -> bool:
        """Wait until all requests and faults are over; return whether they are, in time."""
        loop, load, faults = asyncio.get_running_loop(), self.load, self.faults
        begin_s = well_s = loop.time()
        num_looks = 0
        while not (load.is_over and faults.is_over and self.changes.is_over):
            await asyncio.sleep(LOOK_S)
            num_looks += 1
            if num_looks % LOOKS == 0:
                self._look()
            now = loop.time()
            if load.is_over and now - begin_s > LOAD_S:
                faults.disarm()
            if not faults.is_over:
                well_s = now
            elif now - well_s > MOST_S:
                for request in load.pending:
                    self.outcome.hung += 1
                    what = f"{request.state}, {len(request.tokens)} of {len(request.expected)} tokens"
                    self.world.problem(f"hung: request {request.asking.request_id} ({what})")
                return False
        faults.disarm()
        return True

    async def _all_hear(self) -> bool:
        """Wait until both ends of every link have found out that it is broken, if it is."""
        if self.faults.struck:
            await asyncio.sleep(2 * self.schedule.links.silent_s + 1.0)
        return True

    async def _all_settles(self, *, may_quarantine: bool = False) -> bool:
        """Wait until nothing is held any more; return whether that came, in time."""
        loop = asyncio.get_running_loop()
        begin_s = loop.time()
        while held := list(not_given_back(self.world, may_quarantine=may_quarantine)):
            if loop.time() - begin_s > MOST_S:
                for problem in held:
                    self._wrong(problem)
                return False
            await asyncio.sleep(LOOK_S)
        self._look()
        return True

    def _last_requests(self) -> list[Asking]:
        schedule = self.schedule
        prompt = (1, *range(10, 30))
        return [
            Asking(f"last{i}", "client", 0.05 * i, (i, *prompt), SamplingParams(max_tokens=5, ignore_eos=True))
            for i in range(NUM_LAST)
            if len(prompt) < schedule.num_blocks * schedule.engine["block_size"]
        ]

    # ---- the record ----------------------------------------------------------------------------------------------

    def _look(self) -> None:
        for problem in broken_now(self.world):
            self._wrong(problem)

    def _wrong(self, problem: str) -> None:
        if problem not in self._seen:
            self._seen.add(problem)
            self.world.problem(problem)
            self.outcome.leaked += problem.startswith("leaked")
            self.outcome.hung += problem.startswith("hung")

    def _on_send(self, end: SimConnection, batch: bytes) -> None:
        self.faults.on_send(end)
        self._digest.update(batch)
        if self._with_log:
            self.world.log.append((asyncio.get_running_loop().time(), end.near, end.far, bytes(batch)))

    def _conclude(self) -> None:
        outcome, world = self.outcome, self.world
        requests: list[Request] = self.load.requests
        states = Counter(request.state for request in requests)
        outcome.num_requests = len(requests)
        outcome.num_finished = states["finished"]
        outcome.num_failed = states["failed"] + states["left"]
        outcome.lost = sum(request.is_lost for request in requests)
        outcome.repeated = sum(request.is_repeated for request in requests)
        outcome.problems = list(world.problems)
        outcome.faults = dict(sorted(self.faults.struck.items()))
        outcome.changes = dict(sorted(self.changes.made.items())) if hasattr(self, "changes") else {}
        outcome.num_continued, outcome.num_held = world.num_continued, world.num_held
        outcome.virtual_s = asyncio.get_running_loop().time()
        messages = [entry for entry in world.log if not isinstance(entry[-1], bytes)]
        outcome.num_messages = sum(entry[2] in ("sent", "received") for entry in messages)
        outcome.num_seen, outcome.num_stories = world.num_seen, world.num_stories
        self._digest.update(repr(messages).encode())
        outcome.log_digest = self._digest.hexdigest()
        if self._with_log:
            outcome.log = [*str(self.schedule).splitlines(), *lines_of(world.log)]


@contextmanager
def _undisturbed() -> Iterator[None]:
    """No garbage collection, which would come at any time; and a log of one's own."""
    was_enabled = gc.isenabled()
    gc.disable()
    gc.freeze()  # What is here before needs no look when the run's own garbage is collected.
    logger = logging.getLogger("callboard")
    propagates, logger.propagate = logger.propagate, False
    try:
        yield
    finally:
        logger.propagate = propagates
        gc.unfreeze()
        if was_enabled:
            gc.enable()
