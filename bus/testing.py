"""For tests of actors: an event loop on virtual time, where hours of waiting run in milliseconds, in one order.

Several simulated processes share the loop. What a process starts carries its tag in its context, so that the loop can
hold all of it (SIGSTOP) or drop it for ever (kill -9), between any two steps, without the code in it taking part.
"""

import asyncio
import gc
import heapq
import logging
import sys
import warnings
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from contextvars import Context, ContextVar, copy_context
from typing import Any, TypeVar
from weakref import WeakSet

T = TypeVar("T")

MOST_CANCELLED = 200
"""Cancelled timers that are left in the heap, before it is made anew."""
AT_ONCE_S = 1e-9
"""Timers no further apart than this are due together."""

_PROCESS: "ContextVar[SimulatedProcess | None]" = ContextVar("callboard_process", default=None)
"""Follows tasks and callbacks: the simulated process that they belong to, None for the test around them."""


class SimulatedProcess:
    """Whatever is started by ``spawn``, and by that, and so on: one process among several on one virtual loop.

    Needs a running VirtualLoop. What a paused process was to do it does when it resumes, in the same order: timers
    that ran out meanwhile are due, and what was sent to it has arrived.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_paused = False
        self.is_killed = False
        self.on_kill: list[Callable[[], object]] = []
        """What the kernel does for a process that is no more, such as closing its connections."""
        self._held: list[asyncio.Handle] = []
        self._tasks: WeakSet[asyncio.Task[Any]] = WeakSet()

    def spawn(self, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run a coroutine as this process's. Whoever awaits the task waits for ever if the process is killed."""
        return asyncio.get_running_loop().create_task(coroutine, context=self._context())

    def call_soon(self, callback: Callable[..., object], *args: Any) -> asyncio.Handle:
        """Have this process call something, in the next pass of the loop."""
        return asyncio.get_running_loop().call_soon(callback, *args, context=self._context())

    def pause(self) -> None:
        """Hold all that the process would do from now on. A repeat does nothing."""
        self.is_paused = True

    def resume(self) -> None:
        """Let it go on with all that was held. A repeat does nothing."""
        self.is_paused = False
        held, self._held = self._held, []
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        loop.add_ready(held)

    def kill(self) -> None:
        """End it between two steps: none of its code runs any more, no handler and no ``finally``.

        The step that runs at this moment, if it is the process's own, still comes to its end. A repeat does nothing.
        """
        if self.is_killed:
            return
        self.is_killed = True
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        loop.corpses.extend(self.unfinished())
        self._held.clear()
        for close in self.on_kill:
            close()

    def takes(self, handle: asyncio.Handle) -> bool:
        """Return whether a handle of the process may run now; hold it if it may later."""
        if self.is_killed:
            return False
        if self.is_paused:
            self._held.append(handle)
        return not self.is_paused

    def unfinished(self) -> list[asyncio.Task[Any]]:
        """Return the tasks that have not ended, in the order of their start."""
        return sorted((task for task in self._tasks if not task.done()), key=hash)

    def adopt(self, task: asyncio.Task[Any]) -> None:
        """Count a task as the process's."""
        self._tasks.add(task)

    def _context(self) -> Context:
        context = copy_context()
        context.run(_PROCESS.set, self)
        return context


def current_process() -> SimulatedProcess | None:
    """Return the simulated process whose code is running, None outside of them."""
    return _PROCESS.get()


class _Task(asyncio.Task[Any]):
    """A task that stands in sets by its number: asyncio's own sets of tasks then have the same order in every run."""

    def __init__(
        self, coro: Any, *, loop: "VirtualLoop", name: str | None = None, context: Context | None = None
    ) -> None:
        if context is None:
            context = copy_context()
        process = context.get(_PROCESS)
        if process is None and loop.running is not None:
            # Whoever starts something in an empty context has not left its process by that.
            process = loop.running
            context.run(_PROCESS.set, process)
        loop.num_tasks += 1
        self._number = loop.num_tasks  # First: asyncio counts it in a set at once.
        super().__init__(coro, loop=loop, name=name, context=context)
        if process is not None:
            process.adopt(self)

    def __hash__(self) -> int:
        return self._number


