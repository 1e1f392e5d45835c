"""A peer's pool on the same GPU, mapped into this process: one kernel gathers, converts and scatters into place.

Both processes map the same memory (kv/device_store.py), and the bytes cross nothing but that. A manager's lane into its
own pool on a GPU is the same. No GPU has run this yet.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

from callboard.kv.device_pages import pages_of
from callboard.kv.device_store import DeviceStore
from callboard.kv.layout import SlotRun
from callboard.kv.page_store import PageStore
from callboard.kv.slots import num_slots

from .contract import LaneClosed, PageWrite

EAGER_TURNS = 50
"""Turns of the event loop in which the GPU is asked whether it is done: most writes take less."""
POLL_S = 0.5e-3


class GpuWork(Protocol):
    """A mark in a GPU's stream of work, as torch.cuda.Event is one."""

    def query(self) -> bool:
        """Return whether all before it is done. Raises if the GPU has failed."""


class Pages(Protocol):
    """What begins copies on a GPU: DevicePages is one."""

    def copy(
        self,
        source: DeviceStore,
        target: DeviceStore,
        source_runs: Sequence[SlotRun],
        target_runs: Sequence[SlotRun],
        layers: range,
    ) -> GpuWork:
        """Begin a copy, and return the mark behind it."""


class CudaIpcLane:
    """Copies slots into ``target``, which it closes with itself, once nothing writes there any more, if it owns it."""

    wire_dtype = ""

    def __init__(
        self, name: str, target: DeviceStore, *, is_owner: bool, pages_of: Callable[[str], Pages] = pages_of
    ) -> None:
        self.name = name
        self._pages_of = pages_of
        self._target = target
        self._is_owner = is_owner
        self._is_closed = False
        self._num_writing = 0

    async def write(self, store: PageStore, pages: PageWrite) -> int:
        if self._is_closed or self._target.is_closed or store.is_closed:
            raise LaneClosed
        assert isinstance(store, DeviceStore)
        self._num_writing += 1
        try:
            done = self._pages_of(store.device).copy(store, self._target, pages.source, pages.target, pages.layers)
            await until_done(done)
        finally:
            self._num_writing -= 1
            self._let_go_if_closed()
        return 2 * len(pages.layers) * num_slots(pages.target) * self._target.layout.slot_bytes

    def fits(self, runs: Sequence[SlotRun]) -> bool:
        return all(0 <= run.slot <= self._target.num_slots - run.count and run.count > 0 for run in runs)

    def close(self) -> None:
        self._is_closed = True
        self._let_go_if_closed()

    def _let_go_if_closed(self) -> None:
        # Memory that a kernel is still writing into must stay mapped, or the process's whole context fails.
        if self._is_closed and self._is_owner and not self._num_writing:
            self._target.close()


async def until_done(work: GpuWork) -> None:
    """Wait for the GPU without holding up the event loop; also when cancelled, since it cannot be called back."""
    is_cancelled = False
    turns = 0
    while not work.query():
        turns += 1
        try:
            await asyncio.sleep(0 if turns < EAGER_TURNS else POLL_S)
        except asyncio.CancelledError:
            is_cancelled = True
    if is_cancelled:
        raise asyncio.CancelledError
