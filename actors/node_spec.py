"""What the launcher tells a node's process, and what the process tells back: JSON, one line each."""

from typing import Any, Literal

import msgspec

from callboard.bus import Address

NodeKind = Literal["control", "router", "frontend", "kv_manager", "engine", "actor"]


class ActorSpec(msgspec.Struct, frozen=True):
    """An actor to make: ``class_path`` is ``module:Class``, ``config`` becomes its ``Config`` or its keywords."""

    name: str
    class_path: str
    config: dict[str, Any] = {}


class TraceSpec(msgspec.Struct, frozen=True):
    """How many requests' records a node remembers, and whether prompts may leave it in full or as hashes only."""

    keep: int = 1000
    prompts: Literal["hashed", "full"] = "hashed"


class RestartPolicy(msgspec.Struct, frozen=True):
    """How often a node that failed is started again, and after how long; the wait doubles every time."""

    is_enabled: bool = True
    backoff_s: float = 0.2
    max_restarts: int = 5
    forgive_s: float = 60.0
    """A node that was ready for this long begins to count anew."""


class NodeSpec(msgspec.Struct, frozen=True):
    """Everything one node's process needs to know."""

    fleet: str
    name: str
    kind: NodeKind
    endpoint: str
    actors: tuple[ActorSpec, ...]
    log: str
    directory: Address | None = None
    host: str = ""
    """The joined host it runs on; empty where the fleet was started."""
    keys: bytes | None = None
    """The secret of the fleet's keys. It comes by the pipe alone: no argument, environment or file shows it."""
    silent_s: float = 5.0
    """A peer not heard of for so long is cut off."""
    cores: tuple[int, ...] = ()
    """The cores it is pinned to; empty means all that the launcher may use."""
    num_threads: int = 1
    python_path: str | None = None
    """A directory put before the others on ``sys.path``."""
    pool_bytes: int | None = None
    """Size of the memfd that the launcher makes for the first actor, as ``pool_fd`` in its config."""
    inherits: tuple[int, ...] = ()
    """Descriptors of the launcher's that its process has, too, by the same numbers."""
    dies_with_launcher: bool = True
    """Killed by the kernel in the same moment; otherwise it ends in order when its pipe ends."""
    removes: str | None = None
    """The run directory, removed by this node when the launcher was killed."""
    keeps_logs_at: str | None = None
    """Where it keeps the logs that are in there before."""
    restart: RestartPolicy = RestartPolicy()
    trace: TraceSpec = TraceSpec()
    is_essential: bool = False
    """Without it there is no fleet: when it is given up, the fleet ends."""
    is_needed_of_its_kind: bool = False
    """The fleet ends when the last node of its kind is given up."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """From which level on it logs."""

    def __repr__(self) -> str:
        return f"NodeSpec({self.name!r})"  # Keys and API keys are in it: they must not get into a log.


class Status(msgspec.Struct, frozen=True, omit_defaults=True):
    """A line from the process: it imports, an actor starts, all are ready, or why not.

    Later on, "kill" asks for the end of another node of this launcher's, whose process is stuck; of a KV manager alone.
    """

    state: Literal["starting", "loading", "ready", "failed", "kill"]
    detail: str = ""
    node: str = ""
    """Whom to kill."""
    incarnation: str = ""
    """Of the process that is ready, or of the one that is to be killed: its successor has another."""
