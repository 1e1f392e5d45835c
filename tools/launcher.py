"""The launcher: brings one fleet up, keeps it up until a signal, and takes it down; nothing of it stays behind."""

import asyncio
import logging
import os
import signal
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

from callboard.actors.kept_logs import keep_logs
from callboard.actors.logs import log_to
from callboard.actors.run_dir import remove_run_dir
from callboard.actors.supervisor import NodeFailed, NodeState, Supervisor
from callboard.bus import Address
from callboard.bus.keys import KeysError, read_secret
from callboard.bus.liveness import own_pid

from .endpoints import CONTROL, IPC, Endpoints
from .errors import CliError, StartFailed
from .fleet_check import hosts_of, keys_of, model_of
from .fleet_file import FleetFile
from .gpus import gpus_for
from .growing import Growth
from .kept_logs import kept_at
from .launcher_door import launcher_door
from .launcher_work import LauncherWork
from .log_lines import last_lines
from .machine import allowed_cores, available_memory, claim_port, split_address, total_memory
from .models import resolve_models
from .plan import Machine, Plan, Planner
from .progress import Event, Show, Started
from .running import FleetState, cache_dir, claim_run_dir, write_state
from .units import format_size

log = logging.getLogger("callboard.launcher")

LOG = "launcher.log"
HEALTH_S = 60.0
STOPPED_BY_SIGNAL = 0
TAIL_LINES = 15


