"""Somebody who watches a fleet under faults, as unruly as a watcher can be: slow, stopped, killed, back."""

import asyncio
from collections import deque
from random import Random
from typing import TYPE_CHECKING

from callboard.actors.actor import Actor
from callboard.bus import Address, BusError
from callboard.tools.trace.attach import Follower
from callboard.tools.trace.event import Event
from callboard.tools.trace.notice import Notice
from callboard.tools.trace.story import assemble

if TYPE_CHECKING:
    from .world import Machine, World

MOST_EVENTS = 5000


class Watcher(Actor):
    """Follows all nodes, in turns with leaving them, and makes stories of what it hears."""

    def __init__(self, world: "World", directory: Address) -> None:
        self._world = world
        self._directory = directory
        self._rng = Random(f"{world.schedule.seed}/watcher/{world.machines['watcher'].num_starts}")
        self._events: deque[Event] = deque(maxlen=MOST_EVENTS)

    async def start(self) -> None:
        self.spawn(self._watch())

    async def _watch(self) -> None:
        rng, clock = self._rng, self.node.clock
        while not self._world.has_watched:
            try:
                everything = rng.random() < 0.3
                async with Follower(self.node, self._directory, everything=everything, bodies="hashed") as follower:
                    async for batch in follower:
                        self._take(batch)
                        if rng.random() < 0.1:
                            await clock.sleep(rng.uniform(0.0, 2.0))
                        if rng.random() < 0.02 or self._world.has_watched:
                            break
            except BusError:
                pass  # The directory is out of reach.
            self._world.num_stories += len(assemble(self._events))
            await clock.sleep(rng.uniform(0.0, 0.5))

    def _take(self, batch: list[Event | Notice]) -> None:
        events = [item for item in batch if isinstance(item, Event)]
        self._events.extend(events)
        self._world.num_seen += len(events)


async def bother(world: "World", machine: "Machine") -> None:
    """Kill, stop and pause the watcher, until the world is calm."""
    rng = Random(f"{world.schedule.seed}/bother")
    while not world.has_watched:
        await asyncio.sleep(rng.uniform(0.05, 1.5))
        match rng.randrange(4):
            case 0:
                machine.kill()
            case 1:
                machine.stop()
            case 2 if machine.is_up:
                process = machine.process
                process.pause()
                await asyncio.sleep(rng.uniform(0.1, 8.0))
                process.resume()
