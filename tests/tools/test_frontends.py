"""A fleet with two frontends in processes of their own: both answer, either may be killed or restarted, one port."""

import json
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit

import pytest
from served_fleet import ServedFleet, in_a_thread, requests_by_frontend, samples_of, state_of
from waiting import PATIENCE_S

from callboard.actors.stats_protocol import GetFrontendStats
from callboard.tools.bus_client import ask, find_entries

Eventually = Callable[..., None]
NAMES = ["frontend-0", "frontend-1"]
SMALL = 4096
"""Bytes that a client's kernel takes of an answer that is not read."""


@pytest.fixture(scope="module")
def fleet(place_of_module: Any) -> ServedFleet:
    return ServedFleet(place_of_module, listen="frontends = 2")


class Stream:
    """A client of its own connection that asks for a long answer, and reads none of it before ``rest``."""

    def __init__(self, url: str) -> None:
        address = urlsplit(url)
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL)
        self._socket.settimeout(PATIENCE_S)
        self._socket.connect((address.hostname, address.port))
        body = json.dumps({"model": "tiny", "prompt": "a", "stream": True, "max_tokens": 400, "ignore_eos": True})
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        self._socket.sendall((head + body).encode())
        self.text = self._socket.recv(200)

    def rest(self) -> bool:
        """Read to the end; return whether that was the end of the answer."""
        with suppress(ConnectionResetError):
            while piece := self._socket.recv(1 << 16):
                self.text += piece
        self._socket.close()
        return self.text.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


def in_flight(fleet: ServedFleet) -> dict[str, int]:
    """How many requests each frontend is answering, as it says itself."""
    state = state_of(fleet.place)

    def look() -> dict[str, int]:
        entries = find_entries(state, kind="frontend")
        return {each.name: ask(state, each.address, GetFrontendStats()).everything.num_in_flight for each in entries}

    return in_a_thread(look)


