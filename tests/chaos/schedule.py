"""All that a seed decides, drawn before anything runs: the fleet, its load, and the faults. Print it to see a seed."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

from callboard.actors.engine.simulated import Simulation
from callboard.actors.protocol import SamplingParams
from callboard.bus.links import LinkConfig
from callboard.bus.transports.sim import Break, Weather

SCRIPTS = Path(__file__).parent / "scripts"
OWN_SCRIPTS = tuple(sorted(str(path) for path in SCRIPTS.glob("*.py")))
PLAIN_SCRIPTS = tuple(str(SCRIPTS / f"{name}.py") for name in ("generate_before_sent", "renews_its_lease", "two_parts"))
"""Those that were here first: what seeds stand for hangs on their number."""
LOAD_S = 1.5
"""Requests come, and faults with a time of their own strike, within this long."""

ROLES = {"p": ("prefill",), "d": ("decode",)}
"""By the first letter of an engine's name; others have both."""

MESSAGES = {
    "control": (
        *("received Generate", "sent PrepRecv", "sent RemoteSend", "sent StartGenerate", "sent Release"),
        *("received Register", "received Watch", "sent *"),
    ),
    "engine": (
        *("received StartGenerate", "received ComputeKv", "received Abort", "sent Admit", "sent Finish", "sent Seal"),
        *("sent Refill", "sent Give", "sent Attach", "sent Register", "sent *"),
    ),
    "manager": (
        *("received PrepRecv", "received RemoteSend", "received Release", "sent OpenWrite", "received OpenWrite"),
        *("sent CloseWrite", "received CloseWrite", "sent ComputeKv", "sent Tie", "received Tie", "received Admit"),
        *("received Finish", "received Seal", "received Refill", "received Attach", "sent Abort", "sent *"),
    ),
    "client": ("sent Generate", "sent *"),
}
"""What a fault may wait for, by the kind of node: a message it sends or receives, or any batch (``*``)."""


@dataclass(frozen=True)
class Trigger:
    """When a fault strikes: at a time, or at the ``count``-th message of a kind that its node sends or receives."""

    at_s: float = 0.0
    message: str = ""
    direction: str = ""
    count: int = 0
    is_after: bool = False
    """Not before the message has left, or has been taken."""

    def __str__(self) -> str:
        if not self.message:
            return f"at {self.at_s:.3f} s"
        what = "batch" if self.message == "*" else self.message
        return f"{'after' if self.is_after else 'before'} its {what} number {self.count} is {self.direction}"


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong. ``seconds`` is how long it lasts, or how long a dead node stays dead."""

    kind: str
    """break, partition, pause, kill, crash, stop or congest"""
    node: str
    trigger: Trigger
    seconds: float = 0.0
    peer: str = ""
    """break: the node at the other end"""
    how: Break | None = None
    refuses: bool = False
    """partition: dials are refused meanwhile, rather than hang"""
    island: tuple[str, ...] = ()
    """partition: the nodes on the one side"""
    actor: str = ""
    """crash: the actor that breaks"""

    def __str__(self) -> str:
        who = f"{self.node} and {self.peer}" if self.peer else self.node
        more = ""
        if self.how is not None:
            more = f": {self.how}"
        elif self.island:
            more = f": {', '.join(self.island)} apart, dials {'are refused' if self.refuses else 'hang'}"
        elif self.actor:
            more = f" ({self.actor})"
        return f"{self.kind} {who} {self.trigger}, {self.seconds:.3f} s{more}"


@dataclass(frozen=True)
class Asking:
    """One request of one client."""

    request_id: str
    client: str
    at_s: float
    prompt: tuple[int, ...]
    sampling: SamplingParams
    leaves_after_s: float | None = None
    """The client leaves then, whatever it has got."""
    leaves_at_token: int | None = None
    credit: int = 256
    seconds_per_token: float = 0.0
    """A slow reader takes so long over each token."""
    frontend_seed: int | None = None
    """It is asked through the frontend's endpoints: what, is drawn from this instead (frontend_client.py)."""


@dataclass(frozen=True)
class Change:
    """Something that people do to a fleet while it serves."""

    kind: str
    """swap, canary, shadow, promote, rollback, roles, drain or serve"""
    at_s: float
    engine: str = ""
    roles: tuple[str, ...] = ()
    script: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        more = "/".join(self.roles) if self.kind == "roles" else Path(self.script).stem
        return f"{self.kind} {self.engine}{more} at {self.at_s:.3f} s"