class VirtualLoop(asyncio.BaseEventLoop):
    """A loop on virtual time, in seconds from 0. Use no threads and no sockets in it.

    Raises RuntimeError where nothing can ever happen again, and after ``most_steps`` callbacks.
    """

    task_class = _Task
    _ready: "deque[asyncio.Handle]"
    _scheduled: "list[asyncio.TimerHandle]"
    _timer_cancelled_count: int
    _stopping: bool

    def __init__(self, *, most_steps: float = float("inf")) -> None:
        super().__init__()
        self.now = 0.0
        self.most_steps = most_steps
        self.num_steps = 0
        """Callbacks run so far: what a run costs."""
        self.corpses: list[asyncio.Task[Any]] = []
        """Tasks of killed processes. As garbage they would be closed, and their clean-up code would run."""
        self.running: SimulatedProcess | None = None
        """Whose callback runs now."""
        self.num_tasks = 0

    def time(self) -> float:
        return self.now

    def create_task(self, coro: Any, *, name: Any = None, context: Context | None = None) -> asyncio.Task[Any]:
        return _Task(coro, loop=self, name=name, context=context)

    def add_ready(self, handles: list[asyncio.Handle]) -> None:
        """Run handles in the next pass."""
        self._ready.extend(handles)

    def _run_once(self) -> None:
        # BaseEventLoop calls this again and again. Hot: once per pass, and within it once per callback.
        ready, timers = self._ready, self._scheduled
        if self._timer_cancelled_count > MOST_CANCELLED and self._timer_cancelled_count * 2 > len(timers):
            self._forget_cancelled_timers()
        if not ready and not self._stopping:
            while timers and timers[0]._cancelled:
                self._timer_cancelled_count -= 1
                heapq.heappop(timers)._scheduled = False  # type: ignore[attr-defined]
            if not timers:
                raise RuntimeError("nothing can ever happen again: every task waits for ever")
            self.now = max(self.now, timers[0].when())
        if self.num_steps > self.most_steps:
            raise RuntimeError(f"{self.num_steps} steps in {self.now:.3f} s: this goes round in a circle")
        due = self.now + AT_ONCE_S
        while timers and timers[0].when() < due:
            timer = heapq.heappop(timers)
            timer._scheduled = False  # type: ignore[attr-defined]
            if timer._cancelled:
                self._timer_cancelled_count -= 1
            else:
                # Before its time nothing runs: who finds by the clock that it is too early would wait anew for ever.
                self.now = max(self.now, timer.when())
                ready.append(timer)
        for _ in range(len(ready)):
            handle: Any = ready.popleft()
            if handle._cancelled:
                continue
            process = handle._context.get(_PROCESS)
            if process is None or process.takes(handle):
                self.num_steps += 1
                self.running = process
                handle._run()
                self.running = None

    def _forget_cancelled_timers(self) -> None:
        left = []
        for timer in self._scheduled:
            if timer._cancelled:
                timer._scheduled = False  # type: ignore[attr-defined]
            else:
                left.append(timer)
        heapq.heapify(left)
        self._scheduled[:] = left
        self._timer_cancelled_count = 0

    def _process_events(self, event_list: list[Any]) -> None:
        raise AssertionError("there are no descriptors here")

    def _write_to_self(self) -> None:
        return  # It never sleeps: nobody has to wake it.

    def wind_up(self) -> None:
        """Cancel what still runs, wait for it, and close the loop; what was killed is let go without a word."""
        try:
            dead = set(self.corpses)
            tasks = sorted((task for task in asyncio.all_tasks(self) if task not in dead), key=hash)
            while tasks:
                for task in tasks:
                    task.cancel()
                with suppress(KeyboardInterrupt):  # It leaves the loop anew by each task that waits for the one it hit.
                    self.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
                tasks = [task for task in tasks if not task.done()]
            if not dead:
                self.run_until_complete(self.shutdown_asyncgens())
            dead.clear()  # Nothing must hold them when they are buried.
        finally:
            self.bury()

    def bury(self) -> None:
        """Close the loop, and let go of what was killed."""
        had_corpses = bool(self.corpses)
        with without_a_word():
            self.close()
            while self.corpses:  # No loop variable: it would hold the last of them, and by that all.
                self.corpses.pop()._log_destroy_pending = False  # type: ignore[attr-defined]
            if had_corpses:
                gc.collect()
                gc.collect()  # What the clean-up code of the killed held on to.


@contextmanager
def without_a_word() -> Iterator[None]:
    """Coroutines of killed processes are taken apart here, and complain about a loop that is closed."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    level = logging.root.manager.disable
    logging.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
        sys.unraisablehook = hook


def run_virtual(main: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run ``main()`` on a fresh virtual loop and return its result. Nodes in it take ``clock=VirtualClock()``."""
    loop = VirtualLoop()
    try:
        return loop.run_until_complete(main())
    finally:
        loop.wind_up()
