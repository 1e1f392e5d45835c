"""The directory: who is in the fleet, as soft state under leases.

Actors register themselves and renew (callboard.actors.registration); whoever lets a lease lapse drops out of new
look-ups. That is no statement about death: refs that others hold keep working. A directory that restarts starts
empty and is filled again by the renewals.
"""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

import msgspec

from .actor import Actor
from .protocol import Done, Entry, ListEntries, Register, Unregister, View, Watch
from .registration import DirectoryView, Registration

__all__ = ["Directory", "DirectoryView", "Registration"]


@dataclass(frozen=True, slots=True)
class Lease:
    """An entry and the clock time until which it stands."""

    entry: Entry
    until: float


class Directory(Actor):
    """Keeps the entries of one fleet and tells watchers of every change."""

    class Config(msgspec.Struct, frozen=True):
        """``coalesce_s`` is the least time between two views sent to one watcher."""

        coalesce_s: float = 0.02

    def __init__(self, config: Config | None = None) -> None:
        self.config = config or self.Config()
        self._leases: dict[str, Lease] = {}
        self._view = View(0, ())
        self._changed = asyncio.Event()
        self._sooner = asyncio.Event()
        self._nearest: float | None = None

    async def start(self) -> None:
        self.spawn(self._expire())

    def on_register(self, message: Register) -> Done:
        entry, until = message.entry, self.node.clock.now() + message.lease_s
        before = self._leases.get(entry.name)
        self._leases[entry.name] = Lease(entry, until)
        if self._nearest is None or until < self._nearest:
            self._sooner.set()
        if before is None or before.entry != entry:
            self._publish()
        return Done()

    def on_unregister(self, message: Unregister) -> Done:
        if self._leases.pop(message.name, None) is not None:
            self._publish()
        return Done()

    def on_list_entries(self, message: ListEntries) -> View:
        return self._view

    async def on_watch(self, message: Watch) -> AsyncIterator[View]:
        # Watchers share one event, so that one whose link broke leaves nothing behind.
        while True:
            sent, changed = self._view, self._changed
            yield sent
            await self.node.clock.sleep(self.config.coalesce_s)
            if self._view is sent:
                await changed.wait()

    def _publish(self) -> None:
        """Make the next view, and wake the watchers."""
        entries = tuple(self._leases[name].entry for name in sorted(self._leases))
        self._view = View(self._view.version + 1, entries)
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def _expire(self) -> None:
        """Take out every entry whose lease has lapsed, for ever."""
        clock = self.node.clock
        while True:
            self._sooner.clear()
            self._nearest = min((lease.until for lease in self._leases.values()), default=None)
            wait = None if self._nearest is None else max(0.0, self._nearest - clock.now())
            try:
                async with asyncio.timeout(wait):
                    await self._sooner.wait()
                continue
            except TimeoutError:
                pass
            now = clock.now()
            if self._nearest is not None and now - self._nearest > 1.0:
                self._forgive(now - self._nearest)
                continue
            lapsed = [name for name, lease in self._leases.items() if lease.until <= now]
            for name in lapsed:
                del self._leases[name]
            if lapsed:
                self._publish()

    def _forgive(self, seconds: float) -> None:
        """Add ``seconds`` to all leases: this process was stopped that long, and no renewal could be heard."""
        self._leases = {name: Lease(lease.entry, lease.until + seconds) for name, lease in self._leases.items()}
