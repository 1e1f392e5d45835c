"""How changes of its script reach a router: prepared and then activated by whoever swaps, or taken from another router.

While a change is prepared no other one comes in, so of two people who set at once one wins. It is forgotten after a
while: whoever prepared it may have died. The truth about what runs is the newest change that any router has activated:
routers say in the directory what they run, and one that hears of a newer change meant for it takes it over, also
before it serves anybody after a restart. So a change that one router has activated reaches all of them.
"""

import asyncio
import logging
from dataclasses import dataclass

import msgspec

from callboard.actors.actor import Actor
from callboard.actors.protocol import Done, Entry
from callboard.actors.registration import DirectoryView
from callboard.actors.route_protocol import (
    ActivateRoute,
    Current,
    DropRoute,
    GetChange,
    GetRoutes,
    Prepared,
    PrepareRoute,
    RouteChange,
)
from callboard.actors.route_protocol import Routes as RoutesReport
from callboard.bus import BusError
from callboard.bus.errors import words_of
from callboard.bus.limited import LimitedWork, Unfinished
from callboard.router.errors import RouteRefused, ScriptError
from callboard.router.guest import guest_of
from callboard.router.script import LOAD_S, Script, unfinished
from callboard.router.shared import Shared

from .routes import Routes

log = logging.getLogger("callboard.router")

PREPARED_S = 10.0
"""How long a prepared change keeps others out."""
ASK_S = 2.0
RETRY_S = 0.2
MOST_IGNORED = 1000
MOST_LEFT = 4
"""Scripts whose loading did not end, each of which keeps a thread."""
START_S = 1.0
"""How long a router that starts waits for what others run."""


@dataclass(slots=True)
class _Pending:
    """A change that is prepared, once ``loading`` is done."""

    change: RouteChange
    until: float
    loading: "asyncio.Task[dict[int, Script] | ScriptError]"


