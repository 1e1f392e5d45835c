"""Owned tasks: every task belongs to somebody who ends it and hears of its failure."""

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from typing import Any


class Tasks:
    """The tasks of one owner. An exception in any of them goes to ``on_error``; ``cancel`` ends them all."""

    def __init__(self, on_error: Callable[[BaseException], None]) -> None:
        self._on_error = on_error
        self._tasks: dict[asyncio.Task[Any], None] = {}

    def __len__(self) -> int:
        return len(self._tasks)

    def spawn(self, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run ``coroutine`` as a task of this owner."""
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks[task] = None
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.pop(task, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._on_error(error)

    async def cancel(self) -> None:
        """Cancel all tasks and wait for them, except the one that calls."""
        await cancel_all(self._tasks)


async def cancel_all(tasks: Iterable[asyncio.Task[Any]], timeout_s: float | None = None) -> list[asyncio.Task[Any]]:
    """Cancel tasks and wait for them, except the one that calls; return those that have not ended by then."""
    current = asyncio.current_task()
    others = [task for task in tasks if task is not current]
    for task in others:
        task.cancel()
    if others:
        await asyncio.wait(others, timeout=timeout_s)
    for task in others:
        if task.done() and not task.cancelled():
            task.exception()  # Noted: whoever owns the task has heard of it.
    return [task for task in others if not task.done()]
