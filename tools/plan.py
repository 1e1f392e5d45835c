"""The plan: which processes a fleet file becomes, where each is reached, what it needs; made before any starts."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from callboard.actors.model_config import ModelConfigError, ModelFacts, fingerprint_of, layout_of, read_model_config
from callboard.actors.node_spec import ActorSpec, NodeKind, NodeSpec, TraceSpec
from callboard.bus import Address
from callboard.kv.cuda_driver import Gpu
from callboard.kv.device_store import cuda_ordinal
from callboard.kv.layout import DTYPE_BYTES

from .endpoints import CONTROL, IPC, Endpoints
from .fleet_check import engine_names, manager_name, model_of
from .fleet_file import Engine, FleetFile, Problem
from .gpus import HOST_PROCESS_BYTES, NO_GPUS, Gpus, gpu_of, why_not_on, why_too_full
from .machine import split_address
from .plan_control import FRONTEND_BYTES, control_node, frontend_nodes, policy_of, router_nodes
from .tiers import tier_specs
from .units import format_size, parse_duration, parse_size

PROCESS_BYTES = 400 << 20
"""What an engine's process takes beside its weights, mostly torch."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What the plan may use. ``total_memory`` is what "80%" is a share of."""

    cores: tuple[int, ...]
    total_memory: int
    gpus: Gpus = NO_GPUS


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes the fleet will take."""

    pools: int
    weights: int
    processes: int

    @property
    def total(self) -> int:
        return self.pools + self.weights + self.processes


@dataclass(frozen=True, slots=True)
class Plan:
    """Nodes in stages: a stage starts when the one before it is ready."""

    stages: tuple[tuple[NodeSpec, ...], ...]
    directory: Address
    memory: Memory
    url: str | None
    models: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    facts: dict[str, ModelFacts] = field(default_factory=dict)
    """What the models are, by name."""

    @property
    def nodes(self) -> tuple[NodeSpec, ...]:
        return tuple(node for stage in self.stages for node in stage)


@dataclass(slots=True)
class _Device:
    """One KV manager in the making."""

    engines: list[tuple[int, Engine]] = field(default_factory=list)
    num_blocks: int = 0
    pool_bytes: int = 0
    host_tier_bytes: int = 0


class Planner:
    """Makes the Plan of one fleet file, whose models were resolved to directories."""

    def __init__(
        self,
        file: FleetFile,
        *,
        run_dir: Path,
        models: dict[str, Path],
        machine: Machine,
        port: int,
        host: str = "",
        endpoints: Endpoints | None = None,
        keys: bytes | None = None,
    ) -> None:
        self.file = file
        self.fleet = file.fleet
        self.run_dir = run_dir
        self.endpoints = endpoints or Endpoints(IPC, run_dir)
        self.keys = keys
        self.models = models
        self.machine = machine
        self.port = port
        self.host = host
        """The joined host that the plan is for; empty: the one that has the control node."""
        self.engines = [(index, engine) for index, engine in enumerate(file.fleet.engine) if engine.host == host]
        self.warnings: list[str] = []
        self.directory = self.address(CONTROL, "directory")
        self.facts: dict[str, ModelFacts] = {}
        self.devices: dict[str, _Device] = {}
        self.max_lens: dict[str, int] = {}

    def plan(self) -> Plan:
        """Return the plan. Raises FleetFileError where the file and its models do not fit together."""
        self._read_models()
        if self.fleet.listen.bus != IPC and self.keys is None:
            sentence = "any user of this machine can join the fleet, because its bus has no keys"
            self.warnings.append(f'{sentence}: run "callboard keys new keys", and write keys = "keys" under [listen]')
        for index, engine in self.engines:
            self.devices.setdefault(engine.device, _Device()).engines.append((index, engine))
        managers = [self._manager(device, found) for device, found in self.devices.items()]
        engines = [node for _, engine in self.engines for node in self._engine(engine)]
        actors = [self._user_actor(actor) for actor in self.fleet.actor if actor.host == self.host]
        control = [] if self.host else [control_node(self)]
        askers = [] if self.host else [*router_nodes(self), *frontend_nodes(self)]
        stages = [control, [*managers, *askers], engines, actors]
        host, _ = split_address(self.fleet.listen.http)
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        host = f"[{host}]" if ":" in host else host
        return Plan(
            tuple(tuple(stage) for stage in stages if stage),
            self.directory,
            Memory(
                sum(device.pool_bytes + device.host_tier_bytes for device in self.devices.values()),
                sum(self._weight_bytes(engine) * engine.count for _, engine in self.engines if not _is_on_gpu(engine)),
                sum(_process_bytes(engine) * engine.count for _, engine in self.engines)
                + sum(FRONTEND_BYTES for node in askers if node.kind == "frontend"),
            ),
            f"http://{host}:{self.port}" if self.fleet.engine and control else None,
            tuple(dict.fromkeys(self.model_of(engine) for engine in self.fleet.engine)),
            tuple(self.warnings),
            dict(self.facts),
        )

    # ---- addresses and shared parts ------------------------------------------------------------------------------

    def address(self, node: str, actor: str) -> Address:
        """Return where an actor of a node is reached."""
        return Address(node, self.endpoints.of(node), actor)

    def node(self, name: str, kind: NodeKind, *actors: ActorSpec, **options: Any) -> NodeSpec:
        """Return a node with what all of them are told."""
        log = str(self.run_dir / "logs" / f"{name}.log")
        dies = kind in ("engine", "kv_manager", "router", "frontend")
        return NodeSpec(
            self.fleet.name,
            name,
            kind,
            self.endpoints.of(name),
            actors,
            log,
            directory=self.directory,
            host=self.host,
            keys=self.keys,
            dies_with_launcher=dies,
            silent_s=parse_duration(self.fleet.listen.silent),
            log_level=self.fleet.log.level,
            trace=TraceSpec(self.fleet.trace.keep, self.fleet.trace.prompts),
            **options,
        )

    def _fail(self, path: tuple[str | int, ...], sentence: str) -> None:
        self.file.report([Problem(path, sentence)])

    def model_of(self, engine: Engine) -> str:
        """Return the name of an engine's model."""
        name = model_of(self.file, engine)
        assert name is not None, "fleet_check.py saw to it"
        return name

    # ---- models and memory -----------------------------------------------------------------------------------------

    def _read_models(self) -> None:
        for name, directory in self.models.items():
            path = ("models", name, "path")
            try:
                self.facts[name] = read_model_config(directory)
            except ModelConfigError as error:
                self._fail(path, str(error))
            wanted, most = self.fleet.models[name].max_model_len, self.facts[name].max_model_len
            if wanted is not None and wanted > most:
                sentence = f"max_model_len = {wanted}, but the model was made for {most}: write at most that"
                self._fail(("models", name, "max_model_len"), sentence)
            self.max_lens[name] = wanted or most

    def _dtype(self, engine: Engine) -> str:
        dtype = engine.dtype or self.fleet.models[self.model_of(engine)].dtype
        if dtype != "auto":
            return dtype
        return "bfloat16" if _is_on_gpu(engine) else "float32"  # On CPUs without AMX fp32 is the faster one.

    def _weight_bytes(self, engine: Engine) -> int:
        if engine.runner == "simulated":
            return 0
        model = self.model_of(engine)
        config = json.loads((self.models[model] / "config.json").read_text())
        stored = DTYPE_BYTES.get(str(config.get("dtype") or config.get("torch_dtype")), 2)
        return self.facts[model].weight_bytes * DTYPE_BYTES[self._dtype(engine)] // stored

    def _fingerprint(self, engine: Engine) -> str:
        """Return what two engines have in common whose KV is the same."""
        model = self.model_of(engine)
        try:
            return fingerprint_of(self.models[model], dtype=self._dtype(engine), runner=engine.runner)
        except ModelConfigError as error:
            self._fail(("models", model, "path"), str(error))
            raise

    # ---- nodes ---------------------------------------------------------------------------------------------------

    def _manager(self, device: str, found: _Device) -> NodeSpec:
        index, first = found.engines[0]
        layouts = {}
        for each, engine in found.engines:
            model = self.model_of(engine)
            layouts[each] = layout_of(self.facts[model], engine.block_size, self._dtype(engine))
            if layouts[each] != layouts[index]:
                sentence = f'"{engine.name}" and "{first.name}" share the pool of {device}, but the KV of their models '
                sentence += 'is laid out differently: give one another device, such as "cpu:1"'
                self._fail(("engine", each, "device"), sentence)
            if self._fingerprint(engine) != self._fingerprint(first):
                sentence = f'"{engine.name}" and "{first.name}" share the pool of {device}, but not one model, '
                sentence += 'whose KV it would hold: give one another device, such as "cpu:1"'
                self._fail(("engine", each, "device"), sentence)
        layout = layouts[index]
        gpu = self._gpu(device, index)
        whole = self.machine.total_memory if gpu is None else gpu.num_bytes
        size = parse_size(self.fleet.defaults.kv.size, whole=whole)
        found.num_blocks = layout.num_blocks_in(size)
        if found.num_blocks < 2:
            sentence = f"a pool of {format_size(size)} does not hold two blocks of {format_size(layout.block_bytes)}: "
            self._fail(("defaults", "kv", "size"), sentence + "raise size")
        pool_bytes = found.num_blocks * layout.block_bytes
        if gpu is None:
            found.pool_bytes = pool_bytes
        else:
            weights = sum(self._weight_bytes(engine) * engine.count for _, engine in found.engines)
            num_engines = sum(engine.count for _, engine in found.engines)
            problem = why_too_full(gpu, device, pool=pool_bytes, weights=weights, num_engines=num_engines)
            if problem is not None:
                self._fail(("defaults", "kv", "size"), problem)
        for _, engine in found.engines:
            model, room = self.model_of(engine), found.num_blocks * layout.block_size
            if room < self.max_lens[model]:
                self.warnings.append(f"the pool of {device} holds {room} tokens, so that is the longest request")
                self.max_lens[model] = room
        tiers = tier_specs(self.file, layout, total_memory=self.machine.total_memory)
        found.host_tier_bytes = sum(tier.num_bytes for tier in tiers if tier.kind == "host")
        name = manager_name(device, self.host)
        config = {
            "name": name,
            "layout": msgspec.to_builtins(layout),
            "num_blocks": found.num_blocks,
            "device": device,
            "lease_s": parse_duration(self.fleet.defaults.kv.lease),
            "transport": self.fleet.defaults.kv.transport,
            "wire_dtype": {"auto": ""}.get(self.fleet.defaults.kv.wire, self.fleet.defaults.kv.wire),
            "verify": self.fleet.defaults.kv.verify,
            "socket_dir": str(self.run_dir),
            "tiers": msgspec.to_builtins(tiers),
            "fingerprint": self._fingerprint(first),
        }
        actor = ActorSpec(name, "callboard.actors.kv_manager:KvManager", config)
        # The manager makes the memory of a GPU itself.
        own_pool_bytes = pool_bytes if gpu is None else None
        restart = policy_of(self.fleet.defaults.kv.restart)
        return self.node(name, "kv_manager", actor, pool_bytes=own_pool_bytes, restart=restart)

    def _gpu(self, device: str, index: int) -> Gpu | None:
        if cuda_ordinal(device) is None:
            return None
        if sentence := why_not_on(device, self.machine.gpus):
            self._fail(("engine", index, "device"), sentence)
        return gpu_of(device, self.machine.gpus)

    def _cores(self, device: str) -> tuple[int, ...]:
        cores = self.machine.cores
        if device == "cpu":
            return cores
        if cuda_ordinal(device) is not None:
            return ()
        number = int(device.partition(":")[2])
        if number >= len(cores):
            self.warnings.append(
                f"{device} shares core {cores[number % len(cores)]}: there are only {len(cores)} cores here"
            )
        return (cores[number % len(cores)],)

    def _engine(self, engine: Engine) -> list[NodeSpec]:
        model, manager = self.model_of(engine), manager_name(engine.device, self.host)
        cores = self._cores(engine.device)
        nodes = []
        for name in engine_names(engine):
            config = {
                "name": name,
                "model": model,
                "path": str(self.models[model]),
                "roles": list(engine.roles),
                "device": engine.device,
                "manager": msgspec.to_builtins(self.address(manager, manager)),
                "runner": engine.runner,
                "dtype": self._dtype(engine),
                "block_size": engine.block_size,
                "max_num_batched_tokens": engine.max_num_batched_tokens,
                "max_num_seqs": engine.max_num_seqs,
                "max_model_len": self.max_lens[model],
                "num_threads": max(1, len(cores)),
                "stall_s": parse_duration(self.fleet.listen.stall),
                "fingerprint": self._fingerprint(engine),
            }
            actor = ActorSpec(name, "callboard.actors.engine.engine:Engine", config)
            restart = policy_of(engine.restart)
            num_threads = max(1, len(cores))
            nodes.append(self.node(name, "engine", actor, cores=cores, num_threads=num_threads, restart=restart))
        return nodes

    def _user_actor(self, actor: Any) -> NodeSpec:
        spec = ActorSpec(actor.name, actor.class_path, actor.options)
        base = str(self.file.base)
        return self.node(actor.name, "actor", spec, python_path=base, restart=policy_of(actor.restart))


def _is_on_gpu(engine: Engine) -> bool:
    return cuda_ordinal(engine.device) is not None


def _process_bytes(engine: Engine) -> int:
    return HOST_PROCESS_BYTES if _is_on_gpu(engine) else PROCESS_BYTES
