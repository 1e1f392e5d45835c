"""The simulated network: delays from a seed, retries, breaks, partitions, and processes that die.

Each connection is two wires. A wire keeps the order of what is sent on it, and what it loses is always a suffix; the
two directions, and different connections, know nothing of each other. What arrives runs in the context of the
receiving node, so that a paused one finds it when it resumes, and a killed one never (callboard.bus.testing).
"""

import asyncio
from collections import deque
from collections.abc import Callable
from contextvars import copy_context
from dataclasses import dataclass
from random import Random
from typing import Any

from callboard.bus.testing import SimulatedProcess, current_process

from .contract import Connection, Listener
from .inproc import InprocHub, InprocTransport

APART_S = 1e-9
"""Two arrivals on one wire are this far apart at least: timers of equal time run in any order."""


@dataclass(frozen=True, slots=True)
class Weather:
    """How long batches take: ``min_s`` to ``max_s``, and with ``retry_rate`` up to ``retry_s`` more, for a retry."""

    min_s: float = 20e-6
    max_s: float = 500e-6
    retry_rate: float = 0.0
    retry_s: float = 0.5


@dataclass(frozen=True, slots=True)
class Break:
    """How a connection ends that nobody closed.

    ``keep_out`` is the share of what is under way from the dialling end that still arrives, ``keep_in`` that of the
    other direction; what is sent later is lost. None: nothing is, until the ends hear of it. The dialling end hears
    after ``near_s`` seconds, the other after ``far_s``; None: it never does, and has to find out by its pings.
    """

    keep_out: float | None = 0.0
    keep_in: float | None = 0.0
    near_s: float | None = 0.0
    far_s: float | None = 0.0


class SimHub(InprocHub):
    """A network, the same one for the same seed. Endpoints stand for hosts."""

    def __init__(self, seed: int, *, weather: Weather | None = None, is_one_host: bool = False) -> None:
        super().__init__()
        self.weather = weather or Weather()
        self.is_one_host = is_one_host
        """All processes are on one host, where the kernel tells each of another's end."""
        self.rng = Random(seed)
        self.num_sent = 0
        self.num_lost = 0
        """Batches that were sent and never arrived."""
        self._context = copy_context()
        self.on_send: Callable[[SimConnection, bytes | bytearray], None] | None = None
        """Called before anything is sent, by whom."""
        self._islands: dict[int, tuple[frozenset[str], bool]] = {}
        self._num_partitions = 0
        self._watches: dict[int, list[SimWatch]] = {}
        """By the pid of each process that runs."""
        self._num_processes = 0
        self._wires: dict[Wire, None] = {}

    def transport(self) -> "SimTransport":
        return SimTransport(self)

    def delay(self) -> float:
        """Draw how long the next batch takes, in seconds."""
        weather = self.weather
        delay = self.rng.uniform(weather.min_s, weather.max_s)
        if weather.retry_rate and self.rng.random() < weather.retry_rate:
            delay += self.rng.uniform(0.0, weather.retry_s)
        return delay

    def at(self, when: float, callback: Callable[..., object], *args: Any) -> asyncio.TimerHandle:
        """Do something as the network, which is nobody's process."""
        return asyncio.get_running_loop().call_at(when, callback, *args, context=self._context)

    # ---- processes -----------------------------------------------------------------------------------------------

    def enter(self) -> int:
        """Return the pid of a process that begins."""
        self._num_processes += 1
        self._watches[self._num_processes] = []
        return self._num_processes

    def leave(self, pid: int) -> None:
        """Tell all who watch a process that it has ended."""
        now = asyncio.get_running_loop().time()
        for watch in self._watches.pop(pid):
            self.at(now + self.delay(), watch.tell)

    def watch(self, pid: int, watch: "SimWatch") -> None:
        """Let somebody hear of a process's end, at once if it has come."""
        watches = self._watches.get(pid)
        if watches is None:
            self.at(asyncio.get_running_loop().time(), watch.tell)
        else:
            watches.append(watch)

    # ---- faults --------------------------------------------------------------------------------------------------

    def connections(self, one: str, other: str) -> list["SimConnection"]:
        """Return the connections between two endpoints, as the ends that dialled them."""
        found = []
        for near, far in ((one, other), (other, one)):
            transport = self.transports.get(near)
            ends = () if transport is None else transport.connections
            found += [end for end in ends if isinstance(end, SimConnection) and end.is_dialler and end.far == far]
        return found

    def break_connection(self, end: "SimConnection", how: Break) -> None:
        """Break a connection, given by the end that dialled it."""
        for wire, keep in ((end.out, how.keep_out), (end.other.out, how.keep_in)):
            if keep is not None:
                wire.cut(keep)
        now = asyncio.get_running_loop().time()
        for each, after_s in ((end, how.near_s), (end.other, how.far_s)):
            if after_s is not None:
                self.at(now + after_s, each.hear, "the connection broke")

    def partition(self, island: frozenset[str], *, refuses: bool) -> int:
        """Cut endpoints off from all others; returns what ``heal`` takes.

        What is sent waits for the healing. Dials are refused, or hang till then.
        """
        self._num_partitions += 1
        self._islands[self._num_partitions] = (island, refuses)
        return self._num_partitions

    def heal(self, partition: int) -> None:
        """Undo a partition; what waited is on its way again, unless an end has given up meanwhile."""
        del self._islands[partition]
        for wire in list(self._wires):
            wire.heal()

    def is_severed(self, one: str, other: str) -> bool:
        """Return whether a partition lies between two endpoints."""
        return any((one in island) != (other in island) for island, _ in self._islands.values())

    def refuses(self, one: str, other: str) -> bool:
        """Return whether a dial between two endpoints is refused by a partition."""
        return any(refuses and (one in island) != (other in island) for island, refuses in self._islands.values())

    def hold(self, wire: "Wire") -> None:
        """Note a wire on which something waits for the end of a partition."""
        self._wires[wire] = None

    def forget(self, wire: "Wire") -> None:
        """Forget a wire on which nothing waits."""
        self._wires.pop(wire, None)


