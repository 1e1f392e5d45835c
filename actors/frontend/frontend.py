"""The frontend actor: an OpenAI-compatible HTTP server in front of one router or several.

It tokenises, asks a router for token ids, and makes text of them; it knows nothing of engines but whether there
are any. Several may serve one port, each in a process of its own.
"""

from collections.abc import Sequence

import msgspec
from prometheus_client.registry import Collector

from callboard.actors.actor import Actor
from callboard.actors.frontend_protocol import CannotDrain, Drained, DrainFrontend, FrontendMetrics, GetFrontendMetrics
from callboard.actors.protocol import Entry
from callboard.actors.registration import DirectoryView, Registration
from callboard.actors.stats_protocol import FrontendStats, GetFrontendStats
from callboard.bus import Address, Refusal

from .answer import Backend
from .draining import Draining
from .fleet_metrics import FleetCollector, NodeCollector
from .health import health_routes
from .http import HttpServer, build_app
from .listener import bind
from .metrics import Exposition, RequestCollector, metrics_route
from .microserving import microserving_routes
from .microserving_door import EngineDoor
from .observed import RequestMetrics
from .prompts import Model
from .router_metrics import RouterCollector
from .routers import Routers
from .shared_port import PortShare, SharedPort
from .tokenizer import Tokenizer, TokenizerMissing


class CannotServe(Refusal):
    """A model cannot be served as configured. Fields: model, reason."""

    sentence = "model {model!r} cannot be served: {reason}"


class StillStarting(Refusal):
    """A frontend that is asked before it serves: the directory knows the one before it. Fields: frontend."""

    sentence = "{frontend} is starting"


class ServedModel(msgspec.Struct, frozen=True):
    """A model's directory (tokenizer.json and the files beside it) and its context in tokens."""

    path: str
    max_model_len: int
    roles: tuple[str, ...] = ()
    """The roles of its engines: with a prefill engine and no decode engine, nothing is answered."""