@dataclass(frozen=True)
class Schedule:
    """A seed's fleet, load and faults."""

    seed: int
    engines: tuple[str, ...]
    is_shared: bool
    """All engines have one KV manager, as on one device."""
    script: str
    num_blocks: int
    lease_s: float
    engine: dict[str, Any]
    """Fields of every engine's configuration."""
    links: LinkConfig
    weather: Weather
    is_one_host: bool
    """Nodes can watch each other's processes: a death is proven."""
    requests: tuple[Asking, ...]
    faults: tuple[Fault, ...]
    num_host_blocks: int = 0
    """Room for evicted blocks in each manager's memory; 0: they are lost."""
    wires_break: float | None = None
    """Pages go packed over wires, which break with this chance at each fragment; None: pools are mapped."""
    options: dict[str, Any] = field(default_factory=dict)
    """The script's keyword arguments."""
    changes: tuple[Change, ...] = ()

    @property
    def may_fail(self) -> bool:
        """Whether a request may end badly that does not leave by itself.

        It may not where only engines and managers die: others take over, or the same when they are back. But for
        those that too many deaths hit (load.py).
        """
        deaths = ("kill", "crash", "stop")
        nodes = {*self.engines, *self.managers.values(), "guest"}
        return bool(self.weather.retry_rate) or any(f.kind not in deaths or f.node not in nodes for f in self.faults)

    @property
    def managers(self) -> dict[str, str]:
        """Each engine's KV manager."""
        return {engine: "kv" if self.is_shared else f"kv-{engine}" for engine in self.engines}

    def __str__(self) -> str:
        lines = [
            f"seed {self.seed}: engines {' '.join(self.engines)}{' on one device' if self.is_shared else ''}, "
            f"script {Path(self.script).stem}{self.options or ''}, {self.num_blocks} blocks, "
            f"room for {self.num_host_blocks} more outside, leases of {self.lease_s:g} s"
            + ("" if self.wires_break is None else f", pages over wires ({self.wires_break:.0%} of fragments lost)"),
            f"  engine: {', '.join(f'{key}={value}' for key, value in self.engine.items() if key != 'simulated')}",
            f"  {self.engine['simulated']}",
            f"  {self.weather}, {'one host' if self.is_one_host else 'a host each'}, {self.links}",
            f"  {len(self.requests)} requests",
        ]
        lines += [f"  change {i}: {change}" for i, change in enumerate(self.changes, 1)]
        return "\n".join(lines + [f"  fault {i}: {fault}" for i, fault in enumerate(self.faults, 1)])


CLIENTS = ("client", "guest")
"""The guest may be killed; the client sees every request to its end."""


def draw_plain(seed: int) -> Schedule:
    """Return what a seed stands for, but for what people change meanwhile (changes.py)."""
    rng = Random(f"chaos/{seed}")
    engines = rng.choice([("p", "d"), ("p", "d"), ("a", "b"), ("a",), ("p1", "p2", "d"), ("p", "d1", "d2")])
    is_shared = rng.random() < 0.35
    block_size = rng.choice([4, 4, 8])
    simulation = Simulation(
        num_layers=rng.choice([1, 2, 3]),
        eos_token_id=rng.choice([None, None, 7]),
        vocab_size=rng.choice([100, 1000]),
        seconds_per_step=rng.choice([0.0, 0.001, 0.01]),
        seconds_per_prefill_token=rng.choice([0.0, 0.0002, 0.002]),
    )
    engine = {
        "block_size": block_size,
        "max_num_seqs": rng.choice([1, 2, 8, 64]),
        "max_num_batched_tokens": rng.choice([8, 16, 64, 512]),
        "num_layer_groups": rng.choice([1, 2, 4]),
        "max_buffered_tokens": rng.choice([2, 8, 256]),
        "stall_s": rng.choice([1.0, 30.0]),
        "simulated": simulation,
    }
    schedule = Schedule(
        seed=seed,
        engines=engines,
        is_shared=is_shared,
        script=rng.choice(["disaggregate", "balanced", "round_robin", "disaggregate", *PLAIN_SCRIPTS]),
        # One request must fit twice: it may be sent from a pool into the same one.
        num_blocks=rng.choice([32, 40, 64, 96] if block_size == 4 else [20, 28, 48, 96]),
        lease_s=rng.choice([0.5, 2.0, 10.0]),
        engine=engine,
        links=LinkConfig(ping_s=0.4, silent_s=rng.choice([1.0, 2.0]), hello_s=rng.choice([1.0, 4.0]), dial_s=0.5),
        weather=Weather(retry_rate=rng.choice([0.0, 0.0, 0.01]), max_s=rng.choice([500e-6, 0.005])),
        is_one_host=rng.random() < 0.5,
        requests=tuple(_request(rng, i, block_size) for i in range(rng.choice([6, 10, 14]))),
        faults=(),
    )
    num_faults = rng.choice([0, 1, 1, 2, 2, 3, 4, 6])
    faults = tuple(_fault(rng, schedule) for _ in range(num_faults))
    return _over_wires(_with_a_tier(replace(schedule, faults=faults)))


def death_of(rng: Random, schedule: Schedule) -> Fault:
    """Return the death of an engine or a KV manager, and no other fault."""
    node = rng.choice([*schedule.engines, *schedule.engines, *sorted(set(schedule.managers.values()))])
    kind = rng.choice(["kill", "kill", "crash", "stop"])
    seconds = rng.choice([0.01, rng.uniform(0.0, 1.0)])
    return Fault(kind, node, _trigger(rng, _kind_of(node, schedule)), seconds, actor=node if kind == "crash" else "")


