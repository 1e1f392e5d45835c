"""A fleet of several hosts: what of its file becomes of each, and where one is shown."""

import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rich.console import Console

from callboard.actors.protocol import Entry
from callboard.bus import Address
from callboard.tools.endpoints import JoinedEndpoints
from callboard.tools.errors import FleetFileError
from callboard.tools.fleet_check import check_fleet
from callboard.tools.fleet_file import decode_fleet_file
from callboard.tools.plan import Machine, Plan, Planner
from callboard.tools.ps import FleetRows, _print, _row, _table
from callboard.tools.top_frame import Sample, frame_of
from callboard.tools.top_view import view

FILE = """\
name = "demo"
[listen]
bus = "tcp://127.0.0.1:7000"
[models.tiny]
path = "model"
[defaults.kv]
size = "1MiB"
[[engine]]
name = "prefill"
roles = ["prefill"]
device = "cpu:0"
[[engine]]
name = "decode"
roles = ["decode"]
device = "cpu:0"
host = "b"
block_size = 32
[[actor]]
name = "ping"
class = "my_actors:Ping"
host = "b"
"""


def plan_of(place: Any, host: str, text: str = FILE) -> Plan:
    file = decode_fleet_file(text, source="fleet.toml", base=place.folder)
    check_fleet(file)
    models = {"tiny": place.folder / "model"}
    with JoinedEndpoints("tcp://127.0.0.1:7000", "127.0.0.1", 0) as endpoints:
        return Planner(
            file,
            run_dir=Path("/run/x"),
            models=models,
            machine=Machine((2, 5), 1 << 32),
            port=8123,
            host=host,
            endpoints=endpoints,
        ).plan()


def test_each_host_starts_its_own_and_all_share_the_directory(place: Any) -> None:
    place.model()
    here, there = plan_of(place, ""), plan_of(place, "b")
    assert [node.name for node in here.nodes] == ["control", "kv-cpu0", "prefill"]
    assert [node.name for node in there.nodes] == ["kv-b-cpu0", "decode", "ping"]
    assert (here.url, there.url) == ("http://127.0.0.1:8123", None)
    assert {node.directory for node in (*here.nodes, *there.nodes)} == {here.directory}
    assert {node.host for node in there.nodes} == {"b"}
    manager, engine, _ = there.nodes
    assert engine.actors[0].config["manager"] == ["kv-b-cpu0", manager.endpoint, "kv-b-cpu0"]
    assert here.memory.processes == there.memory.processes > 0  # Of one engine each.
    # The router and the frontend know of the whole fleet, also before the others are there.
    _, router, frontend = here.nodes[0].actors
    assert router.config["script"].endswith("disaggregate.py")
    assert frontend.config["models"]["tiny"]["roles"] == ["decode", "prefill"]


@pytest.mark.parametrize(
    ("before", "after", "sentence"),
    [
        ('name = "prefill"', 'name = "kv-b-cpu0"', "the KV manager of cpu:0 has that name"),
        ('host = "b"\nblock', 'host = "b b"\nblock', '"b b" is no name of a host'),
        ('bus = "tcp://127.0.0.1:7000"', "", 'host "b" cannot reach a fleet whose bus is "ipc"'),
        ('host = "b"\nblock', "block", "engines on cpu:0 share one pool"),
    ],
)
def test_what_cannot_be_of_several_hosts_is_a_sentence(place: Any, before: str, after: str, sentence: str) -> None:
    place.model()
    with pytest.raises(FleetFileError, match=sentence):
        plan_of(place, "b", FILE.replace(before, after, 1))


def test_the_fleet_file_of_the_documents_is_of_two_hosts(place: Any) -> None:
    place.model()
    page = (Path(__file__).parents[2] / "docs/operating.md").read_text()
    (text,) = [text for text in re.findall(r"```toml\n(.*?)```", page, re.DOTALL) if 'host = "b"' in text]
    text = text.replace('"embedded"', '"model"').replace("[models.smol]", "[models.tiny]")
    text = text.replace('keys = "keys"', "").replace("10.0.0.1", "127.0.0.1")
    assert [node.name for node in plan_of(place, "b", text).nodes] == ["kv-b-cpu", "decode"]


def entries(host: str) -> tuple[Entry, ...]:
    door = Entry("frontend", "frontend", Address("control", "tcp://10.0.0.1:7000", "frontend"))
    there = Address("decode", "tcp://10.0.0.2:4000", "decode")
    return door, Entry("prefill", "engine", door.address), Entry("decode", "engine", there, host=host)


@pytest.mark.parametrize("host", ["", "b"])
def test_ps_and_top_show_hosts_where_there_are_several(host: str) -> None:
    rows = tuple(_row(entry, None, 0.0) for entry in entries(host))
    table = _table(FleetRows("demo", "ready", None, (), 0, rows), is_wide=False)
    frame = frame_of("demo", [Sample(1.0, 1.0, entries(host), {})], rates_s=1.0)
    console = Console(width=160)
    with console.capture() as shown:
        console.print(table)
        console.print(view(frame, sort="name"))
    lines = shown.get().splitlines()
    assert sum("HOST" in line for line in lines) == (2 if host else 0)
    assert sum(line.split()[:2] == ["decode", "b"] for line in lines) == (2 if host else 0)


def test_strangers_are_said_of_the_node_that_turned_them_away(capsys: pytest.CaptureFixture[str]) -> None:
    door, engine, there = entries("b")  # A host that has joined knows no process of the others: their pids are 0.
    far = Address("prefill", "tcp://10.0.0.1:7001", "prefill")
    seen = msgspec.structs.replace(door, num_strangers=3), msgspec.structs.replace(engine, address=far), there
    rows = tuple(_row(entry, None, 0.0) for entry in seen)
    _print(FleetRows("demo", "ready", None, (), 0, rows), is_wide=False)
    assert "\nfrontend: 3 connections without the fleet's keys were turned away" in capsys.readouterr().out
