"""Fixtures: a private place for fleets, the command line as users run it, and a fleet that many tests look at."""

import asyncio
import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Self

import my_actors
import pytest
from served_fleet import ServedFleet, in_a_thread, rows_of, state_of
from waiting import PATIENCE_S, wait_until

from callboard.actors.protocol import Entry
from callboard.bus import Ask, BusError
from callboard.tools.bus_client import ask, list_entries
from callboard.tools.cli import main

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

ACTORS = Path(my_actors.__file__)


SHORT = {"check", "down", "keys", "logs", "metrics", "ps", "replay", "requests", "top", "trace"}
"""Commands that look at a fleet, or tell it something, and end: most of a process for one is its start."""


def _is_free() -> bool:
    """Say whether this is the main thread, and no loop runs in it: a command may take it."""
    return threading.current_thread() is threading.main_thread() and asyncio._get_running_loop() is None


@contextmanager
def _own_signals() -> Iterator[None]:
    """Have the signals afterwards mean what they did before: a loop that watched for one leaves it to the system."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
        shutil.copy(ACTORS, folder)

    def seen_from(self, folder: Path) -> Self:
        """Return another folder before the same run directories: files of the one are not the other's."""
        made = copy.copy(self)
        made.folder, made.env = folder, dict(self.env)
        return made

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

    def callboard(self, *words: str, timeout: float = 2 * PATIENCE_S) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        if words[0] in SHORT and _is_free():
            return self.run(*words)
        command = [sys.executable, "-P", "-m", "callboard.tools.cli", *words]
        return subprocess.run(
            command, env=self.env, cwd=self.folder, text=True, capture_output=True, timeout=timeout, check=False
        )

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a command as ``callboard`` does, but in this process: a process for each would take half a minute."""
        with (
            pytest.MonkeyPatch.context() as patch,
            _own_signals(),
            TemporaryFile("w+") as out,
            TemporaryFile("w+") as errors,
        ):
            for name in os.environ.keys() | self.env.keys():
                patch.delenv(name, raising=False)
            for name, value in self.env.items():
                patch.setenv(name, value)
            patch.chdir(self.folder)
            with redirect_stdout(out), redirect_stderr(errors):
                try:
                    code: Any = main(words)
                except SystemExit as ended:
                    code = ended.code
            if code == 130:
                raise KeyboardInterrupt  # It was this process that was told to end.
            texts = [(file.flush(), file.seek(0), file.read())[2] for file in (out, errors)]
        return subprocess.CompletedProcess(words, code, *texts)

    def start(self, *words: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-P", "-m", "callboard.tools.cli", *words]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=self.env, cwd=self.folder, text=True, stdout=pipe, stderr=pipe)

    def ask(self, message: Ask[my_actors.Greeted], *, timeout: float = PATIENCE_S) -> str:
        """Ask the actor "ping" of the fleet "test"; return its answer, or the name of the error."""
        fleet = state_of(self)

        def visit() -> str:
            entries: dict[str, Entry] = {}

            def is_listed() -> bool:  # It enters the directory a little after it is ready.
                entries.update({entry.name: entry for entry in list_entries(fleet)})
                return "ping" in entries

            wait_until(is_listed)
            entry = entries["ping"]
            try:
                return ask(fleet, entry.address, message, timeout=timeout).text
            except BusError as error:
                return type(error).__name__

        return in_a_thread(visit)

    def row(self, name: str = "ping") -> dict[str, Any]:
        """What ``ps`` knows of one actor."""
        return rows_of(self)[name]

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


@contextmanager
def new_place() -> Iterator[Place]:
    # Not tmp_path: unix sockets want short paths.
    made = Place(Path(tempfile.mkdtemp(prefix="cbt", dir="/tmp")))
    yield made
    for pid in made.processes():
        os.kill(pid, signal.SIGKILL)
    shutil.rmtree(made.folder)


@pytest.fixture
def place() -> Iterator[Place]:
    with new_place() as made:
        yield made


@pytest.fixture(scope="module")
def place_of_module() -> Iterator[Place]:
    with new_place() as made:
        yield made


@pytest.fixture(scope="session")
def standing() -> Iterator[ServedFleet]:
    with new_place() as made:
        yield ServedFleet(made)


@pytest.fixture
def fleet(standing: ServedFleet, tmp_path: Path) -> Iterator[ServedFleet]:
    """A fleet that stands for all tests which only look at it and ask it, seen from a folder of one's own.

    It remembers what others asked. Who kills, stops or must be alone has a ServedFleet of its own.
    """
    before = standing.pids()
    yield ServedFleet.seen_from(standing, tmp_path)
    assert standing.pids() == before, "this test has changed the fleet of all"


@pytest.fixture
def eventually() -> Callable[..., None]:
    """Wait until a condition holds; what it saw is told if it never does."""
    return wait_until