@contextmanager
def asking(fleet: ServedFleet) -> Iterator[list[Any]]:
    """Have three clients ask again and again, each with connections of its own; yield what was answered."""
    answers: list[Any] = []
    is_over = threading.Event()

    def ask_on() -> None:
        while not is_over.is_set():
            try:
                answers.append(fleet.complete("hello", max_tokens=4)[0])
            except OSError as error:
                answers.append(error)

    threads = [threading.Thread(target=ask_on) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        yield answers
    finally:
        is_over.set()
        for thread in threads:
            thread.join()


def test_each_frontend_is_a_process_and_commands_know_them(fleet: ServedFleet) -> None:
    rows = fleet.rows()
    assert [name for name, row in rows.items() if row["kind"] == "frontend"] == NAMES
    assert {rows[name]["state"] for name in NAMES} == {"ready"}
    assert len({rows[name]["pid"] for name in (*NAMES, "main")}) == 3
    assert fleet.get("/health/live")[0] == fleet.get("/health/ready")[0] == fleet.get("/health")[0] == 200
    assert fleet.complete("hello", request_id="mine")[0] == 200
    place = fleet.place
    frames = place.callboard("top", "test", "--once", "--json").stdout
    assert [row["name"] for row in json.loads(frames.splitlines()[-1])["frontends"]] == NAMES
    parts = json.loads(place.callboard("requests", "mine", "--fleet", "test", "--json").stdout)
    assert {part["verb"] for part in parts} >= {"start_generate"}
    nodes = set(place.callboard("logs", "--list", "--fleet", "test").stdout.split())
    assert nodes >= {*NAMES, "control"}


def test_whichever_frontend_is_scraped_the_numbers_are_the_same(fleet: ServedFleet, eventually: Eventually) -> None:
    with asking(fleet) as answers:
        eventually(lambda: len(answers) >= 30)
    assert set(answers) == {200}
    scraped = [fleet.scrape()]
    eventually(lambda: sum(requests_by_frontend(fleet.scrape()).values()) >= len(answers))
    scraped += [fleet.scrape() for _ in range(6)]
    assert set(requests_by_frontend(scraped[-1])) == set(NAMES)
    assert len({frozenset(each) for each in scraped[1:]}) == 1, "no series comes and goes"
    for before, after in pairwise(scraped):
        counters = [key for key in before if key[0].endswith(("_total", "_count", "_sum", "_bucket"))]
        assert all(after[key] >= before[key] for key in counters), "no number shrinks"
    text = fleet.place.callboard("metrics", "test").stdout
    assert requests_by_frontend(samples_of(text)) == requests_by_frontend(scraped[-1]), "each number is printed once"


def test_a_frontend_that_is_killed_costs_its_own_connections_alone(fleet: ServedFleet, eventually: Eventually) -> None:
    pids = {name: fleet.rows()[name]["pid"] for name in NAMES}
    streams = [Stream(fleet.url) for _ in range(8)]
    assert all(stream.text.startswith(b"HTTP/1.1 200") for stream in streams)
    lost = in_flight(fleet)["frontend-0"]
    assert 1 <= lost <= 7
    with asking(fleet) as answers:
        os.kill(pids["frontend-0"], signal.SIGKILL)
        num_before = len(answers)
        eventually(lambda: len(answers) >= num_before + 20)
        assert sum(stream.rest() for stream in streams) == 8 - lost
        eventually(lambda: (fleet.rows().get("frontend-0") or {}).get("pid") not in (None, 0, pids["frontend-0"]))
        eventually(lambda: fleet.rows()["frontend-0"]["state"] == "ready")
    # One request of each client may have been in the midst of it.
    assert sum(answer != 200 for answer in answers) <= 3
    rows = fleet.rows()
    assert (rows["frontend-0"]["num_restarts"], rows["frontend-1"]["num_restarts"]) == (1, 0)
    assert rows["frontend-1"]["pid"] == pids["frontend-1"]
    with asking(fleet) as answers:
        eventually(lambda: requests_by_frontend(fleet.scrape()).get("frontend-0", 0) > 0)
    assert set(answers) == {200}


def test_a_restart_loses_no_request_however_long_it_takes(fleet: ServedFleet, eventually: Eventually) -> None:
    before = {name: fleet.rows()[name]["pid"] for name in NAMES}
    streams = [Stream(fleet.url) for _ in range(4)]
    assert in_flight(fleet)["frontend-1"] >= 1
    restarting = fleet.place.start("restart", "frontend-1", "--fleet", "test")
    with asking(fleet) as answers:
        eventually(lambda: fleet.rows()["frontend-1"]["state"] == "draining")
        num_before = len(answers)
        eventually(lambda: len(answers) >= num_before + 20)
        assert all(stream.rest() for stream in streams)
        said, errors = restarting.communicate(timeout=PATIENCE_S)
    assert restarting.returncode == 0, errors
    assert said.splitlines()[-1] == "frontend-1 was restarted, and serves again."
    assert set(answers) == {200}
    after = {name: fleet.rows()[name]["pid"] for name in NAMES}
    assert after["frontend-0"] == before["frontend-0"]
    assert after["frontend-1"] != before["frontend-1"]


@pytest.mark.parametrize("frontends", [1, 2])
def test_a_second_fleet_cannot_have_the_port(fleet: ServedFleet, frontends: int) -> None:
    place, port = fleet.place, urlsplit(fleet.url).port
    text = (place.folder / "fleet.toml").read_text().replace('name = "test"', 'name = "other"', 1)
    file = place.write(text.replace("frontends = 2", f"frontends = {frontends}"), "other.toml")
    up = place.callboard("up", str(file), "--detach", "--port", str(port))
    assert up.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port} (address already in use): pass --port N for another one" in up.stderr
    assert fleet.get("/health/live")[0] == 200


def test_down_ends_all_of_it_and_lets_the_port_go(fleet: ServedFleet, eventually: Eventually) -> None:
    address = urlsplit(fleet.url)
    assert fleet.place.callboard("down", "test").returncode == 0
    eventually(fleet.place.is_empty)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((address.hostname, address.port))
