"""A thread of one's own, for blocking work that must always run in the same one.

OpenMP keeps a team of threads for each thread that computes. With two such teams on one set of cores it stops
spinning between parallel regions, and a decode step on two cores took 1.4 times as long (83 against 58 ms, one run).
"""

import asyncio
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


class Worker:
    """One thread, or on a virtual clock none: then work runs inline. ``close`` when it is not needed any more."""

    def __init__(self, *, is_inline: bool) -> None:
        self._executor = None if is_inline else ThreadPoolExecutor(1, thread_name_prefix="worker")

    async def run(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Run a blocking function in the thread, after what it was given before, and return the result."""
        if self._executor is None:
            await asyncio.sleep(0)
            return function(*args, **kwargs)
        call = functools.partial(function, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._executor, call)

    def close(self) -> None:
        """Let the thread end after the work it has. A repeat does nothing."""
        if self._executor is not None:
            self._executor.shutdown(wait=False)
