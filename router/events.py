"""What happens to the engines of a fleet, for scripts that wait for it: ``async for event in fleet.events()``."""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Literal

from callboard.actors.protocol import Entry

EventKind = Literal["joined", "left", "died", "roles", "load"]


@dataclass(frozen=True, slots=True)
class Happening:
    """Something that happened to an engine, with the last that is known of it."""

    kind: EventKind
    entry: Entry


class Events:
    """Compares one view of the directory with the next, and tells everybody who listens.

    A listener who is slow is told the latest of each kind and engine, so what waits for it stays small.
    """

    def __init__(self) -> None:
        self._engines: dict[str, Entry] = {}
        self._dead: dict[str, Entry] = {}
        self._listeners: dict[_Listener, None] = {}

    def view(self, entries: tuple[Entry, ...]) -> None:
        """Take a new view of all engines. Those that are not ready for requests are not there."""
        now = {entry.name: entry for entry in entries if entry.state == "ready"}
        for name, entry in list(self._engines.items()):
            if name not in now or not _is_same(now[name], entry):
                del self._engines[name]
                if self._dead.pop(name, None) is None:
                    self._tell("left", entry)
        for name, entry in now.items():
            before = self._engines.get(name)
            self._engines[name] = entry
            if before is None:
                self._tell("joined", entry)
            elif before.roles != entry.roles:
                self._tell("roles", entry)
            if before is not None and before.load != entry.load:
                self._tell("load", entry)

    def died(self, engine: str) -> None:
        """Note that an engine is known to be dead. A repeat does nothing."""
        entry = self._engines.get(engine)
        if entry is not None and engine not in self._dead:
            self._dead[engine] = entry
            self._tell("died", entry)

    def load_changed(self, engine: str) -> None:
        """Note that an engine has told of its load itself: it lives."""
        entry = self._engines.get(engine)
        if entry is not None:
            if self._dead.pop(engine, None) is not None:
                self._tell("joined", entry)
            self._tell("load", entry)

    async def listen(self) -> AsyncGenerator[Happening, None]:
        """Give what happens from now on, for ever; the engines that are there have joined."""
        listener = _Listener()
        self._listeners[listener] = None
        try:
            for name, entry in self._engines.items():
                if name not in self._dead:
                    listener.put("joined", entry)
            while True:
                yield await listener.next()
        finally:
            del self._listeners[listener]

    def _tell(self, kind: EventKind, entry: Entry) -> None:
        for listener in self._listeners:
            listener.put(kind, entry)


class _Listener:
    def __init__(self) -> None:
        self._waiting: dict[tuple[EventKind, str], Happening] = {}
        self._has_some = asyncio.Event()

    def put(self, kind: EventKind, entry: Entry) -> None:
        self._waiting.pop((kind, entry.name), None)  # What is told anew is told in its new place.
        self._waiting[kind, entry.name] = Happening(kind, entry)
        self._has_some.set()

    async def next(self) -> Happening:
        while not self._waiting:
            self._has_some.clear()
            await self._has_some.wait()
        return self._waiting.pop(next(iter(self._waiting)))


def _is_same(one: Entry, other: Entry) -> bool:
    return (one.address, one.started) == (other.address, other.started)
