"""The directory: who is in the fleet, as soft state under leases.

Actors register themselves and renew (callboard.actors.registration); whoever lets a lease lapse drops out of new
look-ups. That is no statement about death: refs that others hold keep working. A directory that restarts starts
empty and is filled again by the renewals.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

import msgspec

from .actor import Actor
from .protocol import BadRequest, Done, Entry, ListEntries, Register, Unregister, View, Watch
from .registration import DirectoryView, Registration

__all__ = ["Directory", "DirectoryView", "Registration"]

LONGEST_LEASE_S = 3600.0
MOST_NAME = 256
"""Characters."""
MOST_ENTRY_BYTES = 64 * 1024
MOST_VIEW_BYTES = 8 * 1024 * 1024
"""The most that all entries together may take: a view is one message, and goes to every watcher."""


@dataclass(frozen=True, slots=True)
class Lease:
    """An entry, the clock time until which it stands, and its bytes in a view."""

    entry: Entry
    until: float
    num_bytes: int


class Directory(Actor):
    """Keeps the entries of one fleet and tells watchers of every change."""

    class Config(msgspec.Struct, frozen=True):
        """``coalesce_s`` is the least time between two views sent to one watcher, ``repeat_s`` the most."""

        coalesce_s: float = 0.02
        repeat_s: float = 1.0

    def __init__(self, config: Config | None = None) -> None:
        self.config = config or self.Config()
        self._leases: dict[str, Lease] = {}
        self._num_bytes = 0
        self._view = View(0, ())
        self._changed = asyncio.Event()
        self._sooner = asyncio.Event()
        self._nearest: float | None = None

    async def start(self) -> None:
        self.spawn(self._expire())

    def on_register(self, message: Register) -> Done:
        entry, lease_s = message.entry, message.lease_s
        if not 0.0 <= lease_s <= LONGEST_LEASE_S:  # Nor no number: no timer takes that.
            raise BadRequest(reason=f"a lease of {lease_s} s is not between 0 and {LONGEST_LEASE_S:.0f}")
        until = self.node.clock.now() + lease_s
        before = self._leases.get(entry.name)
        is_new = before is None or before.entry != entry
        num_before = 0 if before is None else before.num_bytes
        num_bytes = len(msgspec.msgpack.encode(entry)) if is_new else num_before
        if len(entry.name) > MOST_NAME or num_bytes > MOST_ENTRY_BYTES:
            raise BadRequest(reason=f"an entry of {num_bytes} bytes, or its name {entry.name[:100]!r}, is too long")
        total = self._num_bytes - num_before + num_bytes
        if total > MOST_VIEW_BYTES:
            raise BadRequest(reason=f"with {entry.name[:100]!r} the directory would hold {total} bytes")
        self._num_bytes = total
        self._leases[entry.name] = Lease(entry, until, num_bytes)
        if self._nearest is None or until < self._nearest:
            self._sooner.set()
        if is_new:
            self._publish()
        return Done()

    def on_unregister(self, message: Unregister) -> Done:
        lease = self._leases.pop(message.name, None)
        if lease is not None:
            self._num_bytes -= lease.num_bytes
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
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self.config.repeat_s):
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
                self._num_bytes -= self._leases.pop(name).num_bytes
            if lapsed:
                self._publish()

    def _forgive(self, seconds: float) -> None:
        """Add ``seconds`` to all leases: this process was stopped that long, and no renewal could be heard."""
        self._leases = {
            name: Lease(lease.entry, lease.until + seconds, lease.num_bytes) for name, lease in self._leases.items()
        }
