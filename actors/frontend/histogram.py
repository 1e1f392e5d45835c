"""Values counted in buckets: since the start for Prometheus, and of the last minute for percentiles."""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise

from callboard.actors.stats_protocol import Percentiles

SLICE_S = 5.0
NUM_SLICES = 12
WINDOW_S = SLICE_S * NUM_SLICES
RATIO = 1.05
"""Of two neighbouring bounds: a percentile is off by less than 5%."""
LEAST, MOST = 1e-4, 1e4


def _geometric() -> list[float]:
    bounds = [LEAST]
    while bounds[-1] < MOST:
        bounds.append(bounds[-1] * RATIO)
    return bounds


class Totals:
    """Counts of values since the start. ``bounds`` are the upper ends of the buckets, ascending."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._ends = list(bounds)
        self._sum = 0.0
        self._counts = [0] * (len(self._ends) + 1)

    def add(self, value: float) -> None:
        """Take in a value."""
        self._counts[bisect_left(self._ends, value)] += 1
        self._sum += value

    @property
    def sum(self) -> float:
        """The sum of all values."""
        return self._sum

    def buckets(self) -> list[tuple[str, float]]:
        """Return (upper end, how many values were not above it), as Prometheus wants them; the last is ``+Inf``."""
        below = list(accumulate(self._all_counts()))
        shown = [(str(float(bound)), float(below[bisect_left(self._ends, bound)])) for bound in self._bounds]
        return [*shown, ("+Inf", float(below[-1]))]

    def _all_counts(self) -> list[int]:
        return self._counts


class Histogram(Totals):
    """Counts of values in seconds, and those of the last minute.

    Inside there are many more buckets than Prometheus is shown, with these among their ends, so that a value is sorted
    once for both uses; and it is counted once, in the slice of time it came in.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        super().__init__(bounds)
        self._ends = sorted({*bounds, *_geometric()})
        self._counts = self._none()  # Of the slices that have been emptied.
        self._slices = [self._none() for _ in range(NUM_SLICES)]
        self._sums = [0.0] * NUM_SLICES
        self._number = 0
        """Which slice of time is the newest; it is written at its remainder."""

    def _none(self) -> list[int]:
        return [0] * (len(self._ends) + 1)

    def add(self, value: float) -> None:
        raise TypeError("a value of a minute has a time: observe it")

    def observe(self, values: Iterable[float], now: float) -> None:
        """Take in values; ``now`` is in seconds of a clock that never goes back."""
        # Hot: once for every few dozen tokens.
        self._turn(now)
        ends, counts = self._ends, self._slices[self._number % NUM_SLICES]
        total = 0.0
        for value in values:
            counts[bisect_left(ends, value)] += 1
            total += value
        self._sums[self._number % NUM_SLICES] += total

    @property
    def sum(self) -> float:
        return self._sum + sum(self._sums)

    def _all_counts(self) -> list[int]:
        return [sum(column) for column in zip(self._counts, *self._slices, strict=True)]

    def recent(self, now: float) -> tuple[list[int], float]:
        """Return the counts of the last minute by inner bucket, and the sum of the values."""
        self._turn(now)
        return [sum(column) for column in zip(*self._slices, strict=True)], sum(self._sums)

    def end(self, index: int) -> tuple[float, float]:
        """Return where an inner bucket begins and ends."""
        begin = self._ends[index - 1] if index else 0.0
        return begin, self._ends[index] if index < len(self._ends) else begin

    def _turn(self, now: float) -> None:
        """Empty the slices whose time has passed since the last look."""
        number = int(now // SLICE_S)
        for passed in range(max(self._number + 1, number - NUM_SLICES + 1), number + 1):
            index = passed % NUM_SLICES
            self._counts = [whole + part for whole, part in zip(self._counts, self._slices[index], strict=True)]
            self._sum += self._sums[index]
            self._slices[index], self._sums[index] = self._none(), 0.0
        self._number = max(self._number, number)


def percentiles(histograms: Sequence[Histogram], now: float) -> Percentiles:
    """Return the percentiles of the last minute of all ``histograms`` together; they have the same bounds."""
    recent = [each.recent(now) for each in histograms]
    counts = [sum(column) for column in zip(*(counts for counts, _ in recent), strict=True)]
    total = sum(counts)
    if not total:
        return Percentiles()
    mean = sum(values for _, values in recent) / total
    return Percentiles(total, mean, *(_quantile(histograms[0], counts, share * total) for share in (0.5, 0.95, 0.99)))


def _quantile(histogram: Histogram, counts: Sequence[int], rank: float) -> float:
    """Return the value of a rank, taking the values of its bucket for evenly spread."""
    for index, (before, upto) in enumerate(pairwise(accumulate(counts, initial=0))):
        if upto >= rank and upto > before:
            begin, end = histogram.end(index)
            return begin + (end - begin) * (rank - before) / (upto - before)
    raise AssertionError("the rank is not above the number of values")
