"""One child process of the supervisor: started by exec, tied by a pipe, heard by Status lines, ended by signals."""

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Self

import msgspec

from .node_spec import NodeSpec, Status

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
_WAITING_VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
SPIN_COUNT = 10_000
"""Turns that libgomp's threads spin at a barrier before they sleep. By default they spin 30 times as often: where
anything else runs on their cores, steps of several threads then took 4 to 35 times as long, and where nothing else
did, the difference was within the noise of three rounds."""
LAST_WORDS_S = 1.0


def child_environment(environment: Mapping[str, str], num_threads: int) -> dict[str, str]:
    """Return what a node's process inherits: its thread counts set, and nothing that calls out on its own.

    How threads wait for each other is set unless the user has.
    """
    fixed = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    if not any(name in environment for name in _WAITING_VARIABLES):
        fixed["GOMP_SPINCOUNT"] = str(SPIN_COUNT)
    return {**environment, **fixed, **dict.fromkeys(_THREAD_VARIABLES, str(num_threads))}


class Child:
    """A node's process. Make it with ``await Child.start(...)``."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.detail = ""
        """The sentence of its failure, if it told one, or of why it was killed."""
        self.incarnation = ""
        """Its node's, from when it is ready."""
        self._process = process

    @classmethod
    async def start(cls, spec: NodeSpec, environment: Mapping[str, str], fds: Sequence[int]) -> Self:
        """Start the process of ``spec``, which inherits ``fds``."""
        log = os.open(spec.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            # -P keeps the current directory off sys.path: a folder of the user's must not shadow a library.
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "callboard.actors.process"),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                env=child_environment(environment, spec.num_threads),
                pass_fds=fds,
                start_new_session=True,  # Ctrl-C is the launcher's alone.
            )
        finally:
            os.close(log)
        assert process.stdin is not None
        process.stdin.write(msgspec.json.encode(spec) + b"\n")
        return cls(process)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process.returncode is None

    async def ready(self, on_state: Callable[[str, str], None]) -> bool:
        """Tell ``on_state`` of the way up; return True once it is ready and False if it ends before."""
        while (status := await self._next_status()) is not None:
            if status.state == "ready":
                self.incarnation = status.incarnation
                return True
            if status.state not in ("failed", "kill"):  # The one is told once it has ended, the other is too early.
                on_state(status.state, status.detail)
        return False

    async def ended(self, on_kill: Callable[[Status], None] = lambda status: None) -> int:
        """Wait for the end; return the exit code, or the negative signal. ``on_kill`` hears whom it wants killed."""

        async def hear() -> None:
            while (status := await self._next_status()) is not None:
                if status.state == "kill":
                    on_kill(status)

        async with asyncio.TaskGroup() as group:
            hearing = group.create_task(hear())
            code = await self._process.wait()
            # What is left in the pipe are its last words, unless a process of its own still holds it.
            await asyncio.wait((hearing,), timeout=LAST_WORDS_S)
            hearing.cancel()
        return code

    async def _next_status(self) -> Status | None:
        assert self._process.stdout is not None
        try:
            line = await self._process.stdout.readline()
        except ValueError:
            return Status("failed", self.detail)  # A line without an end.
        if not line:
            return None
        try:
            status = msgspec.json.decode(line, type=Status)
        except msgspec.MsgspecError:
            return Status("failed", self.detail)  # Somebody else wrote to the pipe: its exit code must do.
        if status.state == "failed":
            self.detail = status.detail
        return status

    def kill(self, why: str) -> None:
        """Kill it, for a reason that is told as that of its failure."""
        self.detail = why
        self.signal(signal.SIGKILL)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal; to a process that has ended, nothing."""
        if self.is_alive:
            try:
                self._process.send_signal(number)
            except ProcessLookupError:
                pass

    async def stop(self, grace_s: float) -> None:
        """Ask it to end, and kill it after ``grace_s``; return when it has ended."""
        self.signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(grace_s):
                await self._process.wait()
        except TimeoutError:
            self.signal(signal.SIGKILL)
            await self._process.wait()
