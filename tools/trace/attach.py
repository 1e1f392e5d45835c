"""Following a running fleet: the tracer of every node, as nodes come, go, and come back, on the reader's clock.

Nothing here slows the fleet. Who reads slowly is told less: a node drops what a follower does not take, and counts it.
Memory is bounded at both ends, and when the reader leaves, its streams end and its links close: nothing stays behind.
"""

import asyncio
from bisect import bisect_right
from operator import attrgetter
from typing import Self

import msgspec

from callboard.actors.protocol import Entry, ListEntries, View, Watch
from callboard.actors.trace_protocol import TRACER, Bodies, Follow, Records
from callboard.bus import FOREVER, ActorDied, Address, BusError, Items, Node, Refusal
from callboard.bus.tasks import Tasks
from callboard.tools.running import RunningFleet, read_state

from .clocks import measure
from .event import Event
from .followed import Followed, events_of
from .notice import Notice, NoticeKind

MOST_WAITING = 10_000
"""Events that wait for the reader, at most, and what is under way; then nodes are read no more."""
CREDIT = 8
"""Batches under way from one node."""
HOLD_S = 0.1
"""Events are held so long beyond the nodes' own batching, to be told in the order of their times."""
START_S = 5.0
"""How long nodes that do not answer are waited for before the past is told without them."""
QUIET_S, LONG_QUIET_S = 0.2, 1.0
"""After a pause of so long the past of a node has been told, as it seems; after a longer one, surely."""
CLOCK_S = 5.0
LOST_S = 1.0
FIRST_RETRY_S, LAST_RETRY_S = 0.05, 1.0
STARTING_S, REFUSED_S = 1.0, 5.0
PATIENCE_S = 10.0
"""A fleet of which nobody is reached for so long has ended, as far as can be told from afar."""

_time_of = attrgetter("time")

Where = RunningFleet | Address
"""A fleet, or its directory's address."""


