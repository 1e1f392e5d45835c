"""Waiting for what happens behind a socket or in another process: long, and saying in the end what was seen.

A busy machine is no fault of what is tested, and a test that passes does not pay for patience.
"""

import asyncio
import inspect
import threading
import time
from collections.abc import Callable

PATIENCE_S = 60.0


def wait_until(condition: Callable[[], object], seconds: float = PATIENCE_S) -> None:
    """Wait in a thread until a condition holds. Raises AssertionError with what it looked at."""
    ends, pause = time.monotonic() + seconds, threading.Event()
    while not condition():
        if time.monotonic() > ends:
            raise AssertionError(told(condition, seconds))
        pause.wait(0.05)


async def until(condition: Callable[[], object], seconds: float = PATIENCE_S) -> None:
    """Wait in a loop until a condition holds. Raises AssertionError with what it looked at."""
    ends = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > ends:
            raise AssertionError(told(condition, seconds))
        await asyncio.sleep(0.01)


def told(condition: Callable[[], object], seconds: float) -> str:
    """Say what did not come to pass, and what those variables of the condition saw that have a ``seen()``."""
    try:
        wanted = inspect.getsource(condition).strip()
    except (OSError, TypeError):
        wanted = repr(condition)
    told = [f"it did not come to pass in {seconds:g} s: {wanted}"]
    for name, value in inspect.getclosurevars(condition).nonlocals.items():
        seen = getattr(value, "seen", None)
        told.append(f"{name}, as seen:\n{seen()}" if seen is not None else f"{name} = {value!r:.2000}")
    return "\n".join(told)
