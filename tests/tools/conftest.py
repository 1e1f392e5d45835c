"""Fixtures: a private place for fleets, and the command line as users run it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

MODEL = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 64,
    "max_position_embeddings": 512,
    "vocab_size": 256,
    "dtype": "float32",
}

ACTORS = '''\
"""A user's actors."""
import asyncio
import os
import time

from callboard.actors.actor import Actor
from callboard.bus import Ask, Message


class Greeted(Message, frozen=True):
    text: str
    pid: int


class Greet(Ask[Greeted], frozen=True):
    name: str


class Die(Ask[Greeted], frozen=True):
    pass


class Hang(Ask[Greeted], frozen=True):
    pass


class Ping:
    def __init__(self, greeting="hi"):
        self.greeting = greeting

    def on_greet(self, message: Greet) -> Greeted:
        return Greeted(f"{self.greeting} {message.name}", os.getpid())

    def on_die(self, message: Die) -> Greeted:
        raise RuntimeError("a bug")

    def on_hang(self, message: Hang) -> Greeted:
        while True:
            pass


class NeverReady(Actor):
    async def start(self):
        await asyncio.Event().wait()


class Loading(Actor):
    async def start(self):
        await self.node.run_blocking(time.sleep, 30)


class Refusing(Actor):
    async def start(self):
        raise OSError("the moon is not in the right phase")
'''


class Place:
    """A folder with fleet files, run directories of its own, and a mark on every process that belongs to it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runtime = folder / "run"
        self.runtime.mkdir(mode=0o700)
        self.mark = f"CALLBOARD_TEST_MARK={folder.name}"
        name, _, value = self.mark.partition("=")
        base = {key: value for key, value in os.environ.items() if not key.startswith(("XDG_", "COV_"))}
        cache = {"XDG_CACHE_HOME": str(folder / "cache"), "XDG_STATE_HOME": str(folder / "state")}
        self.env = {**base, **cache, name: value, "XDG_RUNTIME_DIR": str(self.runtime)}
        (folder / "my_actors.py").write_text(ACTORS)

    def write(self, text: str, name: str = "fleet.toml") -> Path:
        path = self.folder / name
        path.write_text(text)
        return path

    def model(self, name: str = "model", **changes: Any) -> Path:
        path = self.folder / name
        path.mkdir()
        (path / "config.json").write_text(json.dumps(MODEL | changes))
        (path / "model.safetensors").write_bytes(bytes(1 << 20))
        return path

    def actor_fleet(self, kind: str = "Ping", options: str = "{}", restart: str = '{ backoff = "50ms" }') -> str:
        actor = f'[[actor]]\nname = "ping"\nclass = "my_actors:{kind}"\noptions = {options}\nrestart = {restart}\n'
        return str(self.write(f'name = "test"\n{actor}'))

    def callboard(self, *words: str, timeout: float = 40.0) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-P", "-m", "callboard.tools.cli", *words]
        return subprocess.run(
            command, env=self.env, cwd=self.folder, text=True, capture_output=True, timeout=timeout, check=False
        )

    def start(self, *words: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-P", "-m", "callboard.tools.cli", *words]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=self.env, cwd=self.folder, text=True, stdout=pipe, stderr=pipe)

    def ask(self, message: str) -> subprocess.CompletedProcess[str]:
        """Ask the actor "ping" of the one running fleet, from a process of its own."""
        code = f"""
import my_actors
from callboard.bus import BusError
from callboard.tools.bus_client import ask, list_entries
from callboard.tools.running import find_fleet
fleet = find_fleet(None)
[entry] = [entry for entry in list_entries(fleet) if entry.name == "ping"]
try:
    answer = ask(fleet, entry.address, my_actors.{message}, timeout=2.0)
    print(answer.text)
except BusError as error:
    print(type(error).__name__)
"""
        command = [sys.executable, "-c", code]
        return subprocess.run(
            command, env=self.env, cwd=self.folder, text=True, capture_output=True, timeout=20, check=True
        )

    def row(self, name: str = "ping") -> dict[str, Any]:
        """What ``ps --json`` says of one actor."""
        [fleet] = json.loads(self.callboard("ps", "--json").stdout)
        found: dict[str, Any] = next(row for row in fleet["actors"] if row["name"] == name)
        return found

    def processes(self) -> list[int]:
        """The pids of all processes that carry the mark."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                marked = self.mark.encode() in (folder / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if marked:
                found.append(int(folder.name))
        return found

    def is_empty(self) -> bool:
        """Nothing is left: no process, and no run directory."""
        return not self.processes() and not list((self.runtime / "callboard").glob("*"))


@pytest.fixture
def place() -> Iterator[Place]:
    # Not tmp_path: unix sockets want short paths.
    made = Place(Path(tempfile.mkdtemp(prefix="cbt", dir="/tmp")))
    yield made
    for pid in made.processes():
        os.kill(pid, signal.SIGKILL)
    shutil.rmtree(made.folder)


@pytest.fixture
def eventually() -> Callable[..., None]:
    """Wait until a condition holds; fail after some seconds."""

    def wait(condition: Callable[[], bool], seconds: float = 15.0) -> None:
        pause = threading.Event()
        for _ in range(int(seconds / 0.05)):
            if condition():
                return
            pause.wait(0.05)
        raise AssertionError("it did not come to pass")

    return wait
