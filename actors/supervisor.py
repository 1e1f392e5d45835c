"""The supervisor: starts a fleet's processes by exec, restarts those that fail, and stops all of them in order.

It lives in the launcher and is not on the bus. It makes each pool's memfd, a new one for every start of its manager:
an engine that still maps the last one must not write into blocks that the new manager lends.
"""

import asyncio
import os
import signal
from collections.abc import Callable, Iterable, Mapping, Sequence

import msgspec

from callboard.bus.tasks import Tasks

from .child import Child
from .node_spec import NodeKind, NodeSpec, Status

STOP_ORDER: tuple[NodeKind, ...] = ("actor", "engine", "kv_manager", "control")
MAX_BACKOFF_S = 30.0


class NodeState(msgspec.Struct, frozen=True):
    """A node as the launcher sees it. ``state`` is starting, loading, ready, restarting, failed or stopped."""

    name: str
    kind: str
    state: str
    pid: int = 0
    num_restarts: int = 0
    detail: str = ""


class NodeFailed(Exception):
    """A node that did not come up; the text is a sentence for people. ``has_said_why``: the sentence is its own."""

    def __init__(self, name: str, sentence: str, *, has_said_why: bool = False) -> None:
        self.name = name
        self.has_said_why = has_said_why
        super().__init__(f"{name}: {sentence}")


