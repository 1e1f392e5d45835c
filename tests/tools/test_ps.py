"""``callboard ps``: one line an actor, readable at 120 columns, and everything in JSON."""

import json
import re
import time
from collections.abc import Callable
from typing import Any

import psutil
import pytest
from served_fleet import ServedFleet

from callboard.tools.ps import Row
from callboard.tools.units import format_count, format_span

Eventually = Callable[..., None]


def is_at_rest(fleet: ServedFleet) -> bool:
    """Say whether what was asked before has ended for engines and managers, as they report it."""
    rows = fleet.rows()
    busy = [rows[name]["num_running"] or rows[name]["num_waiting"] for name in ("prefill", "decode")]
    return not any(busy) and not any(rows[name]["used_blocks"] for name in ("kv-cpu0", "kv-cpu1"))


def test_ps_shows_roles_uptime_load_blocks_lanes_and_the_script_in_120_columns(
    fleet: ServedFleet, eventually: Eventually
) -> None:
    place = fleet.place
    fleet.complete("x" * 100)
    eventually(lambda: fleet.rows()["kv-cpu0"]["lanes"] != "")
    eventually(lambda: fleet.rows()["kv-cpu1"]["cached_blocks"] >= 6 and is_at_rest(fleet))
    heading, titles, *lines = place.callboard("ps").stdout.splitlines()
    assert heading == f"Fleet test: ready at {fleet.url}/v1"
    assert titles.split() == ["NAME", "ROLE", "MODEL", "STATE", "UP", "LOAD", "USED", "CACHED", "BLOCKS", "WITH"]
    assert all(len(line.rstrip()) <= 120 for line in lines)
    shown = {line.split()[0]: " ".join(line.split()) for line in lines}
    up = r"(\d+m )?\d+s"
    assert re.fullmatch(rf"decode engine \(decode\) tiny ready {up} 0/0 kv-cpu1", shown["decode"])
    assert re.fullmatch(rf"main router ready {up} disaggregate [0-9a-f]{{12}}", shown["main"])
    rows = fleet.rows()
    for name, lane in (("kv-cpu0", " kv-cpu1: shm"), ("kv-cpu1", "")):
        row = rows[name]
        numbers = f"{row['used_blocks']} {row['cached_blocks']} {row['num_blocks']}"
        assert re.fullmatch(rf"{name} kv manager ready {up} {numbers}{lane}", shown[name])
    wide = place.callboard("ps", "test", "--wide").stdout
    assert all(f"{row['pid']} " in wide and row["address"] in wide for row in rows.values())


@pytest.mark.parametrize(
    ("roles", "words"),
    [
        ((), "engine"),
        (("prefill", "decode"), "engine"),
        (("decode",), "engine (decode)"),
        (("reviewer", "decode"), "engine (reviewer, decode)"),
    ],
)
def test_labels_of_an_engine_are_shown(roles: tuple[str, ...], words: str) -> None:
    row = Row("e", "engine", roles, "tiny", "ready", 1, 0, 0, 0, None, None, "", "")
    assert row.role == words


def test_ps_json_has_everything_of_an_engine_and_a_manager(fleet: ServedFleet, eventually: Eventually) -> None:
    before = fleet.settled_rows()
    num_generated = before["decode"]["counters"]["num_generated_tokens"] + 5
    num_cached = before["kv-cpu1"]["cached_blocks"] + 6
    fleet.complete("ps " * 33 + "?", max_tokens=5)
    eventually(lambda: fleet.rows()["decode"]["counters"]["num_generated_tokens"] == num_generated)
    eventually(lambda: fleet.rows()["kv-cpu1"]["cached_blocks"] == num_cached and is_at_rest(fleet))
    [found] = json.loads(fleet.place.callboard("ps", "--json").stdout)
    assert (found["name"], found["state"], found["url"], found["problem"]) == ("test", "ready", fleet.url, None)
    rows = {row["name"]: row for row in found["actors"]}
    decode, manager = rows["decode"], rows["kv-cpu1"]
    assert (decode["kind"], decode["roles"], decode["model"], decode["device"]) == (
        "engine",
        ["decode"],
        "tiny",
        "cpu:1",
    )
    assert (decode["manager"], decode["node"], decode["num_restarts"]) == ("kv-cpu1", "decode", 0)
    age_s = time.time() - psutil.Process(decode["pid"]).create_time()
    assert age_s - 20 < decode["uptime_s"] < age_s + 1
    assert decode["address"].endswith("/decode.sock#decode")
    assert decode["decode_tps"] > 0
    assert (manager["used_blocks"], manager["quarantined_blocks"]) == (0, 0)
    assert manager["free_blocks"] == manager["num_blocks"]
    assert (rows["main"]["script"], rows["main"]["counters"]) == ("disaggregate", None)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-1, "0s"), (0.9, "0s"), (59, "59s"), (61, "1m 01s"), (3600, "1h 00m"), (86399, "23h 59m"), (200_000, "2d 7h")],
)
def test_a_span_is_told_by_its_two_largest_units(seconds: float, text: str) -> None:
    assert format_span(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (87.4, "87"),
        (999.4, "999"),
        (999.6, "1k"),
        (4210, "4.21k"),
        (123_456, "123k"),
        (13.1e6, "13.1M"),
        (5e9, "5G"),
    ],
)
def test_a_count_takes_five_characters_at_most(number: float, text: str) -> None:
    assert format_count(number) == text


def test_a_fleet_at_an_address_where_none_is_ends_with_one_sentence(place: Any) -> None:
    for command in ("ps", "top", "metrics"):
        done = place.run(command, "demo@tcp://127.0.0.1:9")
        assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
        assert "nobody listens at tcp://127.0.0.1:9" in done.stderr
