"""``callboard route check``: what a dry run finds in a script, with its line, and that it is quick and light."""

import os
import re
import subprocess
import sys

import pytest
from swapping import HEAD, LINE_OF_BODY, text_of

from callboard.router.script import read_script, shipped_scripts
from callboard.tools.cli import main
from callboard.tools.route.dry_run import dry_run, requests
from callboard.tools.route.hanging import Hung, while_not_hung
from callboard.tools.route.new import TEMPLATE
from callboard.tools.route.types import check_types


@pytest.fixture
def try_script(tmp_path):
    """Return a function that tries a script's body and returns the outcome, and the problems without the path."""

    def run(body, **options):
        path = tmp_path / "mine.py"
        path.write_text(HEAD + body)
        outcome = dry_run(read_script(str(path), options))
        return outcome, [problem.replace(f"{path}:", "line ") for problem in outcome.problems]

    return run


def line(number):
    return f"line {LINE_OF_BODY + number}"


@pytest.mark.parametrize("name", shipped_scripts())
def test_the_scripts_that_ship_pass(name):
    outcome = dry_run(read_script(name))
    assert outcome.problems == ()
    assert [row.name for row in outcome.rows] == [asked.name for group in requests() for asked in group]
    assert not any(row.is_failed for row in outcome.rows)


def test_the_script_that_new_writes_passes(try_script):
    outcome, problems = try_script(TEMPLATE)
    assert problems == []
    by_name = {row.name: row for row in outcome.rows}
    assert by_name["short"].notes == {"why": "short"}
    assert [verb.split()[0] for verb in by_name["long"].verbs] == ["prep_recv", "remote_send", "start_generate"]


def test_it_shows_what_goes_where_with_ranges_and_times():
    outcome = dry_run(read_script("balanced", {"ratio": "0.5"}))
    by_name = {row.name: row for row in outcome.rows}
    assert by_name["long"].verbs == (
        "prep_recv      decode-1 [0, 350)",
        "remote_send    prefill-1 [0, 350)",
        "start_generate decode-1 [350, 700)",
    )
    assert by_name["short"].ttft_ms < by_name["long"].ttft_ms < by_name["long"].total_ms
    assert [verb for verb in by_name["engine dies"].verbs if "(attempt 2)" in verb]


ONE = "    async for token in fleet.engines[0].start_generate(request):\n"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (
            "async def route(request, fleet):\n    return\n    yield\n",
            [line(0), "route yielded nothing"],
        ),
        (
            f"async def route(request, fleet):\n{ONE}        if token.position != 3:\n            yield token\n",
            [line(3), "route yielded position 4 where 3 was due"],
        ),
        (
            f"async def route(request, fleet):\n{ONE}        yield token\n        yield token\n",
            [line(3), "route yielded position 0 where 1 was due"],
        ),
        (
            "async def route(request, fleet):\n    kv = await fleet.engines[0].prep_recv(request)\n"
            f"{ONE.replace('[0]', '[1]')}        yield token\n",
            [line(1), 'write "async with"'],
        ),
        (
            f"async def route(request, fleet):\n    await asyncio.Event().wait()\n{ONE}        yield token\n",
            [line(1), "await asyncio.Event().wait()", "the request passed its deadline", "and 9 more"],
        ),
        (
            f"async def route(request, fleet):\n    while fleet.engines:\n        await asyncio.sleep(0)\n{ONE}"
            "        yield token\n",
            ["goes round in a circle"],
        ),
        (
            f"async def route(request, fleet):\n    len(fleet.engines) / (request.num_tokens - 24)\n{ONE}"
            "        yield token\n",
            [line(1), "ZeroDivisionError", "requests: short (after 0 of 8 tokens), after that (after 0 of 8 tokens)"],
        ),
        (
            f"async def route(request, fleet):\n{ONE}        yield token\n\n"
            "@background(every=1.0)\nasync def work(fleet):\n    fleet.engines[99]\n",
            [line(6), "IndexError", "in the background"],
        ),
    ],
)
def test_what_is_wrong_is_found_and_said_with_its_line(try_script, body, words):
    _, problems = try_script(body)
    assert problems
    for each in words:
        assert each in "\n".join(problems)


