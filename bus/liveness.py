"""Proof of death on one host: a pidfd becomes readable when its process ends, however it ends.

A pid alone proves nothing, because pids are used again: the start time is checked when the pidfd is opened.
"""

import asyncio
import os
from collections.abc import Callable
from pathlib import Path


def local_host() -> str:
    """Return a name shared by the processes that can see each other's pids: kernel boot and pid namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def process_start(pid: int) -> int | None:
    """Return the start time of a process in clock ticks since boot (field 22 of /proc/PID/stat), None if it is gone.

    Raises OSError where that cannot be told: running out of descriptors is nobody's death.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(stat.rpartition(")")[2].split()[19])


def own_pid() -> tuple[int, int]:
    """Return this process's pid and start time."""
    pid = os.getpid()
    return pid, process_start(pid) or 0


class ProcessWatch:
    """Calls ``on_death`` once when another process of this host ends. ``close`` when it no longer matters."""

    def __init__(self, pid: int, pid_start: int, on_death: Callable[[], None]) -> None:
        self._on_death = on_death
        self._loop = asyncio.get_running_loop()
        self._fd: int | None = None
        try:
            self._fd = os.pidfd_open(pid)
            start = process_start(pid)
        except ProcessLookupError:
            self._loop.call_soon(on_death)
            return
        except (OSError, OverflowError):  # No pidfds here, no descriptors left, or no pid at all: pings remain.
            self.close()
            return
        if start is not None and start != pid_start:
            self.close()
            self._loop.call_soon(on_death)
            return
        self._loop.add_reader(self._fd, self._ended)

    def _ended(self) -> None:
        self.close()
        self._on_death()

    def close(self) -> None:
        """Stop watching. A repeat does nothing."""
        if self._fd is not None:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = None
