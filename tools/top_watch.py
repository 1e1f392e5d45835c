"""Looking at a running fleet again and again, for ``callboard top``: what the directory and the frontends say."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from callboard.actors.protocol import Entry, ListEntries
from callboard.actors.stats_protocol import FrontendStats, GetFrontendStats
from callboard.bus import BusError, Node

from .bus_client import visitor, why_not
from .running import RunningFleet, read_state
from .top_frame import Frame, Sample, frame_of

ASK_S = 2.0
LOST_S = 10.0
"""A directory that has not answered for so long has been lost; it may be starting again before."""
RATES_S = 3.0
"""The time that the rates of the live view are of: engines report four times a second."""
WINDOW_S = 60.0
"""The time that hit rates are of."""


class FleetEnded(Exception):
    """There is nothing more to be seen; the text says why. ``exit_code`` is 1 where that is no orderly end."""

    def __init__(self, sentence: str, exit_code: int = 0) -> None:
        super().__init__(sentence)
        self.exit_code = exit_code


class Watcher:
    """Looks at a fleet every ``interval_s``. Use ``watching``."""

    def __init__(self, fleet: RunningFleet, node: Node, interval_s: float) -> None:
        self.fleet = fleet
        self.interval_s = interval_s
        self._node = node
        self._samples: deque[Sample] = deque()
        self._heard = time.monotonic()

    async def frames(self) -> AsyncIterator[Frame]:
        """Yield a frame every interval, the first after one. Raises FleetEnded, and CliError if nobody ever answers."""
        try:
            await self._look()
        except BusError as error:
            raise why_not(self.fleet, error) from None
        due = time.monotonic()
        while True:
            due = max(due + self.interval_s, time.monotonic())
            await asyncio.sleep(due - time.monotonic())
            try:
                await self._look()
                problem = self._who_is_down()
            except BusError as error:
                problem = self._complain(error)
            rates_s = max(RATES_S, self.interval_s)
            yield frame_of(self.fleet.state.name, self._samples, rates_s=rates_s, problem=problem)

    async def _look(self) -> None:
        directory = self._node.ref(self.fleet.state.directory)
        entries = (await directory.ask(ListEntries(), timeout=ASK_S)).entries
        frontends = [entry for entry in entries if entry.kind == "frontend"]
        answers = await asyncio.gather(*(self._stats(entry) for entry in frontends))
        stats = {entry.name: each for entry, each in zip(frontends, answers, strict=True) if each is not None}
        self._heard = time.monotonic()
        self._samples.append(Sample(self._heard, time.time(), entries, stats))
        while len(self._samples) > 2 and self._heard - self._samples[1].time > WINDOW_S:
            self._samples.popleft()

    async def _stats(self, entry: Entry) -> FrontendStats | None:
        try:
            return await self._node.ref(entry.address).ask(GetFrontendStats(), timeout=ASK_S)
        except BusError:
            return None  # It is starting, or has just left: the frame says so.

    def _who_is_down(self) -> str:
        """Return which processes are not ready, as their launcher says; those of a fleet elsewhere are not known."""
        state = None if self.fleet.is_remote else read_state(self.fleet.folder)
        nodes = [] if state is None else [node for node in state.nodes if node.state not in ("ready", "stopped")]
        words = [f"{node.name} is {node.state}{f': {node.detail}' if node.detail else ''}" for node in nodes]
        return "\n".join(words)

    def _complain(self, error: BusError) -> str:
        """Return what to say of a directory that did not answer. Raises FleetEnded where that is the end."""
        name, silent_s = self.fleet.state.name, time.monotonic() - self._heard
        if not self.fleet.is_remote:
            state = read_state(self.fleet.folder)
            if state is None or state.launcher_pid != self.fleet.state.launcher_pid or state.state == "stopping":
                raise FleetEnded(f'fleet "{name}" has ended')
        if silent_s >= LOST_S:
            raise FleetEnded(f'the directory of fleet "{name}" has not answered for {silent_s:.0f} s ({error})', 1)
        return f"The directory has not answered for {silent_s:.0f} s: these numbers are old."


@asynccontextmanager
async def watching(fleet: RunningFleet, interval_s: float) -> AsyncIterator[Watcher]:
    """Visit a fleet to watch it. Raises CliError."""
    async with visitor(fleet) as node:
        yield Watcher(fleet, node, interval_s)
