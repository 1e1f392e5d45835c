"""The supervisor: starts a fleet's processes by exec, restarts those that fail, and stops all of them in order.

It lives in the launcher and is not on the bus. It makes each pool's memfd, a new one for every start of its manager:
an engine that still maps the last one must not write into blocks that the new manager lends.
"""

import asyncio
import os
import signal
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import msgspec

from callboard.bus.tasks import Tasks

from .child import Child
from .node_spec import NodeKind, NodeSpec, Status

STOP_ORDER: tuple[NodeKind, ...] = ("frontend", "actor", "engine", "kv_manager", "router", "control")
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
        self._awaited: dict[asyncio.Future[None], None] = {}
        self._again: dict[str, asyncio.Future[None]] = {}
        """Nodes that are to end and start again, and who waits for them."""
        self._leaving: dict[str, asyncio.Future[None]] = {}
        """Nodes that are to end and be forgotten, and who waits for it."""
        self._kept: set[str] = set()
        """Nodes that were not given up."""
        self._stopping = asyncio.Event()
        self._errors: list[BaseException] = []

    async def start(self, specs: Iterable[NodeSpec]) -> None:
        """Start nodes side by side and wait until all are ready. Raises NodeFailed for the first that is not."""
        ready = [self._begin(spec) for spec in specs]
        try:
            async with asyncio.TaskGroup() as group:
                for future in ready:
                    group.create_task(_result(future))
        except* NodeFailed as failures:
            raise failures.exceptions[0] from None
        finally:
            for future in ready:
                self._awaited.pop(future, None)

    async def restart(self, name: str) -> None:
        """End a node in order and start it again, as its spec is now; also one that was given up.

        Raises NodeFailed if it does not come up; it is tried again then, as after any failure.
        """
        if name in self._kept:
            ready = self._again.get(name) or self._new_future()
            self._again[name] = ready
            if (child := self._children.get(name)) is not None:
                await child.stop(self._grace_s)
        else:
            ready = self._begin(self._specs[name])
        try:
            await asyncio.shield(ready)
        finally:
            self._awaited.pop(ready, None)

    async def remove(self, name: str) -> None:
        """End a node in order and forget it. Unknown ones are ignored."""
        if name not in self._specs:
            return
        gone = self._leaving.setdefault(name, asyncio.get_running_loop().create_future())
        child = self._children.get(name)
        if child is not None:
            await child.stop(self._grace_s)
        if name not in self._kept:
            self._forget(name)
        await asyncio.shield(gone)

    def spec(self, name: str) -> NodeSpec | None:
        """Return what a node is started with, None for an unknown one."""
        return self._specs.get(name)

    def change(self, spec: NodeSpec) -> None:
        """Start the node of that name with another spec from its next start on."""
        assert spec.name in self._specs
        self._specs[spec.name] = spec

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

    def _new_future(self) -> asyncio.Future[None]:
        future = asyncio.get_running_loop().create_future()
        self._awaited[future] = None
        future.add_done_callback(lambda done: done.cancelled() or done.exception())  # Nobody may wait for it any more.
        return future

    def _begin(self, spec: NodeSpec) -> asyncio.Future[None]:
        """Keep a node from now on; return what is done when it is ready."""
        self._specs[spec.name] = spec
        ready = self._new_future()
        self._kept.add(spec.name)
        self._tasks.spawn(self._keep_until_given_up(spec.name, ready))
        return ready

    async def _keep_until_given_up(self, name: str, ready: asyncio.Future[None]) -> None:
        try:
            await self._keep(name, ready)
        finally:
            self._kept.discard(name)
            again = self._again.pop(name, None)
            if again is not None and not again.done():
                again.set_exception(NodeFailed(name, "it was stopped"))
            if name in self._leaving:
                self._forget(name)

    def _forget(self, name: str) -> None:
        gone = self._leaving.pop(name, None)
        if gone is not None and not gone.done():
            gone.set_result(None)
        self._specs.pop(name, None)
        self._children.pop(name, None)
        state = self.states.pop(name, None)
        if state is not None:
            self._on_change(msgspec.structs.replace(state, state="stopped", pid=0))

    async def _keep(self, name: str, ready: asyncio.Future[None]) -> None:
        """Start a node, and again when it fails, until it is stopped or given up."""
        clock = asyncio.get_running_loop().time
        num_failures = 0
        is_first = True
        while True:
            spec = self._specs[name]
            if (again := self._again.pop(name, None)) is not None:
                ready, num_failures = again, 0
            child = await self._spawn(spec)
            since = None
            try:
                async with asyncio.timeout(self._ready_s):
                    is_ready = await child.ready(partial(self._change, spec))
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
            code = await child.ended(partial(self._on_kill, spec))
            if self._stopping.is_set():
                self._change(spec, "stopped")
                if not ready.done():
                    ready.set_exception(NodeFailed(spec.name, "it was stopped"))
                return
            if name in self._leaving:
                if not ready.done():
                    ready.set_exception(NodeFailed(spec.name, "it was stopped"))
                return
            sentence = child.detail or _describe_exit(code)
            if not ready.done():
                ready.set_exception(NodeFailed(spec.name, sentence, has_said_why=bool(child.detail)))
                if is_first:
                    self._change(spec, "failed", sentence)
                    return
            is_first = False
            if name in self._again:
                self._change(spec, "restarting", "it was asked for", restarted=True)
                continue
            if since is not None and clock() - since >= spec.restart.forgive_s:
                num_failures = 0
            if code == 0 or not spec.restart.is_enabled or num_failures >= spec.restart.max_restarts:
                self._change(spec, "stopped" if code == 0 else "failed", sentence)
                if spec.is_essential or (spec.is_needed_of_its_kind and self._is_none_left(spec.kind)):
                    self.fatal.set()
                return
            self._change(spec, "restarting", sentence, restarted=True)
            await asyncio.sleep(min(MAX_BACKOFF_S, spec.restart.backoff_s * 2**num_failures))
            num_failures += 1
            if self._stopping.is_set() or name in self._leaving:
                return

    def _is_none_left(self, kind: NodeKind) -> bool:
        """Return whether every node of a kind has been given up."""
        names = [name for name, spec in self._specs.items() if spec.kind == kind]
        return all(name in self.states and self.states[name].state in ("failed", "stopped") for name in names)

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
        fds = [*self._inherited, *spec.inherits]
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
        for ready in list(self._awaited):
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
