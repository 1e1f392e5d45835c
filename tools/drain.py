"""``callboard drain``: empty an engine while the fleet serves. It is offered to nobody, and what runs there goes on
elsewhere, moved by the routers with its KV; where nobody can take it, it finishes by itself.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from callboard.actors.move_protocol import GetLeaving, GetOccupied, Leaving, Moved, Occupied, SetDraining
from callboard.actors.protocol import Entry, ListEntries
from callboard.bus import ActorDied, AskTimeout, BusError, LinkLost, Node, UnknownActor

from .bus_client import TIMEOUT_S, ask, visitor, why_not
from .errors import CliError, StartFailed
from .named import engine_named, keep
from .running import RunningFleet, open_fleet
from .units import format_size

POLL_S = 0.1
OUT_OF_REACH_S = 10.0
"""How long an engine that does not answer is asked, before it is given up."""
REPORTED_S = 0.4
"""By then an engine's counters have reached the directory."""
AFTERWARDS = '"callboard drain {name}" shows how far it is, "callboard drain {name} --undo" has it serve again'
ENDED_WELL = ("stop", "length")

Show = Callable[[str], None]


@dataclass
class Outcome:
    """An engine that is empty, and what became of its requests."""

    engine: str
    seconds: float = 0.0
    num_moved: int = 0
    num_bytes: int = 0
    num_finished: int = 0
    """By themselves."""
    num_failed: int = 0
    """With an error, on this engine, since the command began."""
    moves: list[Moved] = field(default_factory=list)
    was_empty: bool = False
    """It had been drained before the command began."""

    def pauses(self) -> list[float]:
        """Return each stream's pause in time between its tokens, from the least on."""
        return sorted(moved.pause_s / moved.itl_s for moved in self.moves if moved.itl_s)

    def pauses_beyond_copy(self) -> list[float]:
        """Return the same without the time until the last of the KV had been sent."""
        return sorted((moved.pause_s - moved.copy_s) / moved.itl_s for moved in self.moves if moved.itl_s)

    def as_builtins(self) -> dict[str, Any]:
        """Return it for JSON."""
        found = {
            **dataclasses.asdict(dataclasses.replace(self, moves=[])),
            "moves": [msgspec.structs.asdict(moved) for moved in self.moves],
            "pauses_itl": self.pauses(),
        }
        return {**found, "pauses_beyond_copy_itl": self.pauses_beyond_copy()}

    def sentence(self) -> str:
        """Return it for people."""
        if self.was_empty:
            return f"{self.engine} is empty: it was drained before."
        parts = [f"{self.engine} is empty after {self.seconds:.1f} s"]
        if self.num_moved:
            what = "1 request was" if self.num_moved == 1 else f"{self.num_moved} requests were"
            parts.append(f"{what} handed over with {format_size(self.num_bytes)} of KV")
        if self.num_finished:
            parts.append(f"{self.num_finished} finished there")
        if not self.num_moved and not self.num_finished:
            parts.append("nothing ran there")
        failed = "none was" if not self.num_failed else "1 was" if self.num_failed == 1 else f"{self.num_failed} were"
        return f"{parts[0]}: {', '.join(parts[1:])}; {failed} ended by it.{self._pauses()}"

    def _pauses(self) -> str:
        if not (pauses := self.pauses()):
            return ""
        longest = max(moved.pause_s for moved in self.moves)
        return (
            f"\nPauses: {statistics.median(pauses):.1f} times the time between tokens at the median, "
            f"{pauses[-1]:.1f} at most; the longest took {1e3 * longest:.0f} ms."
        )


def run(arguments: argparse.Namespace) -> int:
    """Drain an engine, or have it serve again. Raises CliError."""
    fleet = open_fleet(arguments.fleet, keys=arguments.keys)
    name = arguments.engine
    if arguments.undo:
        return _undo(fleet, name)
    if arguments.no_wait:
        occupied = _set(fleet, name, is_draining=True)
        print(
            f"{name} drains: {_words(occupied, [])}. {AFTERWARDS.format(name=name)[0].upper()}"
            f"{AFTERWARDS.format(name=name)[1:]}."
        )
        return 0
    engine_named(fleet, name)
    note = keep(fleet, name, is_draining=True)
    if note:
        print(f"note: {note}", file=sys.stderr)
    try:
        outcome = asyncio.run(drain(fleet, name, shown()))
    except KeyboardInterrupt:
        print(f"\n{name} goes on draining: {AFTERWARDS.format(name=name)}.", flush=True)
        return 130
    if arguments.json:
        print(msgspec.json.encode(outcome.as_builtins()).decode(), flush=True)
    else:
        print(outcome.sentence(), flush=True)
        print(
            f'It takes no new requests: "callboard restart {name}" starts it anew, '
            f'"callboard drain {name} --undo" has it serve again.',
            flush=True,
        )
    return 0


def _undo(fleet: RunningFleet, name: str) -> int:
    was = engine_named(fleet, name).state
    _set(fleet, name, is_draining=False)
    print(f"{name} serves again." if was == "draining" else f"{name} was not draining, and serves.", flush=True)
    return 0


def _set(fleet: RunningFleet, name: str, *, is_draining: bool) -> Occupied:
    engine = engine_named(fleet, name)
    note = keep(fleet, name, is_draining=is_draining)
    if note:
        print(f"note: {note}", file=sys.stderr)
    try:
        return ask(fleet, engine.address, SetDraining(is_draining))
    except BusError as error:
        raise CliError(f"{name} did not take it ({error}): see callboard ps") from None


