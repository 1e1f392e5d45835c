"""What the live view knows: the last requests, bounded, and of each as much as came; cheap per record.

Records are only sorted in as they come. A request's story is assembled when somebody looks at it, so that a thousand
requests a second cost no more than what is on the screen.
"""

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from callboard.bus.taps import ANSWERED, ENDED, RECEIVED, SENT, SPAN
from callboard.router.spans import request_of
from callboard.tools.trace.event import Event
from callboard.tools.trace.story import Story, assemble, is_tell

NUM_REQUESTS = 500
NUM_FAILED = 100
"""Failed requests are kept when others of their time are dropped, so many of them."""
NUM_EVENTS = 1500
"""Of one request; one that makes more keeps its last ones."""
NUM_NOTICES = 20
STALE_S = 900.0
"""An end that has not come after so long a silence is lost."""


@dataclass(slots=True, eq=False)
class Unit:
    """Something an actor was asked for, from its coming in to its answer: a bar of the chart."""

    number: int
    """Of the call, as in the records; of a whole request, of its ``http``."""
    actor: str
    name: str
    begin: float
    end: float | None = None
    """None: it is not answered, as far as known."""
    slot: int = -1
    """Its row among those of its actor at the same time; -1: not drawn yet."""


@dataclass(slots=True, eq=False)
class Tracked:
    """One request, as far as it is known. Times are seconds on the reader's clock."""

    id: str
    number: int
    """Counts requests as they came: the colour."""
    begin: float
    last: float
    events: deque[Event] = field(default_factory=lambda: deque(maxlen=NUM_EVENTS))
    units: dict[int, Unit] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)
    """Of its messages and phases, as in the records."""
    actors: set[str] = field(default_factory=set)
    is_over: bool = False
    error: str = ""
    """How it ended badly as a whole."""
    has_errors: bool = False
    """Or a part of it did."""
    seen: set[int] = field(default_factory=set)
    open_generates: int = 0
    behind: int = 0
    """Events that the story does not know."""
    told: Story | None = None
    home: str = ""
    """The node of whoever asked for it, once it told so: without that node, its end is not told."""

    def is_running(self, now: float) -> bool:
        """Return whether it is under way, as far as is known."""
        if self.is_over or now - self.last >= STALE_S:
            return False
        return self.open_generates > 0 or not self.units or any(unit.end is None for unit in self.units.values())

    def end_of(self, unit: Unit, now: float) -> float:
        """Return until when a unit lasted: now, if it goes on."""
        if unit.end is not None:
            return unit.end
        return max(now, unit.begin) if self.is_running(now) else max(unit.begin, self.last)

    def story(self) -> Story:
        """Return what its events tell, assembled if new ones came."""
        if self.told is None or self.behind:
            stories = assemble(self.events)
            self.told = stories.get(self.id) or next(iter(stories.values()))
            self.behind = 0
        return self.told

    def add(self, event: Event) -> None:
        """Take one more event, unless it is known."""
        record = event.record
        what, number, name = record.what, record.span, record.name
        key = number << 3 | what
        if key in self.seen:
            return  # A node's ring was read while it was followed.
        self.seen.add(key)
        if len(self.seen) > 2 * NUM_EVENTS:
            self.seen.clear()
        self.events.append(event)
        self.behind += 1
        time, begin = event.time, event.begin or event.time
        self.begin = min(self.begin, begin)
        self.last = max(self.last, time)
        if record.error and record.error != "cancelled":
            self.has_errors = True
        if what == RECEIVED:
            self.names.add(name)
            self.actors.add(record.actor)
            if number not in self.units:
                self.units[number] = Unit(number, record.actor, name, time, time if is_tell(name) else None)
        elif what == ANSWERED:
            unit = self.units.get(number)
            if unit is None:
                self.actors.add(record.actor)
                unit = self.units[number] = Unit(number, record.actor, name, begin)
            unit.end = max(time, unit.begin)
            if name == "Generate" and not self.home:
                self._presume_over(record.error)
        elif what == SPAN:
            self._add_span(event)
        elif name == "Generate":
            self._add_generate(event)
        if len(self.units) > NUM_EVENTS:
            del self.units[next(iter(self.units))]

    def _add_span(self, event: Event) -> None:
        record = event.record
        self.names.add(record.name)
        self.actors.add(record.actor)
        if record.name == "http":
            unit = self.units.get(record.span)
            if unit is None:
                unit = self.units[record.span] = Unit(record.span, record.actor, "http", event.begin)
            unit.actor, unit.begin, unit.end = record.actor, event.begin, event.time
            self.home, self.is_over, self.error = event.node, True, record.error

    def _add_generate(self, event: Event) -> None:
        """Follow what the frontend is doing: its own span comes only at the end."""
        record = event.record
        if not self.home:  # It will say itself when it is over.
            self.home, self.is_over, self.error = event.node, False, ""
        if record.what == SENT:
            self.open_generates += 1
            if record.parent and record.parent not in self.units:
                self.units[record.parent] = Unit(record.parent, record.source, "http", min(self.begin, event.time))
        elif record.what == ENDED:
            self.open_generates -= 1
            if self.open_generates <= 0:
                self.is_over = True
                self.error = self.error or record.error
                unit = self.units.get(record.parent)
                if unit is not None and unit.end is None:
                    unit.end = event.time

    def _presume_over(self, error: str) -> None:
        """Take the router's answer for the end: who asked is perhaps on a node that nobody follows."""
        if all(unit.end is not None for unit in self.units.values() if unit.name == "Generate"):
            self.is_over, self.error = True, error


