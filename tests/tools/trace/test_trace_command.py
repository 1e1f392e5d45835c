"""``callboard trace`` as users run it, on fleets of real processes: it shows, says what is wrong, and harms nothing."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from served_fleet import ServedFleet, value
from waiting import PATIENCE_S

Eventually = Callable[..., None]


class Output:
    """A running ``callboard trace``, and the lines it has printed so far."""

    def __init__(self, place: Any, *words: str) -> None:
        self.process = place.start("trace", *words)
        self.lines: list[str] = []
        self._reading = threading.Thread(target=self._read, daemon=True)
        self._reading.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))

    def has(self, pattern: str) -> bool:
        return any(re.search(pattern, line) for line in list(self.lines))

    def seen(self) -> str:
        return "\n".join(self.lines[-50:])

    def end(self) -> str:
        """Press Ctrl-C; return what was said on standard error."""
        self.process.send_signal(signal.SIGINT)
        return self.wait()

    def wait(self) -> str:
        """Wait for its end; return what was said on standard error."""
        code = self.process.wait(PATIENCE_S)
        self._reading.join(PATIENCE_S)
        errors = str(self.process.stderr.read())
        for pipe in (self.process.stdout, self.process.stderr):
            pipe.close()
        assert code == 0, errors
        assert "Traceback" not in errors
        return errors


def requests_ended(lines: list[str]) -> list[str]:
    """The requests whose HTTP answer is among lines of JSON."""
    records = [json.loads(line) for line in list(lines)]
    return [record["request"] for record in records if record.get("verb") == "http"]


def test_past_and_present_are_told_and_ctrl_c_is_a_clean_end(fleet: ServedFleet, eventually: Eventually) -> None:
    fleet.complete("What is it that you do?", request_id="early")
    shown = Output(fleet.place)
    eventually(lambda: shown.has("now following test: 5 nodes$"))
    assert shown.has(r"main +→ decode +prep_recv +\d+ .* make room for the KV of \d+ tokens")
    assert shown.has(r"client +← frontend +http .* POST /v1/completions answered 200")
    fleet.complete("And then?", request_id="late")
    eventually(lambda: shown.has("late .* answered 200"))
    assert shown.end() == "callboard: left test, which runs on\n"
    assert not shown.has("\x1b")
    told = [line for line in shown.lines if " early " in line or " late " in line]
    assert len([line for line in told if "start_generate" in line]) == 4


def test_what_is_wrong_is_one_sentence_and_exit_code_2(place: Any, fleet: ServedFleet) -> None:
    cases = {
        (): 'no fleet is running: start one with "callboard up"',
        ("--fleet", "demo"): 'no fleet "demo" is running: start one with "callboard up"',
        ("--fleet", "tcp://127.0.0.1:1"): "nobody listens at tcp://127.0.0.1:1: is the fleet up",
        ("--fleet", "tcp://nowhere"): '"tcp://nowhere" is no address of a fleet: write for example',
        ("--fleet", "a@tcp://10.0.0.1:70"): "the fleet at tcp://10.0.0.1:70 wants its keys: name their directory",
        ("--slower", "soon"): '--slower "soon" is no duration',
    }
    assert place.callboard("trace", "--format", "text").returncode == 2
    for words, sentence in cases.items():
        expect_sentence(place, sentence, *words)
    fleet.complete("Who?", request_id="known")
    more = {
        ("--request", "unknown"): 'no node remembers a request "unknown"',
        ("--verb", "prepare"): 'there is no verb "prepare"',
        ("--actor", "decoder"): 'there is no actor "decoder": did you mean decode?',
        ("--fleet", "tets"): 'no fleet "tets" is running; running: test',
    }
    for words, sentence in more.items():
        expect_sentence(fleet.place, sentence, *words)
    expect_sentence(fleet.place, 'no node remembers a request "unknown"', "--request", "unknown", "--no-follow")


def test_what_is_asked_for_by_name_is_told_however_small_it_is(fleet: ServedFleet) -> None:
    fleet.complete("Who?")
    place = fleet.place
    all_of_it = place.callboard("trace", "--no-follow", "--format", "text").stdout
    assert " tokenise" not in all_of_it
    named = place.callboard("trace", "--no-follow", "--format", "text", "--verb", "tokenise").stdout
    assert " tokenise" in named
    nothing = place.callboard("trace", "--no-follow", "--format", "text", "--last", "0")
    assert (nothing.returncode, nothing.stdout, nothing.stderr) == (0, "", "")


def expect_sentence(place: Any, sentence: str, *words: str) -> None:
    done = place.run("trace", "--format", "text", *words)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert done.stderr.startswith(f"callboard: {sentence}")


def test_a_reader_that_leaves_ends_it_although_nothing_happens(fleet: ServedFleet) -> None:
    fleet.complete("Who?")
    for words in (("--format", "jsonl"), ("--format", "text"), ("--no-follow",)):
        trace = fleet.place.start("trace", *words)
        assert trace.stdout.readline()
        trace.stdout.close()
        assert (trace.wait(PATIENCE_S), trace.stderr.read()) == (0, "")
        trace.stderr.close()


def test_in_a_terminal_there_are_colours_and_q_leaves(fleet: ServedFleet) -> None:
    fleet.complete("Who?")
    for more, has_colors in (({}, True), ({"NO_COLOR": "1"}, False)):
        ours, theirs = pty.openpty()
        command = [sys.executable, "-P", "-m", "callboard.tools.cli", "trace", "--format", "text"]
        trace = subprocess.Popen(
            command,
            env={**fleet.place.env, "TERM": "xterm-256color", **more},
            stdin=theirs,
            stdout=theirs,
            stderr=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=lambda fd=theirs: __import__("fcntl").ioctl(fd, __import__("termios").TIOCSCTTY, 0),  # type: ignore[misc]
        )
        shown = b""
        while b"now following" not in shown:
            shown += os.read(ours, 4096)
        os.write(ours, b"q")
        assert trace.wait(PATIENCE_S) == 0
        assert trace.stderr is not None
        assert b"left test" in trace.stderr.read()
        trace.stderr.close()
        for fd in (ours, theirs):
            os.close(fd)
        assert (b"\x1b[38;5;" in shown) == has_colors


@pytest.fixture(scope="module")
def shaken(place_of_module: Any) -> ServedFleet:
    """A fleet whose tracers are stopped and killed, and an engine at last."""
    return ServedFleet(place_of_module)


def test_who_is_stopped_or_not_emptied_slows_nobody_and_loses_nothing(
    shaken: ServedFleet, eventually: Eventually
) -> None:
    def num_links() -> float:
        return value(shaken.scrape(), "callboard_bus_links", node="control")

    stopped = Output(shaken.place, "--format", "jsonl")
    full = shaken.place.start("trace", "--format", "jsonl")
    while '"following"' not in full.stdout.readline():
        pass
    eventually(lambda: stopped.has('"following"') and num_links() == 4 + 2)
    wanted = []
    for is_long in (False, True):
        stopped.process.send_signal(signal.SIGSTOP)
        for number in range(40):  # Together, more than a pipe holds, by far.
            wanted.append(f"r{is_long:d}-{number}")
            assert shaken.complete("Who?", request_id=wanted[-1])[0] == 200
        if is_long:  # Longer than the nodes wait for a peer that says nothing.
            eventually(lambda: num_links() == 4 + 1)
        stopped.process.send_signal(signal.SIGCONT)
        eventually(lambda: len(requests_ended(stopped.lines)) >= len(wanted))
    eventually(lambda: stopped.has('"kind":"back"'))
    assert stopped.end() == "callboard: left test, which runs on\n"  # The bus's own words are not for users.
    assert stopped.has("is out of reach: it had given up this tracer, which did not listen for a while")
    assert sorted(requests_ended(stopped.lines)) == sorted(wanted)
    notices = [json.loads(line) for line in stopped.lines if '"notice"' in line]
    assert not any(notice.get("num_lost") for notice in notices)

    lines = [full.stdout.readline() for _ in range(1000)]
    assert not any('"notice"' in line for line in lines)
    full.send_signal(signal.SIGINT)
    full.wait(PATIENCE_S)
    assert (full.returncode, full.stderr.read()) == (0, "callboard: left test, which runs on\n")
    full.stdout.close()
    full.stderr.close()


def test_killed_tracers_are_forgotten_by_the_nodes(shaken: ServedFleet) -> None:
    place = shaken.place
    code = """
