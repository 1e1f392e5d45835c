"""The routers of a fleet, as one frontend sees them: whom to ask next, and whom not just now."""

import asyncio
import math
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

from callboard.actors.protocol import Entry
from callboard.actors.registration import DirectoryView
from callboard.bus import Address, Node

SUSPECT_S = 3.0
"""How long a router that was lost is asked only if there is no other, unless it has started anew before.

As long as the directory takes to forget one that is dead.
"""
PAUSE_S = 0.25
"""Between two looks for a router where there is none."""
WINDOW_S = 30.0
"""The time over which it is counted how many sequences end."""
MOST_COUNTED = 512
LONGEST_RETRY_S = 60


class Turnover:
    """How fast places at the routers become free, and how many clients were sent away meanwhile."""

    def __init__(self, now: float) -> None:
        self._begin = now
        self._ends: deque[float] = deque(maxlen=MOST_COUNTED)
        self._refusals: deque[float] = deque(maxlen=MOST_COUNTED)

    def ended(self, now: float) -> None:
        """Note that a place became free."""
        self._ends.append(now)

    def refused(self, now: float) -> int:
        """Note that a client is sent away; return after how many seconds it should come again.

        That is when as many places have become free as clients were sent away of late, at the present pace.
        """
        self._refusals.append(now)
        for times in (self._ends, self._refusals):
            while times and times[0] < now - WINDOW_S:
                times.popleft()
        if not self._ends:
            return min(LONGEST_RETRY_S, max(1, math.ceil(min(WINDOW_S, now - self._begin))))
        since = self._ends[0] if len(self._ends) == MOST_COUNTED else max(self._begin, now - WINDOW_S)
        seconds_each = (now - since) / len(self._ends)
        horizon = now - max(1.0, seconds_each * len(self._refusals))
        waiting = sum(1 for time in self._refusals if time >= horizon)
        return min(LONGEST_RETRY_S, max(1, math.ceil(waiting * seconds_each)))


class RouterCounts:
    """What was asked of one router, by this frontend."""

    __slots__ = ("last_asked", "num_asked", "num_in_flight", "num_lost", "num_refused")

    def __init__(self) -> None:
        self.num_in_flight = 0
        self.num_asked = 0
        self.num_lost = 0
        """Sequences that had to go on elsewhere, because it died or was out of reach."""
        self.num_refused = 0
        self.last_asked = 0
        """Larger the later it was asked."""


class Routers:
    """The routers that may be asked: all of the directory's, those of ``names``, or the ``only`` one, in it or not."""

    def __init__(
        self,
        node: Node,
        view: DirectoryView | None = None,
        *,
        only: Address | None = None,
        names: Sequence[str] = (),
    ) -> None:
        self.counts: dict[str, RouterCounts] = {}
        """By the router's name."""
        self.turnover = Turnover(node.clock.now())
        self._node = node
        self._view = view
        self._only = only
        self._names = tuple(names)
        self._suspects: dict[str, tuple[tuple[Address, float], float]] = {}
        self._num_asked = 0

    def there(self) -> list[Address]:
        """Return where all are that may be asked, the suspected ones too."""
        return [address for address, _ in self._known()]

    def missing(self) -> str | None:
        """Return in a sentence that no router is there, None if one is."""
        entries = () if self._view is None else self._view.entries("router")
        if self._only is not None:
            is_there = self._view is None or any(entry.address == self._only for entry in entries)
            return None if is_there else f"router {self._only.actor} is not there"
        if self.there():
            return None
        return f"none of the routers {', '.join(self._names)} is there" if self._names else "no router is there"

    def pick(self, without: Collection[str] = (), *, is_desperate: bool = False) -> Address | None:
        """Return the router to ask: with the fewest sequences of this frontend, of equals the least recently asked.

        None if there is none but those of ``without`` and, unless ``is_desperate``, those that were just lost.
        """
        now = self._node.clock.now()
        free = [
            address
            for address, started in self._known()
            if address.actor not in without and (is_desperate or not self._is_suspect(address, started, now))
        ]
        return min(free, key=self._key, default=None)

    @contextmanager
    def asking(self, router: Address) -> Iterator[RouterCounts]:
        """Count a sequence as the router's while the body runs."""
        counts = self._of(router)
        self._num_asked += 1
        counts.last_asked = self._num_asked
        counts.num_asked += 1
        counts.num_in_flight += 1
        try:
            yield counts
        finally:
            counts.num_in_flight -= 1

    def suspect(self, router: Address) -> None:
        """Note that a router is dead or out of reach: others are asked first."""
        started = next((started for address, started in self._known() if address == router), 0.0)
        self._suspects[router.actor] = ((router, started), self._node.clock.now() + SUSPECT_S)

    async def change(self, seconds: float) -> None:
        """Wait until there may be another router to ask, at most for ``seconds``, and not for long."""
        pause = min(seconds, PAUSE_S)
        if self._view is None:
            await self._node.clock.sleep(pause)
            return
        before = self._known()
        try:
            async with asyncio.timeout(pause):
                await self._view.wait_for(lambda _: self._known() != before)
        except TimeoutError:
            pass

    def _known(self) -> list[tuple[Address, float]]:
        """Return every router with the time of its start, by which one that came back is told from the lost one."""
        entries = () if self._view is None else self._view.entries("router")
        if self._only is None:
            return [(each.address, each.started) for each in entries if self._may_be_asked(each)]
        started = next((each.started for each in entries if each.address == self._only), 0.0)
        return [(self._only, started)]

    def _may_be_asked(self, entry: Entry) -> bool:
        return entry.state == "ready" and (not self._names or entry.name in self._names)

    def _is_suspect(self, address: Address, started: float, now: float) -> bool:
        known, until = self._suspects.get(address.actor, ((address, started), 0.0))
        return known == (address, started) and now < until

    def _of(self, router: Address) -> RouterCounts:
        counts = self.counts.get(router.actor)
        if counts is None:
            counts = self.counts[router.actor] = RouterCounts()
        return counts

    def _key(self, address: Address) -> tuple[int, int, str]:
        counts = self._of(address)
        return counts.num_in_flight, counts.last_asked, address.actor
