"""Where the live view gets its events: a running fleet, what a fleet remembers, or a recording."""

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Protocol

from callboard.actors.protocol import Entry
from callboard.bus import Node
from callboard.tools.running import RunningFleet
from callboard.tools.trace.event import Event
from callboard.tools.trace.notice import Notice
from callboard.tools.trace.past import collect

BATCH = 2000
"""Events that are taken at once: keys are answered in between."""


class Source(Protocol):
    """Batches of events and notices; ``entries`` are the actors known so far, by name."""

    @property
    def name(self) -> str: ...

    @property
    def entries(self) -> Mapping[str, Entry]: ...

    def __aiter__(self) -> AsyncIterator[list[Event | Notice]]: ...


class Told:
    """Events that are there already."""

    def __init__(self, name: str, events: Iterable[Event], entries: Iterable[Entry] = (), *, notes: str = "") -> None:
        self.name = name
        self.entries: dict[str, Entry] = {entry.name: entry for entry in entries}
        self._events = events
        self._notes = notes

    async def __aiter__(self) -> AsyncIterator[list[Event | Notice]]:
        batch: list[Event | Notice] = []
        last = 0.0
        for event in self._events:
            batch.append(event)
            last = max(last, event.time)
            if len(batch) >= BATCH:
                yield batch
                batch = []
                await asyncio.sleep(0)
        if self._notes:
            batch.append(Notice(self._notes, "without", time=last))
        yield batch


async def remembered(node: Node, fleet: RunningFleet) -> Told:
    """Return what the nodes of a fleet remember. Raises BusError."""
    past = await collect(node, fleet)
    missing = ", ".join(f"{name} could not be asked: {why}" for name, why in past.missing.items())
    return Told(fleet.state.name, past.events, past.entries, notes=missing)
