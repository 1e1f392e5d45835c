"""A limit for code that never awaits, or seldom: on one loop nothing else can end it."""

import asyncio
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from callboard.bus.testing import VirtualLoop

MOST_CPU_S = 10.0
"""A dry run takes about one."""
MOST_S = 60.0
MOST_BLOCKED_S = 2.0
"""Of one step of the loop: all streams of a router stand still for so long."""
TICK_S = 0.1


class Hung(BaseException):
    """Raised in the middle of what runs; ``line`` is the innermost of the script's.

    ``has_blocked``: it may go on after a while, but blocks for too long.
    """

    def __init__(self, line: int, *, has_blocked: bool = False) -> None:
        super().__init__(line)
        self.line = line
        self.has_blocked = has_blocked


@contextmanager
def while_not_hung(path: str) -> Iterator[None]:
    """Raise Hung in what runs here for too long, if a script's code is running then. In the main thread alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    found: list[Hung] = []
    num_ticks, step, num_blocked = 0, -1, 0

    def on_alarm(number: int, frame: FrameType | None) -> None:
        nonlocal num_ticks, step, num_blocked
        while frame is not None and frame.f_code.co_filename != path:
            frame = frame.f_back
        if number == signal.SIGALRM:  # Ticks are counted, not seconds: who gets no CPU for a while does not block.
            num_ticks += 1
            now = _step()
            num_blocked = num_blocked + 1 if now == step and now >= 0 and frame is not None else 0
            step = now
        has_blocked = num_blocked * TICK_S >= MOST_BLOCKED_S
        is_over = number != signal.SIGALRM or has_blocked or num_ticks * TICK_S >= MOST_S
        if frame is not None and (found or is_over):  # Once found, nothing else that it does is waited for.
            found.append(Hung(frame.f_lineno, has_blocked=has_blocked))
            raise found[-1]

    before: dict[signal.Signals, Any] = {
        number: signal.signal(number, on_alarm) for number in (signal.SIGVTALRM, signal.SIGALRM)
    }
    # Again and again: the script may catch it, or not be running at that very moment.
    signal.setitimer(signal.ITIMER_VIRTUAL, MOST_CPU_S, 0.05)
    signal.setitimer(signal.ITIMER_REAL, TICK_S, TICK_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0.0)
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        for number, handler in before.items():
            signal.signal(number, handler)
        if found:
            raise found[0]


def _step() -> int:
    """Return which step of a virtual loop runs; -1 where none does."""
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        return -1
    return loop.num_steps if isinstance(loop, VirtualLoop) else -1