class Follower:
    """All records of a fleet as they happen: ``async with Follower(node, fleet) as f: async for batch in f: ...``.

    A batch is a list of events and notices, by time; one list follows another within ``every_s`` and a little more.
    With ``with_past`` the nodes' rings come first, in no order between batches, until the notice ``following``. The
    iteration ends with the fleet. Entering raises BusError where the directory does not answer.
    """

    def __init__(
        self,
        node: Node,
        fleet: Where,
        *,
        with_past: bool = True,
        everything: bool = False,
        every_s: float = 0.05,
        bodies: Bodies = "none",
        salt: bytes = b"",
    ) -> None:
        self.num_lost = 0
        """Records that nodes made and that were not told here, as far as known."""
        self.entries: dict[str, Entry] = {}
        """All actors seen in the directory since the start, by name."""
        self._node = node
        self._fleet = fleet if isinstance(fleet, RunningFleet) else None
        self._directory = fleet.state.directory if isinstance(fleet, RunningFleet) else fleet
        self._ask = Follow(with_past, everything, every_s, bodies, salt)
        self._hold_s = every_s + HOLD_S
        self._listed: dict[str, Address] = {}
        self._followed: dict[str, Followed] = {}
        self._waiting: list[Event | Notice] = []
        self._is_sorted = True
        self._wake, self._room = asyncio.Event(), asyncio.Event()
        self._has_started = self._is_over = False
        self._unreached_since = 0.0
        self._error: BaseException | None = None
        self._tasks = Tasks(self._broke)

    @property
    def name(self) -> str:
        """The fleet's name."""
        return self._node.fleet

    @property
    def nodes(self) -> tuple[str, ...]:
        """The nodes that are followed at this moment."""
        return tuple(sorted(name for name, each in self._followed.items() if each.is_attached))

    @property
    def followed(self) -> dict[str, Followed]:
        """All nodes that are known, by name, with their clocks."""
        return dict(self._followed)

    async def __aenter__(self) -> Self:
        view = await self._node.ref(self._directory).ask(ListEntries(), timeout=3.0)
        self._unreached_since = self._node.clock.now()
        self._take_view(view)
        self._tasks.spawn(self._watch())
        self._tasks.spawn(self._begin())
        self._tasks.spawn(self._keep_time())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._is_over = True
        await self._tasks.cancel()

    def _broke(self, error: BaseException) -> None:
        self._error = self._error or error
        self._wake.set()

    # ---- what is told --------------------------------------------------------------------------------------------

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> list[Event | Notice]:
        while True:
            if self._error is not None:
                raise self._error
            if batch := self._take_due():
                return batch
            if self._is_over:
                raise StopAsyncIteration
            self._wake.clear()
            oldest = self._waiting[0].time if self._waiting else None
            wait = None if oldest is None else max(0.001, oldest + self._hold_s - self._node.clock.now())
            try:
                async with asyncio.timeout(wait):
                    await self._wake.wait()
            except TimeoutError:
                pass

    def _take_due(self) -> list[Event | Notice]:
        """Return what may be told now, by time."""
        waiting = self._waiting
        if not self._is_sorted:
            waiting.sort(key=_time_of)
            self._is_sorted = True
        until = self._node.clock.now() - self._hold_s
        # A full buffer goes out early: better out of order than lost.
        is_full = len(waiting) >= MOST_WAITING
        num = len(waiting) if self._is_over or is_full else bisect_right(waiting, until, key=_time_of)
        due = waiting[:num]
        del waiting[:num]
        self._room.set()
        return due

    def say(self, kind: NoticeKind, text: str, *, node: str = "", num_lost: int = 0) -> None:
        """Tell a notice, after all that happened before it."""
        clock = self._node.clock
        self._put([Notice(text, kind, node, num_lost, clock.now(), clock.wall())])

    def _put(self, items: "list[Event] | list[Notice]") -> None:
        self._waiting += items
        self._is_sorted = False
        self._wake.set()

    # ---- who is there --------------------------------------------------------------------------------------------

    def _take_view(self, view: View) -> None:
        self.entries |= {entry.name: entry for entry in view.entries}
        nodes = {self._directory.node: self._directory}
        nodes |= {entry.address.node: entry.address for entry in view.entries if entry.address.endpoint}
        self._listed = nodes
        for name, address in nodes.items():
            tracer = Address(name, address.endpoint, TRACER)
            each = self._followed.get(name)
            if each is None or each.tracer != tracer:
                each = self._followed[name] = Followed(tracer)
            if not each.is_kept:
                each.is_kept = True
                self._tasks.spawn(self._keep(each))

    async def _watch(self) -> None:
        retry_s = FIRST_RETRY_S
        while not self._is_over:
            try:
                async with self._node.ref(self._directory).stream(Watch(), timeout=FOREVER) as views:
                    async for view in views:
                        retry_s = FIRST_RETRY_S
                        self._unreached_since = self._node.clock.now()
                        self._take_view(view)
            except BusError:
                pass
            if self._has_ended():
                self.say("ended", f"fleet {self.name} has ended")
                self._is_over = True
                return
            await self._node.clock.sleep(retry_s)
            retry_s = min(2 * retry_s, LAST_RETRY_S)

    def _has_ended(self) -> bool:
        if self._fleet is not None and not self._fleet.is_remote:
            return read_state(self._fleet.folder) is None
        if self.nodes:
            self._unreached_since = self._node.clock.now()
        return self._node.clock.now() - self._unreached_since > PATIENCE_S

    async def _begin(self) -> None:
        """Say that the past has been told, once it has."""
        try:
            async with asyncio.timeout(START_S):
                for each in list(self._followed.values()):
                    await each.has_told_past.wait()
        except TimeoutError:
            pass
        self._has_started = True
        num, now = len(self.nodes), self._node.clock.now()
        others = [each.clock for each in self._followed.values() if each.is_attached and not each.clock.is_shared]
        error_s = max((clock.offset(now).error_s for clock in others), default=0.0)
        clocks = f"; clocks of other hosts are known to {error_s * 1000:.3g} ms" if others else ""
        self.say("following", f"now following {self.name}: {num} node{'s' * (num != 1)}{clocks}")
        for each in self._followed.values():
            if not each.is_attached and not each.refused_at:
                self.say("cut", f"{each.name} does not answer: it is followed as soon as it does", node=each.name)

    # ---- one node ------------------------------------------------------------------------------------------------

    async def _keep(self, each: Followed) -> None:
        """Follow one node for as long as the directory lists it, or it is in reach."""
        retry_s = FIRST_RETRY_S
        while self._followed.get(each.name) is each:
            try:
                await self._read(each)
                self._detach(each, "cut", f"{each.name} tells no more: its tracer has left")
            except Refusal as error:
                retry_s = self._refused(each, error)
            except ActorDied as error:
                has_stopped = str(error).endswith("stopped")
                text = "stopped" if has_stopped else "died: what it had noted and not told is lost"
                self._detach(each, "stopped" if has_stopped else "died", f"{each.name} {text}")
            except BusError as error:
                text = str(error).replace(f"{each.name} has", "it has", 1)
                if "out of order" in text:  # The bus has seen a gap; here that is what follows from standing still.
                    text = "it had given up this tracer, which did not listen for a while"
                self._detach(each, "cut", f"{each.name} is out of reach: {text}")
            each.has_told_past.set()
            if each.name not in self._listed:
                break  # What is known of it is kept: it may come again, as the same process.
            await self._node.clock.sleep(retry_s)
            retry_s = min(2 * retry_s, LAST_RETRY_S)
        each.is_kept = False

    def _refused(self, each: Followed, error: Refusal) -> float:
        """Note that a node has no tracer, or none for us, and say so if it stays so; return when to ask again."""
        now = self._node.clock.now()
        each.refused_at = each.refused_at or now
        if now - each.refused_at < STARTING_S:  # It may be starting this moment.
            return FIRST_RETRY_S
        if not each.is_refused:
            each.is_refused = True
            self.say("without", f"{each.name} tells nothing: {error}", node=each.name)
        return REFUSED_S

    def _detach(self, each: Followed, kind: NoticeKind, text: str) -> None:
        self._tell_lost(each)
        if each.is_attached:
            each.is_attached = False
            each.detached_at = self._node.clock.now()
            self.say(kind, text, node=each.name)

    async def _read(self, each: Followed) -> None:
        """Follow one node until its stream ends. Raises BusError."""
        moment = await measure(self._node, each.tracer, each.clock)
        before, ask = each.attached_to, self._ask
        if before and not ask.with_past:  # What its ring has of the time since the link broke.
            ask = msgspec.structs.replace(ask, with_past=True)
        each.begin(moment, with_past=self._ask.with_past or bool(before))
        async with self._node.ref(each.tracer).stream(ask, timeout=FOREVER, credit=CREDIT) as batches:
            while True:
                batch = await self._next(each, batches)
                if not each.is_attached:
                    each.is_attached, each.is_refused, each.refused_at = True, False, 0.0
                    each.attached_at, each.attached_to = self._node.clock.now(), each.incarnation
                    if before != each.incarnation:
                        self._greet(each, before)
                if each.is_in_past and not (batch and batch.is_past):
                    num_missed = each.end_past()
                    if before == each.incarnation:
                        self._meet_again(each, num_missed)
                if batch is None:
                    return
                if records := each.take(batch):
                    self._put(events_of(self._node, each.name, each.clock, records))
                while len(self._waiting) >= MOST_WAITING:
                    self._room.clear()
                    await self._room.wait()

    async def _next(self, each: Followed, batches: Items[Records]) -> Records | None:
        """Return the next batch, None at the end; while the past comes, an empty one when no more of it does."""
        while each.is_attached and each.is_in_past:
            try:
                async with asyncio.timeout(LONG_QUIET_S if each.has_told_past.is_set() else QUIET_S):
                    return await anext(batches, None)
            except BusError:
                raise
            except TimeoutError:
                if each.has_told_past.is_set():
                    return Records(())
                each.has_told_past.set()
        return await anext(batches, None)

    def _greet(self, each: Followed, before: str) -> None:
        if before:
            self.say("back", f"{each.name} is back, as a new process", node=each.name)
        elif self._has_started:
            self.say("came", f"{each.name} came: following it", node=each.name)

    def _meet_again(self, each: Followed, num_missed: int) -> None:
        self.num_lost += num_missed
        num = each.num_caught_up
        told = f"{num} record{'s' * (num != 1)} of that time caught up"
        lost = f", {num_missed} lost" if num_missed else ""
        text = f"{each.name} is reached again after {each.attached_at - each.detached_at:.1f} s: {told}{lost}"
        self.say("back", text, node=each.name, num_lost=num_missed)

    def _tell_lost(self, each: Followed) -> None:
        num, each.num_lost = each.num_lost, 0
        if num:
            self.num_lost += num
            text = f"{num} record{'s' * (num != 1)} of {each.name} lost: they came faster than they were read here"
            self.say("lost", text, node=each.name, num_lost=num)

    async def _keep_time(self) -> None:
        """Tell of losses once a second, and every few seconds ask the clocks of other hosts again."""
        node = self._node
        while True:
            asked = node.clock.now()
            others = [each for each in self._followed.values() if each.is_attached and not each.clock.is_shared]
            await asyncio.gather(
                *(measure(node, each.tracer, each.clock, num_asks=4) for each in others), return_exceptions=True
            )
            while node.clock.now() < asked + CLOCK_S:
                await node.clock.sleep(LOST_S)
                for each in self._followed.values():
                    self._tell_lost(each)
