"""How busy engines are: what they report, corrected by what this router knows better.

A report is up to a second old, so two requests of one instant would pick the same engine by it. The router counts
its own requests from the moment an engine is picked, and takes from a report only what others put there.
"""

import msgspec

from callboard.actors.protocol import Entry, Load

SUSPECT_S = 1.0
"""How long an engine that just failed is not offered, unless it registered anew before."""


class Loads:
    """The router's own requests by engine, and the engines it suspects to be dead."""

    def __init__(self) -> None:
        self._own: dict[str, int] = {}
        self._others: dict[str, int] = {}
        self._reported: dict[str, Load] = {}
        self._suspects: dict[str, tuple[Entry, float]] = {}
        self._picked: dict[str, int] = {}
        self._num_picks = 0

    def report(self, entries: tuple[Entry, ...]) -> None:
        """Take a new view of the engines; forget those that are gone."""
        names = {entry.name for entry in entries}
        for known in (self._others, self._reported, self._picked, self._suspects):
            for name in [name for name in known if name not in names]:
                del known[name]
        for entry in entries:
            # Only a new report says something about the others; an old one may count requests of ours that ended.
            if self._reported.get(entry.name) != entry.load:
                self._reported[entry.name] = entry.load
                reported = entry.load.num_running + entry.load.num_waiting
                self._others[entry.name] = max(0, reported - self.num_own(entry.name))

    def num_own(self, engine: str) -> int:
        """Return how many of this router's requests an engine has."""
        return self._own.get(engine, 0)

    def load(self, entry: Entry) -> Load:
        """Return the entry's load with this router's own requests counted now rather than when it was reported."""
        total = self._others.get(entry.name, 0) + self.num_own(entry.name)
        num_running = min(entry.load.num_running, total)
        return msgspec.structs.replace(entry.load, num_running=num_running, num_waiting=total - num_running)

    def last_picked(self, engine: str) -> int:
        """Return a number that is larger the later the engine was picked, 0 if never."""
        return self._picked.get(engine, 0)

    def take(self, engine: str) -> None:
        """Count one more request of ours."""
        self._num_picks += 1
        self._picked[engine] = self._num_picks
        self._own[engine] = self.num_own(engine) + 1

    def give_back(self, engine: str) -> None:
        """Count one less."""
        self._own[engine] -= 1
        if not self._own[engine]:
            del self._own[engine]

    def suspect(self, entry: Entry, now: float) -> None:
        """Note that a call to the engine or its manager ended with its death."""
        self._suspects[entry.name] = (entry, now + SUSPECT_S)

    def suspected_until(self, entry: Entry, now: float) -> float | None:
        """Return until when the engine is not to be offered, None if it may be."""
        suspect, until = self._suspects.get(entry.name, (entry, 0.0))
        is_same = (suspect.address, suspect.manager, suspect.pid) == (entry.address, entry.manager, entry.pid)
        return until if is_same and now < until else None