def _over_wires(schedule: Schedule) -> Schedule:
    """Have some fleets send their pages as between hosts. Drawn apart, too."""
    rng = Random(f"wires/{schedule.seed}")
    if rng.random() < 0.65:
        return schedule
    return replace(schedule, wires_break=rng.choice([0.0, 0.01]) if schedule.faults else 0.0)


def _with_a_tier(schedule: Schedule) -> Schedule:
    """Give some fleets memory for evicted blocks, and pools and prompts with which some are evicted, and come back.

    It is drawn apart: what other seeds stand for does not depend on it.
    """
    rng = Random(f"tiers/{schedule.seed}")
    if rng.random() < 0.6:
        return schedule
    prompts = [(rng.randrange(4), *range(10, rng.randrange(18, 70))) for _ in schedule.requests]
    requests = [replace(each, prompt=prompt) for each, prompt in zip(schedule.requests, prompts, strict=True)]
    return replace(
        schedule,
        num_blocks=32 if schedule.engine["block_size"] == 4 else 20,
        num_host_blocks=rng.choice([5, 20, 60]),
        requests=tuple(requests),
    )


def _request(rng: Random, number: int, block_size: int) -> Asking:
    # A few beginnings, shared by many: prefixes are matched, sent in part, evicted.
    length = rng.choice([1, 2, block_size - 1, block_size, block_size + 1, rng.randrange(1, 60), rng.randrange(20, 60)])
    prompt = (number % 3, *range(10, 10 + length - 1))
    leaves_after_s = rng.uniform(0.0, 0.4) if rng.random() < 0.15 else None
    return Asking(
        request_id=f"r{number}",
        client=CLIENTS[rng.random() < 0.25],
        at_s=rng.uniform(0.0, LOAD_S) if rng.random() < 0.7 else 0.0,
        prompt=prompt,
        sampling=SamplingParams(
            max_tokens=rng.choice([1, 2, rng.randrange(1, 24)]),
            ignore_eos=rng.random() < 0.5,
            temperature=rng.choice([0.0, 1.0]),
            seed=rng.choice([0, -5, 2**63 + 3]),
        ),
        leaves_after_s=leaves_after_s,
        leaves_at_token=rng.randrange(1, 6) if rng.random() < 0.1 else None,
        credit=rng.choice([1, 2, 256, 256]),
        seconds_per_token=rng.choice([0.0, 0.0, 0.0, 0.02]),
        frontend_seed=rng.getrandbits(32) if rng.random() < 0.25 else None,
    )


def _fault(rng: Random, schedule: Schedule) -> Fault:
    managers = sorted(set(schedule.managers.values()))
    nodes = [*schedule.engines, *managers]
    kind = rng.choice(["break", "break", "partition", "pause", "pause", "kill", "kill", "crash", "stop", "congest"])
    node = rng.choice([*nodes, *nodes, "control", "guest" if kind == "kill" else "control"])
    trigger = _trigger(rng, _kind_of(node, schedule))
    seconds = rng.choice([0.01, rng.uniform(0.0, 1.0), rng.uniform(1.0, 6.0)])
    match kind:
        case "break":
            peer = _peer(rng, node, schedule)
            lost = [None, 0.0, 0.5, rng.random()]
            heard = [0.0, rng.uniform(0.0, 0.05), rng.uniform(0.0, 2.0), None]
            how = Break(rng.choice(lost), rng.choice(lost), rng.choice(heard), rng.choice(heard))
            return Fault(kind, node, trigger, peer=peer, how=how)
        case "partition":
            others = [each for each in [*nodes, "control", *CLIENTS] if each != node and rng.random() < 0.3]
            island = (node, *others)
            return Fault(kind, node, trigger, seconds, refuses=rng.random() < 0.5, island=island)
        case "crash":
            actor = rng.choice(["directory", "main"]) if node == "control" else node
            return Fault(kind, node, trigger, min(seconds, 1.0), actor=actor)
        case "kill" | "stop":
            return Fault(kind, node, trigger, min(seconds, 1.0))
        case "congest":
            return Fault(kind, node, trigger, min(seconds, 0.3))
        case _:
            return Fault(kind, node, trigger, seconds)


def _kind_of(node: str, schedule: Schedule) -> str:
    if node in schedule.engines:
        return "engine"
    return {"control": "control", "client": "client", "guest": "client"}.get(node, "manager")


def _trigger(rng: Random, kind: str) -> Trigger:
    if rng.random() < 0.4:
        return Trigger(at_s=rng.uniform(0.0, LOAD_S))
    direction, message = rng.choice(MESSAGES[kind]).split()
    count = rng.randrange(1, 100) if message == "*" else rng.choice([1, 1, 2, 3, rng.randrange(1, 8)])
    return Trigger(message=message, direction=direction, count=count, is_after=rng.random() < 0.5)


def _peer(rng: Random, node: str, schedule: Schedule) -> str:
    managers = sorted(set(schedule.managers.values()))
    nodes = [*schedule.engines, *managers, "control"]
    return rng.choice([each for each in nodes if each != node])
