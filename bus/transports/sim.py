"""The simulated network: inproc with delays drawn from a seed, in order on each connection and free between them."""

from random import Random

from .inproc import InprocHub


class SimHub(InprocHub):
    """A hub whose batches take ``min_s`` to ``max_s``, the same ones for the same seed."""

    def __init__(self, seed: int, *, min_s: float = 20e-6, max_s: float = 500e-6) -> None:
        super().__init__()
        self._rng = Random(seed)
        self._min_s = min_s
        self._max_s = max_s

    def delay(self, sender: str, receiver: str) -> float:
        return self._rng.uniform(self._min_s, self._max_s)

    def cut(self, endpoint: str) -> None:
        """Break one connection of the node at ``endpoint``, drawn from the seed; none where it has none."""
        connections = list(self.transports[endpoint].connections)
        if connections:
            self._rng.choice(connections).cut()
