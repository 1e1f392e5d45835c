"""A fleet on two machines: control node and prefill engine on ``a``, decode engine on ``b``, which has joined it."""

import itertools
import json
import os
import queue
import secrets
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from byte_tokenizer import write_byte_tokenizer
from waiting import PATIENCE_S, wait_until

from callboard.bus.keys import KEY_FILE, SECRET_BYTES, format_secret

from .namespaces import Host

NAME = "demo"
PORT = 7000
MODEL = {
    "model_type": "llama",
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "hidden_size": 512,
    "max_position_embeddings": 2048,
    "vocab_size": 256,
    "dtype": "float32",
}
"""16 KiB of KV for each token: a prompt of 512 tokens is 8 MiB."""
FLEET = """\
name = "demo"
[listen]
http = "127.0.0.1:0"
bus = "tcp://{address}:{port}"
keys = "keys"
silent = "2s"
[models.tiny]
path = "model"
[defaults.kv]
size = "32MiB"
lease = "5s"
[[engine]]
name = "prefill"
roles = ["prefill"]
runner = "simulated"
device = "cpu:0"
[[engine]]
name = "decode"
roles = ["decode"]
runner = "simulated"
device = "cpu:1"
host = "b"
"""


class Pending:
    """What the agent was asked, until it has answered."""

    def __init__(self) -> None:
        self.lines: queue.Queue[dict[str, Any]] = queue.Queue()

    def next(self, seconds: float = PATIENCE_S) -> dict[str, Any]:
        """Return the next line about it. Raises queue.Empty."""
        line = self.lines.get(timeout=seconds)
        assert "failed" not in line, line
        return line

    def end(self, seconds: float = PATIENCE_S) -> dict[str, Any]:
        """Return the last line."""
        while "first" in (line := self.next(seconds)):
            pass
        return line


