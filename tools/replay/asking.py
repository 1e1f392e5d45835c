"""Asking the recorded requests again, at their times: of a live router, or of a simulated one."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from callboard.bus import BusError, Node, Ref
from callboard.bus.tasks import Tasks

from .recorded import RecordedRequest

MOST_LATE_S = 0.05
"""A request that is asked later than this was not asked at its time."""
TIMEOUT_S = 600.0
"""Routers have deadlines of their own; this ends what a dead one leaves."""

Show = Callable[[str], None]


@dataclass(slots=True)
class Asked:
    """How the asking itself went."""

    num_late: int = 0
    """Requests that could not be asked at their times."""
    latest_s: float = 0.0


class Asking:
    """Asks requests from one node. ``id_of`` gives the id that a request is asked under.

    Prompts of which only hashes are known become tokens that no cache has seen under another ``salt``.
    """

    def __init__(
        self,
        node: Node,
        router: Callable[[str], Ref],
        id_of: Callable[[RecordedRequest], str],
        *,
        speed: float,
        show: Show,
        salt: int = 0,
    ) -> None:
        self.asked = Asked()
        self._node = node
        self._router = router
        self._id_of = id_of
        self._speed = speed
        self._show = show
        self._salt = salt
        self._num_done = 0
        self._errors: list[BaseException] = []

    async def run(self, requests: Sequence[RecordedRequest]) -> Asked:
        """Ask all of them, and wait for their ends."""
        clock = self._node.clock
        began, first = clock.now(), requests[0].time
        tasks = Tasks(self._errors.append)
        running = []
        try:
            for request in requests:
                due = began + (request.time - first) / self._speed
                await clock.sleep(max(0.0, due - clock.now()))
                late = clock.now() - due
                if late > MOST_LATE_S:
                    self.asked.num_late += 1
                self.asked.latest_s = max(self.asked.latest_s, late)
                running.append(tasks.spawn(self._ask(request, len(requests), began)))
            await asyncio.gather(*running)
        finally:
            await tasks.cancel()
        return self.asked

    async def _ask(self, request: RecordedRequest, num: int, began: float) -> None:
        try:
            async with asyncio.timeout(self._patience(request)):
                await self._read(request)
        except (BusError, TimeoutError):
            pass  # Its end is recorded, as everything else is.
        self._num_done += 1
        seconds = f"{self._node.clock.now() - began:.1f} s{' simulated' * self._node.clock.is_virtual}"
        self._show(f"replayed {self._num_done:,} of {num:,} requests, {seconds}")

    def _patience(self, request: RecordedRequest) -> float | None:
        """Return after how long the client leaves whatever happens: as it did, if it had no token by then."""
        if request.leaves_early and not request.num_tokens and request.seconds is not None:
            return request.seconds
        return None

    async def _read(self, request: RecordedRequest) -> None:
        message = request.message(self._id_of(request), self._salt)
        num_read = 0
        async with self._router(request.router).stream(message, timeout=TIMEOUT_S) as tokens:
            async for _ in tokens:
                num_read += 1
                if request.leaves_early and num_read == request.num_tokens:
                    break
