"""A peer's pool mapped into this process: one copy, straight into place (``shm``, ``inproc``)."""

from collections.abc import Sequence

from callboard.kv.layout import SlotRun
from callboard.kv.packing import convert
from callboard.kv.page_store import PageStore, copy_slots
from callboard.kv.slots import pair_runs

from .contract import LaneClosed, PageWrite
from .pace import Pace


class MappedLane:
    """Copies slots into ``target``, which it closes with itself if it is the owner; converts where dtypes differ."""

    wire_dtype = ""

    def __init__(self, name: str, target: PageStore, *, is_owner: bool, pace: Pace | None = None) -> None:
        self.name = name
        self._target = target
        self._pace = pace or Pace()
        self._is_owner = is_owner
        self._is_closed = False

    async def write(self, store: PageStore, pages: PageWrite) -> int:
        # On the loop, in pieces: a thread would hold the interpreter's lock just as long, and could not be stopped.
        num_bytes = 0
        copies = pair_runs(pages.source, pages.target)
        move = copy_slots if store.layout.dtype == self._target.layout.dtype else convert
        piece_bytes = self._pace.piece_bytes(self._target.layout)
        pieces = move(store, self._target, copies, pages.layers, piece_bytes=piece_bytes)

        def copy() -> int:
            if self._is_closed or self._target.is_closed:
                raise LaneClosed
            return next(pieces, 0)

        while moved := await self._pace.take(copy):
            num_bytes += moved
        return num_bytes

    def fits(self, runs: Sequence[SlotRun]) -> bool:
        return all(0 <= run.slot <= self._target.num_slots - run.count and run.count > 0 for run in runs)

    def close(self) -> None:
        self._is_closed = True
        if self._is_owner:
            self._target.close()