class JoinedFleet:
    """``start`` brings it up, ``close`` ends what is on this side of it; the rest ends with its machines."""

    def __init__(self, a: Host, b: Host, folder: Path) -> None:
        self.a, self.b, self.folder = a, b, folder
        self._ids = itertools.count()
        self._pending: dict[int, Pending] = {}
        self._agent: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None
        self.port = 0

    def start(self) -> None:
        """Make keys, start the fleet on ``a``, and join it from ``b``."""
        model = self.folder / "model"
        model.mkdir()
        (model / "config.json").write_text(json.dumps(MODEL))
        write_byte_tokenizer(model)
        (self.folder / "fleet.toml").write_text(FLEET.format(address=self.a.address, port=PORT))
        keys = self.folder / "keys"
        keys.mkdir(mode=0o700)
        (keys / KEY_FILE).touch(mode=0o600)
        (keys / KEY_FILE).write_text(format_secret(secrets.token_bytes(SECRET_BYTES)))
        self.up()
        join = self.join()
        assert join.returncode == 0, join.stderr
        self._agent = subprocess.Popen(
            self.a.words(sys.executable, "-P", str(Path(__file__).with_name("agent.py")), folder=self.folder),
            env=self.environment(self.a),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, args=(self._agent,), daemon=True)
        self._reader.start()
        self.until(lambda: not self.complete([1, 2, 3])["error"])

    def up(self) -> None:
        """Start the fleet on ``a``."""
        up = self.callboard(self.a, "up", "fleet.toml", "--detach")
        assert up.returncode == 0, up.stderr
        [url] = [line.split()[1] for line in up.stdout.splitlines() if line.startswith("  URL")]
        self.port = int(url.rpartition(":")[2].removesuffix("/v1"))

    def join(self, *options: str, host: str = "b") -> subprocess.CompletedProcess[str]:
        """Join from ``b``."""
        where = f"tcp://{self.a.address}:{PORT}"
        return self.callboard(self.b, "join", where, "fleet.toml", "--host", host, "--detach", *options)

    def close(self) -> None:
        if self._agent is not None:
            assert self._agent.stdin is not None
            self._agent.stdin.close()  # Its end.
            self._agent.wait()
            assert self._reader is not None
            self._reader.join()
            assert self._agent.stdout is not None
            self._agent.stdout.close()

    # ---- what it is asked ----------------------------------------------------------------------------------------

    def environment(self, host: Host) -> dict[str, str]:
        """Return the environment of processes on a host."""
        base = {key: value for key, value in os.environ.items() if not key.startswith(("XDG_", "COV_", "UCX_"))}
        runtime = {"XDG_RUNTIME_DIR": str(self.folder / f"run-{host.name}")}
        state = {"XDG_STATE_HOME": str(self.folder / f"state-{host.name}")}
        return {**base, **runtime, **state, "XDG_CACHE_HOME": str(self.folder / "cache")}

    def callboard(self, host: Host, *words: str, timeout: float = 150.0) -> subprocess.CompletedProcess[str]:
        """Run a command on a host."""
        return subprocess.run(
            host.words(sys.executable, "-P", "-m", "callboard.tools.cli", *words, folder=self.folder),
            env=self.environment(host),
            text=True,
            capture_output=True,
            timeout=timeout,
            check=False,
        )

    def joined(self) -> dict[str, Any]:
        """Return the state file of the joined host's launcher."""
        state: dict[str, Any] = json.loads((self._joined_folder / "state.json").read_text())
        return state

    def joined_log(self) -> str:
        """Return what the launcher of the joined host has logged."""
        return (self._joined_folder / "logs" / "launcher.log").read_text()

    @property
    def _joined_folder(self) -> Path:
        return self.folder / "run-b" / "callboard" / f"{NAME}@b"

    def rows(self, host: Host, *words: str) -> dict[str, dict[str, Any]]:
        """Return what ``ps`` says on a host."""
        done = self.callboard(host, "ps", "--json", *words)
        assert done.returncode == 0, done.stderr
        [fleet] = json.loads(done.stdout)
        return {row["name"]: row for row in fleet["actors"]}

    def begin(self, kind: str, **what: Any) -> Pending:
        """Have the agent on ``a`` ask something."""
        assert self._agent is not None
        assert self._agent.stdin is not None
        id, pending = next(self._ids), Pending()
        self._pending[id] = pending
        self._agent.stdin.write(json.dumps({"id": id, "kind": kind, **what}) + "\n")
        self._agent.stdin.flush()
        return pending

    def begin_completion(self, prompt: list[int], *, max_tokens: int = 8, request_id: str = "") -> Pending:
        """Begin a request over HTTP on ``a``."""
        return self.begin("complete", port=self.port, prompt=prompt, max_tokens=max_tokens, request_id=request_id)

    def complete(self, prompt: list[int], *, max_tokens: int = 8, request_id: str = "") -> dict[str, Any]:
        """Do so, and return its tokens, error and seconds."""
        return self.begin_completion(prompt, max_tokens=max_tokens, request_id=request_id).end()

    def kv_stats(self) -> dict[str, Any]:
        """Return GetKvStats of each KV manager, None for one that is out of reach."""
        found: dict[str, Any] = self.begin("kv_stats").end()["value"]
        return found

    def is_all_free(self) -> bool:
        """Say whether every block of both pools is free or cached, and nothing is wrong with the books."""
        stats = self.kv_stats()
        return len(stats) == 2 and all(
            each is not None
            and each["free"] + each["cached"] == each["num_blocks"]
            and not each["num_reservations"]
            and not each["problems"]
            for each in stats.values()
        )

    def until(self, condition: Callable[[], bool], seconds: float = PATIENCE_S) -> None:
        """Wait for what happens on the hosts."""
        wait_until(condition, seconds)

    def _read(self, agent: subprocess.Popen[str]) -> None:
        assert agent.stdout is not None
        for text in agent.stdout:
            line = json.loads(text)
            self._pending[line["id"]].lines.put(line)