class Supervisor:
    """The processes of one fleet. ``environment`` is what they inherit; ``on_change`` hears of every new state."""

    def __init__(
        self,
        *,
        environment: Mapping[str, str],
        on_change: Callable[[NodeState], None] = lambda state: None,
        inherited: Sequence[int] = (),
        ready_s: float = 300.0,
        grace_s: float = 8.0,
    ) -> None:
        self.fatal: asyncio.Event = asyncio.Event()
        """Set when a node without which there is no fleet was given up."""
        self.states: dict[str, NodeState] = {}
        self._environment = environment
        self._on_change = on_change
        self._inherited = tuple(inherited)
        self._ready_s = ready_s
        self._grace_s = grace_s
        self._tasks = Tasks(self._broke)
        self._children: dict[str, Child] = {}
        self._specs: dict[str, NodeSpec] = {}
        self._awaited: list[asyncio.Future[None]] = []
        self._stopping = asyncio.Event()
        self._errors: list[BaseException] = []

    async def start(self, specs: Iterable[NodeSpec]) -> None:
        """Start nodes side by side and wait until all are ready. Raises NodeFailed for the first that is not."""
        loop = asyncio.get_running_loop()
        ready = self._awaited = []
        for spec in specs:
            self._specs[spec.name] = spec
            ready.append(loop.create_future())
            self._tasks.spawn(self._keep(spec, ready[-1]))
        try:
            async with asyncio.TaskGroup() as group:
                for future in ready:
                    group.create_task(_result(future))
        except* NodeFailed as failures:
            raise failures.exceptions[0] from None

    async def stop(self) -> None:
        """End every process, kind by kind; those that do not within the grace are killed. A repeat does nothing."""
        self._stopping.set()
        for kind in STOP_ORDER:
            children = [child for name, child in self._children.items() if self._specs[name].kind == kind]
            await asyncio.gather(*(child.stop(self._grace_s) for child in children))
        await self._tasks.cancel()
        # One that was being started meanwhile.
        await asyncio.gather(*(child.stop(0.0) for child in self._children.values()))

    def kill(self) -> None:
        """Kill every process at once; ``stop`` must still be called."""
        self._stopping.set()
        for child in self._children.values():
            child.signal(signal.SIGKILL)

    # ---- one node's life ---------------------------------------------------------------------------------------

    async def _keep(self, spec: NodeSpec, ready: asyncio.Future[None]) -> None:
        """Start a node, and again when it fails, until it is stopped or given up."""
        clock = asyncio.get_running_loop().time
        num_failures = 0
        while True:
            child = await self._spawn(spec)
            since = None
            try:
                async with asyncio.timeout(self._ready_s):
                    is_ready = await child.ready(lambda state, detail: self._change(spec, state, detail))
            except TimeoutError:
                is_ready, child.detail = False, f"it was not ready within {self._ready_s:.0f} s"
                child.signal(signal.SIGKILL)
            if is_ready:
                since = clock()
                self._change(spec, "ready")
                if not ready.done():
                    ready.set_result(None)
            if not is_ready:
                # It has closed its pipe, and so is about to end: it may not hold the fleet up by not doing so.
                try:
                    async with asyncio.timeout(self._grace_s):
                        await child.ended()
                except TimeoutError:
                    child.signal(signal.SIGKILL)
            code = await child.ended(lambda status: self._on_kill(spec, status))
            if self._stopping.is_set():
                self._change(spec, "stopped")
                if not ready.done():
                    ready.set_exception(NodeFailed(spec.name, "it was stopped"))
                return
            sentence = child.detail or _describe_exit(code)
            if not ready.done():
                self._change(spec, "failed", sentence)
                ready.set_exception(NodeFailed(spec.name, sentence, has_said_why=bool(child.detail)))
                return
            if since is not None and clock() - since >= spec.restart.forgive_s:
                num_failures = 0
            if code == 0 or not spec.restart.is_enabled or num_failures >= spec.restart.max_restarts:
                self._change(spec, "stopped" if code == 0 else "failed", sentence)
                if spec.is_essential:
                    self.fatal.set()
                return
            self._change(spec, "restarting", sentence, restarted=True)
            await asyncio.sleep(min(MAX_BACKOFF_S, spec.restart.backoff_s * 2**num_failures))
            num_failures += 1
            if self._stopping.is_set():
                return

    def _on_kill(self, asking: NodeSpec, status: Status) -> None:
        """Kill a process that keeps blocks of a KV manager's pool and is out of reach; its node starts again.

        Heard of KV managers alone, of the engines and KV managers here, and of the very process that is meant.
        """
        spec, child = self._specs.get(status.node), self._children.get(status.node)
        if asking.kind != "kv_manager" or spec is None or child is None or spec.name == asking.name:
            return
        if spec.kind in ("engine", "kv_manager") and status.incarnation and child.incarnation == status.incarnation:
            child.kill(f"it was killed for {asking.name}: {status.detail}")

    async def _spawn(self, spec: NodeSpec) -> Child:
        fds = list(self._inherited)
        pool_fd = None
        if spec.pool_bytes is not None:
            pool_fd = _make_pool(spec.name, spec.pool_bytes)
            first, *others = spec.actors
            fds.append(pool_fd)
            first = msgspec.structs.replace(first, config={**first.config, "pool_fd": pool_fd})
            spec = msgspec.structs.replace(spec, actors=(first, *others))
        try:
            child = self._children[spec.name] = await Child.start(spec, self._environment, fds)
        finally:
            if pool_fd is not None:
                os.close(pool_fd)  # The manager and whoever maps it keep it; with the last of them it is gone.
        self._change(spec, "starting")
        return child

    def _change(self, spec: NodeSpec, state: str, detail: str = "", *, restarted: bool = False) -> None:
        before = self.states.get(spec.name)
        num_restarts = (before.num_restarts if before else 0) + restarted
        child = self._children[spec.name]
        pid = child.pid if child.is_alive else 0
        self.states[spec.name] = NodeState(spec.name, spec.kind, state, pid, num_restarts, detail)
        self._on_change(self.states[spec.name])

    def _broke(self, error: BaseException) -> None:
        self._errors.append(error)
        for ready in self._awaited:
            if not ready.done():
                ready.set_exception(error)
        self.fatal.set()

    @property
    def error(self) -> BaseException | None:
        """The supervisor's own failure, a bug, if ``fatal`` was set by one."""
        return self._errors[0] if self._errors else None


async def _result(future: asyncio.Future[None]) -> None:
    await future


def _make_pool(name: str, num_bytes: int) -> int:
    fd = os.memfd_create(f"callboard-{name}", os.MFD_CLOEXEC)
    os.ftruncate(fd, num_bytes)
    return fd


def _describe_exit(code: int) -> str:
    if code >= 0:
        return f"it ended with exit code {code}"
    try:
        return f"it was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"it was killed by signal {-code}"
