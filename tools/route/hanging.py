"""A limit for code that never awaits: on one loop nothing else can end it."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

MOST_CPU_S = 10.0
"""A dry run takes about one."""
MOST_S = 60.0


class Hung(BaseException):
    """Raised in the middle of what runs; ``line`` is the innermost of the script's."""

    def __init__(self, line: int) -> None:
        super().__init__(line)
        self.line = line


@contextmanager
def while_not_hung(path: str) -> Iterator[None]:
    """Raise Hung in what runs here for too long, if a script's code is running then. In the main thread alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    found: list[int] = []

    def on_alarm(_: int, frame: FrameType | None) -> None:
        while frame is not None and frame.f_code.co_filename != path:
            frame = frame.f_back
        if frame is not None:
            found.append(frame.f_lineno)
            raise Hung(frame.f_lineno)

    before: dict[signal.Signals, Any] = {
        number: signal.signal(number, on_alarm) for number in (signal.SIGVTALRM, signal.SIGALRM)
    }
    # Again and again: the script may catch it, or not be running at that very moment.
    signal.setitimer(signal.ITIMER_VIRTUAL, MOST_CPU_S, 0.05)
    signal.setitimer(signal.ITIMER_REAL, MOST_S, 0.05)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0.0)
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        for number, handler in before.items():
            signal.signal(number, handler)
        if found:
            raise Hung(found[0])
