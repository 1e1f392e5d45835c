"""``make chaos`` as its users run it: what it prints last, and what an interrupt leaves."""

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

from .harness import Outcome
from .many import Totals

TESTS = Path(__file__).parents[1]
SUMS = re.compile(r"\d+ seeds: 0 lost, 0 repeated, 0 leaked, 0 hung")


def start(*options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "chaos", *options]
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, text=True, stdout=pipe, stderr=pipe, start_new_session=True)


def is_working(pid: int) -> bool:
    """Both workers have been started, and an interrupt is heard again."""
    num_children = len(Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    ignored = re.search(r"SigIgn:\s*([0-9a-f]+)", Path(f"/proc/{pid}/status").read_text())
    return num_children > 2 and ignored is not None and not int(ignored[1], 16) & 1 << signal.SIGINT - 1


def test_the_last_line_is_the_sums() -> None:
    process = start("--seeds", "3", "--first", "12", "--jobs", "2")
    out, _ = process.communicate(timeout=120)
    assert (process.returncode, out.splitlines()[-1]) == (0, "3 seeds: 0 lost, 0 repeated, 0 leaked, 0 hung")


def test_an_interrupt_ends_all_processes_and_tells_the_sums_so_far() -> None:
    process = start("--seeds", "100000", "--jobs", "2")
    pause = threading.Event()
    while not is_working(process.pid):
        assert process.poll() is None
        pause.wait(0.05)
    os.killpg(process.pid, signal.SIGINT)  # As a terminal does.
    # Whoever holds the pipes lives: this returns when the last one has ended.
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert re.match(r"interrupted after \d+ of 100000 seeds\n", out)
    assert SUMS.fullmatch(out.splitlines()[-1])


def test_a_failing_seed_is_told_with_the_command_that_shows_it() -> None:
    totals = Totals()
    totals.add(Outcome(3))
    totals.add(Outcome(7, lost=2, problems=["request r1 had no end"]))
    totals.add(Outcome(5, problems=["another run of it had another log"]))
    *failing, _, sums = totals.lines(1.0)
    assert failing == [
        "seed 5 wrong: another run of it had another log",
        "    make chaos SEED=5",
        "seed 7 lost: request r1 had no end",
        "    make chaos SEED=7",
    ]
    assert sums == "3 seeds: 2 lost, 0 repeated, 0 leaked, 0 hung, 1 otherwise wrong"


def test_a_seed_that_is_shown_ends_with_its_sums() -> None:
    process = start("--seed", "12")
    out, _ = process.communicate(timeout=120)
    assert out.splitlines()[-2:] == ["nothing is wrong", "1 seeds: 0 lost, 0 repeated, 0 leaked, 0 hung"]
