"""``callboard route`` on a running fleet with two routers, as a person uses it; all tests share the fleet."""

import json
import os
import re
import signal

import pytest
from served_fleet import ServedFleet, state_of
from survival.served import Served
from survival.swaps import Swaps
from waiting import wait_until

from callboard.actors.engine.simulated import Simulation, simulated_tokens
from callboard.actors.model_config import read_model_config

ROUTERS = '[[router]]\nname = "main"\nscript = "disaggregate"\ncount = 2\nrestart = { backoff = "50ms" }\n'
MINE = """\
from callboard.router import *


async def route(request: Request, fleet: Fleet, *, fails: bool = False) -> Tokens:
    if fails and request.num_tokens == 7:
        raise KeyError("planted")
    async for token in least_loaded(fleet.decode).start_generate(request):
        yield token
"""


@pytest.fixture(scope="module")
def served(place_of_module):
    return ServedFleet(place_of_module, more=ROUTERS)


@pytest.fixture
def fleet(served):
    """The fleet, back at its first script after each test."""
    served.place.write(MINE, "mine.py")
    (served.place.folder / "new.py").unlink(missing_ok=True)
    yield served
    done = served.place.run("route", "rollback", "1")
    assert done.returncode == 0 or "is the active one" in done.stderr


def route(fleet, *words, code=0):
    done = fleet.place.run("route", *words)
    assert done.returncode == code, (done.stdout, done.stderr)
    return done.stdout if code == 0 else done.stderr


def shown(fleet):
    return json.loads(route(fleet, "show", "--json"))


def ask(fleet, num, prompt="seven77"):
    return [fleet.complete(prompt)[0] for _ in range(num)]


def test_a_script_is_written_checked_set_shown_and_rolled_back(fleet):
    assert "Next: callboard route check new.py" in route(fleet, "new", "new")
    assert "exists already" in route(fleet, "new", "new.py", code=2)
    assert route(fleet, "check", "new.py", "--no-types").endswith("OK.\n")
    assert route(fleet, "set", "new.py", "--set", "short=9").startswith("New requests take new (version ")
    for report in shown(fleet):
        active = report["change"]["active"]
        assert (active["name"], active["options"]) == ("new", {"short": 9})
        assert active["path"] == str(fleet.place.folder / "new.py")
    assert ask(fleet, 2) == [200, 200]
    assert route(fleet, "show", "--source") == (fleet.place.folder / "new.py").read_text()
    told = route(fleet, "show")
    assert re.search(r"Router main-0: new \(version \d+\), set by \S+@", told)
    assert "options  short=9" in told
    assert route(fleet, "rollback").startswith("New requests take disaggregate (version 1)")
    history = route(fleet, "history")
    assert re.search(r"version 1 +disaggregate \w+  rolled back by", history)
    assert "Router main-1: the same" in history


def test_a_script_that_fails_is_not_set_and_set_anyway_it_is_rolled_back(fleet):
    fleet.place.write(MINE.replace("fails and request.num_tokens == 7", "True"), "mine.py")
    refused = route(fleet, "set", "mine.py", code=2)
    assert "fails on simulated engines, and was not set" in refused
    assert 'mine.py:6 in route: raise KeyError("planted")' in refused
    assert shown(fleet)[0]["change"]["active"]["name"] == "disaggregate"
    route(fleet, "set", "mine.py", "--no-check")
    codes = ask(fleet, 8)
    assert 3 <= codes.count(500) <= 6  # Three at one router, and some at the other before it hears of it.
    wait_until(lambda: {report["change"]["what"] for report in shown(fleet)} == {"failed"})
    assert 'mine.py:6 in route: raise KeyError("planted")' in route(fleet, "history")
    assert ask(fleet, 1) == [200]


def test_clients_are_told_nothing_of_the_scripts_inside(fleet):
    route(fleet, "set", "mine.py", "--set", "fails=true", "--max-failures", "0")
    status, body = fleet.complete("seven77")
    assert status == 500
    error = json.loads(body)["error"]
    assert (error["type"], error["code"]) == ("server_error", "script_error")
    assert not re.search(r"mine|planted|KeyError|/", error["message"])
    logged = fleet.place.run("logs", "--level", "error").stdout
    assert 'mine.py:6 in route: raise KeyError("planted")' in logged


