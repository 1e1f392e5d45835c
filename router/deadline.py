"""One time limit over many short waits of one task."""

import asyncio
from collections.abc import Callable
from types import TracebackType

from callboard.bus import AskTimeout
from callboard.bus.clock import Clock


class Deadline:
    """A limit that holds only inside of ``with deadline:``, which may be entered again and again.

    A scope of ``asyncio.timeout`` a token costs more than all else the router does with it, and around all tokens it
    would strike while the generator is suspended at a yield, in whoever drives it. If it passes outside of all scopes,
    ``on_idle`` hears of it: whoever reads the tokens may not want the next one for ever. ``close`` when it no longer
    matters.
    """

    def __init__(self, clock: Clock, *, seconds: float, what: str, on_idle: Callable[[AskTimeout], None]) -> None:
        self._clock = clock
        self._until = clock.now() + seconds
        self._what = what
        self._on_idle = on_idle
        self._task: asyncio.Task[object] | None = None
        self._num_cancels = 0
        self._is_past = False
        self._has_struck = False
        self._timer = asyncio.get_running_loop().call_later(seconds, self._strike)

    def remaining_s(self) -> float:
        """Return the seconds left, not below 0."""
        return max(0.0, self._until - self._clock.now())

    def close(self) -> None:
        """Forget the limit. A repeat does nothing."""
        self._timer.cancel()

    def _strike(self) -> None:
        self._is_past = True
        if self._task is not None:
            self._has_struck = True
            self._task.cancel()
        else:
            self._on_idle(self._error())

    def _error(self) -> AskTimeout:
        return AskTimeout(f"{self._what} passed its deadline")

    def __enter__(self) -> None:
        if self._is_past:
            raise self._error()
        task = asyncio.current_task()
        assert task is not None
        self._num_cancels = task.cancelling()
        self._task = task

    def __exit__(self, kind: object, error: BaseException | None, trace: TracebackType | None) -> None:
        task, self._task = self._task, None
        if self._has_struck and task is not None:
            self._has_struck = False
            is_cancelled_too = task.uncancel() > self._num_cancels
            if error is not None and not is_cancelled_too:
                raise self._error() from error
