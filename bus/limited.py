"""Work of a guest's that may never end, in a thread of its own: who asked for it goes on, whatever becomes of it.

A thread cannot be stopped from outside. Code of Python's in it can be interrupted, between two of its instructions;
what waits in C goes on, and keeps nothing but its thread.
"""

import asyncio
import ctypes
import logging
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any, Generic, TypeVar

from .watchdog import IMPORTING, OWN, GuestOf

T = TypeVar("T")
log = logging.getLogger("callboard.bus")

NUM_TRIES = 30
"""Interruptions of what catches them."""
TRY_S = 0.01


class Interrupted(BaseException):
    """Raised in the middle of work that has taken too long."""


class Unfinished(Exception):
    """Work that did not end in its time. ``line`` is where in the guest's ``file`` it was then, None if nowhere."""

    def __init__(self, seconds: float, file: str, line: int | None) -> None:
        super().__init__(f"it did not end within {seconds:g} s")
        self.file = file
        self.line = line


class LimitedWork(Generic[T]):
    """One call of a function in a thread of its own, which ends with the process at the latest.

    ``is_inline``: on a virtual clock it is called on the loop, and has all the time it takes.
    """

    def __init__(self, function: Callable[..., T], *arguments: Any, is_inline: bool) -> None:
        self._is_inline = is_inline
        self._loop = asyncio.get_running_loop()
        self._done: asyncio.Future[T] = self._loop.create_future()
        self._function = function
        self._arguments = arguments
        self._thread = threading.Thread(target=self._run, name="limited", daemon=True)

    @property
    def is_going_on(self) -> bool:
        """Whether its thread still runs."""
        return self._thread.is_alive()

    async def result(self, seconds: float, guest_of: GuestOf) -> T:
        """Begin, and return the result. Raises Unfinished, and what the function raises.

        When the time is over, or who waits is cancelled, the guest's code is interrupted, except in an import that it
        makes: that ends by itself, and half of a module would be left behind.
        """
        if self._is_inline:
            await asyncio.sleep(0)
            return self._function(*self._arguments)
        self._thread.start()
        try:
            async with asyncio.timeout(seconds):
                return await asyncio.shield(self._done)
        except TimeoutError:
            if self._done.done():
                raise
            file, line = self._where(guest_of)
            for _ in range(NUM_TRIES):
                if not self._interrupt(guest_of):
                    break
                await asyncio.sleep(TRY_S)
            raise Unfinished(seconds, file, line) from None
        except asyncio.CancelledError:
            self._interrupt(guest_of)
            raise

    def _run(self) -> None:
        with suppress(Interrupted):  # It may come in the moment in which all is over.
            try:
                result = self._function(*self._arguments)
            except Exception as error:
                self._tell(self._fail, error)
            except BaseException as error:  # It is not to end the loop that waits for it.
                self._tell(self._fail, RuntimeError(f"{type(error).__name__}: {error}"))
            else:
                self._tell(self._succeed, result)

    def _tell(self, tell: Callable[[Any], None], outcome: Any) -> None:
        with suppress(RuntimeError):  # The loop has ended: nobody waits.
            self._loop.call_soon_threadsafe(tell, outcome)

    def _succeed(self, result: T) -> None:
        if not self._done.done():
            self._done.set_result(result)

    def _fail(self, error: Exception) -> None:
        if not self._done.done():
            is_taken = not isinstance(error, StopIteration)  # What a future does not take.
            self._done.set_exception(error if is_taken else RuntimeError("StopIteration"))
            self._done.exception()  # Nobody may wait any more.

    def _frames(self) -> list[FrameType]:
        """Return what the thread runs, innermost first; nothing once it has ended."""
        if not self._thread.is_alive():  # Another may have its ident.
            return []
        frames, frame = [], sys._current_frames().get(self._thread.ident or 0)
        while frame is not None:
            frames.append(frame)
            frame = frame.f_back
        return frames

    def _where(self, guest_of: GuestOf) -> tuple[str, int | None]:
        for frame in self._frames():
            if guest_of(frame) is not None:
                return frame.f_code.co_filename, frame.f_lineno
        return "", None

    def _interrupt(self, guest_of: GuestOf) -> bool:
        """Interrupt the guest's code, not what it calls of OWN; return whether it is worth another try."""
        is_own = False
        for frame in self._frames():
            if guest_of(frame) is not None:
                if not is_own:
                    ident = ctypes.c_ulong(self._thread.ident or 0)
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, ctypes.py_object(Interrupted))
                return True
            name = str(frame.f_globals.get("__name__"))
            if name.startswith(IMPORTING):
                return False
            is_own |= name.startswith(OWN)
        return False
