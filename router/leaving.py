"""Engines that drain: what this router reads from them goes on at others, as long as there are others.

An engine that drains is an Entry in that state and nothing more: scripts are not offered it, and each router moves what
it reads from it. Nothing is forced: what cannot be moved goes on where it is, and is tried again.
"""

import logging
from collections import deque

from callboard.actors.move_protocol import Leaving, Moved
from callboard.actors.protocol import Entry
from callboard.bus import BusError

from .generation import Generation
from .handover import move
from .shared import Shared

log = logging.getLogger("callboard.router")

AT_ONCE = 4
"""Sequences of one engine that are on their way at a time: each of them pauses, and they share the lane."""
LOOK_S = 0.05
FIRST_RETRY_S, LAST_RETRY_S = 0.5, 8.0
"""Until one that could not be moved is tried again: each try may make it stand still for a moment."""
MOST_TOLD = 64
"""Moves that are remembered of an engine."""
GENERATES = "decode"


class _Departure:
    """One engine that is left."""

    def __init__(self) -> None:
        self.under_way: dict[Generation, None] = {}
        self.tried: dict[Generation, tuple[int, float]] = {}
        """How often one was tried in vain, and when it is tried again."""
        self.moves: deque[Moved] = deque(maxlen=MOST_TOLD)
        self.num_moved = self.num_failed = self.num_bytes = 0
        self.why_not = ""
        self.is_watched = False


class Departures:
    """Serves one router; ``look`` is to be called with every new view."""

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self._departures: dict[str, _Departure] = {}

    def look(self) -> None:
        """Begin to leave the engines that drain, and forget those that are gone or ready again."""
        entries = {entry.name: entry for entry in self._shared.view.entries("engine")}
        for name, departure in list(self._departures.items()):
            if (name not in entries or entries[name].state == "ready") and not departure.is_watched:
                del self._departures[name]
        for entry in entries.values():
            if entry.state != "draining":
                continue
            departure = self._departures.setdefault(entry.name, _Departure())
            if not departure.is_watched:
                departure.is_watched = True
                self._shared.router.spawn(self._leave(entry.name, departure))

    def tell(self, name: str) -> Leaving:
        """Return how far it is with an engine."""
        departure, entry = self._departures.get(name, _Departure()), self._shared.view.get(name)
        is_known = entry is None or entry.state == "draining"
        return Leaving(
            is_known=is_known,
            num_requests=self._shared.loads.num_own(name),
            num_streams=sum(generation.entry.name == name for generation in self._generations()),
            num_moved=departure.num_moved,
            num_failed=departure.num_failed,
            num_bytes=departure.num_bytes,
            moves=tuple(departure.moves),
            num_targets=0 if entry is None else len(self._targets(entry)),
            why_not=departure.why_not,
        )

    # ---- inside --------------------------------------------------------------------------------------------------

    async def _leave(self, name: str, departure: _Departure) -> None:
        """Hand over what is read from an engine, until it is ready again or gone."""
        clock = self._shared.node.clock
        try:
            while (entry := self._shared.view.get(name)) is not None and entry.state == "draining":
                self._start_moves(entry, departure)
                await clock.sleep(LOOK_S)
        finally:
            departure.is_watched = False

    def _start_moves(self, entry: Entry, departure: _Departure) -> None:
        now, shared = self._shared.node.clock.now(), self._shared
        departure.tried = {g: tried for g, tried in departure.tried.items() if g in shared.generations}
        for generation in self._generations():
            if len(departure.under_way) >= AT_ONCE:
                return
            is_there = generation.entry.name == entry.name and generation.has_begun and generation.num_output_tokens
            if not is_there or generation.moving is not None or generation in departure.under_way:
                continue
            if departure.tried.get(generation, (0, 0.0))[1] > now:
                continue
            target = self._choose(entry)
            if target is None:
                return
            departure.under_way[generation] = None
            shared.router.spawn(self._move(generation, target, departure))

    async def _move(self, generation: Generation, target: Entry, departure: _Departure) -> None:
        request_id = generation.attempt.request.id
        try:
            moved = await move(generation, target)
        except BusError as error:
            if generation.is_over:
                return
            departure.num_failed += 1
            departure.why_not = f"{request_id} to {target.name}: {error}"[:500]
            num_tries = departure.tried.get(generation, (0, 0.0))[0] + 1
            retry_s = min(LAST_RETRY_S, FIRST_RETRY_S * 2 ** (num_tries - 1))
            departure.tried[generation] = num_tries, self._shared.node.clock.now() + retry_s
            log.warning("not handed over to %s: %s", target.name, error, extra={"request_id": request_id})
            return
        finally:
            departure.under_way.pop(generation, None)
        departure.num_moved += 1
        departure.num_bytes += moved.num_bytes
        departure.moves.append(moved)
        log.info(
            "handed over from %s to %s: %d bytes, a pause of %.1f ms",
            moved.source,
            moved.target,
            moved.num_bytes,
            1e3 * moved.pause_s,
            extra={"request_id": request_id},
        )

    def _generations(self) -> list[Generation]:
        return [each for each in self._shared.generations if isinstance(each, Generation)]

    def _choose(self, source: Entry) -> Entry | None:
        """Return the idlest engine that what runs on ``source`` may go on at."""
        loads = self._shared.loads

        def load_of(entry: Entry) -> tuple[int, int]:
            load = loads.load(entry)
            return load.num_running + load.num_waiting, loads.last_picked(entry.name)

        return min(self._targets(source), key=load_of, default=None)

    def _targets(self, source: Entry) -> list[Entry]:
        now, loads = self._shared.node.clock.now(), self._shared.loads
        return [
            entry
            for entry in self._shared.view.entries("engine")
            if entry.name != source.name
            and entry.state == "ready"
            and entry.model == source.model
            and entry.manager is not None
            and _fits(entry, source)
            and loads.suspected_until(entry, now) is None
        ]


def _fits(entry: Entry, source: Entry) -> bool:
    """Whether an engine is for what runs on another: it generates, or has a role of its own that the other has, too."""
    own = set(source.roles) - {"prefill"}
    return not entry.roles or GENERATES in entry.roles or bool(own & set(entry.roles))