def shown() -> Show:
    """Return what shows how far it is: on a terminal one line that changes, else a line for each change."""
    last = ""

    def show(text: str) -> None:
        nonlocal last
        if text == last:
            return
        last = text
        if sys.stderr.isatty():
            print(f"\r\x1b[2K{text}", end="", file=sys.stderr, flush=True)
        elif text:
            print(text, file=sys.stderr, flush=True)

    return show


async def drain(fleet: RunningFleet, name: str, show: Show) -> Outcome:
    """Drain an engine and return when it is empty. Raises CliError. Cancelled, it goes on draining."""
    async with visitor(fleet) as node:
        try:
            return await _Drain(fleet, node, name, show).run()
        finally:
            show("")


class _Drain:
    """One engine on its way to be empty, as the command sees it."""

    def __init__(self, fleet: RunningFleet, node: Node, name: str, show: Show) -> None:
        self._fleet = fleet
        self._node = node
        self._name = name
        self._show = show
        self._begin_s = node.clock.now()
        self._finished: dict[str, int] | None = None
        self._heard_s = node.clock.now()

    async def run(self) -> Outcome:
        is_first, was_draining = True, False
        while True:
            entries = await self._entries()
            engine = self._engine(entries)
            if self._finished is None and engine is not None:
                self._finished = engine.counters.num_finished
                was_draining = engine.state == "draining"
            occupied = None if engine is None else await self._ask_engine(engine)
            if occupied is not None:
                routers = await self._ask_routers([entry for entry in entries if entry.kind == "router"])
                told = [each for each in routers if each is not None]
                self._show(f"{self._name} drains: {_words(occupied, told)}{_why_it_stays(occupied, told)}")
                is_known = all(each is not None and each.is_known for each in routers)
                num_requests = sum(each.num_requests for each in told)
                if is_known and not (num_requests or occupied.num_sequences or occupied.num_sends):
                    return await self._outcome(told, was_empty=was_draining and is_first)
                is_first = False
            await self._node.clock.sleep(POLL_S)

    def _engine(self, entries: tuple[Entry, ...]) -> Entry | None:
        """Return the engine's entry; None while one that was there is starting again."""
        if self._finished is None:
            return engine_named(self._fleet, self._name, entries)
        engine = next((entry for entry in entries if entry.name == self._name), None)
        if engine is None and self._node.clock.now() - self._heard_s > OUT_OF_REACH_S:
            raise StartFailed(f"{self._name} is gone: see callboard ps")
        return engine

    async def _entries(self) -> tuple[Entry, ...]:
        try:
            return (await self._node.ref(self._fleet.state.directory).ask(ListEntries(), timeout=TIMEOUT_S)).entries
        except BusError as error:
            raise why_not(self._fleet, error) from None

    async def _ask_engine(self, engine: Entry) -> Occupied | None:
        """Ask it to drain, each time anew: one that was started again meanwhile might not know of it."""
        clock = self._node.clock
        message = GetOccupied() if engine.state == "draining" else SetDraining(is_draining=True)
        try:
            occupied: Occupied = await self._node.ref(engine.address).ask(message, timeout=TIMEOUT_S)
        except (ActorDied, AskTimeout, LinkLost, UnknownActor) as error:
            if clock.now() - self._heard_s > OUT_OF_REACH_S:
                raise StartFailed(f"{self._name} is gone ({error}): see callboard ps") from None
            return None
        except BusError as error:
            raise CliError(f"{self._name} did not take it ({error})") from None
        self._heard_s = clock.now()
        return occupied

    async def _ask_routers(self, routers: list[Entry]) -> list[Leaving | None]:
        async def one(router: Entry) -> Leaving | None:
            with contextlib.suppress(BusError):  # One that is gone has no requests, or will be asked again.
                return await self._node.ref(router.address).ask(GetLeaving(self._name), timeout=TIMEOUT_S)
            return None

        return list(await asyncio.gather(*(one(router) for router in routers)))

    async def _outcome(self, told: list[Leaving], *, was_empty: bool) -> Outcome:
        clock = self._node.clock
        seconds = clock.now() - self._begin_s
        await clock.sleep(REPORTED_S)
        counters = engine_named(self._fleet, self._name, await self._entries()).counters.num_finished
        before = self._finished or {}
        since = {reason: number - before.get(reason, 0) for reason, number in counters.items()}
        return Outcome(
            self._name,
            seconds,
            sum(each.num_moved for each in told),
            sum(each.num_bytes for each in told),
            sum(max(0, since.get(reason, 0)) for reason in ENDED_WELL),
            max(0, since.get("error", 0)),
            [moved for each in told for moved in each.moves],
            was_empty,
        )


def _words(occupied: Occupied, told: list[Leaving]) -> str:
    """Return how far it is."""
    num_left = max(occupied.num_sequences, sum(each.num_requests for each in told))
    parts = ["1 request left" if num_left == 1 else f"{num_left} requests left"]
    if occupied.num_sends:
        parts.append(f"KV for {occupied.num_sends} others to be computed")
    num_moved, num_bytes = sum(each.num_moved for each in told), sum(each.num_bytes for each in told)
    if num_moved:
        parts.append(f"{num_moved} handed over with {format_size(num_bytes)} of KV")
    return ", ".join(parts)


def _why_it_stays(occupied: Occupied, told: list[Leaving]) -> str:
    """Return why requests are not handed over, if they are not."""
    if not told or not any(each.num_requests for each in told):
        return ""
    if not any(each.num_targets for each in told):
        return " (there is nobody to hand them over to: they finish by themselves)"
    reasons = [each.why_not for each in told if each.why_not]
    return f" (not yet: {reasons[-1]})" if reasons else ""
