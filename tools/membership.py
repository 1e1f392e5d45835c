"""What the launcher of a joined host asks of the fleet, and hears of it: a visit to its bus that lasts."""

from collections.abc import Callable, Mapping

from callboard.actors.model_config import ModelFacts, kv_shape
from callboard.actors.protocol import Entry, ListEntries, View, Watch
from callboard.bus import FOREVER, ActorDied, BusError, Node
from callboard.bus.transports.zmq import KEY_REFUSED

from .bus_client import TIMEOUT_S, why_not
from .errors import CliError, StartFailed
from .running import RunningFleet

LEAVE_S = 5.0
"""How long those are waited for who have our names and may just be leaving: leases take 3 s to lapse."""
ARRIVE_S = 20.0
FIRST_RETRY_S, LAST_RETRY_S = 0.1, 1.0
POLL_S = 0.1

Say = Callable[[str, bool], None]
"""Tell the user a sentence; the second argument says whether it is bad news."""


class Membership:
    """One host's membership. ``node`` is the launcher's own, which only dials."""

    def __init__(self, node: Node, fleet: RunningFleet, *, host: str, leave_s: float = LEAVE_S) -> None:
        self._node = node
        self._fleet = fleet
        self._host = host
        self._leave_s = leave_s
        self._directory = node.ref(fleet.state.directory)
        self._rivals: set[str] = set()

    async def entries(self) -> tuple[Entry, ...]:
        """Return who is in the fleet. Raises CliError with the reason if it cannot be asked."""
        try:
            return (await self._directory.ask(ListEntries(), timeout=TIMEOUT_S)).entries
        except BusError as error:
            raise why_not(self._fleet, error) from None

    async def require_free(self, names: Mapping[str, str]) -> None:
        """Wait until nobody in the fleet has one of ``names``, of actors by their kind. Raises CliError."""
        clock = self._node.clock
        until = clock.now() + self._leave_s
        while True:
            entries = await self.entries()
            taken = next((each for each in entries if each.name in names or each.address.node in names), None)
            if taken is None:
                return
            if clock.now() >= until:
                raise CliError(self._why_taken(taken, names))
            await clock.sleep(POLL_S)

    def _why_taken(self, taken: Entry, names: Mapping[str, str]) -> str:
        name = taken.name if taken.name in names else taken.address.node
        where = f"host {taken.host}" if taken.host else "the host that it was started on"
        if names[name] == "kv_manager" and taken.host == self._host:
            sentence = f'a host "{self._host}" has joined already ({name} is at {taken.address.endpoint})'
            return f"{sentence}: pass --host with another name"
        here = f'give the one here another name, or write host = "{self._host}" at what of the file is this host\'s'
        return f'the fleet has a "{name}" already, on {where}: {here}'

    async def require_same(self, facts: Mapping[str, ModelFacts]) -> None:
        """Make sure that the models, by name, are those of the fleet. Raises CliError."""
        entries = await self.entries()
        served = {each for entry in entries if (text := entry.detail.get("models")) for each in text.split(", ")}
        for name, own in facts.items():
            if served and name not in served:
                known = ", ".join(sorted(served))
                raise CliError(f'the fleet does not serve a model "{name}": it serves {known}')
            for entry in entries:
                theirs = entry.detail.get("kv")
                if entry.kind == "engine" and entry.model == name and theirs is not None and theirs != kv_shape(own):
                    raise CliError(
                        f'model "{name}" is another one here: its KV has {kv_shape(own)}, that of {entry.name} '
                        f"{theirs}, so that they cannot exchange it: join with the model that the fleet serves"
                    )

    async def wait_until_listed(self, endpoints: Mapping[str, str]) -> None:
        """Wait until the directory lists the actors of these names, each at its endpoint. Raises StartFailed."""
        clock = self._node.clock
        until = clock.now() + ARRIVE_S
        while True:
            listed = {entry.name: entry.address.endpoint for entry in await self.entries()}
            lacking = [name for name, endpoint in endpoints.items() if listed.get(name) != endpoint]
            if not lacking:
                return
            if clock.now() >= until:
                raise StartFailed(f"{', '.join(lacking)} did not enter the fleet's directory within {ARRIVE_S:.0f} s")
            await clock.sleep(POLL_S)

    async def watch(self, endpoints: Mapping[str, str], say: Say) -> None:
        """Tell of every loss and return of the fleet, for ever; its members find their own way back."""
        clock, retry_s, lost = self._node.clock, FIRST_RETRY_S, None
        while True:
            error: BusError | None = None
            try:
                async with self._directory.stream(Watch(), timeout=FOREVER) as views:
                    async for view in views:
                        if lost is not None:
                            say(
                                f"fleet {self._fleet.state.name} is reached again after {clock.now() - lost:.1f} s",
                                False,
                            )
                            lost, retry_s = None, FIRST_RETRY_S
                        self._look_for_rivals(view, endpoints, say)
            except BusError as broken:
                error = broken
            if lost is None:
                lost = clock.now()
                say(self._why_lost(error), True)
            await clock.sleep(retry_s)
            retry_s = min(2 * retry_s, LAST_RETRY_S)

    def _why_lost(self, error: BusError | None) -> str:
        state = self._fleet.state
        name, at = state.name, state.directory.endpoint
        if isinstance(error, ActorDied):
            return f"fleet {name} was stopped, or its control node has died: this host waits for it at {at}"
        if error is not None and KEY_REFUSED in str(error):
            return f"at {at} is a fleet with another key now: this host waits for {name}"
        why = "it does not answer" if error is None else str(error)
        return f"fleet {name} is out of reach ({why}): this host goes on, and is in it again when it is back"

    def _look_for_rivals(self, view: View, endpoints: Mapping[str, str], say: Say) -> None:
        for entry in view.entries:
            own = endpoints.get(entry.name)
            if own is not None and own != entry.address.endpoint and entry.name not in self._rivals:
                self._rivals.add(entry.name)
                say(f"there is another {entry.name}, at {entry.address.endpoint}: one of the two must leave", True)
