"""What people do to a fleet while it serves, done as the command line does it, by a client that does not die."""

import asyncio
from collections import Counter

from callboard.actors.move_protocol import SetDraining, SetRoles
from callboard.bus import BusError
from callboard.router.script import read_script
from callboard.router.swap.changer import Changer
from callboard.router.swap.swap import Target, swap

from .schedule import ROLES, Change
from .world import Machine, World, address_of

CANARY_SHARE = 50.0


class Changes:
    """The changes of one world. What cannot be done under faults is noted, and left."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.made: Counter[str] = Counter()
        """Changes that took effect, by kind."""
        self._machine: Machine = world.machines["client"]
        self._under_way: set[asyncio.Task[None]] = set()

    def arm(self) -> None:
        """Let the schedule's changes come."""
        for change in self.world.schedule.changes:
            task = self._machine.process.spawn(self._make(change))
            self._under_way.add(task)
            task.add_done_callback(self._under_way.discard)

    @property
    def is_over(self) -> bool:
        return not self._under_way

    async def mend(self) -> None:
        """Have every engine serve, as what it was started as."""
        for engine in self.world.schedule.engines:
            roles = ROLES.get(engine[0], ("prefill", "decode"))
            for message in (SetDraining(False), SetRoles(roles)):
                try:
                    await self._machine.ref_to(address_of(engine, engine)).ask(message, timeout=10.0)
                except BusError as error:
                    self.world.problem(f"{engine} could not be told {message} although all is well: {error!r}")

    async def _make(self, change: Change) -> None:
        await asyncio.sleep(change.at_s)
        try:
            await self._do(change)
        except BusError as error:
            self.world.note(f"CHANGE {change} was not made: {error!r}")
        else:
            self.world.note(f"CHANGE {change} was made")
            self.made[change.kind] += 1

    async def _do(self, change: Change) -> None:
        if change.engine:
            message = SetRoles(change.roles) if change.kind == "roles" else SetDraining(change.kind == "drain")
            await self._machine.ref_to(address_of(change.engine, change.engine)).ask(message, timeout=3.0)
            return
        node = self._machine.node
        assert node is not None
        changer = Changer(node.new_id, "chaos", node.clock.now())
        match change.kind:
            case "swap":
                decide = changer.set_script(read_script(change.script, change.options))
            case "canary" | "shadow":
                share = CANARY_SHARE if change.kind == "canary" else None
                decide = changer.try_script(read_script(change.script, change.options), share=share)
            case "promote":
                decide = changer.promote
            case _:
                decide = changer.roll_back(None)
        await swap(node, [Target("main", self._machine.ref_to(address_of("control", "main")))], decide)
