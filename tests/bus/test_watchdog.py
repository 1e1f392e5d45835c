"""The watchdog: a guest's code that keeps the loop is interrupted, and nothing else ever is."""

import asyncio
import logging
import re
import signal
import subprocess
import sys
import time
from types import FunctionType
from typing import Any

import pytest

from callboard.bus.watchdog import Hung, Watchdog, limited, open_dump

HUNG_S = 0.12
GUEST = "<guest>"
HOSTS = """
def step(books):
    books.append("begun")
    for _ in range(2000):
        pass
    books.append("ended")
"""


def guest_of(frame: Any) -> str | None:
    return GUEST if frame.f_code.co_filename == GUEST else None


def guests(body: str, **known: Any) -> Any:
    """Return a guest's function ``run``."""
    names = {"asyncio": asyncio, "time": time, "re": re, **known}
    exec(compile(body, GUEST, "exec"), names)
    return names["run"]


class Watched:
    """A loop that is watched, and counts its turns."""

    def __init__(self) -> None:
        self.hung: list[Hung] = []
        self.num_turns = 0
        self.dog = Watchdog(HUNG_S, guest_of, on_hung=self.hung.append)

    async def __aenter__(self) -> "Watched":
        assert self.dog.start()
        self.turning = asyncio.ensure_future(self._turn())
        await asyncio.sleep(0)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.dog.stop()
        self.turning.cancel()
        assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
        assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL

    async def _turn(self) -> None:
        while True:
            self.num_turns += 1
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    "line",
    [
        "while True: pass",
        "time.sleep(3600)",
        "re.match('(a+)+$', 'a' * 60 + 'b')",
        "[None for _ in iter(int, 1)]",
        "__import__('threading').Event().wait()",
        "asyncio.run_coroutine_threadsafe(asyncio.sleep(0), asyncio.get_running_loop()).result()",
    ],
)
async def test_code_that_keeps_the_loop_is_interrupted_at_its_line_and_the_loop_goes_on(line: str) -> None:
    run = guests(f"async def run():\n    await asyncio.sleep(0)\n    {line}\n")
    async with Watched() as watched:
        with pytest.raises(Hung) as hung:
            await run()
        assert (hung.value.file, hung.value.line, hung.value.guest) == (GUEST, 3, GUEST)
        before = watched.num_turns
        await asyncio.sleep(0.1)
        assert watched.num_turns > before
        assert watched.hung[-1] is hung.value


async def test_except_exception_does_not_catch_it_and_what_catches_all_is_interrupted_again() -> None:
    body = """
async def run(caught):
    while True:
        try:
            while True:
                pass
        except {}:
            caught.append(time.monotonic())
            if len(caught) == 3:
                return
"""
    async with Watched() as watched:
        caught: list[float] = []
        with pytest.raises(Hung):
            await guests(body.format("Exception"))(caught)
        assert not caught
        await guests(body.format("BaseException"))(caught)
        await asyncio.sleep(0.1)
        assert len(watched.hung) == 4
        assert caught[1] - caught[0] >= HUNG_S / 4, "its clean-up has some time"


async def test_what_is_not_the_guests_is_never_left_half_done() -> None:
    names: dict[str, Any] = {"__name__": "callboard.of.ours"}
    exec(compile(HOSTS, "ours.py", "exec"), names)
    step, books = names["step"], []
    assert isinstance(step, FunctionType)
    run = guests("async def run(step, books):\n    while True:\n        step(books)\n")
    async with Watched():
        with pytest.raises(Hung):
            await run(step, books)
    assert books[-1] == "ended"
    assert len(books) > 100


async def test_what_asks_without_an_end_and_never_has_to_wait_is_interrupted_between_two_asks() -> None:
    names: dict[str, Any] = {"__name__": "callboard.of.ours", "time": time}
    asks = "async def ask():\n    await inner()\nasync def inner():\n    time.sleep(0.03)\n"
    exec(compile(asks, "ours.py", "exec"), names)
    run = guests("async def run(ask):\n    for _ in range(30): await ask()\n")
    async with Watched():
        with pytest.raises(Hung):
            await run(names["ask"])


async def test_a_guest_that_has_had_the_signal_and_leaves_it_to_the_system_is_interrupted_all_the_same() -> None:
    async with Watched():
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        await asyncio.sleep(HUNG_S)
        with pytest.raises(Hung):
            await guests("async def run():\n    while True: pass\n")()


async def test_a_loop_that_turns_is_left_alone_and_so_is_code_of_nobodys(caplog: pytest.LogCaptureFixture) -> None:
    turning = "async def run():\n    for _ in range(9):\n        time.sleep(0.03)\n        await asyncio.sleep(0)\n"
    async with Watched() as watched:
        await guests(turning)()
        assert not caplog.records
        with caplog.at_level(logging.WARNING):
            time.sleep(3 * HUNG_S)  # noqa: ASYNC251 - nobody's in particular.
        await asyncio.sleep(0.05)
        [record] = caplog.records
        assert re.search(r"has stood still for 0.\d s, in \S+test_watchdog.py:\d+ in test_a_loop", record.getMessage())
        assert not watched.hung