def test_a_canary_takes_some_requests_and_is_promoted(fleet):
    assert "50 per cent" in route(fleet, "set", "mine.py", "--canary", "50")
    assert ask(fleet, 24) == [200] * 24
    counts = {each["script"]["name"]: 0 for report in shown(fleet) for each in report["versions"]}
    for report in shown(fleet):
        trial = report["change"]["trial"]["number"]
        counts["mine"] += sum(e["num_requests"] for e in report["versions"] if e["script"]["number"] == trial)
    assert 2 <= counts["mine"] <= 22
    assert "canary   mine" in route(fleet, "show")
    assert route(fleet, "promote").startswith("New requests take mine")
    assert {report["change"]["active"]["name"] for report in shown(fleet)} == {"mine"}
    assert "nothing is tried" in route(fleet, "promote", code=2)


def test_a_shadow_decides_and_sends_nothing(fleet):
    assert "in the shadow of disaggregate" in route(fleet, "set", "balanced", "--shadow")
    assert ask(fleet, 6, "a prompt of so many words that a split of it moves") == [200] * 6
    wait_until(lambda: sum(report["shadow"]["num_compared"] for report in shown(fleet)) == 6)
    told = route(fleet, "show")
    assert re.search(r"decided alike for 0 of \d requests: 0.0 per cent", told)
    assert re.search(r"remote_send    prefill \[\d+, 50\) ≠ remote_send    prefill \[\d+, 40\)", told)
    assert "callboard route promote" not in route(fleet, "rollback")


def test_one_router_is_changed_by_its_name(fleet):
    route(fleet, "set", "least_loaded", "--router", "main-1")
    assert [report["change"]["active"]["name"] for report in shown(fleet)] == ["disaggregate", "least_loaded"]
    assert "run different scripts" in route(fleet, "set", "mine.py", "--canary", "10", code=2)
    assert 'no router "main-7": there is main-0, main-1' in route(fleet, "show", "--router", "main-7", code=2)
    route(fleet, "set", "disaggregate")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("set", "nothing.py"), "there is no such script"),
        (("set", "balancd"), "Did you mean 'balanced'?"),
        (("set", "balanced", "--set", "ratio"), "sets no option: write for example --set ratio=0.3"),
        (("set", "balanced", "--set", "ratio=much"), "Give a value of type float"),
        (("set", "balanced", "--set", "ration=1"), "Did you mean 'ratio'?"),
        (("set", "mine.py", "--canary", "0"), "is no share"),
        (("set", "mine.py", "--canary", "lots"), "is no share"),
        (("set", "mine.py", "--canary", "5", "--shadow"), "leave --canary or --shadow out"),
        (("set", "mine.py", "--max-failures", "21"), "is no number of failures"),
        (("rollback", "77"), "there is no such version; known are"),
        (("new", "two words"), "is no name for a script"),
        (("new", "balanced"), "ships with Callboard"),
        (("new", "no/such/folder/mine"), "cannot write"),
        (("check", "."), "there is no such script"),
        (("show", "--fleet", "nowhere"), 'no fleet "nowhere" is running'),
        ((), "COMMAND"),
    ],
)
def test_bad_input_is_answered_with_a_sentence(fleet, words, sentence):
    assert sentence in route(fleet, *words, code=2)


def test_the_scripts_that_ship_are_listed(fleet):
    assert re.search(r"^balanced +P computes \[0, split\)", route(fleet, "list"), re.MULTILINE)


async def test_swaps_under_load_lose_repeat_and_fail_nothing(fleet):
    facts = read_model_config(fleet.place.folder / "model")
    load = Served(state_of(fleet.place).folder, state_of(fleet.place), fleet.url)
    swaps = Swaps(load)
    await swaps.run(30)
    assert len(swaps.seconds) == 30
    assert len(swaps.versions) > 10
    assert len(load.answers) > 30
    for answer in load.answers:
        due = simulated_tokens(
            answer.prompt, answer.sampling.max_tokens, Simulation().shaped_like(facts), answer.sampling
        )
        assert (answer.error, answer.tokens) == ("", due)
    await load.assert_all_free()


def test_a_router_that_is_killed_comes_back_with_what_was_set(fleet):
    route(fleet, "set", "mine.py")
    pid = fleet.pids()["main-1"]
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: fleet.pids().get("main-1", 0) not in (0, pid) and "main-1" in fleet.rows())
    assert [report["change"]["active"]["name"] for report in shown(fleet)] == ["mine", "mine"]