class Launcher:
    """One run of one fleet. ``run`` returns the exit code, or raises CliError when the fleet does not come up."""

    host = ""
    """The joined host that this is; empty: the fleet's own, with the control node."""

    def __init__(self, file: FleetFile, *, show: Show, environment: Mapping[str, str], is_detached: bool) -> None:
        self._file = file
        self._title = file.fleet.name
        """The name of the run directory, and what the user calls this by."""
        self._show = show
        self._environment = environment
        self._is_detached = is_detached
        self._folder = Path()
        self._state: FleetState | None = None
        self._supervisor: Supervisor | None = None
        self._num_signals = 0
        self._plan_of: Callable[[FleetFile], Plan]
        """Makes the plan of a fleet file, this one or one with more engines."""

    async def run(self) -> int:
        """Bring the fleet up, serve until SIGINT or SIGTERM, take it down."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(None) as scope:
                for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                    loop.add_signal_handler(number, self._on_signal, scope)
                return await self._live()
        except TimeoutError:
            if not scope.expired():
                raise
            return STOPPED_BY_SIGNAL

    def _on_signal(self, scope: asyncio.Timeout) -> None:
        self._num_signals += 1
        if self._num_signals == 1:
            scope.reschedule(asyncio.get_running_loop().time())
        elif self._supervisor is not None:
            self._supervisor.kill()

    async def _live(self) -> int:
        self._folder, lock = await claim_run_dir(self._title)
        fd = self._log_to_file()
        try:
            return await self._serve(lock)
        except StartFailed as error:
            log.error("%s", error)
            raise StartFailed(f"{error}{self._where_logs_are(str(error))}") from None
        except Exception:
            log.exception("the launcher failed")
            raise
        finally:
            if self._has_failed():
                keep_logs(self._folder / "logs", kept_at(self._title))
            logging.getLogger().handlers.clear()
            os.close(fd)
            remove_run_dir(self._folder)
            os.close(lock)

    def _log_to_file(self) -> int:
        """Begin the launcher's own log, return its descriptor; a daemon has no other place for its words."""
        path = self._folder / "logs" / LOG
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        log_to(fd, path, node="launcher", level=self._file.fleet.log.level)
        if self._is_detached:
            os.dup2(fd, 1)
            os.dup2(fd, 2)
        return fd

    def _has_failed(self) -> bool:
        """Return whether somebody may ask for the logs of what a process did."""
        is_failing = sys.exc_info()[0] not in (None, asyncio.CancelledError)
        states = {} if self._supervisor is None else self._supervisor.states
        logs = [path for path in (self._folder / "logs").glob("*.log") if path.name != LOG and path.stat().st_size]
        return bool(logs) and (is_failing or any(state.state == "failed" for state in states.values()))

    def _where_logs_are(self, sentence: str) -> str:
        """Return what to add to the sentence of a failure; nothing if no process had begun."""
        if not self._has_failed():
            return ""
        end = "\n" if "\n" in sentence else "; "
        return f"{end}its logs are kept: callboard logs --failed --fleet {self._title}"

    async def _serve(self, lock: int) -> int:
        with Endpoints(self._file.fleet.listen.bus, self._folder) as endpoints:
            return await self._serve_at(endpoints, lock)

    async def _serve_at(self, endpoints: Endpoints, lock: int) -> int:
        name, keys_folder = self._file.fleet.name, keys_of(self._file)
        directory = Address(CONTROL, endpoints.of(CONTROL), "directory")
        pid, start = own_pid()
        shown = None if keys_folder is None else str(keys_folder)
        source = self._file.source
        self._write(FleetState(name, "starting", pid, start, directory, fleet_file=source, keys=shown, host=self.host))
        try:
            keys = None if keys_folder is None else read_secret(keys_folder)
        except KeysError as error:
            raise StartFailed(str(error)) from None
        plan = await self._plan(endpoints, keys)
        await self._enter(plan)
        self._write(url=plan.url, models=plan.models)
        supervisor = self._supervisor = Supervisor(
            environment=self._environment, on_change=self._on_change, inherited=(lock,)
        )
        try:
            for stage in plan.stages:
                await supervisor.start(stage)
            await self._arrive(plan, supervisor)
            self._write(state="ready")
            log.info("the fleet is up" if not self.host else "the host has joined the fleet")
            self._show(Event("ready", started=self._started(plan)))
            async with launcher_door(self._folder, self._work(supervisor).serve):
                await supervisor.fatal.wait()
            raise self._why_it_ended(plan, supervisor)
        except NodeFailed as error:
            raise StartFailed(str(error) + ("" if error.has_said_why else self._tail(error.name))) from None
        finally:
            self._write(state="stopping")
            log.info("stopping")
            self._show(Event("step", "stopping"))
            endpoints.stop_listening()
            await supervisor.stop()

    def _work(self, supervisor: Supervisor) -> LauncherWork:
        return LauncherWork(
            self._file, supervisor, host=self.host, plan=self._plan_of, check=check_memory, tail=self._tail
        )

    async def _enter(self, plan: Plan) -> None:
        """Look whether the plan can be; nothing of it runs yet. Raises CliError."""
        check_memory(plan, available_memory())

    async def _arrive(self, plan: Plan, supervisor: Supervisor) -> None:
        """Wait until what was started can be used. Raises StartFailed."""
        if plan.url is not None and not hosts_of(self._file.fleet):
            await self._wait_until_healthy(plan.url, supervisor)

    def _started(self, plan: Plan) -> Started:
        """Return what the user is told once all is ready."""
        assert self._state is not None
        fleet, state = self._file.fleet, self._state
        return Started(
            fleet.name,
            state.launcher_pid,
            plan.url,
            plan.models,
            self._is_detached,
            fleet.listen.api_keys,
            bus=plan.directory.endpoint if fleet.listen.bus != IPC else None,
            file=self._file.source,
            hosts=tuple(hosts_of(fleet)),
        )

    async def _plan(self, endpoints: Endpoints, keys: bytes | None) -> Plan:
        fleet = self._file.fleet
        host, port = split_address(fleet.listen.http)
        if fleet.engine and not self.host:
            port = claim_port(host, port)
        models = await resolve_models(
            self._file,
            cache=cache_dir(),
            log=self._folder / "logs" / "models.log",
            environment=self._environment,
            show=self._show,
        )

        def plan_of(file: FleetFile) -> Plan:
            used = {model_of(file, engine) for engine in file.fleet.engine}
            return Planner(
                file,
                run_dir=self._folder,
                models={name: path for name, path in models.items() if file is self._file or name in used},
                machine=Machine(allowed_cores(), total_memory(), gpus_for(file.fleet)),
                port=port,
                host=self.host,
                endpoints=endpoints,
                keys=keys,
            ).plan()

        self._plan_of = plan_of
        plan = plan_of(self._file)
        for warning in plan.warnings:
            log.warning("%s", warning)
            self._show(Event("warning", warning))
        return plan

    async def _wait_until_healthy(self, url: str, supervisor: Supervisor) -> None:
        """Wait until the frontend sees an engine for every model: from then on a request is served."""
        self._show(Event("step", "waiting for the frontend to see the engines"))
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(HEALTH_S):
                while not await loop.run_in_executor(None, _is_healthy, url):
                    if supervisor.fatal.is_set():
                        raise StartFailed("the control process ended while the fleet was starting")
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise StartFailed(
                f"the engines are ready, but {url}/health did not say so within {HEALTH_S:.0f} s"
            ) from None

    def _why_it_ended(self, plan: Plan, supervisor: Supervisor) -> CliError:
        if supervisor.error is not None:
            raise supervisor.error
        names = [
            node.name
            for node in plan.nodes
            if (node.is_essential or node.is_needed_of_its_kind) and supervisor.states[node.name].state == "failed"
        ]
        name = names[0] if names else "control"
        sentence = supervisor.states[name].detail
        return StartFailed(f"{name} failed too often ({sentence}), so the fleet was stopped{self._tail(name)}")

    def _tail(self, node: str) -> str:
        lines = last_lines(self._folder / "logs" / f"{node}.log", TAIL_LINES)
        return "".join(f"\n  | {line}" for line in lines)

    def _on_change(self, state: NodeState) -> None:
        levels = {"restarting": logging.WARNING, "failed": logging.WARNING, "starting": logging.DEBUG}
        level = {**levels, "loading": logging.DEBUG}.get(state.state, logging.INFO)
        log.log(level, "%s is %s%s", state.name, state.state, f": {state.detail}" if state.detail else "")
        self._show(Event("node", node=state))
        assert self._supervisor is not None
        self._write(nodes=tuple(self._supervisor.states[name] for name in sorted(self._supervisor.states)))

    def _write(self, whole: FleetState | None = None, /, **changes: object) -> None:
        if whole is None:
            assert self._state is not None
            whole = msgspec.structs.replace(self._state, **changes)
        self._state = whole
        try:
            write_state(self._folder, whole)
        except OSError as error:  # The fleet can serve without it; only ps and down suffer.
            print(f"cannot write the state file: {error}", file=sys.stderr, flush=True)


def _is_healthy(url: str) -> bool:
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{url}/health", timeout=2.0) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def check_memory(plan: Plan | Growth, available: int) -> None:
    """Raise StartFailed if the plan needs more than ``available`` bytes."""
    memory = plan.memory
    if memory.total <= available:
        return
    parts = f"pools {format_size(memory.pools)}, weights {format_size(memory.weights)}"
    raise StartFailed(
        f"the fleet needs about {format_size(memory.total)} of memory ({parts}, processes "
        f"{format_size(memory.processes)}) and {format_size(available)} are free: "
        "lower size in [defaults.kv], or use fewer engines"
    )
