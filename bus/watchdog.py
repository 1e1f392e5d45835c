"""A watch over an event loop that runs a guest's code: what keeps the loop from turning is interrupted.

The loop winds up an alarm clock again and again. Where it does not, because something keeps it, signals come, and
their handler looks what runs. A guest's code gets Hung raised in its middle; of anything else a line is logged. A
signal and no thread: it ends a sleep in the kernel, too, and reaches code in C that keeps the interpreter's lock.

What cannot be interrupted so ends with its process: code that catches Hung and goes on, by the same handler; code in C
that never returns, by a thread where it waits, and where it keeps the interpreter's lock by a limit of CPU time, which
the kernel watches over. None of them counts the time for which the process was stopped.
"""

import asyncio
import atexit
import dis
import faulthandler
import inspect
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import IO, Any, Literal

log = logging.getLogger("callboard.bus")

NUM_LOOKS = 8
"""In the second half of the time that the loop may stand."""
NUM_ENDS = 10
"""Times the loop may stand, until its process ends whatever runs."""
OWN = ("callboard.", "asyncio", "logging")
"""Modules that a guest calls, but that are interrupted only when they return to it: they keep what others need, too."""
IMPORTING = ("importlib", "_frozen_importlib")
"""What runs while a module is imported: it is not interrupted, because half of a module would be left for good."""
_SUSPENDS = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR
_SUSPENDING = (dis.opmap["YIELD_VALUE"], dis.opmap["RETURN_GENERATOR"])

Within = Literal["guest", "own", "import"]
GuestOf = Callable[[FrameType], Any]
"""Returns whose code a frame runs: a guest, or None where it is nobody's in particular."""


class Hung(BaseException):
    """Raised in the middle of a guest's code that kept the loop. No Exception: those are caught too easily."""

    def __init__(self, guest: Any, file: str, line: int, seconds: float) -> None:
        super().__init__(f"it kept everything else here from going on for {seconds:.1f} s")
        self.guest = guest
        self.file = file
        self.line = line
        """The innermost of the guest's own code."""
        self.seconds = seconds
        """For how long the loop had not turned, or that code had been seen, if others had kept it before."""
        self.is_told = False
        """For whoever deals with it: nobody else has to."""


class Watchdog:
    """Watches the running loop, of the main thread, from ``start`` to ``stop``.

    ``on_hung`` is called once the loop turns again, for each interruption. ``on_end`` is called in the middle of a
    guest's code that was interrupted in vain; then the process ends. With a ``dump`` the process also ends where the
    loop stands for NUM_ENDS times ``hung_s`` in something that takes no signals: then what ran stands in that file.
    """

    def __init__(
        self,
        hung_s: float,
        guest_of: GuestOf,
        *,
        on_hung: Callable[[Hung], None] = lambda hung: None,
        on_end: Callable[[Hung], None] | None = None,
        dump: IO[bytes] | None = None,
    ) -> None:
        self.is_watching = False
        self._hung_s = hung_s
        self._look_s = hung_s / 2 / NUM_LOOKS
        self._guest_of = guest_of
        self._on_hung = on_hung
        self._on_end = on_end
        self._dump = dump
        self._num_beats = 0
        self._next_s = 0.0
        """Seconds for which the next signal stands. They are counted: who gets no CPU for a while hangs in nothing."""
        self._standing_s = 0.0
        self._frame: FrameType | None = None
        """The outermost frame of the guest that keeps the loop: one step of it."""
        self._held_s = 0.0
        self._struck_s: float | None = None
        """What ``_held_s`` was when it was interrupted last."""
        self._hung: list[Hung] = []
        self._is_said = False
        self._timer: asyncio.TimerHandle | None = None
        self._is_over = threading.Event()

    def start(self) -> bool:
        """Begin; return False where signals cannot come: outside of the main thread, or if somebody else has them."""
        if not _is_free():
            return False
        signal.signal(signal.SIGALRM, self._on_alarm)
        atexit.register(self.stop)  # Without a handler, a signal would end the process.
        self.is_watching = True
        if self._dump is not None:
            faulthandler.register(signal.SIGPROF, file=self._dump, all_threads=True, chain=True)
            threading.Thread(target=self._end_at_last, name="watchdog", args=(self._dump,), daemon=True).start()
        self._beat()
        return True

    def stop(self) -> None:
        """End. A repeat does nothing."""
        if not self.is_watching:
            return
        self.is_watching = False
        _end_alarm()
        atexit.unregister(self.stop)
        self._is_over.set()
        if self._dump is not None:
            signal.setitimer(signal.ITIMER_PROF, 0.0)
            faulthandler.unregister(signal.SIGPROF)
            self._dump.close()
        if self._timer is not None:
            self._timer.cancel()

    def _beat(self) -> None:
        """The loop turns."""
        _forget_return()
        if signal.getsignal(signal.SIGALRM) in (signal.SIG_DFL, signal.SIG_IGN):
            signal.signal(signal.SIGALRM, self._on_alarm)  # A guest had the signal, and has "restored" it.
        self._wind(self._hung_s / 2)
        self._standing_s = self._held_s = 0.0
        self._frame = self._struck_s = None
        self._is_said = False
        if self._dump is not None:
            signal.setitimer(signal.ITIMER_PROF, NUM_ENDS * self._hung_s)
        self._num_beats += 1
        self._timer = asyncio.get_running_loop().call_later(self._hung_s / NUM_LOOKS, self._beat)
        hung, self._hung = self._hung, []
        for each in hung:
            self._on_hung(each)

    def _wind(self, seconds: float) -> None:
        self._next_s = seconds
        signal.setitimer(signal.ITIMER_REAL, seconds, self._look_s)

    def _on_alarm(self, number: int, frame: FrameType | None) -> None:
        seconds, self._next_s = self._next_s, self._look_s
        self._standing_s += seconds
        outer, inner, within = _look(frame, self._guest_of)
        if outer is None or inner is None or within == "import":
            self._frame = None
            self._say(frame)
            return
        if outer is not self._frame:
            self._frame, self._held_s, self._struck_s = outer, 0.0, None
            return
        self._held_s += seconds
        if not self._is_due():
            return
        seconds = self._held_s if self._hung else self._standing_s
        hung = Hung(self._guest_of(inner), inner.f_code.co_filename, inner.f_lineno, seconds)
        if self._held_s >= 2 * self._hung_s and self._on_end is not None:
            try:
                self._on_end(hung)
            finally:
                os._exit(1)
        if within == "guest":
            self._strike(hung)
        else:
            _on_return(self._guest_of, lambda: self._strike(hung))

    def _end_at_last(self, dump: IO[bytes]) -> None:
        """End the process where the loop stands for too long. In a thread: it counts only while the process runs."""
        num_beats, num_missed = -1, 0
        while not self._is_over.wait(self._hung_s):
            num_missed = num_missed + 1 if self._num_beats == num_beats else 0
            num_beats = self._num_beats
            if num_missed >= NUM_ENDS:
                faulthandler.dump_traceback(dump, all_threads=True)
                os._exit(1)

    def _say(self, frame: FrameType | None) -> None:
        """Log once what it is that keeps the loop, and is not interrupted."""
        if frame is None or self._is_said or self._standing_s < self._hung_s:
            return
        self._is_said = True
        where = f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_qualname}"
        log.warning("the event loop has stood still for %.1f s, in %s", self._standing_s, where)

    def _strike(self, hung: Hung) -> None:
        self._struck_s = self._held_s
        self._hung.append(hung)
        raise hung

    def _is_due(self) -> bool:
        """Return whether what keeps the loop is to be interrupted now: sooner, if others kept it before in this turn.

        Its clean-up is left the same time again.
        """
        if self._struck_s is not None:
            return self._held_s - self._struck_s >= self._hung_s / 2
        looks = 2 if self._hung else NUM_LOOKS
        return self._held_s >= (looks - 0.5) * self._look_s and self._standing_s >= self._hung_s - self._look_s / 2


