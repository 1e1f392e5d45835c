"""A lone router in the control process, whose script hangs: the fleet goes on; and one that cannot be interrupted."""

import json
import re
import urllib.error
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from served_fleet import ServedFleet
from waiting import wait_until

ROUTER = '[[router]]\nname = "main"\nscript = "disaggregate"\nhang = "200ms"\n'
HANGING = """\
import time
from callboard.router import *


async def route(request: Request, fleet: Fleet) -> Tokens:
    if request.num_tokens == 7:
        time.sleep(3600)
    while request.num_tokens == 8:
        try:
            while True:
                pass
        except BaseException:
            pass
    if request.num_tokens == 9:
        sum(range(10**15))
    async for token in least_loaded(fleet.decode).start_generate(request):
        yield token
"""


@pytest.fixture(scope="module")
def fleet(place_of_module: Any) -> ServedFleet:
    place_of_module.write(HANGING, "mine.py")
    return ServedFleet(place_of_module, more=ROUTER)


def route(fleet: ServedFleet, *words: str) -> str:
    done = fleet.place.run("route", *words)
    assert done.returncode == 0, (done.stdout, done.stderr)
    return str(done.stdout)


def code_of(fleet: ServedFleet, prompt: str) -> int:
    """Return the status of a completion, 0 where the connection breaks."""
    try:
        return fleet.complete(prompt)[0]
    except (urllib.error.URLError, OSError):
        return 0


def test_a_request_that_hangs_gets_500_and_the_others_their_answers(fleet: ServedFleet) -> None:
    route(fleet, "set", "mine.py", "--no-check")
    pids = fleet.pids()
    with ThreadPoolExecutor(9) as pool:
        others = [pool.submit(fleet.complete, "a good one", max_tokens=40) for _ in range(8)]
        status, body = pool.submit(fleet.complete, "seven77").result()
        assert [other.result()[0] for other in others] == [200] * 8
    error = json.loads(body)["error"]
    assert (status, error["type"], error["code"]) == (500, "server_error", "script_error")
    assert fleet.pids() == pids
    assert "mine.py:7 in route: time.sleep(3600)" in fleet.place.run("logs", "--level", "error").stdout
    assert {row["state"] for row in fleet.rows().values()} == {"ready"}


@pytest.mark.parametrize(
    ("prompt", "lines", "words"),
    [
        ("eight888", (10, 11), "script mine (version {}) keeps everything else here from going on at"),
        ("nine 9999", (15,), "it was killed by SIGPROF"),
    ],
    ids=["catches everything", "never returns from C"],
)
def test_a_script_that_cannot_be_interrupted_ends_its_process_and_does_not_come_back(
    fleet: ServedFleet, prompt: str, lines: tuple[int, ...], words: str
) -> None:
    version = re.search(r"version (\d+)", route(fleet, "set", "mine.py", "--no-check"))
    assert version is not None
    assert code_of(fleet, "a good one") == 200
    pid = fleet.pids()["control"]
    with ThreadPoolExecutor(1) as pool:
        hanging = pool.submit(code_of, fleet, prompt)
        wait_until(lambda: fleet.pids()["control"] not in (0, pid))
        assert hanging.result() == 0
    wait_until(lambda: code_of(fleet, "a good one") == 200)
    # What ended the process is not what runs, and the same request ends well.
    [report] = json.loads(route(fleet, "show", "--json"))
    assert (report["change"]["what"], report["change"]["active"]["name"]) == ("failed", "disaggregate")
    assert any(f"mine.py:{line}: " in report["change"]["why"] for line in lines)
    assert code_of(fleet, prompt) == 200
    told = fleet.place.run("logs", "--level", "error").stdout
    assert f"script mine (version {version[1]}) has ended the process before this one, and it is rolled back" in told
    launcher = fleet.place.runtime / "callboard" / "test" / "logs" / "launcher.log"
    assert f"control is restarting: {words.format(version[1])}" in launcher.read_text()
