"""What the README and the documents beside it show works as it stands there."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from fleet import running_fleet

from callboard.actors.actor import start_actor
from callboard.actors.engine.simulated import SimulatedRunner, Simulation, simulated_tokens
from callboard.actors.protocol import SamplingParams
from callboard.bus import Node
from callboard.tools.default_fleet import default_fleet
from callboard.tools.fleet_check import check_fleet
from callboard.tools.fleet_file import decode_fleet_file

ROOT = Path(__file__).parent.parent
TEXT = "\n".join(path.read_text() for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))))


def block(language: str, containing: str) -> str:
    blocks = re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)
    (found,) = [text for text in blocks if containing in text]
    return str(found)


def module(name: str, source: str) -> Any:
    made = ModuleType(name)
    sys.modules[name] = made  # Handlers' annotations are looked up there.
    exec(compile(source, f"documents ({name})", "exec"), made.__dict__)
    return made


async def test_the_first_router_script_routes(tmp_path: Path) -> None:
    script = tmp_path / "my_router.py"
    script.write_text(block("python", "ratio: float"))
    layout = SimulatedRunner(Simulation()).layout
    async with running_fleet(layout=layout, script=str(script), options={"ratio": 0.3}) as fleet:
        got = await fleet.generate(list(range(50)), SamplingParams(max_tokens=5, ignore_eos=True), request_id="r")
        assert got.tokens == simulated_tokens(list(range(50)), 5)
        sent = next(call for call in await fleet.sub_requests("r") if call.verb == "remote_send")
        assert sent.num_computed_tokens == 35


async def test_the_ping_actor_answers() -> None:
    ping = module("readme_ping", block("python", "class Ping(Actor)"))
    async with Node("a") as node:
        ref = await start_actor(node, "ping", ping.Ping())
        assert (await ref.ask(ping.Hello("hello"))).text == "hello to you"


def test_the_ping_actor_starts_from_a_fleet_file(tmp_path: Path) -> None:
    (tmp_path / "ping.py").write_text(block("python", "class Ping(Actor)"))
    text = default_fleet() + block("toml", "[[actor]]")
    check_fleet(decode_fleet_file(text, source="docs", base=tmp_path))


def test_the_ping_actor_is_asked_from_another_process(tmp_path: Path) -> None:
    (tmp_path / "ping.py").write_text(block("python", "class Ping(Actor)"))
    (tmp_path / "fleet.toml").write_text(block("toml", "[[actor]]"))
    with tempfile.TemporaryDirectory(prefix="cbt", dir="/tmp") as runtime:  # Unix sockets want short paths.
        source = block("python", "# ask_ping.py").replace("/tmp/callboard-1000", f"{runtime}/callboard")
        (tmp_path / "ask_ping.py").write_text(source)
        env = {**os.environ, "XDG_RUNTIME_DIR": runtime}
        cli = [sys.executable, "-m", "callboard.tools.cli"]
        subprocess.run([*cli, "up", "fleet.toml", "--detach"], cwd=tmp_path, env=env, check=True, timeout=60)
        try:
            command = [sys.executable, "ask_ping.py"]
            asked = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
        finally:
            subprocess.run([*cli, "down"], env=env, check=True, timeout=60)
    assert (asked.stdout, asked.stderr) == ("good day to you\n", "")


def test_the_bus_is_a_plain_library(tmp_path: Path) -> None:
    script = tmp_path / "plain_bus.py"
    script.write_text(block("python", "class Calculator"))
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60)
    assert (result.stdout, result.stderr) == ("5\n", "")


def test_bringing_a_model_is_a_table_of_the_fleet_file(tmp_path: Path) -> None:
    text = re.sub(
        r"\[models\.smollm2-135m\].*?\n\n", block("toml", "[models.mine]") + "\n", default_fleet(), flags=re.S
    )
    assert "[models.mine]" in text
    fleet = decode_fleet_file(text, source="docs", base=tmp_path).fleet
    assert list(fleet.models) == ["mine"]
