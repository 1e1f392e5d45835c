"""Of every run: it ends in order, and says what each folder took, since ``make test`` has a quarter of an hour."""

import signal
from collections import defaultdict
from collections.abc import Iterator

import pytest


def pytest_configure() -> None:
    """End a run that is told to end as Ctrl-C does: fixtures take down the fleets that they have started."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Iterator[None]:
    """Say how long the tests of each folder took, with what they set up and took down."""
    yield
    seconds: defaultdict[str, float] = defaultdict(float)
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                folders = report.nodeid.partition("::")[0].split("/")[1:-1]
                seconds[folders[0] if folders else "others"] += report.duration
    if len(seconds) > 1:
        terminalreporter.section("seconds per folder")
        for folder, total in sorted(seconds.items(), key=lambda each: -each[1]):
            terminalreporter.write_line(f"{total:8.1f}s {folder}")