class Wire:
    """One direction of one connection."""

    def __init__(self, hub: SimHub, sender: str, receiver: str) -> None:
        self.is_dead = False
        self.hub = hub
        self._ends = (sender, receiver)
        self._arrival = 0.0
        self._under_way: deque[asyncio.TimerHandle] = deque()
        self._held: list[tuple[Callable[..., object], tuple[Any, ...]]] = []

    def send(self, callback: Callable[..., object], *args: Any) -> None:
        """Have ``callback`` called at the far end, as the network."""
        self.hub.num_sent += 1
        if self.is_dead:
            self.hub.num_lost += 1
        elif self._held or self.hub.is_severed(*self._ends):
            self._held.append((callback, args))
            self.hub.hold(self)
        else:
            self._launch(callback, args)

    def heal(self) -> None:
        """Send what waited, if no partition is left in between."""
        if not self.hub.is_severed(*self._ends):
            held, self._held = self._held, []
            self.hub.forget(self)
            for callback, args in held:
                self._launch(callback, args)

    def cut(self, keep: float) -> None:
        """Lose all but a share of what is under way, and all that follows."""
        self.lose(keep)
        self.is_dead = True

    def lose(self, keep: float) -> None:
        """Lose all but a share of what is under way, the last of it first."""
        under_way = self._under_way
        num_kept = round(keep * len(under_way))
        self.hub.num_lost += len(under_way) - num_kept + len(self._held)
        while len(under_way) > num_kept:
            under_way.pop().cancel()
        self._held.clear()
        self.hub.forget(self)

    def _launch(self, callback: Callable[..., object], args: tuple[Any, ...]) -> None:
        now = asyncio.get_running_loop().time()
        self._arrival = max(self._arrival + APART_S, now + self.hub.delay())
        self._under_way.append(self.hub.at(self._arrival, self._arrive, callback, args))

    def _arrive(self, callback: Callable[..., object], args: tuple[Any, ...]) -> None:
        self._under_way.popleft()
        callback(*args)


