"""Reporting layers whose KV is computed by a GPU: when its writes are done, not when they are launched."""

from collections import deque
from collections.abc import Callable
from typing import Protocol

from .step import OnLayers


class Event(Protocol):
    """A mark in the GPU's stream of work, as torch.cuda.Event is one."""

    def query(self) -> bool:
        """Return whether all before it is done."""

    def synchronize(self) -> None:
        """Wait until all before it is done."""


class LayerEvents:
    """Tells ``on_layers`` of each group of layers, in order, once the GPU has passed the event recorded after it.

    While layers are launched this only looks, so the launches run ahead of the GPU as they would without it; what is
    left is waited for in ``finish``, when the whole step has been launched and the thread has nothing else to do.
    """

    def __init__(self, groups: dict[int, tuple[int, int]], on_layers: OnLayers, record: Callable[[], Event]) -> None:
        self._groups = groups
        self._on_layers = on_layers
        self._record = record
        self._pending: deque[tuple[tuple[int, int], Event]] = deque()

    def launched(self, layer: int) -> None:
        """Note that a layer's KV is on its way, and report what has come to be in place meanwhile."""
        if layer in self._groups:
            self._pending.append((self._groups[layer], self._record()))
        while self._pending and self._pending[0][1].query():
            self._on_layers(*self._pending.popleft()[0])

    def finish(self) -> None:
        """Report the rest, each group as soon as it is in place."""
        while self._pending:
            layers, event = self._pending.popleft()
            event.synchronize()
            self._on_layers(*layers)
