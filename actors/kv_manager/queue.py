"""Who waits for blocks, and in which order they get them."""

import asyncio
import enum
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

from callboard.bus import Node, current_call
from callboard.kv.allocator import Allocator
from callboard.kv.layout import OutOfBlocks

T = TypeVar("T")

RECALL_S = 0.1
"""How long engines may take to return unused blocks, before a shortage is told to somebody who would not wait."""


class Priority(enum.IntEnum):
    """Running sequences go first; then sends, for which a reservation holds blocks already, here or elsewhere; then
    new sequences, and last promises of room.
    """

    REFILL = 0
    SEND = 1
    ADMIT = 2
    PREP_RECV = 3


class _Waiter:
    """One attempt that has to be made again when blocks come back."""

    def __init__(self, attempt: Callable[[], Any], shortage: OutOfBlocks) -> None:
        self.attempt = attempt
        self.shortage = shortage
        self.granted: asyncio.Future[Any] = asyncio.get_running_loop().create_future()


class BlockQueue:
    """First come, first served, within each priority. Nobody overtakes one of the same or a higher priority.

    ``recall(count)`` asks the engines for unused blocks, and returns whether there is any hope of some.
    """

    def __init__(self, node: Node, allocator: Allocator, recall: Callable[[int], bool]) -> None:
        self._node = node
        self._allocator = allocator
        self._recall = recall
        self._waiting: dict[Priority, deque[_Waiter]] = {priority: deque() for priority in Priority}

    async def take(
        self, priority: Priority, total: int, attempt: Callable[[], T], undo: Callable[[T], None], wait_s: float
    ) -> T:
        """Return what ``attempt()`` returns, as soon as it does not raise OutOfBlocks, within ``wait_s``.

        ``total`` is the number of blocks it all comes to: more than there are is refused at once. If the caller is
        cancelled when it was granted already, ``undo`` gets it. Raises OutOfBlocks, and what ``attempt`` raises.
        """
        self._allocator.require_fit(total)
        shortage = OutOfBlocks(needed=total, free=self._allocator.num_available)
        if not any(self._waiting[other] for other in Priority if other <= priority):
            try:
                return attempt()
            except OutOfBlocks as error:
                shortage = error
        if self._recall(shortage.needed):
            wait_s = max(wait_s, RECALL_S)
        if not wait_s > 0:  # Also for what is no number: no timer takes that.
            raise shortage
        waiter = _Waiter(attempt, shortage)
        self._waiting[priority].append(waiter)
        begin_s = self._node.clock.now()
        try:
            async with asyncio.timeout(wait_s):
                granted: T = await self._granted(waiter, undo)
                return granted
        except TimeoutError:
            raise waiter.shortage from None
        finally:
            self._node.note(current_call(), "blocks", begin_s, purpose=priority.name.lower(), num_blocks=total)
            if waiter in self._waiting[priority]:
                self._waiting[priority].remove(waiter)
            self.pump()

    def pump(self) -> None:
        """Grant what can be granted now. To be called whenever blocks may have come back."""
        for priority in Priority:
            waiting = self._waiting[priority]
            while waiting:
                waiter = waiting[0]
                if not waiter.granted.done():
                    try:
                        waiter.granted.set_result(waiter.attempt())
                    except OutOfBlocks as error:
                        waiter.shortage = error
                        return
                    except Exception as error:
                        waiter.granted.set_exception(error)
                waiting.popleft()

    @staticmethod
    async def _granted(waiter: _Waiter, undo: Callable[[Any], None]) -> Any:
        try:
            return await waiter.granted
        except asyncio.CancelledError:
            # Granted and cancelled in the same pass of the loop: nobody will get it.
            if waiter.granted.done() and not waiter.granted.cancelled() and waiter.granted.exception() is None:
                undo(waiter.granted.result())
            raise