async def test_an_import_is_left_to_come_to_its_end_and_it_is_said(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "comes_slowly.py").write_text("import time\ntime.sleep(0.45)\nHERE = 'all of it'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    async with Watched() as watched:
        run = guests("async def run():\n    import comes_slowly\n    return comes_slowly.HERE\n")
        assert await run() == "all of it"
        await asyncio.sleep(0.05)
        assert not watched.hung
    assert "comes_slowly.py:2 in <module>" in caplog.text


async def test_of_many_that_keep_one_turn_of_the_loop_the_later_ones_have_less_time() -> None:
    run = guests("async def run():\n    await asyncio.sleep(0)\n    while True: pass\n")
    async with Watched() as watched:
        begin = time.monotonic()
        ends = await asyncio.gather(*(run() for _ in range(4)), return_exceptions=True)
        await asyncio.sleep(0.05)
        assert all(isinstance(end, Hung) for end in ends)
        assert len(watched.hung) == 4
        assert sum(each.seconds for each in watched.hung) < 4 * HUNG_S / 2, time.monotonic() - begin


async def test_there_is_one_watchdog_at_a_time_and_none_outside_of_the_main_thread() -> None:
    async with Watched():
        assert not Watchdog(HUNG_S, guest_of).start()
        run = guests("def run():\n    while True: pass\n")
        with pytest.raises(Hung), limited(3600.0, guest_of):  # The watchdog looks already.
            run()
    assert not await asyncio.to_thread(Watchdog(HUNG_S, guest_of).start)


def test_code_that_does_not_end_where_no_loop_runs_is_interrupted_too() -> None:
    run = guests("def run():\n    while True: pass\n")
    with pytest.raises(Hung) as hung, limited(0.1, guest_of):
        run()
    assert hung.value.line == 2
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL


ENDING = """
import asyncio, sys, time
from callboard.bus.watchdog import Watchdog, open_dump

def of_guest(frame):
    return "guest" if frame.f_code.co_filename == "<guest>" else None

def told(hung):
    print("ends at line", hung.line, flush=True)

async def main():
    dump = open_dump(sys.argv[1])
    assert Watchdog(0.1, of_guest, on_end=told, dump=dump).start()
    await asyncio.sleep(float(sys.argv[3]))
    names = {"asyncio": asyncio, "time": time}
    exec(compile(sys.argv[2], "<guest>", "exec"), names)
    await names["run"]()

asyncio.run(main())
print("it came to its end", flush=True)
"""
STUBBORN = """
async def run():
    while True:
        try:
            while True:
                pass
        except BaseException:
            pass
"""
IN_C = "async def run():\n    sum(range(10 ** 15))\n"
WAITING_IN_C = """
import ctypes
async def run():
    lock, mutex = ctypes.CDLL(None).pthread_mutex_lock, ctypes.create_string_buffer(64)
    lock(mutex) or lock(mutex)
"""


def ended(tmp_path: Any, body: str, before_s: float = 0.0) -> tuple[int, str, str]:
    """Return the exit code, what was said, and the dump."""
    command = [sys.executable, "-c", ENDING, str(tmp_path / "dump"), body, str(before_s)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout, (tmp_path / "dump").read_text()


def test_what_catches_every_interruption_ends_with_its_process(tmp_path: Any) -> None:
    code, said, _ = ended(tmp_path, STUBBORN)
    assert code == 1
    assert re.fullmatch(r"ends at line [56]\n", said)


@pytest.mark.parametrize(("body", "line", "by"), [(IN_C, 2, -signal.SIGPROF), (WAITING_IN_C, 5, 1)])
def test_code_in_c_that_never_returns_ends_with_its_process_and_the_dump_says_where(
    tmp_path: Any, body: str, line: int, by: int
) -> None:
    code, said, dump = ended(tmp_path, body, before_s=0.2)
    assert (code, said) == (by, "")
    main = re.match(r"main (0x[0-9a-f]+)\n", dump)
    assert main is not None
    assert re.search(rf'hread {main[1]} \(most recent call first\):\n  File "<guest>", line {line} in run\n', dump)


def test_a_loop_that_idles_for_long_ends_nothing(tmp_path: Any) -> None:
    code, said, dump = ended(tmp_path, "async def run():\n    await asyncio.sleep(1.2)\n")
    assert (code, said) == (0, "it came to its end\n")
    assert "File" not in dump


def test_a_process_that_is_stopped_for_a_while_is_not_taken_for_one_that_hangs(tmp_path: Any) -> None:
    steps = "async def run():\n    print('begun', flush=True)\n"
    steps += "    for _ in range(25):\n        time.sleep(0.02)\n        await asyncio.sleep(0)\n"
    command = [sys.executable, "-c", ENDING, str(tmp_path / "dump"), steps, "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(1.3)  # Ten times as long as its loop may stand, and more.
        process.send_signal(signal.SIGCONT)
        assert process.stdout.read() == "it came to its end\n"
    assert process.returncode == 0


def test_the_dump_is_begun_anew_by_each_process(tmp_path: Any) -> None:
    (tmp_path / "dump").write_text("of the last one")
    open_dump(str(tmp_path / "dump")).close()
    assert re.fullmatch(r"main 0x[0-9a-f]{16}\n", (tmp_path / "dump").read_text())