class RouteChanges(Actor):
    """The part of the router actor that takes changes. ``routes`` and ``view`` are the router's."""

    routes: Routes
    view: DirectoryView
    is_inner: bool = False
    """It is for scripts of other routers, and is changed only by its name."""
    _pending: _Pending | None = None
    _problem: str = ""
    _ignored: dict[str, None]
    """Ids of changes of other routers that are not for this one, or cannot be loaded here."""
    _left: list[LimitedWork[dict[int, Script]]]
    """What was to load scripts, and has not ended."""
    _catching_up: "asyncio.Task[None] | None" = None

    async def start_routes(self, shared: Shared) -> None:
        """Begin to serve, with what other routers run if that is newer."""
        self._ignored, self._left = {}, []
        self.routes.is_locked = self.is_preparing
        await self._catch_up_at_start()
        self.routes.start(shared)

    # ---- asked by who swaps --------------------------------------------------------------------------------------

    async def on_prepare_route(self, message: PrepareRoute) -> Prepared:
        change, current = message.change, self.routes.change
        self._refuse_strangers()
        if change.id == current.id:
            return Prepared(PREPARED_S)
        pending = self._prepared()
        if pending is not None and pending.change.id != change.id:
            what = f"{pending.change.by or 'somebody'} is changing the script to {pending.change.active.name}"
            raise RouteRefused(reason=f"{what} at this moment: try again")
        if current.id != message.base:
            what = f"{current.by or 'somebody'} has changed the script to {current.active.name} meanwhile"
            raise RouteRefused(reason=f'{what}: look at "callboard route show", and try again')
        if change.age <= current.age:
            raise RouteRefused(reason=f"change {change.epoch} is older than what runs")
        if pending is None:
            pending = self._pending = _Pending(change, 0.0, self.spawn(self._load(change)))
        await asyncio.wait([pending.loading])
        if pending.loading.cancelled():
            raise RouteRefused(reason="it was dropped while it was loaded")
        outcome = pending.loading.result()
        if isinstance(outcome, ScriptError):
            self._drop(change.id)
            raise outcome
        pending.until = self.node.clock.now() + PREPARED_S
        return Prepared(PREPARED_S)

    def on_activate_route(self, message: ActivateRoute) -> Done:
        if message.id == self.routes.change.id:
            return Done()
        pending = self._prepared()
        loaded = None
        if pending is not None and pending.change.id == message.id and pending.loading.done():
            loaded = pending.loading.result()
        if pending is None or not isinstance(loaded, dict):
            raise RouteRefused(reason="this change is not prepared here, or not any more")
        self._pending, self._problem = None, ""
        self.routes.apply(pending.change, loaded)
        return Done()

    def on_drop_route(self, message: DropRoute) -> Done:
        self._drop(message.id)
        return Done()

    def on_get_routes(self, message: GetRoutes) -> RoutesReport:
        report = self.routes.report(with_sources=message.with_sources)
        pending = self._prepared()
        words = "" if pending is None else f"{pending.change.active.name}, by {pending.change.by}"
        return msgspec.structs.replace(report, prepared=words, problem=self._problem)

    def on_get_change(self, message: GetChange) -> Current:
        return Current(self.routes.change)

    def is_preparing(self) -> bool:
        """Return whether a change is prepared, or is being prepared."""
        return self._prepared() is not None

    def _prepared(self) -> _Pending | None:
        if self._pending is not None and self._pending.loading.done() and self.node.clock.now() >= self._pending.until:
            self._pending = None
        return self._pending

    def _drop(self, change_id: str) -> None:
        pending = self._pending
        if pending is not None and pending.change.id == change_id:
            self._pending = None
            pending.loading.cancel()

    def _is_open_to_strangers(self) -> bool:
        # A script runs as the fleet's user: who may set one must not be anybody who can reach a port. That holds for
        # who says that he is a router of the fleet, too.
        return self.node.endpoint.startswith("tcp:") and self.node.keys is None

    def _refuse_strangers(self) -> None:
        if self._is_open_to_strangers():
            what = "the bus of this fleet has no keys, and whoever can reach it could run code in it"
            raise RouteRefused(reason=f'{what}: run "callboard keys new keys", and write keys = "keys" under [listen]')

    async def _load(self, change: RouteChange) -> dict[int, Script] | ScriptError:
        # In a thread: requests go on while modules are imported.
        path: str = (change.trial or change.active).path
        line: int | None = None
        self._left = [work for work in self._left if work.is_going_on]
        if len(self._left) >= MOST_LEFT:
            reason = f"the code of {MOST_LEFT} earlier scripts still has not ended that was to load them"
            return ScriptError(file=path, line=line, reason=reason, remedy="Restart the router")
        work = self.node.limited(self.routes.load, change)
        try:
            return await work.result(LOAD_S, guest_of)
        except ScriptError as error:
            return error
        except asyncio.CancelledError:
            self._left.append(work)
            raise
        except Unfinished as error:
            path, line = error.file or path, error.line
            if not work.is_going_on:
                return unfinished(path, line, LOAD_S)
            self._left.append(work)
            reason = f"its code outside of functions did not end within {LOAD_S:.0f} s, and still goes on in a thread"
            remedy = "Only definitions and imports belong there"
            log.error("%s:%s: %s", path, line, reason)
        except Exception as error:  # A script's objects may do anything while they are looked at.
            reason = f"it cannot be loaded: {words_of(error)}"
            remedy = "Only definitions and imports belong outside of route"
        return ScriptError(file=path, line=line, reason=reason, remedy=remedy)

    # ---- heard from other routers --------------------------------------------------------------------------------

    def route_detail(self) -> dict[str, str]:
        """Return what the directory is told of what runs."""
        script, change = self.routes.active, self.routes.change
        return {
            "script": script.name,
            "version": script.version,
            "path": script.path,
            "epoch": str(change.epoch),
            "change": change.id,
            **({"inner": "yes"} if self.is_inner else {}),
        }

    def hear_routers(self) -> None:
        """Look at the view for routers that run something newer, and take it over."""
        newer = self._find_newer()
        if newer and (self._catching_up is None or self._catching_up.done()):
            self._catching_up = self.spawn(self._catch_up())

    async def _catch_up_at_start(self) -> None:
        """Take over what other routers run, before anybody is served; in vain if nobody can be asked in time."""
        if self.directory is None or self._is_open_to_strangers():
            return
        try:
            async with asyncio.timeout(START_S):
                await self.view.wait_for(lambda _: True)
                async with asyncio.TaskGroup() as group:  # Each of them: the directory hears of a change later.
                    for entry in self.view.entries("router"):
                        if entry.name != self.routes.router:
                            group.create_task(self._take_from(entry))
        except TimeoutError:
            log.warning("other routers do not say what they run: starting with %s", self.routes.active.name)

    def _find_newer(self) -> list[Entry]:
        if self._is_open_to_strangers():
            return []
        return [
            entry
            for entry in self.view.entries("router")
            if entry.name != self.routes.router
            and _age_of(entry) > self.routes.change.age
            and entry.detail.get("change") not in self._ignored
        ]

    async def _catch_up(self) -> None:
        while newer := self._find_newer():
            for entry in newer:
                await self._take_from(entry)
            await self.node.clock.sleep(RETRY_S)

    async def _take_from(self, entry: Entry) -> None:
        try:
            change = (await self.node.ref(entry.address).ask(GetChange(), timeout=ASK_S)).change
        except BusError:
            return  # It is gone, or will be asked again.
        is_for_all = not change.routers and not self.is_inner
        if not is_for_all and self.routes.router not in change.routers:
            self._ignore(change.id)
            return
        if change.age <= self.routes.change.age or self.is_preparing():
            return
        loaded = await self._load(change)
        if isinstance(loaded, ScriptError):
            self._ignore(change.id)
            self._problem = f"change {change.epoch} of router {entry.name} cannot be loaded here: {loaded}"
            log.error("%s", self._problem)
            return
        if change.age > self.routes.change.age and not self.is_preparing():
            self._problem = ""
            self.routes.apply(change, loaded)

    def _ignore(self, change_id: str) -> None:
        self._ignored[change_id] = None
        if len(self._ignored) > MOST_IGNORED:
            del self._ignored[next(iter(self._ignored))]


def _age_of(entry: Entry) -> tuple[int, str]:
    epoch = entry.detail.get("epoch", "")
    return (int(epoch) if epoch.isdecimal() else 0), entry.detail.get("change", "")
