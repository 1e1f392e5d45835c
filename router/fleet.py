"""The fleet as a script sees it, and the two ways of choosing an engine that most scripts need."""

import asyncio
from collections.abc import Iterable, Mapping

from callboard.actors.protocol import Entry, Probe
from callboard.actors.registration import DirectoryView
from callboard.bus import Address, BusError

from .attempt import Attempt
from .engine import Engine
from .errors import NoEngine
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


class Fleet:
    """The ready engines that serve the request's model, as the directory knows them now."""

    def __init__(self, attempt: Attempt, view: DirectoryView) -> None:
        self.lacking: str | None = None
        """The first role that was asked for in vain; "" where any would have done."""
        self._attempt = attempt
        self._view = view
        self._engines: dict[str, Engine] = {}

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
        """Return (and pick) the ``k`` least loaded engines, fewer if there are not as many."""
        excluded = {engine.name for engine in without}
        chosen = sorted((e for e in self.engines if e.name not in excluded), key=_load_key)[:k]
        for engine in chosen:
            engine.pick()
        return chosen

    async def probe(self, request: Request) -> dict[Engine, int]:
        """Return how many tokens of the prompt each engine has cached, by asking every KV manager once."""
        engines = self.engines
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
        return {e: cached[e.entry.manager] if e.entry.manager is not None else 0 for e in engines}

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


def ready_engines(view: DirectoryView, attempt: Attempt) -> list[Entry]:
    """Return the entries an attempt may choose from: ready, of its model, and not just found dead."""
    now = attempt.node.clock.now()
    return [
        entry
        for entry in view.entries("engine")
        if entry.state == "ready"
        and entry.model == attempt.request.model
        and attempt.loads.suspected_until(entry, now) is None
    ]


def least_loaded(engines: Iterable[Engine]) -> Engine:
    """Pick the engine with the fewest requests; of equals the one not picked for the longest. Raises NoEngine."""
    engine = min(engines, key=_load_key, default=None)
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
