"""Of every run: it ends in order, what has real processes gets a second try, and what each folder took is said."""

import os
import signal
from collections import defaultdict
from collections.abc import Iterator

import pytest

SECOND_TRY = ("bench", "directory", "end_to_end", "frontend", "hosts", "kv", "security", "survival", "tools")
OUTSIDE = {"subprocess", "socket", "httpx", "real_fleet", "ServedFleet", "JoinedFleet", "Pilot"}
"""Names in a module that has to do with what other processes, sockets or screens do, and when."""
OUTSIDE_FIXTURES = {"door", "open_door", "place", "place_of_module", "standing"}


def pytest_configure() -> None:
    """End a run that is told to end as Ctrl-C does: fixtures take down the fleets that they have started."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # Some hundred processes are started: that each compiles what it imports would be a minute.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let tests of real processes run once more when they fail; what is pure never is: it fails for a reason.

    Each that needed it is named at the end of the run, with its first error (CONTRIBUTING.md says why). Where more
    than a few do, something is broken, and no more are tried again.
    """
    for item in items:
        if not isinstance(item, pytest.Function) or _folder(item.nodeid) not in SECOND_TRY:
            continue
        if not OUTSIDE.isdisjoint(vars(item.module)) or not OUTSIDE_FIXTURES.isdisjoint(item.fixturenames):
            item.add_marker(pytest.mark.flaky(reruns=1))


def _folder(nodeid: str) -> str:
    folders = nodeid.partition("::")[0].split("/")[1:-1]
    return folders[0] if folders else "others"


@pytest.hookimpl(wrapper=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Iterator[None]:
    """Say how long the tests of each folder took, with what they set up and took down."""
    yield
    seconds: defaultdict[str, float] = defaultdict(float)
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                seconds[_folder(report.nodeid)] += report.duration
    if len(seconds) > 1:
        terminalreporter.section("seconds per folder")
        for folder, total in sorted(seconds.items(), key=lambda each: -each[1]):
            terminalreporter.write_line(f"{total:8.1f}s {folder}")
