"""Fleets with keys, in real processes: on TCP, served and supervised as any other, and closed to who lacks the key."""

import json
import os
import re
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from byte_tokenizer import write_byte_tokenizer
from my_actors import Greet

from callboard.bus.keys import KEY_FILE, read_secret

Eventually = Callable[..., None]
ENGINES = """\
[models.tiny]
path = "model"
[defaults.kv]
size = "1MiB"
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
"""
LISTEN = '[listen]\nhttp = "127.0.0.1:0"\nkeys = "keys"\n'


def simulated_model(place: Any) -> None:
    """Write a model directory that a simulated engine and the frontend take: a shape, and a tokenizer of bytes."""
    folder = place.model(vocab_size=256)
    (folder / "model.safetensors").unlink()
    write_byte_tokenizer(folder)
    (folder / "chat_template.jinja").write_text("{% for message in messages %}{{ message['content'] }}{% endfor %}")


def actor_fleet(place: Any, listen: str) -> str:
    text = Path(place.actor_fleet()).read_text()
    return str(place.write(text.replace("[[actor]]", f"{listen}[[actor]]", 1)))


def rows(place: Any, *words: str) -> dict[str, dict[str, Any]]:
    [fleet] = json.loads(place.callboard("ps", "--json", *words).stdout)
    return {row["name"]: row for row in fleet["actors"]}


def everything_readable(place: Any) -> bytes:
    """What a look around shows: the run directory's files, and the processes' arguments and environments."""
    files = [path for path in place.runtime.rglob("*") if path.is_file()]
    files += [Path(f"/proc/{pid}/{name}") for pid in place.processes() for name in ("cmdline", "environ")]
    return b"\n".join(path.read_bytes() for path in files)


def test_a_fleet_on_tcp_with_keys_serves_and_shows_its_secret_nowhere(place: Any, eventually: Eventually) -> None:
    simulated_model(place)
    place.callboard("keys", "new")
    fleet = place.write(f'name = "test"\n{LISTEN}bus = "tcp://127.0.0.1:0"\n{ENGINES}')
    up = place.callboard("up", str(fleet), "--detach")
    assert (up.returncode, "warning" in up.stderr) == (0, False), up.stderr
    before = rows(place)
    assert sorted(before) == ["decode", "frontend", "kv-cpu0", "kv-cpu1", "main", "prefill"]
    assert {row["state"] for row in before.values()} == {"ready"}
    ports = {re.fullmatch(r"tcp://127\.0\.0\.1:(\d+)#.*", row["address"])[1] for row in before.values()}  # type: ignore[index]
    assert len(ports) == 5

    assert place.callboard("chat", "Who are you?", "--max-tokens", "8").stdout.strip()
    parts = json.loads(place.callboard("requests", "--json").stdout)
    assert [part["verb"] for part in parts] == ["prep_recv", "remote_send", "start_generate"]
    assert (parts[1]["lane"], parts[1]["error"]) == ("shm", "")

    control = before["main"]["address"].partition("#")[0]
    by_address = place.callboard("requests", "--fleet", f"test@{control}", "--keys", "keys", "--json")
    assert json.loads(by_address.stdout) == parts

    secret = read_secret(place.folder / "keys")
    seen = everything_readable(place)
    assert b"decode" in seen
    for form in (secret, secret.hex().encode(), (place.folder / "keys" / KEY_FILE).read_bytes().split()[-1]):
        assert form not in seen

    os.kill(before["decode"]["pid"], signal.SIGKILL)
    eventually(lambda: rows(place)["decode"]["num_restarts"] == 1 and rows(place)["decode"]["state"] == "ready")
    assert rows(place)["decode"]["address"] == before["decode"]["address"]
    assert place.callboard("chat", "Are you back?", "--max-tokens", "8").returncode == 0

    port = int(before["main"]["address"].partition("#")[0].rpartition(":")[2])
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
    eventually(lambda: rows(place)["main"]["num_strangers"] == 3)
    assert "frontend, main: 3 connections without the fleet's keys were turned away" in place.callboard("ps").stdout
    assert place.callboard("down").returncode == 0
    assert place.is_empty()


