"""What a process leaves behind that a script has ended, and what the next start makes of it."""

import faulthandler
from typing import Any

import pytest
from swapping import FAILING, add_router, change, changer, look, set_script, text_of, to

from callboard.bus.watchdog import open_dump
from callboard.router.actor import RouterActor
from callboard.router.swap.ended import Ended, forget_ended, read_ended, write_ended


def ends(path: str, number: int, line: int = 4) -> None:
    """Leave behind what a process does that ends because of a version."""
    with open_dump(f"{path}.ended") as file:
        write_ended(file, number, line)


async def again(fleet: Any, name: str, path: str) -> RouterActor:
    """Start a router anew, as its process would be."""
    return await add_router(fleet, name, "least_loaded", routes_at=path)


@pytest.fixture
async def router(fleet: Any, tmp_path: Any) -> RouterActor:
    await fleet.add_engine("a")
    fleet.router = await again(fleet, "main", str(tmp_path / "main.routes"))
    return fleet.router


@pytest.fixture
def path(tmp_path: Any) -> str:
    return str(tmp_path / "main.routes")


async def test_a_script_that_ended_its_process_is_not_the_active_one_after_it(fleet, router, path, caplog):
    await set_script(fleet, to("a"))
    await set_script(fleet, text_of(FAILING))
    ends(path, 3)
    next_one = await again(fleet, "next", path)
    report = await look(fleet, next_one)
    assert (report.change.what, report.change.active.name, report.change.epoch) == ("failed", "to_a", 4)
    assert report.change.why == "/home/me/mine.py:4: \nit did not end, and its process was ended"
    assert [each.is_rolled_back for each in report.versions] == [False, False, True]
    assert "script mine (version 3) has ended the process before this one, and it is rolled back" in caplog.text
    assert read_ended(f"{path}.ended") is None, "it is judged once"
    # And so it stays with the one after that, and with the others.
    last = await again(fleet, "last", path)
    assert (await look(fleet, last)).change.id == report.change.id


async def test_all_routers_go_back_from_it(fleet, router, path):
    other = await add_router(fleet, "other", "least_loaded")
    await set_script(fleet, text_of(FAILING), router, other)
    number = (await look(fleet)).change.active.number
    await fleet.kill("node-main")
    ends(path, number)
    back = await again(fleet, "main-again", path)
    await fleet.settle()
    assert [(await look(fleet, each)).change.active.name for each in (back, other)] == ["least_loaded"] * 2


@pytest.mark.parametrize("share", [None, 50.0])
async def test_a_trial_that_ended_its_process_is_over(fleet, router, path, share):
    await change(fleet, changer().try_script(text_of(FAILING), share=share))
    ends(path, 2)
    report = await look(fleet, await again(fleet, "next", path))
    assert (report.change.what, report.change.active.name, report.change.trial) == ("failed", "least_loaded", None)


async def test_one_that_was_returned_to_makes_room_for_what_was_before_it(fleet, router, path):
    await set_script(fleet, text_of(FAILING))
    await set_script(fleet, to("a"))
    await change(fleet, changer().roll_back(None))
    assert (await look(fleet)).change.active.number == 2
    ends(path, 2)
    report = await look(fleet, await again(fleet, "next", path))
    assert report.change.active.number == 1


@pytest.mark.parametrize(
    ("number", "most", "words"),
    [
        (2, 0, "script mine (version 2) has ended the process before this one, and it is not to be rolled back"),
        (1, 3, "the process before this one was ended because it stood still: in version 1, at line 4"),
    ],
)
async def test_what_is_not_to_be_rolled_back_or_runs_no_more_stays_as_it_is(
    fleet, router, path, caplog, number, most, words
):
    await set_script(fleet, text_of(FAILING), max_failures=most)
    ends(path, number)
    report = await look(fleet, await again(fleet, "next", path))
    assert (report.change.what, report.change.active.number) == ("set", 2)
    assert words in caplog.text


async def test_the_first_script_of_all_goes_on_and_it_is_said(fleet, path, caplog):
    ends(path, 1)
    report = await look(fleet, await again(fleet, "main", path))
    assert report.change.what == "started"
    assert "and there is no earlier one: it goes on" in caplog.text


@pytest.mark.parametrize("name", ["mine.py", "schön €/😀.py"])
def test_a_script_is_found_in_what_faulthandler_writes(tmp_path, name):
    path, script = str(tmp_path / "x.ended"), f"/home/me/{name}"
    with open_dump(path) as file:
        names = {"dump": faulthandler.dump_traceback, "file": file}
        exec(compile("\n\ndef route():\n    dump(file, all_threads=True)\n\nroute()\n", script, "exec"), names)
    ended = read_ended(path)
    assert ended is not None
    text, other = text_of(""), text_of("", name="other")
    mine = type(text)(text.name, script, text.source, {}, 7)
    assert ended.text_of([other, mine]) == (mine, 4)
    assert ended.text_of([other]) is None
    assert __file__ in ended.where()
    forget_ended(path)
    forget_ended(path)
    assert read_ended(path) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nonsense",
        f"script {'9' * 5000} line 1\n",
        "main 0x01\n",
        'main 0x01\nThread 0x02 (most recent call first):\n  File "x", line 1 in y\n',
    ],
)
def test_what_says_nothing_is_nothing(tmp_path, text):
    (tmp_path / "ended").write_text(text)
    assert read_ended(str(tmp_path / "ended")) is None


def test_a_version_by_its_number_is_that_one_alone():
    ended = Ended(3, 9)
    texts = [type(to("a"))("mine", "/home/me/mine.py", "", {}, number) for number in (2, 3)]
    assert ended.text_of(texts) == (texts[1], 9)
