"""Pages of pools in GPU memory, moved by this process: between two pools, or packed into host memory and back.

All goes through one stream of its own for each GPU, beside whatever else the process computes there. Nothing orders it
after an engine's work but the message that brings it here: an engine reports layers when the GPU is done with them.
torch and Triton are loaded by ``warm_up``, or by the first page. No GPU has run this yet.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

from .device_store import DeviceStore
from .layout import SlotRun
from .packed_form import SCALED, packed_bytes
from .slots import num_slots

WARMED_TOKENS = (1, 32, 33)
"""Kernels are compiled anew for one token, for a multiple of 16, and for what is neither."""


def warm_up(store: DeviceStore) -> None:
    """Load torch and the kernels, and map a pool that nobody uses yet: seconds, so do it in a thread.

    Raises what is wrong with them; of a GPU that torch cannot use, OSError.
    """
    pages = pages_of(store.device)
    for count in WARMED_TOKENS:
        if count <= store.num_slots:
            runs = (SlotRun(0, count),)
            pages.copy(store, store, runs, runs, range(1)).synchronize()


@cache
def pages_of(device: str) -> "DevicePages":
    """Return what moves pages on a GPU in this process."""
    return DevicePages(device)


class DevicePages:
    """Moves pages of the pools on one GPU, on a stream of its own, in the order it is told to."""

    def __init__(self, device: str) -> None:
        """Raises OSError with a sentence where torch has no CUDA, or cannot use this GPU."""
        import torch

        from callboard.kernels import pages

        if not torch.cuda.is_available():
            raise OSError(f"the torch installed here ({torch.__version__}) cannot use {device}")
        self._torch, self._kernels = torch, pages
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def copy(
        self,
        source: DeviceStore,
        target: DeviceStore,
        source_runs: Sequence[SlotRun],
        target_runs: Sequence[SlotRun],
        layers: range,
    ) -> Any:
        """Begin to copy slots of some layers, converting them to the target's dtype; return the event of the end.

        Neither pool may be closed before that. Raises ValueError if a slot is not in its pool.
        """
        with self._torch.cuda.stream(self._stream):
            read, write = source.tensor(), target.tensor()
            tables = self._table(source_runs), self._table(target_runs)
            self._kernels.copy_pages(read, write, *tables, layers=layers)
            return self._stream.record_event()

    def pack(self, store: DeviceStore, runs: Sequence[SlotRun], layers: range, out: memoryview, dtype: str) -> None:
        """Gather slots into host memory, laid out as packed_form.py says; returns when they are there."""
        with self._torch.cuda.stream(self._stream):
            staged, values, scales = self._staged(store, runs, layers, dtype)
            self._kernels.gather_pages(store.tensor(), self._table(runs), values, layers=layers, scales=scales)
            self._torch.frombuffer(out, dtype=self._torch.uint8, count=len(staged)).copy_(staged)
            self._stream.synchronize()

    def unpack(self, store: DeviceStore, runs: Sequence[SlotRun], layers: range, data: memoryview, dtype: str) -> None:
        """Scatter slots that were packed in host memory; returns when they are in place."""
        with self._torch.cuda.stream(self._stream):
            staged, values, scales = self._staged(store, runs, layers, dtype)
            if data.readonly:
                data = memoryview(bytearray(data))
            staged.copy_(self._torch.frombuffer(data, dtype=self._torch.uint8, count=len(staged)))
            self._kernels.scatter_pages(values, store.tensor(), self._table(runs), layers=layers, scales=scales)
            self._stream.synchronize()

    def _table(self, runs: Sequence[SlotRun]) -> Any:
        return self._kernels.SlotTable.of_runs([(run.slot, run.count) for run in runs], self._device)

    def _staged(self, store: DeviceStore, runs: Sequence[SlotRun], layers: range, dtype: str) -> tuple[Any, Any, Any]:
        """Return a buffer on the GPU, and the packed values and scales (None if there are none) in it."""
        torch, layout, count = self._torch, store.layout, num_slots(runs)
        staged = torch.empty(packed_bytes(layout, count, len(layers), dtype), dtype=torch.uint8, device=self._device)
        shape = (len(layers), 2, count, layout.num_kv_heads, layout.head_dim)
        if dtype != SCALED:
            return staged, staged.view(getattr(torch, dtype)).view(shape), None
        end = 2 * len(layers) * count * layout.num_kv_heads * layout.head_dim
        values = staged[:end].view(torch.float8_e4m3fn).view(shape)
        if end % 4:
            raise ValueError(f"scales cannot lie behind {end} bytes: {layout}")
        return staged, values, staged[end:].view(torch.float32).view(len(layers), 2, -1)
