"""What carries a schedule's faults out, each at its trigger, and undoes it."""

import asyncio
from collections import Counter
from collections.abc import Callable

from callboard.bus.testing import SimulatedProcess
from callboard.bus.transports.sim import SimConnection

from .schedule import Fault
from .world import JUST_AFTER_S, Machine, World, endpoint_of


class Faults:
    """The faults of one world."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.struck: Counter[str] = Counter()
        """Faults that happened, by kind."""
        self._num_under_way = 0
        self._counts: Counter[tuple[str, str, str]] = Counter()
        self._waiting: dict[tuple[str, str, str], list[Fault]] = {}

    def arm(self) -> None:
        """Let the schedule's faults come."""
        world = self.world
        for fault in world.schedule.faults:
            trigger = fault.trigger
            if not trigger.message:
                self._begin()
                self._in(trigger.at_s, lambda fault=fault: (self._done(), self._strike(fault)))
            else:
                self._waiting.setdefault((fault.node, trigger.direction, trigger.message), []).append(fault)
        world.on_message = lambda machine, direction, kind: self._count(machine.name, direction, kind)

    def disarm(self) -> None:
        """Let no more faults come; those that strike already end by themselves."""
        self._waiting.clear()

    @property
    def is_over(self) -> bool:
        """Nothing is wrong any more, as far as is known: what waits for its message may still come."""
        return not self._num_under_way

    # ---- triggers ------------------------------------------------------------------------------------------------

    def on_send(self, end: SimConnection) -> None:
        """Count a batch."""
        self._count(end.near.removeprefix("sim://"), "sent", "*")

    def _count(self, node: str, direction: str, kind: str) -> None:
        key = (node, direction, kind)
        waiting = self._waiting.get(key)
        if waiting is None:
            return
        self._counts[key] += 1
        for fault in [fault for fault in waiting if fault.trigger.count == self._counts[key]]:
            waiting.remove(fault)
            if fault.trigger.is_after:
                self._in(JUST_AFTER_S, lambda fault=fault: self._strike(fault))
            else:
                self._strike(fault)

    def _in(self, seconds: float, do: Callable[[], object]) -> None:
        """Do something later, as nobody's process."""
        self.world.hub.at(asyncio.get_running_loop().time() + seconds, do)

    def _begin(self) -> None:
        self._num_under_way += 1

    def _done(self) -> None:
        self._num_under_way -= 1

    # ---- strikes -------------------------------------------------------------------------------------------------

    def _strike(self, fault: Fault) -> None:
        machine = self.world.machines[fault.node]
        if not machine.is_up:
            return  # It is dead already.
        self.world.note(f"FAULT {fault}")
        self.struck[fault.kind] += 1
        getattr(self, f"_{fault.kind}")(fault, machine)

    def _until(self, seconds: float, undo: Callable[[], object]) -> None:
        def over() -> None:
            undo()
            self._done()

        self._begin()
        self._in(seconds, over)

    def _break(self, fault: Fault, machine: Machine) -> None:
        hub = self.world.hub
        connections = hub.connections(endpoint_of(fault.node), endpoint_of(fault.peer))
        assert fault.how is not None
        if connections:
            hub.break_connection(hub.rng.choice(connections), fault.how)
            self._until(max(fault.how.near_s or 0.0, fault.how.far_s or 0.0), lambda: None)

    def _partition(self, fault: Fault, machine: Machine) -> None:
        island = frozenset(endpoint_of(node) for node in fault.island)
        hub = self.world.hub
        partition = hub.partition(island, refuses=fault.refuses)
        self._until(fault.seconds, lambda: hub.heal(partition))

    def _pause(self, fault: Fault, machine: Machine) -> None:
        process: SimulatedProcess = machine.process
        process.pause()
        self._until(fault.seconds, process.resume)

    def _congest(self, fault: Fault, machine: Machine) -> None:
        transport = machine.transport
        if transport is None:
            return
        transport.is_full = True
        self._until(fault.seconds, lambda: setattr(transport, "is_full", False))

    def _kill(self, fault: Fault, machine: Machine) -> None:
        self._goes_down(fault, machine)
        machine.kill()

    def _stop(self, fault: Fault, machine: Machine) -> None:
        self._goes_down(fault, machine)
        machine.stop()

    def _crash(self, fault: Fault, machine: Machine) -> None:
        self._goes_down(fault, machine)
        machine.crash(fault.actor)

    def _goes_down(self, fault: Fault, machine: Machine) -> None:
        machine.restart_s = fault.seconds
        self.world.num_deaths += machine.kind in ("engine", "kv_manager")
        self._begin()
        num_starts = machine.num_starts
        self._in(0.0, lambda: asyncio.get_running_loop().create_task(self._await_return(machine, num_starts)))

    async def _await_return(self, machine: Machine, num_starts: int) -> None:
        while machine.num_starts == num_starts or not machine.is_ready.is_set():
            await asyncio.sleep(0.05)
        self._done()
