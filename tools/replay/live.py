"""Replaying against a running fleet: its router is asked again, or one of our own asks its engines."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from callboard.actors.actor import start_actor, stop_actor
from callboard.actors.protocol import Entry, ListEntries
from callboard.bus import Address, BusError, Node, Ref
from callboard.bus.taps import Row, TapRecord, finished
from callboard.bus.tasks import Tasks
from callboard.router.actor import RouterActor
from callboard.tools.bus_client import visitor, why_not
from callboard.tools.errors import CliError
from callboard.tools.running import RunningFleet
from callboard.tools.trace.attach import Follower
from callboard.tools.trace.event import Event, event_of
from callboard.tools.trace.notice import Notice

from .asking import Asked, Asking, Show
from .outcomes import Outcome, Outcomes
from .recorded import HashedTokens, RecordedRequest

SETTLE_S = 1.0
"""How long the fleet's last records are waited for."""
VIEW_S = 5.0


@dataclass(frozen=True, slots=True)
class Router:
    """A script to be run here in place of the fleet's own."""

    script: str
    options: dict[str, object]


@dataclass(frozen=True, slots=True)
class Live:
    """What came of a replay: outcomes by the ids that the requests were recorded under."""

    outcomes: dict[str, Outcome]
    asked: Asked
    script: str
    notes: tuple[str, ...]


class GuestRouter(RouterActor):
    """A router that is in no directory: it serves this process alone, and the fleet's own goes on as it is."""

    async def start(self) -> None:
        await self.open()

    def hear_routers(self) -> None:
        """Take over nothing: it runs what it was given."""

    async def _catch_up_at_start(self) -> None:
        pass


async def replay_live(
    fleet: RunningFleet,
    requests: Sequence[RecordedRequest],
    *,
    router: Router | None,
    speed: float,
    show: Show,
) -> Live:
    """Ask the requests of a running fleet. Raises CliError where it cannot serve them."""
    async with visitor(fleet) as node:
        try:
            entries = (await node.ref(fleet.state.directory).ask(ListEntries(), timeout=3.0)).entries
        except BusError as error:
            raise why_not(fleet, error) from None
        wanted, notes = _served(fleet.state.name, entries, requests)
        session = _Session(fleet, node, entries, wanted, notes)
        return await session.run(router, speed=speed, show=show)


def _served(
    fleet: str, entries: Sequence[Entry], requests: Sequence[RecordedRequest]
) -> tuple[list[RecordedRequest], list[str]]:
    """Return the requests for models that the fleet serves. Raises CliError where there are none."""
    models = {entry.model: None for entry in entries if entry.kind == "engine"}
    if not models:
        raise CliError(f'fleet "{fleet}" has no engines')
    wanted = [request for request in requests if request.model in models]
    others = {request.model: None for request in requests if request.model not in models}
    names = ", ".join(f'"{model}"' for model in others)
    if not wanted:
        raise CliError(f'fleet "{fleet}" serves {", ".join(models)}, and the recording asks for {names}')
    left = len(requests) - len(wanted)
    return wanted, [f"{left} requests for {names} are left out: the fleet serves no such model"] if left else []


class _Session:
    """One replay against one fleet."""

    def __init__(
        self,
        fleet: RunningFleet,
        node: Node,
        entries: Sequence[Entry],
        requests: list[RecordedRequest],
        notes: list[str],
    ) -> None:
        self._fleet = fleet
        self._node = node
        self._routers = {entry.name: entry for entry in entries if entry.kind == "router"}
        self._requests = requests
        self._notes = notes
        self._outcomes = Outcomes()
        self._mark = f"replay-{node.new_id()[:6]}-"
        self._error: BaseException | None = None

    async def run(self, router: Router | None, *, speed: float, show: Show) -> Live:
        """Follow the fleet, ask, and wait for what is told of it."""
        node = self._node
        node.follow(self._take_own)
        tasks = Tasks(self._broke)
        try:
            async with Follower(node, self._fleet, with_past=False) as follower:
                following = asyncio.Event()
                tasks.spawn(self._read(follower, following))
                await following.wait()
                guest = None if router is None else await self._guest(router)
                try:
                    if guest is None and not self._routers:
                        raise CliError(f'fleet "{self._fleet.state.name}" has no router: give one with --router')
                    script = self._script(guest)
                    salt = node.rng.getrandbits(64)  # The caches still hold what an earlier replay asked.
                    asking = Asking(node, self._ref_of(guest), self._id_of, speed=speed, show=show, salt=salt)
                    asked = await asking.run(self._requests)
                finally:
                    if guest is not None:
                        await stop_actor(guest)
                await node.clock.sleep(SETTLE_S)
                if any(not isinstance(request.prompt, HashedTokens) for request in self._requests):
                    self._notes.append("prompts were recorded in full: the fleet's caches may have held them already")
                if follower.num_lost:
                    self._notes.append(f"{follower.num_lost} records were lost while it was replayed")
        except BusError as error:
            raise why_not(self._fleet, error) from None
        finally:
            await tasks.cancel()
            node.unfollow(self._take_own)
        if self._error is not None:
            raise self._error
        return Live(self._finish(), asked, script, tuple(self._notes))

    async def _guest(self, router: Router) -> GuestRouter:
        node = self._node
        config = GuestRouter.Config(
            name="replay", script=router.script, options=router.options, max_queue=len(self._requests) + 1
        )
        guest = GuestRouter(config)
        await start_actor(node, config.name, guest, directory=node.ref(self._fleet.state.directory))
        try:
            async with asyncio.timeout(VIEW_S):
                await guest.view.wait_for(lambda view: any(entry.kind == "engine" for entry in view.entries))
        except TimeoutError:
            pass  # The script waits for engines as it always does.
        return guest

    def _script(self, guest: GuestRouter | None) -> str:
        if guest is not None:
            return f"{guest.script.name} {guest.script.version}, run here"
        said = (f"{e.detail.get('script', '?')} {e.detail.get('version', '')}" for e in self._routers.values())
        return ", ".join(dict.fromkeys(said)) + ", of the fleet"

    def _ref_of(self, guest: GuestRouter | None) -> Callable[[str], Ref]:
        node = self._node
        if guest is not None:
            return lambda name: guest.ref
        first = next(iter(self._routers.values()))

        def router(name: str) -> Ref:
            address: Address = self._routers.get(name, first).address
            return node.ref(address)

        return router

    def _id_of(self, request: RecordedRequest) -> str:
        return (self._mark + request.id)[:256]

    # ---- what is told --------------------------------------------------------------------------------------------

    async def _read(self, follower: Follower, following: asyncio.Event) -> None:
        try:
            async for batch in follower:
                for item in batch:
                    if isinstance(item, Notice):
                        if item.kind == "following":
                            following.set()
                        elif item.kind in ("died", "cut", "without", "ended"):
                            self._notes.append(item.text)
                    else:
                        self._take(item)
        finally:
            following.set()

    def _take_own(self, row: Row, message: object) -> None:
        """Take what happens at this node, which has no tracer."""
        self._take(event_of(TapRecord(*finished(row)), self._node.name))

    def _take(self, event: Event) -> None:
        if event.record.request_id.startswith(self._mark):
            self._outcomes.add(event)

    def _broke(self, error: BaseException) -> None:
        self._error = self._error or error

    def _finish(self) -> dict[str, Outcome]:
        names = {self._id_of(request): request.id for request in self._requests}
        found = {}
        for name, outcome in self._outcomes.finish().items():
            if name in names:
                outcome.id = names[name]
                found[outcome.id] = outcome
        return found
