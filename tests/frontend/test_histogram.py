"""Histograms: Prometheus' buckets exactly, percentiles nearly, and of the last minute alone."""

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from prometheus_client import Histogram as Reference

from callboard.actors.frontend.histogram import WINDOW_S, Histogram, Totals, percentiles
from callboard.actors.frontend.observed import ITL_S, NUM_TOKENS, REQUEST_S, TTFT_S

BOUNDS = {"ttft": TTFT_S, "itl": ITL_S, "request": REQUEST_S}
VALUES = st.lists(st.floats(0, 1e5, allow_nan=False) | st.sampled_from(TTFT_S), max_size=200)


@pytest.mark.parametrize("bounds", [*BOUNDS.values(), NUM_TOKENS])
def test_bounds_ascend_so_that_prometheus_takes_them(bounds: tuple[float, ...]) -> None:
    assert list(bounds) == sorted(set(bounds))


@given(VALUES)
def test_buckets_and_sum_are_those_of_the_client_library(values: list[float]) -> None:
    reference = Reference("x", "x", buckets=TTFT_S, registry=CollectorRegistry())
    histogram, totals = Histogram(TTFT_S), Totals(TTFT_S)
    for value in values:
        reference.observe(value)
        totals.add(value)
    histogram.observe(values, 0.0)
    [family] = reference.collect()
    expected = [(s.labels["le"], s.value) for s in family.samples if s.name == "x_bucket"]
    assert histogram.buckets() == totals.buckets() == expected
    assert histogram.sum == pytest.approx(sum(values))
    assert totals.sum == pytest.approx(sum(values))


@pytest.mark.parametrize("seed", range(5))
def test_a_percentile_is_off_by_less_than_a_twentieth(seed: int) -> None:
    rng = Random(seed)
    values = sorted(rng.lognormvariate(-3.0, 1.5) for _ in range(5000))
    histogram = Histogram(ITL_S)
    histogram.observe(values, 100.0)
    found = percentiles([histogram], 100.0)
    assert found.count == 5000
    assert found.mean == pytest.approx(sum(values) / 5000)
    for share, value in ((0.5, found.p50), (0.95, found.p95), (0.99, found.p99)):
        assert value == pytest.approx(values[int(share * 5000)], rel=0.05)


def test_percentiles_of_several_histograms_are_those_of_all_their_values() -> None:
    slow, fast, both = Histogram(ITL_S), Histogram(ITL_S), Histogram(ITL_S)
    for histogram, value in ((slow, 2.0), (fast, 0.01)):
        histogram.observe([value] * 50, 0.0)
        both.observe([value] * 50, 0.0)
    assert percentiles([slow, fast], 0.0) == percentiles([both], 0.0)
    assert percentiles([slow, fast], 0.0).p50 == pytest.approx(0.01, rel=0.05)
    assert percentiles([slow, fast], 0.0).p95 == pytest.approx(2.0, rel=0.05)


def test_a_minute_forgets_what_was_before_it_and_prometheus_does_not() -> None:
    histogram = Histogram(ITL_S)
    histogram.observe([1.0] * 10, 7.0)
    histogram.observe([0.1], 7.0 + WINDOW_S - 5.0)
    assert percentiles([histogram], 7.0 + WINDOW_S - 5.0).count == 11
    assert percentiles([histogram], 7.0 + WINDOW_S).count == 1
    assert percentiles([histogram], 1000 * WINDOW_S).p99 is None
    assert histogram.buckets()[-1] == ("+Inf", 11.0)


def test_a_long_silence_costs_no_more_than_a_minute_of_slices() -> None:
    histogram = Histogram(ITL_S)
    histogram.observe([1.0], 0.0)
    histogram.observe([2.0], 1e12)
    assert percentiles([histogram], 1e12).count == 1
