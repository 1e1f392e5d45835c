"""The sides of bench/transfer.py while they run: their processes, and the pools that all of them map."""

import contextlib
import importlib.util
import os
import select
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from _transfer_job import LAYOUT, NUM_BLOCKS, NUM_ROWS, PAGE_BYTES, Job, Moved, warm

from callboard.kv.page_store import PageStore

START_S = 60.0
MOVE_S = 60.0
"""A process that is not ready, or a job not done, by then is an error."""
NEEDS = {"ucx": "ucxx", "gloo": "torch", "NIXL": "nixl_cu13", "NIXL packed": "nixl_cu13"}
HERE = Path(__file__).parent
ON_THE_BUS = ("shared pool", "shm", "ucx")
"""Sides whose links must be heard of all the time. The others stand still while it is not their turn: a thread that
polls for nothing would take a core from who is measured."""


@dataclass(frozen=True, slots=True)
class Cores:
    """Where the two processes of a side stay, the same for all sides."""

    near: tuple[int, ...]
    far: tuple[int, ...]

    def __str__(self) -> str:
        if self.near == self.far:
            return "processes are not pinned"
        return f"near ends on cores {list(self.near)}, far ends on cores {list(self.far)}"


def cores(*, is_pinned: bool) -> Cores:
    """Return half of the cores for each end."""
    found = tuple(sorted(os.sched_getaffinity(0)))
    if not is_pinned or len(found) < 2:
        return Cores(found, found)
    return Cores(found[: len(found) // 2], found[len(found) // 2 :])


def what_lacks(side: str) -> str:
    """Say what keeps a side from running here, "" if nothing does."""
    package = NEEDS.get(side, "")
    if package and importlib.util.find_spec(package) is None:
        return f"{package} is not installed (pip install -e '.[bench,ucx]')"
    if side == "memcpy of pages" and shutil.which("cc") is None:
        return "there is no C compiler"
    return ""


class Pools:
    """The pool that jobs read from, and the one they write into. Every process maps the same memory."""

    def __init__(self) -> None:
        self.source = warm(PageStore.create(LAYOUT, NUM_BLOCKS))
        self.target = warm(PageStore.create(LAYOUT, NUM_BLOCKS))
        rng = np.random.default_rng(5)
        for row in self.source.rows():
            row[:] = np.frombuffer(rng.bytes(len(row)), np.uint8)
        self._heads = self.source.rows().reshape(NUM_ROWS, NUM_BLOCKS, PAGE_BYTES)[:, :, :: PAGE_BYTES - 1]

    @property
    def fds(self) -> tuple[int, int]:
        assert self.source.fd is not None
        assert self.target.fd is not None
        return self.source.fd, self.target.fd

    def change(self, seed: int) -> None:
        """Change the first and the last byte of every page: what an earlier job left in the target is wrong now."""
        self._heads[:] = np.random.default_rng(seed).integers(0, 256, self._heads.shape, np.uint8)

    def check(self, side: str, blocks: tuple[list[int], list[int]]) -> None:
        """Exit unless every page is in its place."""
        source, target = (
            store.rows().reshape(NUM_ROWS, NUM_BLOCKS, PAGE_BYTES) for store in (self.source, self.target)
        )
        for ours, theirs in zip(*blocks, strict=True):
            if not np.array_equal(source[:, ours], target[:, theirs]):
                sys.exit(f"{side}: block {ours} is not what lies in block {theirs} of the other pool")


class Side:
    """A side's processes. ``close`` ends them."""

    def __init__(self, name: str, folder: Path, pools: Pools, cores: Cores) -> None:
        self.name = name
        self._folder = folder / name.replace(" ", "-")
        self._folder.mkdir(mode=0o700)
        self._pools = pools
        self._cores = cores
        self._processes: list[subprocess.Popen[bytes]] = []

    def start_far(self) -> None:
        """Begin to start the far end."""
        # From the main thread: when the thread ends that started a process, so does the process (PR_SET_PDEATHSIG).
        self._far = self._start("far", self._cores.far, "")

    def start_near(self) -> None:
        """Wait for the far end, and begin to start the near one, which is told what that says of itself."""
        self._near = self._start("near", self._cores.near, self._ready(self._far))

    def await_ready(self) -> None:
        """Wait for the near end."""
        self._ready(self._near)
        self._signal(signal.SIGSTOP)

    def _start(self, role: str, cores: tuple[int, ...], facts: str) -> "subprocess.Popen[bytes]":
        fds = self._pools.fds
        arguments = [self.name, role, ",".join(map(str, cores)), *map(str, fds), str(self._folder), facts]
        command = [sys.executable, str(HERE / "_transfer_side.py"), *arguments]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=fds)
        self._processes.append(process)
        return process

    def _ready(self, process: "subprocess.Popen[bytes]") -> str:
        """Wait until a process takes orders; return what it says of itself."""
        word, _, facts = self._line(process, START_S).decode().strip().partition(" ")
        if word != "ready":
            raise RuntimeError(f"{self.name}: an end did not start, it said {word!r}")
        return facts

    def move(self, job: Job, *, is_checked: bool = True) -> Moved:
        """Have a job done, and look whether it was. Returns the time of the near end, the CPU of both."""
        self._pools.change(job.seed)
        self._signal(signal.SIGCONT)
        line = msgspec.json.encode(job) + b"\n"
        self._tell(self._far, line)
        self._line(self._far, MOVE_S)
        self._tell(self._near, line)
        moved = msgspec.json.decode(self._line(self._near, MOVE_S), type=Moved)
        self._tell(self._far, b"\n")
        moved.cpu_s += msgspec.json.decode(self._line(self._far, MOVE_S), type=Moved).cpu_s
        self._signal(signal.SIGSTOP)
        if is_checked and moved.num_bytes is None and self.name != "memcpy":
            self._pools.check(self.name, moved.blocks or job.blocks())
        return moved

    def _signal(self, number: signal.Signals) -> None:
        if self.name not in ON_THE_BUS:
            for process in self._processes:
                process.send_signal(number)

    def _tell(self, process: "subprocess.Popen[bytes]", line: bytes) -> None:
        assert process.stdin is not None
        process.stdin.write(line)
        process.stdin.flush()

    def _line(self, process: "subprocess.Popen[bytes]", timeout: float) -> bytes:
        assert process.stdout is not None
        if not select.select([process.stdout], [], [], timeout)[0]:
            raise TimeoutError(f"{self.name} gave no answer within {timeout:.0f} s")
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name}: a process ended with {process.wait()}")
        return line

    def close(self) -> None:
        """End the processes, the near one first."""
        for process in reversed(self._processes):
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):  # It has not read all that it was told.
                        pipe.close()