import asyncio, sys
from callboard.bus import Node
from callboard.tools.running import find_fleet
from callboard.tools.trace.attach import Follower
from contextlib import AsyncExitStack

async def main():
    fleet = find_fleet(None)
    async with AsyncExitStack() as stack:
        followers = []
        for number in range(32):
            node = await stack.enter_async_context(Node(f"watcher-{number}", fleet="test"))
            followers.append(await stack.enter_async_context(Follower(node, fleet)))
        while not all(len(follower.nodes) == 5 for follower in followers):
            await asyncio.sleep(0.02)
        print("attached", flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""
    for _ in range(2):  # A node has room for 32.
        watching = subprocess.Popen([sys.executable, "-c", code], env=place.env, stdout=subprocess.PIPE, text=True)
        assert watching.stdout is not None
        assert watching.stdout.readline() == "attached\n"
        refused = place.callboard("trace", "--format", "text", "--no-follow")
        assert refused.returncode == 0
        assert shaken.complete("Who?")[0] == 200
        watching.kill()
        watching.wait(PATIENCE_S)
        watching.stdout.close()


def test_a_killed_engine_is_told_of_and_followed_again(shaken: ServedFleet, eventually: Eventually) -> None:
    shown = Output(shaken.place)
    eventually(lambda: shown.has("now following"))
    os.kill(shaken.rows()["decode"]["pid"], signal.SIGKILL)
    eventually(lambda: shown.has("-- decode died: what it had noted and not told is lost"))
    eventually(lambda: shown.has("-- decode is back, as a new process"))
    eventually(lambda: shaken.complete("And now?", request_id="after")[0] == 200)
    eventually(lambda: shown.has("after .* start_generate .* done"))
    shown.end()


def test_two_that_watch_from_one_process_do_not_take_each_other_for_the_same(fleet: ServedFleet) -> None:
    code = """
import asyncio
from contextlib import AsyncExitStack
from callboard.tools.bus_client import visitor
from callboard.tools.running import find_fleet
from callboard.tools.trace.attach import Follower

async def main():
    async with AsyncExitStack() as stack:
        followers = []
        for _ in range(3):
            node = await stack.enter_async_context(visitor(find_fleet(None)))
            followers.append(await stack.enter_async_context(Follower(node, find_fleet(None))))
        async with asyncio.timeout(60):
            while not all(len(follower.nodes) == 5 for follower in followers):
                await asyncio.sleep(0.02)
        await asyncio.sleep(1)  # Those who take each other for the same cut each other off, and come back.
        print([len(follower.nodes) for follower in followers])

asyncio.run(main())
"""
    env = fleet.place.env
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[5, 5, 5]"


def test_a_fleet_on_tcp_is_traced_by_its_address_with_its_key_alone(place: Any) -> None:
    place.callboard("keys", "new")
    place.callboard("keys", "new", "other")
    fleet = ServedFleet(place, listen='keys = "keys"\nbus = "tcp://127.0.0.1:0"')
    fleet.complete("Who?", request_id="mine")
    at = fleet.rows()["main"]["address"].partition("#")[0]
    elsewhere = place.folder / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    place.env["XDG_RUNTIME_DIR"] = str(elsewhere)
    done = place.callboard("trace", "--fleet", f"test@{at}", "--keys", "keys", "--no-follow")
    assert (done.returncode, " mine " in done.stdout) == (0, True), done.stderr
    wrong = "is not that of a fleet"
    cases = {
        ("--fleet", f"test@{at}"): f"the fleet at {at} wants its keys: name their directory with --keys DIR",
        ("--fleet", f"test@{at}", "--keys", "other"): f'the key in other {wrong} "test" at {at}',
        ("--fleet", at, "--keys", "keys"): f'the key in keys {wrong} "default" at {at}',
        ("--fleet", f"test@{at}", "--keys", "none"): "there is no key file none/fleet.key",
    }
    for words, sentence in cases.items():
        expect_sentence(place, sentence, *words)
    place.env["XDG_RUNTIME_DIR"] = str(place.runtime)


def test_a_fleet_without_keys_is_traced_by_its_address_from_its_first_request_to_its_end(
    place: Any, eventually: Eventually
) -> None:
    fleet = ServedFleet(place, listen='bus = "tcp://127.0.0.1:0"')
    assert place.callboard("trace", "--no-follow").stderr == "callboard: fleet test remembers no request yet\n"
    shown = Output(place)
    eventually(lambda: shown.has("now following test: 5 nodes; waiting for requests"))
    fleet.complete("Who?", request_id="mine")
    at = fleet.rows()["main"]["address"].partition("#")[0]
    done = place.callboard("trace", "--fleet", f"test@{at}", "--no-follow", "--format", "jsonl")
    assert requests_ended(done.stdout.splitlines()) == ["mine"]
    expect_sentence(place, f'the fleet at {at} is not named "default": give its name', "--fleet", at)
    assert place.callboard("down").returncode == 0
    assert shown.wait() == ""
    assert shown.lines[-1].endswith("-- fleet test has ended")


HEAVY = ("torch", "transformers", "litestar", "uvicorn", "numpy", "triton", "httpx", "textual", "ray", "opentelemetry")


@pytest.mark.parametrize("words", [["trace", "--help"], ["trace", "--no-follow"], ["trace", "--format", "text"]])
def test_lines_load_nothing_heavy(place: Any, words: list[str]) -> None:
    code = f"""
import sys
from callboard.tools.cli import main
try:
    main({words!r})
    import callboard.tools.trace.lines
except SystemExit:
    pass
print([name for name in {HEAVY!r} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], env=place.env, text=True, capture_output=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_run_directory_and_the_logs_are_as_before(fleet: ServedFleet) -> None:
    place = fleet.place
    fleet.complete("Who?")
    before = sorted(path for path in place.runtime.rglob("*"))
    logs = {path: path.stat().st_size for path in Path(place.runtime).rglob("*.log")}
    for words in (("--no-follow",), ("--request", "no")):
        place.callboard("trace", "--format", "text", *words)
    assert sorted(path for path in place.runtime.rglob("*")) == before
    assert {path: path.stat().st_size for path in Path(place.runtime).rglob("*.log")} == logs