class Model:
    """The last requests by id, the oldest first, and what else there is to say."""

    def __init__(self, *, keep: int = NUM_REQUESTS, takes: Callable[[str], bool] | None = None) -> None:
        self.keep = keep
        self._takes = takes
        """Of which requests, by their ids, anything is kept at all; None: of all."""
        self.requests: OrderedDict[str, Tracked] = OrderedDict()
        self.notices: deque[tuple[float, str]] = deque(maxlen=NUM_NOTICES)
        """When (on the reader's clock), and what."""
        self.num_seen = 0
        self.num_events = 0
        self.num_lost = 0
        """Records that were made and not told."""
        self.num_skipped = 0
        """Requests that went by while the view was held and had no room."""
        self.last = 0.0
        """When the latest event was."""
        self.version = 0
        """Counts changes."""
        self.is_held = False
        """Nothing is dropped: somebody looks at a still picture."""
        self.pinned = ""
        """A request that is not dropped: somebody looks at it."""
        self.horizon = 0.0
        """Requests that came earlier may have been dropped: of what was before, the picture has holes."""
        self._gone: OrderedDict[str, None] = OrderedDict()
        self._failed: set[str] = set()

    def add(self, events: Iterable[Event]) -> None:
        """Take records as they come: in any order, twice, or of requests that were dropped."""
        # Hot: once per record (tests/tools/trace/test_live_load.py).
        requests = self.requests
        for event in events:
            request_id = event.record.request_id
            if not request_id:
                continue
            tracked = requests.get(request_id) or self._track(request_id, event)
            if tracked is None:
                continue
            self.num_events += 1
            if event.time > self.last:
                self.last = event.time
            tracked.add(event)
            if tracked.error:
                self._failed.add(tracked.id)
        self.version += 1

    def say(self, text: str, *, at: float, num_lost: int = 0) -> None:
        """Note that something happened to the fleet, or to the records."""
        self.num_lost += num_lost
        self.notices.append((at, text))
        self.version += 1

    def known_ids(self) -> list[str]:
        """Return the ids of the last requests, also of those that were dropped."""
        return [*self._gone, *self.requests]

    def keep_last(self, num: int) -> None:
        """Drop all but the requests that came last."""
        latest = sorted(self.requests.values(), key=lambda each: each.begin)
        for tracked in latest[: max(len(latest) - num, 0)]:
            self._drop(tracked)
        self.version += 1

    def lose(self, node: str, why: str) -> None:
        """Take note that a node is gone, or (empty) all: of what was asked for there, no end will be told."""
        for tracked in self.requests.values():
            if not tracked.is_over and (not node or tracked.home == node):
                tracked.is_over, tracked.error = True, why
                self._failed.add(tracked.id)
        self.version += 1

    def release(self) -> None:
        """Let go of what was held."""
        self.is_held, self.num_skipped = False, 0
        while len(self.requests) > self.keep and self._drop_one():
            pass
        self.version += 1

    def _track(self, request_id: str, event: Event) -> Tracked | None:
        root = request_of(request_id)
        found = self.requests.get(root)
        if found is not None or root in self._gone:
            return found
        if self._takes is not None and not self._takes(root):
            self._forget(root)
            return None
        while len(self.requests) >= self.keep:
            if self.is_held:
                if len(self.requests) < 2 * self.keep:
                    break
                self.num_skipped += 1
                self._forget(root)
                return None
            if not self._drop_one():
                break
        self.num_seen += 1
        begin = event.begin or event.time
        made = self.requests[root] = Tracked(root, self.num_seen, begin, begin)
        return made

    def _drop_one(self) -> bool:
        """Drop the oldest request but the one that is looked at, and the last that failed."""
        has_room = len(self._failed) <= min(NUM_FAILED, self.keep // 2)
        for tracked in self.requests.values():
            if tracked.id != self.pinned and not (has_room and tracked.id in self._failed):
                self._drop(tracked)
                return True
        return False

    def _drop(self, tracked: Tracked) -> None:
        del self.requests[tracked.id]
        self.horizon = max(self.horizon, tracked.begin)
        self._failed.discard(tracked.id)
        self._forget(tracked.id)

    def _forget(self, request_id: str) -> None:
        self._gone[request_id] = None
        if len(self._gone) > 8 * self.keep:
            self._gone.popitem(last=False)