def test_a_script_that_never_awaits_is_found(try_script, monkeypatch):
    monkeypatch.setattr("callboard.tools.route.hanging.MOST_CPU_S", 0.5)
    body = "async def route(request, fleet):\n    while True:\n        try:\n            pass\n"
    _, problems = try_script(f"{body}        except BaseException:\n            pass\n    yield\n")
    assert len(problems) == 1
    assert "never awaits anything" in problems[0]
    assert problems[0].startswith("line ")


def test_what_fails_everywhere_with_other_numbers_is_said_once(try_script):
    body = (
        "async def route(request, fleet):\n    await fleet.engines[0].prep_recv(request, end=request.num_tokens + 1)\n"
    )
    _, problems = try_script(f"{body}    yield\n")
    assert len(problems) == 1
    assert "BadRange: [0, 25) is no range of a prompt of 24 tokens" in problems[0]
    assert "and 9 more" in problems[0]


def test_a_script_that_blocks_is_found_without_waiting_for_its_end(try_script, monkeypatch):
    monkeypatch.setattr("callboard.tools.route.hanging.MOST_BLOCKED_S", 0.2)
    body = f"import time\n\nasync def route(request, fleet):\n    time.sleep(5.0)\n{ONE}        yield token\n"
    _, problems = try_script(body)
    assert problems == [f"{line(3)}: it keeps the router from everything else here, for seconds: await what takes long"]


def test_ctrl_c_ends_a_check_without_a_word_of_tasks(tmp_path):
    path = tmp_path / "mine.py"
    body = "async def route(request, fleet):\n    if request.num_tokens == 700:\n        signal.raise_signal(2)\n"
    path.write_text(f"import signal\n{HEAD}{body}{ONE}        yield token\n")
    command = [sys.executable, "-m", "callboard.tools.cli", "route", "check", "--no-types", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 130
    assert done.stderr.strip() == ""


def test_a_script_that_never_loads_is_found(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("callboard.tools.route.hanging.MOST_CPU_S", 0.3)
    path = tmp_path / "mine.py"
    path.write_text("x = 0\nwhile True:\n    x += 1\n")
    assert main(["route", "check", str(path)]) == 2
    assert re.search(r"mine.py:[23]: its code outside of functions does not end", capsys.readouterr().err)


def test_code_that_hangs_elsewhere_is_left_alone():
    with while_not_hung("/nowhere.py"):
        assert sum(range(1000)) == 499500
    with pytest.raises(ValueError, match="mine"), while_not_hung("/nowhere.py"):
        raise ValueError("mine")
    assert issubclass(Hung, BaseException)
    assert not issubclass(Hung, Exception)


def test_a_fleet_with_other_roles_is_made_for_a_script_that_asks_for_them(try_script):
    body = "async def route(request, fleet):\n"
    body += "    async for token in least_loaded(fleet.with_role('reviewer')).start_generate(request):\n"
    outcome, problems = try_script(body + "        yield token\n")
    assert problems == []
    assert outcome.engines[-2:] == ("reviewer-0", "reviewer-1")


def test_a_fleet_with_other_routers_is_made_for_a_script_that_hands_requests_on(try_script):
    body = "async def route(request, fleet):\n"
    body += "    async for token in fleet.router('long').generate(request):\n        yield token\n"
    outcome, problems = try_script(body)
    assert problems == []
    assert not any(row.is_failed for row in outcome.rows)


def test_it_takes_the_same_way_every_time(try_script):
    first, _ = try_script(TEMPLATE)
    again, _ = try_script(TEMPLATE)
    assert first == again


def test_it_loads_nothing_heavy():
    code = (
        "import sys; from callboard.tools.cli import main; code = main(['route', 'check', 'balanced', '--no-types']); "
    )
    code += "print(code, [m for m in ('torch', 'triton', 'transformers', 'litestar', 'rich') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert done.stdout.splitlines()[-1] == "0 []"


@pytest.mark.skipif(not os.environ.get("CALLBOARD_LONG"), reason="mypy reads all of Callboard: CALLBOARD_LONG=1")
def test_types_that_do_not_fit_are_said_with_file_and_line():
    text = text_of("async def route(request: Request, fleet: Fleet) -> Tokens:\n    yield request.num_tokenz\n")
    found = check_types(text).result()
    assert not found.is_good
    assert f'/home/me/mine.py:{LINE_OF_BODY + 1}: error: "Request" has no attribute "num_tokenz"' in found.words
    assert check_types(read_script("adaptive")).result().words == "types: they fit"
