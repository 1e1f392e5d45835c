"""The deadlines of many calls on few timers: nearly every call ends long before its own, so it must cost little.

A timer for each cost as much as encoding and decoding the call. What is served has none: its caller cancels it.
"""

import asyncio
from contextvars import copy_context
from typing import Protocol

TICK_S = 0.01
"""Deadlines this near each other share a timer, and one may be that much late; beyond 100 s, by a hundredth."""
NEVER_S = 1e8
"""As far as a timer reaches; three years. What is later is never."""


class Expiring(Protocol):
    """What can run out of time."""

    def expire(self) -> None:
        """End: the deadline has passed."""


Slot = dict[Expiring, None]
"""The calls that end with one tick. Whoever ends before takes itself out: ``slot.pop(call, None)``."""


class Deadlines:
    """The deadlines of one node."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._slots: dict[float, Slot] = {}
        # Not that of the call that comes first: a timer would keep it, and its link, until long after its end.
        self._context = copy_context()

    def add(self, call: Expiring, seconds: float) -> Slot | None:
        """Let ``call`` expire in ``seconds``; return where it is to be taken out, None if that is never."""
        # Hot: once per ask (bench/bus.py).
        if seconds > NEVER_S:
            return None
        tick = TICK_S if seconds <= 100 else 1.0 if seconds <= 10_000 else 100.0
        end = (int((self._loop.time() + seconds) / tick) + 1) * tick
        slot = self._slots.get(end)
        if slot is None:
            slot = self._slots[end] = {}
            self._loop.call_at(end, self._expire, end, context=self._context)
        slot[call] = None
        return slot

    def _expire(self, end: float) -> None:
        for call in list(self._slots.pop(end)):
            call.expire()