class Frontend(Actor):
    """Serves HTTP from ``start`` to ``stop``. ``port`` is the one that was bound."""

    class Config(msgspec.Struct, frozen=True, kw_only=True):
        """``models`` by the name clients use. Port 0 takes a free one. Without ``api_keys`` everybody may ask."""

        models: dict[str, ServedModel]
        router: Address | None = None
        """The only one that is asked, also while the directory does not know it."""
        routers: tuple[str, ...] = ()
        """By name, those that are asked; by default all of the fleet's."""
        name: str = "frontend"
        host: str = "127.0.0.1"
        port: int = 8000
        api_keys: tuple[str, ...] = ()
        microserving: bool = False
        """Whether clients may ask engines themselves, past the routers (microserving.py)."""
        request_timeout_s: float = 600.0
        patience_s: float = 15.0
        """How long a request waits for a router that is not there, or for another one after a death."""
        max_body_bytes: int = 8 << 20
        grace_s: int = 2
        """How long requests may go on when the frontend is stopped."""
        stall_s: float = 30.0
        """A client that takes nothing of its answer for so long is cut off, and its request cancelled."""
        shared: SharedPort | None = None
        """Where others accept at the port, too; ``host`` and ``port`` only say then where it is."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.port = config.port
        self._models: dict[str, Model] = {}
        self._backend: Backend | None = None
        self._view: DirectoryView | None = None
        self._routers: Routers
        self._door: EngineDoor
        self._server: HttpServer | None = None
        self._share: PortShare | None = None
        self._exposition: Exposition
        self._draining: Draining | None = None
        self._is_stopping = False

    @property
    def url(self) -> str:
        """Where clients find it; OpenAI's clients add ``/v1``."""
        host = f"[{self.config.host}]" if ":" in self.config.host else self.config.host
        return f"http://{host}:{self.port}"

    async def start(self) -> None:
        """Bind, load the tokenizers, serve. Raises PortTaken, CannotListen, CannotServe."""
        config = self.config
        self._view = None if self.directory is None else DirectoryView(self)
        self._share = self._meet()
        bound = bind(config.host, config.port) if self._share is None else self._share.listener
        try:
            for name, served in config.models.items():
                self._models[name] = await self._load(name, served)
            metrics = RequestMetrics(self._models, self.node.clock.now)
            self._routers = Routers(self.node, self._view, only=config.router, names=config.routers)
            self._backend = Backend(
                node=self.node,
                routers=self._routers,
                actor=self.name,
                models=self._models,
                timeout_s=config.request_timeout_s,
                patience_s=config.patience_s,
                max_body_bytes=config.max_body_bytes,
                metrics=metrics,
                claimed=None if self._share is None else self._share.claimed,
            )
            self._exposition = self._metrics(metrics)
            more = [*health_routes(self.unready), metrics_route(self._exposition)]
            if config.microserving and self._view is not None:
                self._door = EngineDoor(self._backend, self._view, self.spawn)
                more += microserving_routes(self._door)
            app = build_app(self._backend, self.models_without_engine, config.api_keys, more)
        except BaseException:
            bound.close()
            raise
        self.port = bound.getsockname()[1]
        server = self._server = HttpServer(
            app, bound, grace_s=config.grace_s, stall_s=config.stall_s, share=self._share
        )
        self.spawn(server.serve())
        address = self.node.address_of(self.name)
        detail = {"url": self.url, "models": ", ".join(config.models)}
        entry = Registration(self, Entry(name=self.name, kind="frontend", address=address, detail=detail))
        if (share := self._share) is not None:
            others, clock = share.others.ready, self.node.clock
            self._draining = Draining(self.name, server, entry, clock, others=others, spawn=self.spawn)

    async def stop(self) -> None:
        self._is_stopping = True
        if self._server is not None and self._backend is not None:
            await self._server.stop(self._backend.cut_short)

    def models_without_engine(self) -> list[str]:
        """Return the served models that lack a ready engine, or one in a role. Outside of a fleet, none are known."""
        if self._view is None:
            return []
        ready = [entry for entry in self._view.entries("engine") if entry.state == "ready"]
        return [name for name, served in self.config.models.items() if not _is_whole(name, served, ready)]

    def unready(self) -> list[str]:
        """Return in sentences what is missing for requests to be answered; nothing, when all is there."""
        missing = []
        if self._is_stopping:
            missing.append("the frontend is stopping")
        if (no_router := self._routers.missing()) is not None:
            missing.append(no_router)
        ready = [] if self._view is None else [e for e in self._view.entries("engine") if e.state == "ready"]
        for name in self.models_without_engine():
            roles = sorted(set(self.config.models[name].roles) - _roles_of(name, self.config.models[name], ready))
            missing.append(f"model {name} has no ready engine" + (f" for {' and '.join(roles)}" if roles else ""))
        return missing

    def on_get_frontend_stats(self, message: GetFrontendStats) -> FrontendStats:
        if self._server is None or self._backend is None:
            raise StillStarting(frontend=self.name)
        return self._backend.metrics.stats()

    def on_get_frontend_metrics(self, message: GetFrontendMetrics) -> FrontendMetrics:
        if self._server is None:
            raise StillStarting(frontend=self.name)
        return self._exposition.told()

    async def on_drain_frontend(self, message: DrainFrontend) -> Drained:
        if self._server is None:
            raise StillStarting(frontend=self.name)
        if self._draining is None:
            raise CannotDrain(frontend=self.name, reason="it is the only one")
        return await self._draining.drain()

    def _meet(self) -> PortShare | None:
        """Return this frontend's share of a port that it has with others, None for one of its own."""
        if self.config.shared is None:
            return None
        assert self._view is not None, "several frontends are of a fleet"
        assert self.directory is not None, "so they have its directory"
        name, node = self.name, self.node
        return PortShare(self.config.shared, name=name, node=node, view=self._view, directory=self.directory)

    def _metrics(self, metrics: RequestMetrics) -> Exposition:
        own: list[Collector] = [RequestCollector(metrics), RouterCollector(self._routers)]
        if self._view is None:
            return Exposition(self.node, own=own)
        others = None if self._share is None else self._share.others
        own.append(NodeCollector(self.node, self._view))
        fleet = FleetCollector(self._view.entries if others is None else others.last_entries)
        return Exposition(self.node, own=own, fleet=[fleet], others=others, name=self.name)

    async def _load(self, name: str, served: ServedModel) -> Model:
        try:
            tokenizer = await self.node.run_blocking(Tokenizer.load, served.path, self.node.clock.wall)
        except TokenizerMissing as error:
            raise CannotServe(model=name, reason=str(error)) from None
        return Model(name, tokenizer, served.max_model_len, int(self.node.clock.wall()))


def _is_whole(name: str, served: ServedModel, ready: Sequence[Entry]) -> bool:
    return any(entry.model == name for entry in ready) and _roles_of(name, served, ready).issuperset(served.roles)


def _roles_of(name: str, served: ServedModel, ready: Sequence[Entry]) -> set[str]:
    """Return the roles that a model's ready engines take."""
    return {role for entry in ready if entry.model == name for role in entry.roles or served.roles}
