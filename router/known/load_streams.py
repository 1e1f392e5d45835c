"""A standing stream of load from every engine: how this router hears of it as it changes, and at once of a death."""

import asyncio

from callboard.actors.actor import Actor
from callboard.actors.load_protocol import WatchLoad
from callboard.actors.protocol import Entry
from callboard.bus import FOREVER, ActorDied, BusError, NotUnderstood
from callboard.router.events import Events

from .loads import Loads

FIRST_RETRY_S = 0.1
LAST_RETRY_S = 2.0


class LoadStreams:
    """One stream for each engine of the directory's view, by tasks that the router owns.

    Where a stream breaks, the directory's view stands in until it stands again.
    """

    def __init__(self, router: Actor, loads: Loads, events: Events) -> None:
        self._router = router
        self._loads = loads
        self._events = events
        self._following: dict[str, tuple[Entry, asyncio.Task[None]]] = {}

    def follow(self, entries: tuple[Entry, ...]) -> None:
        """Follow these engines, and no others from now on."""
        wanted = {entry.name: entry for entry in entries}
        for name, (entry, task) in list(self._following.items()):
            if name not in wanted or not _is_same(wanted[name], entry):
                task.cancel()
                self._loads.lost(name)
                del self._following[name]
        for name, entry in wanted.items():
            if name not in self._following:
                self._following[name] = entry, self._router.spawn(self._follow(entry))

    async def _follow(self, entry: Entry) -> None:
        ref, node = self._router.node.ref(entry.address), self._router.node
        retry_s = FIRST_RETRY_S
        while True:
            try:
                async with ref.stream(WatchLoad(), timeout=FOREVER) as reports:
                    async for report in reports:
                        retry_s = FIRST_RETRY_S
                        self._loads.take_report(entry.name, report)
                        self._events.load_changed(entry.name)
            except NotUnderstood:
                return  # An engine that is not ours, and tells the directory only.
            except ActorDied:
                self._loads.suspect(entry, node.clock.now())
                self._events.died(entry.name)
            except BusError:
                pass
            self._loads.lost(entry.name)
            await node.clock.sleep(retry_s * node.rng.uniform(0.75, 1.25))
            retry_s = min(2 * retry_s, LAST_RETRY_S)


def _is_same(one: Entry, other: Entry) -> bool:
    return (one.address, one.started) == (other.address, other.started)
