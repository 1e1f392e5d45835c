"""Time, as actors may reach it: through their node, so that a simulation can replace it."""

import asyncio
import time


class Clock:
    """Real time. ``now`` and ``wall`` are seconds; ``now`` is monotonic and comparable only on one host."""

    is_virtual = False

    def now(self) -> float:
        """Return monotonic seconds."""
        return time.monotonic()

    def wall(self) -> float:
        """Return seconds since the epoch, for people and files; never for deadlines."""
        return time.time()

    async def sleep(self, seconds: float) -> None:
        """Wait ``seconds``."""
        await asyncio.sleep(seconds)


class VirtualClock(Clock):
    """The time of the running loop, which a VirtualLoop moves by itself (callboard.bus.testing)."""

    is_virtual = True

    def now(self) -> float:
        return asyncio.get_running_loop().time()

    def wall(self) -> float:
        return asyncio.get_running_loop().time()
