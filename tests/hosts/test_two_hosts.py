"""A fleet on two machines: one has joined the other's, over a network that is slow, is cut, and comes back.

The tests share it, in this order; each leaves it whole but the last, which ends it.
"""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from callboard.actors.engine.simulated import Simulation, simulated_tokens

from .joined_fleet import MODEL, PORT, JoinedFleet

SHAPE = Simulation(num_layers=MODEL["num_hidden_layers"], vocab_size=256)
NUM_TOKENS = 300
NUM_BYTES = NUM_TOKENS * 16 * 1024
SLOW_BYTES_PER_S = 2_500_000


def prompt(number: int) -> list[int]:
    """A prompt of which nothing is cached."""
    return [(i * 7 + number) % 256 for i in range(NUM_TOKENS)]


@contextmanager
def slow(fleet: JoinedFleet) -> Iterator[None]:
    """Let the cable carry 20 Mbit/s from a to b, late by 10 ms where the kernel has what it takes."""
    rate = f"{SLOW_BYTES_PER_S * 8}"
    try:
        fleet.a.ip("qdisc", "add", "dev", "eth0", "root", "netem", "delay", "10ms", "rate", rate, tool="tc")
    except OSError:
        words = ("tbf", "rate", rate, "burst", "64kb", "latency", "200ms")
        try:
            fleet.a.ip("qdisc", "add", "dev", "eth0", "root", *words, tool="tc")
        except OSError as error:
            pytest.skip(f"the network cannot be made slow here: {error}")
    try:
        yield
    finally:
        fleet.a.ip("qdisc", "del", "dev", "eth0", "root", tool="tc")


@contextmanager
def cut(fleet: JoinedFleet) -> Iterator[None]:
    """Pull the cable."""
    fleet.b.ip("link", "set", "eth0", "down")
    try:
        yield
    finally:
        fleet.b.ip("link", "set", "eth0", "up")


def serves(fleet: JoinedFleet, number: int) -> bool:
    answer = fleet.complete(prompt(number))
    return not answer["error"] and answer["tokens"] == simulated_tokens(prompt(number), 8, SHAPE)


def test_a_request_is_served_by_both_hosts_and_answered_as_one_engine_would(fleet: JoinedFleet) -> None:
    answer = fleet.complete(prompt(0), max_tokens=40, request_id="both")
    assert answer["error"] == ""
    assert answer["tokens"] == simulated_tokens(prompt(0), 40, SHAPE)

    parts = json.loads(fleet.callboard(fleet.b, "requests", "both", "--json").stdout)
    assert [(part["verb"], part["actor"]) for part in parts] == [
        ("prep_recv", "decode"),
        ("remote_send", "prefill"),
        ("start_generate", "decode"),
    ]
    assert (parts[1]["lane"], parts[1]["num_bytes"]) == ("ucx", NUM_BYTES)
    fleet.until(fleet.is_all_free)


def test_either_host_shows_the_whole_fleet(fleet: JoinedFleet) -> None:
    where = f"demo@tcp://{fleet.a.address}:{PORT}"
    words = ("trace", "explain", "both", "--fleet", where, "--keys", "keys")
    with ThreadPoolExecutor() as threads:
        explaining = threads.submit(fleet.callboard, fleet.b, *words)
        looks = ((fleet.a,), (fleet.b,), (fleet.b, where, "--keys", "keys"))
        at_a, *others = threads.map(lambda look: fleet.rows(*look), looks)
    explained = explaining.result().stdout
    assert {name: row["host"] for name, row in at_a.items()} == {
        "decode": "b",
        "frontend": "",
        "kv-b-cpu1": "b",
        "kv-cpu0": "",
        "main": "",
        "prefill": "",
    }
    addresses = {name: row["address"] for name, row in at_a.items()}
    assert [{name: row["address"] for name, row in look.items()} for look in others] == [addresses, addresses]
    assert addresses["decode"].startswith(f"tcp://{fleet.b.address}:")
    # The clock of b is far ahead, and what happened on a is told by it all the same, with how far off it may be.
    assert "4.7 MiB by ucx to kv-b-cpu1" in explained
    assert "Other hosts' clocks may be off: " in explained


def test_pages_that_take_long_are_waited_for(fleet: JoinedFleet) -> None:
    with slow(fleet):
        answer = fleet.complete(prompt(1), request_id="slow")
    assert answer["tokens"] == simulated_tokens(prompt(1), 8, SHAPE), answer
    assert answer["seconds"] > 0.7 * NUM_BYTES / SLOW_BYTES_PER_S  # It did go over that cable.
    fleet.until(fleet.is_all_free)


def test_a_cable_cut_under_a_transfer_costs_a_retry_and_no_block(fleet: JoinedFleet) -> None:
    with slow(fleet):
        pending = fleet.begin_completion(prompt(2), request_id="cut")
        fleet.until(lambda: (fleet.kv_stats().get("kv-b-cpu1") or {}).get("reserved", 0) > 0)
        with cut(fleet):
            fleet.until(lambda: "out of reach" in fleet.joined_log())
            # What was lent to the request on this side has come back, though nobody there can be asked.
            fleet.until(lambda: fleet.kv_stats()["kv-cpu0"]["leased"] == 0)
    answer = pending.end()
    assert answer["error"] == "", answer
    assert answer["tokens"] == simulated_tokens(prompt(2), 8, SHAPE)
    fleet.until(fleet.is_all_free)
    fleet.until(lambda: serves(fleet, 3))
    fleet.until(lambda: "reached again after" in fleet.joined_log())


def test_a_request_while_the_cable_is_cut_ends_with_a_sentence(fleet: JoinedFleet) -> None:
    with cut(fleet):
        fleet.until(lambda: "kv-b-cpu1" not in fleet.kv_stats())
        assert "no ready engine serves model 'tiny' with role 'decode'" in fleet.complete(prompt(4))["error"]
    fleet.until(lambda: serves(fleet, 5))
    fleet.until(fleet.is_all_free)


def test_a_fleet_that_is_started_again_has_its_joined_host_at_once(fleet: JoinedFleet) -> None:
    before = fleet.joined()["nodes"]
    down = fleet.callboard(fleet.a, "down")
    assert "Fleet demo is stopped.\nOf b, its processes wait for the fleet" in down.stdout
    fleet.up()
    fleet.until(lambda: serves(fleet, 6))
    assert fleet.joined()["nodes"] == before
    assert "was stopped, or its control node has died: this host waits for it" in fleet.joined_log()
    fleet.until(fleet.is_all_free)


def test_a_host_that_leaves_is_gone_from_the_fleet_and_leaves_nothing(fleet: JoinedFleet) -> None:
    assert fleet.b.num_processes() > 0
    fleet.b.run("kill", "-INT", str(fleet.joined()["launcher_pid"]))  # As Ctrl-C does.
    fleet.until(lambda: fleet.b.num_processes() == 0)
    assert not list((fleet.folder / "run-b" / "callboard").iterdir())
    assert list(fleet.kv_stats()) == ["kv-cpu0"]
    fleet.until(lambda: fleet.kv_stats()["kv-cpu0"]["leased"] == 0)