class SimConnection:
    """One end of a connection. ``other`` is the far end, also while nobody listens there yet."""

    other: "SimConnection"

    def __init__(self, hub: SimHub, near: str, far: str, *, is_dialler: bool) -> None:
        self.near = near
        self.far = far
        self.is_dialler = is_dialler
        self.is_open = True
        self.transport: SimTransport | None = None
        self.out = Wire(hub, near, far)

    def send(self, batch: bytes | bytearray) -> bool:
        if self.is_open and self.out.hub.on_send is not None:
            self.out.hub.on_send(self, batch)
        if self.is_open:
            assert self.transport is not None
            if self.transport.is_full:
                return False
            self.out.send(self.other._arrived, batch)
        return True

    def close(self) -> None:
        if self.is_open:
            self._end()
            self.out.send(self.other.hear, "closed by the other side")

    def abandon(self, keep: float) -> None:
        """End as the kernel does for a process that was killed: the far side hears of it after what still arrives."""
        if self.is_open:
            self.out.lose(keep)
            self.close()

    def hear(self, reason: str) -> None:
        """Tell this end, in its process, that the connection is gone."""
        if self.is_open and self.transport is not None:
            self.transport.deliver(self._gone, reason)

    def _arrived(self, batch: bytes | bytearray) -> None:
        if self.is_open and self.transport is not None:
            self.transport.deliver(self._receive, batch)

    def _receive(self, batch: bytes | bytearray) -> None:
        if self.is_open and self.transport is not None:
            self.transport.listener.received(self, batch)

    def _gone(self, reason: str) -> None:
        if self.is_open and self.transport is not None:
            self._end()
            self.transport.listener.closed(self, reason)

    def _end(self) -> None:
        self.is_open = False
        if self.transport is not None:
            self.transport.forget(self)


class SimWatch:
    """What ProcessWatch is on a real host (bus/liveness.py)."""

    def __init__(self, transport: "SimTransport", on_death: Callable[[], None]) -> None:
        self._transport = transport
        self._on_death: Callable[[], None] | None = on_death

    def close(self) -> None:
        """Stop watching. A repeat does nothing."""
        self._on_death = None

    def tell(self) -> None:
        """Tell the watching process of the death."""
        if self._on_death is not None:
            self._transport.deliver(self._ended)

    def _ended(self) -> None:
        if self._on_death is not None:
            self._on_death()


class SimHost:
    """A process's view of the others on its host. Processes of different hosts cannot watch each other."""

    def __init__(self, transport: "SimTransport") -> None:
        self.name = "simulated" if transport.hub.is_one_host else ""
        self.pid = (transport.hub.enter(), 1)
        self._transport = transport

    def watch(self, pid: int, pid_start: int, on_death: Callable[[], None]) -> SimWatch:
        """Call ``on_death`` once when a process ends."""
        watch = SimWatch(self._transport, on_death)
        self._transport.hub.watch(pid, watch)
        return watch


class SimTransport(InprocTransport):
    """One node's transport on a simulated network, in the simulated process that starts it."""

    hub: SimHub
    host: SimHost

    def __init__(self, hub: SimHub) -> None:
        super().__init__(hub)
        self.is_full = False
        """There is no room for anything sent, for now."""
        self._process: SimulatedProcess | None = None

    async def start(self, endpoint: str, listener: Listener) -> str:
        self._context = copy_context()
        self._process = current_process()
        self.host = SimHost(self)
        if self._process is not None:
            self._process.on_kill += [self._die, lambda: self.hub.leave(self.host.pid[0])]
        return await super().start(endpoint, listener)

    def dial(self, endpoint: str, node: str = "") -> Connection:
        near = SimConnection(self.hub, self.endpoint, endpoint, is_dialler=True)
        far = SimConnection(self.hub, endpoint, self.endpoint, is_dialler=False)
        near.other, far.other = far, near
        near.transport = self
        self.connections[near] = None
        if self.hub.refuses(self.endpoint, endpoint):
            self.hub.at(asyncio.get_running_loop().time() + self.hub.delay(), near.hear, f"no way to {endpoint}")
        else:
            near.out.send(self._knock, near)
        return near

    def deliver(self, callback: Callable[..., object], *args: Any) -> None:
        """Have this node's process take something that has arrived."""
        asyncio.get_running_loop().call_soon(callback, *args, context=self._context)

    def _knock(self, near: SimConnection) -> None:
        """A dial has reached the far host."""
        far = near.other
        peer = self.hub.transports.get(near.far)
        if not isinstance(peer, SimTransport):
            far.out.send(near.hear, f"nobody listens at {near.far}")
            far.is_open = False
            return
        far.transport = peer
        peer.connections[far] = None
        peer.deliver(peer.listener.accepted, far)

    async def stop(self) -> None:
        if self._process is not None and self._die in self._process.on_kill:
            self._process.on_kill.remove(self._die)
        await super().stop()

    def _die(self) -> None:
        if self.hub.transports.get(self.endpoint) is self:
            del self.hub.transports[self.endpoint]
        for connection in list(self.connections):
            assert isinstance(connection, SimConnection)
            connection.abandon(self.hub.rng.random())
