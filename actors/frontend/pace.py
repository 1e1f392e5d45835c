"""When the tokens of one sequence come: a look at the clock each, sorted into a histogram a few dozen at a time."""

from collections.abc import Callable
from operator import sub

from .histogram import Histogram

GAPS_AT_ONCE = 64


class Pace:
    """When the tokens of one sequence came. ``gaps``: where the times between them go."""

    __slots__ = ("_gaps", "_now", "_times", "first")

    def __init__(self, now: Callable[[], float], gaps: Histogram) -> None:
        self.first: float | None = None
        self._now = now
        self._gaps = gaps
        self._times: list[float] = []

    def token(self) -> None:
        """Note that a token has come."""
        # Hot: once per token.
        times = self._times
        times.append(self._now())
        if len(times) > GAPS_AT_ONCE or self.first is None:
            self.flush()

    def flush(self) -> None:
        """Sort the gaps that are not yet there into the histogram."""
        times = self._times
        if not times:
            return
        if self.first is None:
            self.first = times[0]
        if len(times) > 1:
            self._gaps.observe(map(sub, times[1:], times), times[-1])
            del times[:-1]

    @property
    def last(self) -> float | None:
        """When the last token came; None before the first."""
        return self._times[-1] if self._times else None
