"""One port for several frontends: all accept at the same socket, and a connection goes to who has the fewest.

They inherit that socket from the launcher, which keeps it. So there is one queue: nobody else can have the port, what
a frontend that dies or leaves has not accepted yet the others do, and one that hangs keeps no connection waiting. With
SO_REUSEPORT each would have a queue of its own, which is lost with it, and another fleet could share the port unseen.

How many connections each has they tell each other in a file that all of them map.
"""

import asyncio
import logging
import mmap
import os
import socket
from collections.abc import Callable, Collection, Coroutine
from pathlib import Path
from typing import Any

log = logging.getLogger("callboard.frontend")

TURN_S = 0.001
"""How long a connection is left to who has fewer: it has been woken, too, unless it hangs or is busy."""
LEAD = 8
"""One may have an eighth more than the others: who is woken first need not wait for them at each connection."""
AT_ONCE = 64
"""Connections that are accepted before others have their turn on the loop."""
PAUSE_S = 1.0
"""How long nothing is accepted after the system had no room for another connection."""
_NUMBER = 8
"""Bytes of a count in the file."""

Spawn = Callable[[Coroutine[Any, Any, Any]], object]


class Counts:
    """How many connections each of ``num`` frontends has, in a file that all map; ``own`` is this one's place.

    One that was killed leaves its count behind until it is back.
    """

    def __init__(self, path: Path, *, num: int, own: int) -> None:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            # What is there stays. Not by truncation: whoever writes into a hole is killed where the disk is full.
            os.posix_fallocate(fd, 0, num * _NUMBER)
            self._map = mmap.mmap(fd, num * _NUMBER)
        finally:
            os.close(fd)
        self._own = own
        self._numbers = memoryview(self._map).cast("q")  # 1 more than the count; 0: it does not accept.

    def tell(self, number: int | None) -> None:
        """Say how many there are here; None: nothing is accepted here."""
        self._numbers[self._own] = 0 if number is None else number + 1

    def fewest(self, others: Collection[int] | None = None) -> int | None:
        """Return the fewest that another has which accepts, of all or of those in ``others``; None if there is none."""
        numbers = enumerate(self._numbers)
        there = (n - 1 for i, n in numbers if n > 0 and i != self._own and (others is None or i in others))
        return min(there, default=None)


class Acceptor:
    """Accepts connections at a shared socket, from ``start`` to ``stop``, and again, until ``close``.

    ``open`` makes a connection of an accepted socket, and ``lost`` must be told when it has ended. ``others`` returns
    the places of the frontends that are known to live.
    """

    def __init__(
        self,
        listener: socket.socket,
        counts: Counts,
        *,
        others: Callable[[], Collection[int]],
        open: Callable[[socket.socket], Coroutine[Any, Any, Any]],
        spawn: Spawn,
    ) -> None:
        self.num_open = 0
        self._listener = listener
        self._counts = counts
        self._others = others
        self._open = open
        self._spawn = spawn
        self._is_accepting = False
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Accept connections from now on."""
        if not self._is_accepting:
            self._is_accepting = True
            self._tell()
            self._read()

    def stop(self) -> None:
        """Accept no more; what is open stays so."""
        if self._is_accepting:
            self._is_accepting = False
            if self._timer is None:
                asyncio.get_running_loop().remove_reader(self._listener)
            else:
                self._timer.cancel()
                self._timer = None
            self._counts.tell(None)

    def close(self) -> None:
        """Accept no more, for good. Once all have, the port refuses connections: none waits for nobody."""
        self.stop()
        self._listener.close()

    def lost(self) -> None:
        """Note that a connection has ended."""
        self.num_open -= 1
        self._tell()

    # ---- inside --------------------------------------------------------------------------------------------------

    def _tell(self) -> None:
        if self._is_accepting:
            self._counts.tell(self.num_open)

    def _read(self) -> None:
        asyncio.get_running_loop().add_reader(self._listener, self._accept)

    def _pause(self, seconds: float, then: Callable[[], None]) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._listener)
        self._timer = loop.call_later(seconds, then)

    def _accept(self) -> None:
        """Accept what waits, as long as nobody else should."""
        for _ in range(AT_ONCE):
            if not self._is_due():
                return self._pause(TURN_S, self._take_turn)
            if not self._accept_one():
                return None
        return None

    def _take_turn(self) -> None:
        """Accept what waits still: those who have fewer connections did not."""
        self._timer = None
        self._read()
        if self._accept_one():
            self._accept()

    def _is_due(self) -> bool:
        """Return whether nobody else that accepts has clearly fewer connections."""
        fewest = self._counts.fewest()
        if fewest is None or self.num_open <= fewest + fewest // LEAD:
            return True
        fewest = self._counts.fewest(self._others())  # One that was killed has left its count behind.
        return fewest is None or self.num_open <= fewest + fewest // LEAD

    def _accept_one(self) -> bool:
        """Return whether there was one."""
        try:
            accepted, _ = self._listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return False
        except OSError as error:
            log.error("no connection can be accepted: %s", error)
            self._pause(PAUSE_S, self._resume)
            return False
        accepted.setblocking(False)
        self.num_open += 1
        self._tell()
        self._spawn(self._begin(accepted))
        return True

    def _resume(self) -> None:
        self._timer = None
        self._read()

    async def _begin(self, accepted: socket.socket) -> None:
        try:
            await self._open(accepted)
        except OSError as error:  # Its client has left already.
            log.debug("a connection could not be opened: %s", error)
            accepted.close()
            self.lost()
