"""Means, percentiles and their intervals, of samples that hang together.

A run's requests are no independent samples: who meets a queue meets it with its neighbours, and a round has its
weather. The bootstrap here draws rounds, and in each of them runs of consecutive requests (a circular block bootstrap),
so that both show in the interval. Strategies of a round got the same arrivals, so ratios are taken of pairs: the same
draw for both.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Indices = NDArray[np.int64]
Statistic = Callable[[Array], Array]
"""Of samples along the last axis."""

NUM_DRAWS = 1000
RUN = 10
"""Consecutive requests that are drawn together."""
CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value and its interval."""

    value: float
    low: float
    high: float

    def scaled(self, factor: float) -> "Estimate":
        """Return it in another unit; a negative factor turns it around."""
        ends = sorted((self.low * factor, self.high * factor))
        return Estimate(self.value * factor, *ends)

    def __str__(self) -> str:
        return f"{_short(self.value)} ({_short(self.low)} to {_short(self.high)})"


def mean(samples: Array) -> Array:
    """Return the mean along the last axis."""
    return np.asarray(samples.mean(axis=-1))


def p99(samples: Array) -> Array:
    """Return the 99th percentile along the last axis, between ranks where it falls there."""
    return np.asarray(np.quantile(samples, 0.99, axis=-1))


def estimate(rounds: Sequence[Array], statistic: Statistic, *, seed: int = 0) -> Estimate:
    """Return a statistic of all rounds' samples together. All rounds are equally long."""
    pool = np.stack(rounds)
    return _estimate(statistic(pool.ravel()), statistic(_drawn(pool, *_draws(pool, seed))))


def ratio(rounds: Sequence[Array], base: Sequence[Array], statistic: Statistic, *, seed: int = 0) -> Estimate:
    """Return a statistic of ``rounds`` over that of ``base``, whose rounds met the same arrivals."""
    pool, base_pool = np.stack(rounds), np.stack(base)
    assert pool.shape == base_pool.shape, "they were not paired"
    draws = _draws(pool, seed)
    drawn = statistic(_drawn(pool, *draws)) / statistic(_drawn(base_pool, *draws))
    return _estimate(statistic(pool.ravel()) / statistic(base_pool.ravel()), drawn)


def round_ratios(rounds: Sequence[Array], base: Sequence[Array], statistic: Statistic) -> list[float]:
    """Return the ratio in each round: what a repeat more could bring."""
    return [float(statistic(mine) / statistic(theirs)) for mine, theirs in zip(rounds, base, strict=True)]


def _estimate(value: Array, drawn: Array) -> Estimate:
    low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(float(value), float(low), float(high))


def _draws(pool: Array, seed: int) -> tuple[Indices, Indices]:
    """Return which rounds a resample takes, [draws, rounds], and which of their samples, [draws, rounds, samples]."""
    rng, (num_rounds, length) = np.random.default_rng(seed), pool.shape
    chosen = rng.integers(0, num_rounds, (NUM_DRAWS, num_rounds))
    starts = rng.integers(0, length, (NUM_DRAWS, num_rounds, -(-length // RUN), 1))
    positions = (starts + np.arange(RUN)).reshape(NUM_DRAWS, num_rounds, -1)[:, :, :length]
    return chosen, positions % length


def _drawn(pool: Array, chosen: Indices, positions: Indices) -> Array:
    return pool[chosen[:, :, None], positions].reshape(NUM_DRAWS, -1)


def _short(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
