"""The two standing ties of an actor to the directory: keeping itself known, and knowing the others.

Both survive the directory's absence: a registration tries again until it is back, and a view stays usable, marked
stale, while nothing newer can be had.
"""

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec

from callboard.bus import FOREVER, BusError, Items

from .actor import Actor
from .protocol import Entry, Register, Unregister, View, Watch

FIRST_RETRY_S = 0.05
LAST_RETRY_S = 1.0
COALESCE_S = 0.02
"""The least time between two renewals: an engine may report its load at every step."""
UNREGISTER_S = 0.5
STALE_S = 2.5
"""A directory that is heard of every second and then not for so long is out of reach, whatever its link says."""


class Registration:
    """Keeps an actor's entry in the directory, by a task that the actor owns. Make it in the actor's ``start``.

    Renews every third of ``lease_s`` and at once after ``update``. When the task is cancelled (the actor stops) the
    entry is taken out. Without a directory it does nothing.
    """

    def __init__(self, actor: Actor, entry: Entry, lease_s: float = 3.0) -> None:
        self.entry = msgspec.structs.replace(entry, started=round(actor.node.clock.wall(), 3), host=actor.host)
        self.lease_s = lease_s
        self.is_registered = False
        self._actor = actor
        self._updated = asyncio.Event()
        if actor.directory is not None:
            actor.spawn(self._run())

    def update(self, **changes: Any) -> None:
        """Change fields of the entry (``state=``, ``load=``, ...) and tell the directory soon."""
        entry = msgspec.structs.replace(self.entry, **changes)
        if entry != self.entry:
            self.entry = entry
            self._updated.set()

    async def _run(self) -> None:
        retry_s = FIRST_RETRY_S
        try:
            while True:
                self._updated.clear()
                self.is_registered = await self._register()
                if self.is_registered:
                    retry_s = FIRST_RETRY_S
                    await self._actor.node.clock.sleep(COALESCE_S)
                    await self._wait_for_update(self.lease_s / 3)
                else:
                    await self._actor.node.clock.sleep(retry_s * self._actor.node.rng.uniform(0.75, 1.25))
                    retry_s = min(2 * retry_s, LAST_RETRY_S)
        finally:
            await self._unregister()

    async def _register(self) -> bool:
        assert self._actor.directory is not None
        self.entry = msgspec.structs.replace(self.entry, num_strangers=self._actor.node.num_strangers)
        try:
            await self._actor.directory.ask(Register(self.entry, self.lease_s), timeout=self.lease_s / 3)
        except BusError:
            return False
        return True

    async def _unregister(self) -> None:
        assert self._actor.directory is not None
        try:
            await self._actor.directory.ask(Unregister(self.entry.name), timeout=UNREGISTER_S)
        except BusError:
            pass  # The lease lapses by itself.

    async def _wait_for_update(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._updated.wait()
        except TimeoutError:
            pass


class DirectoryView:
    """The directory's last view, kept fresh by a task that the actor owns. Make it in the actor's ``start``.

    ``is_stale`` says that the directory is out of reach. When it returns, entries that it does not know again yet
    are carried for ``carry_s``: one that restarted, or was cut off for longer than the leases, is filled by renewals,
    not at once.
    """

    def __init__(self, actor: Actor, on_change: Callable[[View], None] | None = None, carry_s: float = 5.0) -> None:
        self.is_stale = True
        self.has_view = False
        self._view = View(0, ())
        self._actor = actor
        self._on_change = on_change
        self._carry_s = carry_s
        self._carried: dict[str, Entry] = {}
        self._carry_until = 0.0
        self._changed = asyncio.Event()
        if actor.directory is not None:
            actor.spawn(self._run())

    @property
    def view(self) -> View:
        """The last view, and what is carried into it."""
        if self._carried and self._actor.node.clock.now() >= self._carry_until:
            self._carried = {}
        if not self._carried:
            return self._view
        entries = {**self._carried, **{entry.name: entry for entry in self._view.entries}}
        return View(self._view.version, tuple(entries[name] for name in sorted(entries)))

    def entries(self, kind: str | None = None) -> tuple[Entry, ...]:
        """Return the entries, ordered by name; of one kind if given."""
        return tuple(entry for entry in self.view.entries if kind is None or entry.kind == kind)

    def get(self, name: str) -> Entry | None:
        """Return the entry of that name, None if there is none."""
        return next((entry for entry in self.view.entries if entry.name == name), None)

    async def wait_for(self, predicate: Callable[[View], bool]) -> View:
        """Return the first view, from the present one on, for which ``predicate`` holds. Limit it by a timeout."""
        while not (self.has_view and predicate(self.view)):
            await self._changed.wait()
        return self.view

    async def _run(self) -> None:
        assert self._actor.directory is not None
        retry_s = FIRST_RETRY_S
        while True:
            try:
                async with self._actor.directory.stream(Watch(), timeout=FOREVER) as views:
                    while (view := await self._next(views)) is not None:
                        retry_s = FIRST_RETRY_S
                        self._take(view)
            except BusError:
                pass
            self.is_stale = True
            await self._actor.node.clock.sleep(retry_s * self._actor.node.rng.uniform(0.75, 1.25))
            retry_s = min(2 * retry_s, LAST_RETRY_S)

    async def _next(self, views: Items[View]) -> View | None:
        """Return the next view, None at the end; meanwhile see whether this one has become stale."""
        while True:
            try:
                async with asyncio.timeout(STALE_S):
                    return await anext(views, None)
            except BusError:
                raise
            except TimeoutError:
                self.is_stale = True

    def _take(self, view: View) -> None:
        if not self.is_stale and view == self._view:
            return
        now = self._actor.node.clock.now()
        if self.is_stale and self.has_view:
            self._carry_until = now + self._carry_s
        if now < self._carry_until:  # The first view may be from before the leases lapsed.
            known = {entry.name for entry in view.entries}
            self._carried = {entry.name: entry for entry in self.view.entries if entry.name not in known}
        self._view, self.is_stale, self.has_view = view, False, True
        if self._on_change is not None:
            self._on_change(self.view)
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
