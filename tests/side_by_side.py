"""All tests, a run of pytest for each folder, two of them side by side: those with real processes mostly wait.

``make test`` is this. With arguments that name tests it is a plain run of pytest.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
AT_ONCE = 2
LONGEST = ("tools", "end_to_end", "chaos", "kv", "frontend", "bus", "hosts")
"""These begin first: otherwise one of them would be alone at the end."""
CACHE = ".pytest_cache"


def parts() -> list[tuple[str, list[str]]]:
    """Return what each run is called, and the paths of its tests."""
    folders = {path.relative_to(TESTS).parts[0] for path in TESTS.rglob("test_*.py") if path.parent != TESTS}
    order = [*LONGEST, *sorted(folders - set(LONGEST))]
    found = [(name, [f"tests/{name}"]) for name in order if name in folders]
    return [*found, ("others", [f"tests/{path.name}" for path in sorted(TESTS.glob("test_*.py"))])]


class Run:
    """One run of pytest, its output in a file until it has ended."""

    def __init__(self, name: str, paths: list[str], arguments: list[str]) -> None:
        self.name = name
        self.begin_s = time.monotonic()
        folder = TESTS.parent / CACHE / name
        folder.mkdir(parents=True, exist_ok=True)
        self._out = folder / "output"
        command = [sys.executable, "-m", "pytest", "-o", f"cache_dir={CACHE}/{name}", *arguments, *paths]
        # Torch would take both cores in each.
        environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        with self._out.open("wb") as out:
            self.process = subprocess.Popen(
                command, cwd=TESTS.parent, env=environment, stdout=out, stderr=subprocess.STDOUT
            )

    @property
    def is_over(self) -> bool:
        return self.process.poll() is not None

    @property
    def code(self) -> int:
        """Its exit status; a folder of which no test was chosen is no failure."""
        code = abs(self.process.returncode)
        return 0 if code == pytest.ExitCode.NO_TESTS_COLLECTED else code

    def lines(self) -> list[str]:
        return self._out.read_text(errors="backslashreplace").splitlines() or ["nothing was said"]


def main(arguments: list[str]) -> int:
    """Run all tests; return the exit status."""
    if any(not word.startswith("-") for word in arguments):
        return int(pytest.main(arguments))
    waiting, running, ended = parts(), list[Run](), list[Run]()
    is_interrupted = False

    def interrupt(*_: object) -> None:
        nonlocal is_interrupted
        is_interrupted = True
        for run in running:
            run.process.terminate()  # It takes down what it has started, and says what it knows.

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, interrupt)
    begin_s, told = time.monotonic(), list[str]()
    while running or (waiting and not is_interrupted):
        while waiting and len(running) < AT_ONCE and not is_interrupted:
            running.append(Run(*waiting.pop(0), arguments))
        time.sleep(0.1)
        for run in [run for run in running if run.is_over]:
            running.remove(run)
            ended.append(run)
            lines = run.lines()
            told += [f"  {line}" for line in lines if line.startswith(("FAILED ", "ERROR ", "RERUN "))]
            told.append(f"{run.name}: {lines[-1].strip('= ')}")
            print("\n".join(lines), f"\n==== {run.name} took {time.monotonic() - run.begin_s:.0f} s\n", flush=True)
    print("\n".join(told), f"\nall of it took {time.monotonic() - begin_s:.0f} s")
    return 130 if is_interrupted else max(run.code for run in ended)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
