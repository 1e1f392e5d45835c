"""Pages packed for the wire, and pages between pools of different dtypes.

packed_form.py says what a packed piece looks like, kernels/pages_numpy.py how values are rounded. Block sizes do not
matter here: a slot is a slot. A pool on a GPU is packed there (device_pages.py), to the same bytes.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from .device_store import DeviceStore
from .layout import DTYPE_BYTES, KvLayout, SlotRun
from .packed_form import SCALED, SCALED_TOKENS, packed_bytes
from .page_store import PIECE_BYTES, PageStore
from .slots import SlotCopy, num_slots

CONVERTED_BYTES = PIECE_BYTES // 4
"""The most bytes converted without letting the event loop run: a conversion takes some four times as long as a copy."""


def pack(store: PageStore, runs: Sequence[SlotRun], layers: range, out: memoryview, *, wire_dtype: str) -> int:
    """Pack the slots of ``runs``, in that order, into the beginning of ``out``; return the bytes written.

    Raises ValueError, and writes nothing, if ``out`` is too small, a slot or a layer is not the pool's, or the dtype
    is none.
    """
    num_bytes = _check(store, runs, layers, len(out), wire_dtype)
    if not num_bytes:
        return 0
    if isinstance(store, DeviceStore):
        from .device_pages import pages_of

        pages_of(store.device).pack(store, runs, layers, out[:num_bytes], wire_dtype)
        return num_bytes
    from callboard.kernels import pages_numpy

    values, scales = _packed(out[:num_bytes], store.layout, num_slots(runs), len(layers), wire_dtype)
    pool, dtype, slots = _slots_of(store, layers), store.layout.dtype, [(run.slot, run.count) for run in runs]
    if scales is not None:
        pages_numpy.gather_scaled(pool, dtype, slots, values, scales)
    else:
        pages_numpy.gather(pool, dtype, slots, values, wire_dtype)
    return num_bytes


def unpack(store: PageStore, runs: Sequence[SlotRun], layers: range, data: memoryview, *, wire_dtype: str) -> None:
    """Write a packed piece into the slots of ``runs``. Raises ValueError as ``pack`` does, and writes nothing."""
    num_bytes = _check(store, runs, layers, len(data), wire_dtype)
    if not num_bytes:
        return
    if isinstance(store, DeviceStore):
        from .device_pages import pages_of

        pages_of(store.device).unpack(store, runs, layers, data[:num_bytes], wire_dtype)
        return
    from callboard.kernels import pages_numpy

    values, scales = _packed(data[:num_bytes], store.layout, num_slots(runs), len(layers), wire_dtype)
    pool, dtype, slots = _slots_of(store, layers), store.layout.dtype, [(run.slot, run.count) for run in runs]
    if scales is not None:
        pages_numpy.scatter_scaled(values, scales, pool, dtype, slots)
    else:
        pages_numpy.scatter(values, wire_dtype, pool, dtype, slots)


def convert(
    source: PageStore,
    target: PageStore,
    copies: Sequence[SlotCopy],
    layers: range,
    *,
    piece_bytes: int = CONVERTED_BYTES,
) -> Iterator[int]:
    """Copy slots of some layers into a pool of another dtype; yields the bytes written, after each piece.

    A piece is at most ``piece_bytes``, or one slot. Exhaust it, or what follows the last piece is not copied. Between
    two pieces it holds nothing of either pool. Raises ValueError if the pools hold the KV of different models.
    """
    if not source.layout.can_exchange_with(target.layout):
        raise ValueError(f"KV laid out as {source.layout} does not go into a pool of {target.layout}")
    assert source.device == target.device == "cpu", "pools on GPUs are copied by kernels/pages.py"
    from callboard.kernels import pages_numpy

    layout = target.layout
    width = layout.num_kv_heads * layout.head_dim
    size = min(piece_bytes, CONVERTED_BYTES) // DTYPE_BYTES[layout.dtype]
    for copy in copies:
        for some_layers, tokens in pages_numpy.parts(len(layers), copy.count, width, size):
            read = _slots_of(source, layers)[some_layers, :, copy.source : copy.source + copy.count]
            write = _slots_of(target, layers)[some_layers, :, copy.target : copy.target + copy.count]
            write = write[:, :, tokens]
            pages_numpy.cast_in_parts(read[:, :, tokens], source.layout.dtype, write, layout.dtype)
            num_bytes = write.nbytes
            del read, write
            yield num_bytes


def _check(store: PageStore, runs: Sequence[SlotRun], layers: range, num_bytes: int, wire_dtype: str) -> int:
    """Return how many bytes are packed."""
    if layers.step != 1 or not 0 <= layers.start <= layers.stop <= store.layout.num_layers:
        raise ValueError(f"{layers} are no layers of a pool of {store.layout.num_layers}")
    for run in runs:
        if run.count <= 0 or not 0 <= run.slot <= store.num_slots - run.count:
            raise ValueError(f"a pool of {store.num_slots} slots does not have {run.count} from {run.slot} on")
    needed = packed_bytes(store.layout, num_slots(runs), len(layers), wire_dtype)
    if num_bytes < needed:
        raise ValueError(f"{needed} bytes are packed, and the buffer has {num_bytes}")
    return needed


def _packed(data: memoryview, layout: KvLayout, num_tokens: int, num_layers: int, wire_dtype: str) -> Any:
    """Return the arrays in a packed piece: values, and scales if there are any."""
    import numpy as np

    from callboard.kernels.pages_numpy import STORAGE

    shape = (num_layers, 2, num_tokens, layout.num_kv_heads * layout.head_dim)
    num_bytes = packed_bytes(layout, num_tokens, num_layers, wire_dtype)
    num_scales = num_layers * 2 * -(-num_tokens // SCALED_TOKENS) if wire_dtype == SCALED else 0
    end = num_bytes - 4 * num_scales
    values = np.frombuffer(data[:end], STORAGE[wire_dtype]).reshape(shape)
    if wire_dtype != SCALED:
        return values, None
    return values, np.frombuffer(data[end:], np.float32).reshape(num_layers, 2, num_scales // (2 * num_layers))


def _slots_of(store: PageStore, layers: range) -> Any:
    """Return the pool as an array [num_layers, 2, num_slots, num_kv_heads * head_dim], which can be written."""
    import numpy as np

    from callboard.kernels.pages_numpy import STORAGE

    # Of a slice, so that the store can give up its own view while somebody still looks into the memory.
    view = store.view[store.offset(layers.start, 0, 0) : store.offset(layers.stop, 0, 0)]
    width = store.layout.num_kv_heads * store.layout.head_dim
    return np.frombuffer(view, STORAGE[store.layout.dtype]).reshape(len(layers), 2, store.num_slots, width)
