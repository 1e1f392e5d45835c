"""What a launcher does for commands while its fleet serves: it adds engines, restarts processes, remembers roles.

What is done to one process is done one after another, and so are additions, which choose names and devices among what
is there; all else goes on at the same time.
"""

import asyncio
import difflib
import logging
from collections.abc import Callable

import msgspec

from callboard.actors.node_spec import NodeSpec
from callboard.actors.supervisor import NodeFailed, Supervisor

from .errors import CliError, StartFailed
from .fleet_file import FleetFile
from .gpus import gpus_for
from .growing import Growth, grow
from .launcher_calls import AddEngines, Call, KeepEngine, RestartNode, Said
from .launcher_door import Say
from .machine import available_memory
from .plan import Plan
from .turns import Turns

log = logging.getLogger("callboard.launcher")

ADDING = ""
"""The turn of those who add engines; no node has this name, and it is before all others in order."""


class LauncherWork:
    """Serves the launcher's door. ``plan`` makes the plan of a fleet file on this host.

    ``check`` looks whether a plan fits into memory; ``tail`` returns the last lines of a node's log.
    """

    def __init__(
        self,
        file: FleetFile,
        supervisor: Supervisor,
        *,
        host: str,
        plan: Callable[[FleetFile], Plan],
        check: Callable[[Growth, int], None],
        tail: Callable[[str], str],
    ) -> None:
        self._file = file
        self._supervisor = supervisor
        self._host = host
        self._plan = plan
        self._check = check
        self._tail = tail
        self._turns = Turns()

    async def serve(self, call: Call, say: Say) -> Said:
        """Do what a command asks for. Raises CliError."""
        if isinstance(call, AddEngines):
            async with self._turns.of(ADDING):
                return await self._add(call, say)
        async with self._turns.of(call.name):
            if isinstance(call, RestartNode):
                return await self._restart(call, say)
            return self._keep(call)

    # ---- more engines --------------------------------------------------------------------------------------------

    async def _add(self, call: AddEngines, say: Say) -> Said:
        loop, taken = asyncio.get_running_loop(), set(self._supervisor.states)

        def look() -> Growth:  # It reads models' files, and may ask the driver.
            gpus = gpus_for(self._file.fleet)
            return grow(self._file, call, host=self._host, taken=taken, gpus=gpus, plan=self._plan)

        growth = await loop.run_in_executor(None, look)
        self._check(growth, available_memory())
        for warning in growth.warnings:
            log.warning("%s", warning)
            say(f"warning: {warning}")
        names = [node.name for stage in growth.stages for node in stage]
        say(f"starting {', '.join(names)}")
        async with self._turns.of(*names):  # Nobody has them: they are of nodes that are not there yet.
            await self._start(growth, names)
        self._file = growth.file
        log.info("added %s", ", ".join(names))
        return Said("done", names=tuple(engine.name for engine in growth.engines))

    async def _start(self, growth: Growth, names: list[str]) -> None:
        """Start what is added, all of it or nothing. Raises StartFailed."""
        try:
            for stage in growth.stages:
                await self._supervisor.start(stage)
        except BaseException as error:
            for name in reversed(names):
                await self._supervisor.remove(name)
            if not isinstance(error, NodeFailed):
                raise
            raise StartFailed(str(error) + ("" if error.has_said_why else self._tail(error.name))) from None

    # ---- those that are there ------------------------------------------------------------------------------------

    async def _restart(self, call: RestartNode, say: Say) -> Said:
        spec = self._spec(call.name)
        if spec.is_essential:
            raise CliError(f'without "{call.name}" there is no fleet: stop and start the fleet instead')
        if spec.kind == "engine":
            self._supervisor.change(_engine_with(spec, is_draining=False))
        say(f"restarting {call.name}")
        log.info("restarting %s: it was asked for", call.name)
        try:
            await self._supervisor.restart(call.name)
        except NodeFailed as error:
            raise StartFailed(str(error) + ("" if error.has_said_why else self._tail(error.name))) from None
        return Said("done", names=(call.name,))

    def _keep(self, call: KeepEngine) -> Said:
        spec = self._spec(call.name)
        if spec.kind != "engine":
            raise CliError(f'"{call.name}" is no engine')
        changes: dict[str, object] = {}
        if call.roles is not None:
            changes["roles"] = list(call.roles)
        if call.is_draining is not None:
            changes["is_draining"] = call.is_draining
        self._supervisor.change(_engine_with(spec, **changes))
        return Said("done", names=(call.name,))

    def _spec(self, name: str) -> NodeSpec:
        spec = self._supervisor.spec(name)
        if spec is not None:
            return spec
        known = sorted(self._supervisor.states)
        near = difflib.get_close_matches(name, known, n=1)
        hint = f'did you mean "{near[0]}"?' if near else f"there are {', '.join(known)}"
        raise CliError(f'there is no "{name}" here: {hint}')


def _engine_with(spec: NodeSpec, **changes: object) -> NodeSpec:
    """Return an engine's spec with other values in its config."""
    first, *others = spec.actors
    first = msgspec.structs.replace(first, config={**first.config, **changes})
    return msgspec.structs.replace(spec, actors=(first, *others))
