"""An engine's load, told to whoever watches as it changes: no router has to ask, or to guess from what is old."""

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import suppress

from callboard.actors.load_protocol import LoadReport
from callboard.actors.protocol import Load, Probe
from callboard.bus import BusError, Clock, Ref

from .generation import Generation
from .scheduler import Scheduler
from .throughput import Throughput

GAP_S = 0.01
"""The least time between two reports of what is not urgent."""
MOST_TOLD = 4096
"""Comings and goings that are kept for a watcher who takes no reports; beyond, it is told everything anew."""


class LoadWatch:
    """How busy an engine is, the requests it has, and everybody who wants to know."""

    def __init__(
        self, clock: Clock, scheduler: Scheduler, throughput: Throughput, generations: Mapping[str, Generation]
    ) -> None:
        self.num_blocks = self.free_blocks = self.cached_blocks = 0
        """Of the pool, as the manager said last."""
        self._clock = clock
        self._scheduler = scheduler
        self._throughput = throughput
        self._generations = generations
        self._counts = (0, 0)
        self._looked_s = 0.0
        self._present: dict[str, int] = {}
        self._watchers: dict[_Watcher, None] = {}

    def load(self) -> Load:
        """Return how busy the engine is."""
        scheduler, throughput = self._scheduler, self._throughput
        waiting = [each.sequence for each in self._generations.values() if each.needs_admission]
        num_uncomputed = scheduler.num_uncomputed_tokens + sum(each.num_uncomputed_tokens for each in waiting)
        cost = throughput.fit.cost
        return Load(
            num_running=len(scheduler),
            num_waiting=len(waiting),
            free_blocks=self.free_blocks,
            num_blocks=self.num_blocks,
            prefill_tps=round(throughput.prefill_tps, 1),
            decode_tps=round(throughput.decode_tps, 1),
            queue_s=round(throughput.prefill_s(num_uncomputed), 3),
            cached_blocks=self.cached_blocks,
            num_decoding=scheduler.num_decoding,
            num_uncomputed_tokens=num_uncomputed,
            step_s=cost.step_s,
            prefill_token_s=cost.prefill_token_s,
            decode_s=cost.decode_s,
            attended_s=cost.attended_s,
            num_generating=scheduler.num_generating + len(waiting),
            prefill_share=round(throughput.prefill_share(self._clock.now()), 3),
        )

    async def look_at_pool(self, manager: Ref) -> None:
        """Ask how full the pool is; without an answer the last numbers stand."""
        with suppress(BusError):
            probed = await manager.ask(Probe(b""), timeout=1.0)
            self.free_blocks, self.cached_blocks = probed.free_blocks, probed.cached_blocks
            self.stepped()

    def began(self, request_id: str) -> None:
        """Note that something of a request has come."""
        self._present[request_id] = self._present.get(request_id, 0) + 1
        for watcher in self._watchers:
            watcher.note(watcher.began, request_id)

    def ended(self, request_id: str) -> None:
        """Note that it is over, once for each ``began``."""
        self._present[request_id] -= 1
        if not self._present[request_id]:
            del self._present[request_id]
        for watcher in self._watchers:
            watcher.note(watcher.ended, request_id)

    def stepped(self) -> None:
        """Note that a step is over: the load may have changed."""
        # Hot: once per step. What is urgent is seen by two counts; the rest is looked at as often as it may be told.
        if not self._watchers:
            return
        now, counts = self._clock.now(), (len(self._scheduler), self._scheduler.num_decoding)
        if counts == self._counts and now < self._looked_s + GAP_S:
            return
        self._counts, self._looked_s = counts, now
        load = self.load()
        for watcher in self._watchers:
            watcher.compare(load)

    async def serve(self) -> AsyncGenerator[LoadReport, None]:
        """Report for ever."""
        watcher = _Watcher()
        self._watchers[watcher] = None
        try:
            while True:
                yield watcher.take(self.load(), self._present)
                sent_s = self._clock.now()
                await watcher.changed.wait()
                with suppress(TimeoutError):
                    async with asyncio.timeout(max(0.0, sent_s + GAP_S - self._clock.now())):
                        await watcher.urgent.wait()
        finally:
            del self._watchers[watcher]


class _Watcher:
    """What one stream has still to be told."""

    def __init__(self) -> None:
        self.began: list[str] = []
        self.ended: list[str] = []
        self.changed = asyncio.Event()
        self.urgent = asyncio.Event()
        self._is_whole = True
        self._told = Load()

    def note(self, told: list[str], request_id: str) -> None:
        """Keep an id to be told at once."""
        if not self._is_whole:
            told.append(request_id)
            self._is_whole = len(self.began) + len(self.ended) > MOST_TOLD
        self.changed.set()
        self.urgent.set()

    def compare(self, load: Load) -> None:
        """Ask for a report if the load is another one than was told; at once if a request has come further."""
        if _stages(load) != _stages(self._told):
            self.urgent.set()
            self.changed.set()
        elif _amounts(load) != _amounts(self._told):
            self.changed.set()

    def take(self, load: Load, present: dict[str, int]) -> LoadReport:
        """Return the report that is due."""
        if self._is_whole:
            everything = tuple(request_id for request_id, count in present.items() for _ in range(count))
            report = LoadReport(load, everything, is_whole=True)
        else:
            report = LoadReport(load, tuple(self.began), tuple(self.ended))
        self._is_whole, self._told = False, load
        self.began, self.ended = [], []
        self.changed.clear()
        self.urgent.clear()
        return report


def _stages(load: Load) -> tuple[int, ...]:
    return load.num_running, load.num_waiting, load.num_decoding, load.num_generating


def _amounts(load: Load) -> tuple[int, ...]:
    # Not the measured speeds, which differ with every step: they come along with the rest.
    return load.num_uncomputed_tokens, load.free_blocks