def open_dump(path: str) -> IO[bytes]:
    """Begin the file of a Watchdog's ``dump`` anew: its first line says which of the threads in it is the main one.

    For the main thread. Raises OSError.
    """
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
    file = os.fdopen(fd, "wb", buffering=0)
    file.write(f"main 0x{threading.get_ident():016x}\n".encode())
    return file


@contextmanager
def limited(seconds: float, guest_of: GuestOf) -> Iterator[None]:
    """Raise Hung in a guest's code that runs for longer inside of this, and again where it goes on.

    Nobody looks outside of the main thread, or where a Watchdog looks already.
    """
    if not _is_free():
        yield
        return

    def on_alarm(number: int, frame: FrameType | None) -> None:
        _, inner, within = _look(frame, guest_of)
        if inner is None or within == "import":
            return
        hung = Hung(guest_of(inner), inner.f_code.co_filename, inner.f_lineno, seconds)
        if within == "guest":
            strike(hung)
        else:
            _on_return(guest_of, lambda: strike(hung))

    def strike(hung: Hung) -> None:
        raise hung

    signal.signal(signal.SIGALRM, on_alarm)
    signal.setitimer(signal.ITIMER_REAL, seconds, seconds / NUM_LOOKS)
    try:
        yield
    finally:
        _end_alarm()


def _is_free() -> bool:
    is_main = threading.current_thread() is threading.main_thread()
    return is_main and signal.getsignal(signal.SIGALRM) in (signal.SIG_DFL, signal.SIG_IGN)


def _end_alarm() -> None:
    signal.setitimer(signal.ITIMER_REAL, 0.0)
    _forget_return()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)


def _on_return(guest_of: GuestOf, strike: Callable[[], None]) -> None:
    """Call ``strike``, which raises, as soon as what a guest has called returns to it."""

    def hook(frame: FrameType, event: str, _: Any) -> None:
        if event == "return":
            if frame.f_back is None or _is_suspended(frame):  # Left for a while: then the loop will turn.
                return
            frame = frame.f_back
        if guest_of(frame) is not None:
            _forget_return()
            strike()

    hook.__dict__["is_the_watchdogs"] = True
    if sys.getprofile() is None:
        sys.setprofile(hook)


def _is_suspended(frame: FrameType) -> bool:
    """Return whether a frame that is left will be entered again."""
    code = frame.f_code
    return bool(code.co_flags & _SUSPENDS) and code.co_code[frame.f_lasti] in _SUSPENDING


def _forget_return() -> None:
    if getattr(sys.getprofile(), "is_the_watchdogs", False):
        sys.setprofile(None)


def _look(frame: FrameType | None, guest_of: GuestOf) -> tuple[FrameType | None, FrameType | None, Within]:
    """Return the outermost and the innermost frame of a guest, and what runs in the innermost one."""
    outer = inner = None
    within: Within = "guest"
    while frame is not None:
        name = str(frame.f_globals.get("__name__"))
        if guest_of(frame) is not None:
            outer, inner = frame, inner or frame
        elif inner is None and name.startswith(IMPORTING):
            within = "import"
        elif inner is None and within == "guest" and name.startswith(OWN):
            within = "own"
        frame = frame.f_back
    return outer, inner, within