def test_whoever_lacks_the_key_is_told_what_to_do(place: Any) -> None:
    place.callboard("keys", "new")
    assert place.callboard("up", actor_fleet(place, LISTEN), "--detach").returncode == 0  # On ipc.
    assert place.ask(Greet("you")) == "hi you"

    (place.folder / "keys").rename(place.folder / "moved")
    ps = place.callboard("ps")
    assert ps.returncode == 1
    assert re.search(r"there is no key file .*/keys/fleet\.key: copy the fleet's there, or .* --keys DIR", ps.stderr)
    assert "ping     actor" in ps.stdout  # The launcher knows of it all the same.
    requests = place.callboard("requests")
    assert (requests.returncode, "there is no key file" in requests.stderr) == (2, True)
    assert rows(place, "--keys", "moved")["ping"]["address"].startswith("ipc:")

    place.callboard("keys", "new")
    refused = place.callboard("requests")
    assert refused.returncode == 2
    assert re.search(r'the key in .*/keys is not the one fleet "test" was started with: .* --keys DIR', refused.stderr)
    (place.folder / "keys" / KEY_FILE).chmod(0o644)
    assert "run chmod 600" in place.callboard("ps").stderr
    assert place.callboard("down").returncode == 0
    assert place.is_empty()


def test_the_lines_of_the_documents_are_a_fleet_once_there_are_keys(place: Any) -> None:
    page = (Path(__file__).parents[2] / "docs/operating.md").read_text()
    blocks = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    (lines,) = [text for text in blocks if "bus =" in text and "[[engine]]" not in text]
    fleet = actor_fleet(place, lines)
    assert "fleet.toml:4: keys: there is no key file" in place.callboard("check", fleet).stderr
    place.callboard("keys", "new")
    done = place.callboard("check", fleet)
    assert (done.returncode, "bus      tcp://10.0.0.1:7000, with keys" in done.stdout) == (0, True)


def test_a_fleet_does_not_start_with_a_key_that_others_can_read(place: Any) -> None:
    place.callboard("keys", "new")
    (place.folder / "keys" / KEY_FILE).chmod(0o644)
    up = place.callboard("up", actor_fleet(place, LISTEN))
    assert up.returncode == 2
    assert "fleet.toml:4: keys: the keys are not used, because" in up.stderr
    assert "run chmod 600" in up.stderr


def test_a_bus_on_loopback_without_keys_is_served_with_a_warning(place: Any) -> None:
    up = place.callboard("up", actor_fleet(place, '[listen]\nbus = "tcp://127.0.0.1:*"\n'), "--detach")
    assert up.returncode == 0
    assert "any user of this machine can join the fleet, because its bus has no keys" in up.stderr
    assert place.ask(Greet("you")) == "hi you"
    place.callboard("keys", "new")
    assert 'fleet "test" runs without keys: leave --keys out' in place.callboard("ps", "--keys", "keys").stderr


def test_a_port_of_the_bus_that_is_taken_is_a_sentence(place: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        up = place.callboard("up", actor_fleet(place, f'[listen]\nbus = "tcp://127.0.0.1:{port}"\n'))
    assert up.returncode == 1
    assert f"the bus cannot listen at 127.0.0.1:{port} (address already in use): change [listen] bus" in up.stderr
    assert place.is_empty()


def test_a_run_directory_that_was_open_is_closed_before_sockets_lie_in_it(place: Any) -> None:
    folder = place.runtime / "callboard" / "test"
    folder.mkdir(parents=True)
    (place.runtime / "callboard").chmod(0o700)
    folder.chmod(0o777)
    assert place.callboard("up", place.actor_fleet(), "--detach").returncode == 0
    assert folder.stat().st_mode & 0o777 == 0o700
    assert place.ask(Greet("you")) == "hi you"
    (place.runtime / "callboard").chmod(0o755)
    ps = place.callboard("ps")
    assert (ps.returncode, "is not private to you (0700)" in ps.stderr) == (2, True)
    (place.runtime / "callboard").chmod(0o700)
    assert place.callboard("down").returncode == 0
