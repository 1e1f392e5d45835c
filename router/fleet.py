"""The fleet as a script sees it, and the ways of choosing an engine that most scripts need."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import aclosing
from dataclasses import dataclass

from callboard.actors.protocol import Entry, Probe
from callboard.actors.registration import DirectoryView
from callboard.bus import Address, BusError

from .attempt import Attempt
from .engine import Engine
from .errors import NoEngine
from .events import EventKind
from .peer import Peer
from .prefix import Prefix
from .request import Request

PROBE_S = 1.0
"""A manager that does not answer a probe by then counts as having nothing."""


class Engines(tuple[Engine, ...]):
    """Engines, ordered by name; ``role`` says what was asked for."""

    role: str = ""
    fleet: "Fleet | None" = None

    def missing(self) -> NoEngine:
        """Return the error for there being none."""
        if self.fleet is None:
            return NoEngine(model="", role=self.role, known="")
        return self.fleet.no_engine(self.role)


@dataclass(frozen=True, slots=True)
class EngineEvent:
    """Something that happened to an engine.

    It ``joined`` (ready for requests), ``left`` (stopped, drained, or not heard of any more), or ``died`` (known to be
    dead); its ``roles`` changed, or its ``load``.
    """

    kind: EventKind
    engine: Engine


class Fleet:
    """The ready engines that serve the request's model, as the directory knows them now.

    In the background, where there is no request, those of every model.
    """

    def __init__(self, attempt: Attempt, view: DirectoryView) -> None:
        self.lacking: str | None = None
        """The first role that was asked for in vain; "" where any would have done."""
        self._attempt = attempt
        self._view = view
        self._engines: dict[str, Engine] = {}
        self._num_prefixes = 0

    @property
    def engines(self) -> Engines:
        """All of them."""
        return self.with_role("")

    @property
    def prefill(self) -> Engines:
        """Those that take prompts."""
        return self.with_role("prefill")

    @property
    def decode(self) -> Engines:
        """Those that generate."""
        return self.with_role("decode")

    def with_role(self, role: str) -> Engines:
        """Return those with a role; an engine without explicit roles has every one."""
        ready = (self._engine(entry) for entry in ready_engines(self._view, self._attempt))
        engines = Engines(engine for engine in ready if not role or engine.has_role(role))
        engines.role, engines.fleet = role, self
        if not engines and self.lacking is None:
            self.lacking = role
        return engines

    def idlest(self, k: int = 1, without: Iterable[Engine] = ()) -> list[Engine]:
        """Return (and pick) the ``k`` least loaded engines, the least loaded first; fewer if there are not as many."""
        excluded = {engine.name for engine in without}
        chosen = sorted((e for e in self.engines if e.name not in excluded), key=_load_key)[:k]
        for engine in chosen:
            engine.pick()
        return chosen

    async def probe(self, request: Request, *, only_if_seen: bool = False) -> dict[Engine, int]:
        """Return how many tokens of the prompt each engine has cached, by asking every KV manager once.

        With ``only_if_seen`` nobody is asked about a prompt whose beginning this router has not had before: then all
        have nothing. That spares new prompts the asking, and overlooks what only other routers have sent.
        """
        engines = [engine for engine in self.engines if engine.model == request.model]
        if only_if_seen and request is self._attempt.request and not self._attempt.num_seen_tokens:
            return dict.fromkeys(engines, 0)
        cached: dict[Address, int] = {}

        async def ask(manager: Address) -> None:
            ref, timeout = self._attempt.node.ref(manager), min(PROBE_S, request.deadline)
            try:
                cached[manager] = (await ref.ask(Probe(request.packed_prompt), timeout=timeout)).num_cached_tokens
            except BusError:
                cached[manager] = 0

        async with asyncio.TaskGroup() as group:
            for manager in {e.entry.manager: None for e in engines}:
                if manager is not None:
                    group.create_task(ask(manager))
        found = {e: cached[e.entry.manager] if e.entry.manager is not None else 0 for e in engines}
        if request is self._attempt.request:
            self._attempt.cached = {engine.name: num_tokens for engine, num_tokens in found.items()}
        return found

    async def hot_prefixes(self, *, min_hits_per_s: float, most: int = 8) -> list[Prefix]:
        """Return the beginnings of prompts that this router is asked for that often, the hottest first.

        At most so many; of one that continues another, the longer. Who holds them the KV managers are asked.
        """
        attempt, now = self._attempt, self._attempt.node.clock.now()
        hot = attempt.shared.prefixes.hot(attempt.request.model, min_hits_per_s=min_hits_per_s, now=now, most=most)
        return [await self._prefix(model, tokens, rate) for model, tokens, rate in hot]

    async def events(self) -> AsyncIterator[EngineEvent]:
        """Give what happens to the engines, from now on and for ever; those that are there have joined.

        Who is slow to listen hears the latest of each kind and engine.
        """
        async with aclosing(self._attempt.shared.events.listen()) as happenings:
            async for happening in happenings:
                if self._attempt.request.model in ("", happening.entry.model):
                    yield EngineEvent(happening.kind, self._engine(happening.entry))

    def router(self, name: str) -> Peer:
        """Return another router of the fleet, to hand the request on to."""
        return Peer(name, self._attempt)

    def no_engine(self, role: str) -> NoEngine:
        """Return the error that says which engine is missing."""
        now, loads = self._attempt.node.clock.now(), self._attempt.loads

        def state(entry: Entry) -> str:
            return entry.state if loads.suspected_until(entry, now) is None else "failed just now"

        known = "; ".join(
            f"{entry.name} ({state(entry)}, model {entry.model}, roles {' and '.join(entry.roles) or 'all'})"
            for entry in self._view.entries("engine")
        )
        return NoEngine(model=self._attempt.request.model, role=role, known=known)

    def _engine(self, entry: Entry) -> Engine:
        engine = self._engines.get(entry.name)
        if engine is None or engine.entry.address != entry.address:
            engine = self._engines[entry.name] = Engine(entry, self._attempt)
        engine.entry = entry
        return engine

    async def _prefix(self, model: str, tokens: bytes, hits_per_s: float) -> Prefix:
        request = self._attempt.request
        self._num_prefixes += 1
        prefix = Prefix(
            f"{request.id}/{self._num_prefixes}",
            model,
            tokens,
            attempt=request.attempt,
            hits_per_s=hits_per_s,
            holders=(),
            others=(),
            remaining_s=lambda: request.deadline,
        )
        cached = await self.probe(prefix)
        by_load = sorted(cached, key=_load_key)
        # Only full blocks are cached: of a prefix that ends inside of one there is no more to be had.
        prefix.holders = tuple(e for e in by_load if cached[e] > prefix.num_tokens - e.block_size)
        prefix.others = tuple(e for e in by_load if e not in prefix.holders)
        return prefix


def ready_engines(view: DirectoryView, attempt: Attempt) -> list[Entry]:
    """Return the entries an attempt may choose from: ready, of its model, and not just found dead."""
    now = attempt.node.clock.now()
    return [
        entry
        for entry in view.entries("engine")
        if entry.state == "ready"
        and attempt.request.model in ("", entry.model)
        and attempt.loads.suspected_until(entry, now) is None
    ]


def least_loaded(engines: Iterable[Engine]) -> Engine:
    """Pick the engine with the fewest requests; of equals the one not picked for the longest. Raises NoEngine."""
    engine = min(engines, key=_load_key, default=None)
    if engine is None:
        raise engines.missing() if isinstance(engines, Engines) else Engines().missing()
    engine.pick()
    return engine


def cheapest(engines: Iterable[Engine], cost: Callable[[Engine], float]) -> Engine:
    """Pick the engine for which ``cost`` is least; of equals the least loaded. Raises NoEngine."""
    engine = min(engines, key=lambda e: (cost(e), *_load_key(e)), default=None)
    if engine is None:
        raise engines.missing() if isinstance(engines, Engines) else Engines().missing()
    engine.pick()
    return engine


def best_match(engines: Iterable[Engine], cached: Mapping[Engine, int]) -> Engine:
    """Pick the engine with most tokens cached, as ``fleet.probe`` says; of equals the least loaded. Raises NoEngine."""
    engine = min(engines, key=lambda e: (-cached.get(e, 0), *_load_key(e)), default=None)
    if engine is None:
        raise engines.missing() if isinstance(engines, Engines) else Engines().missing()
    engine.pick()
    return engine


def _load_key(engine: Engine) -> tuple[int, int, str]:
    load = engine.load
    return load.num_running + load.num_waiting, engine.last_picked, engine.name
