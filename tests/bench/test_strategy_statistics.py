"""The arithmetic of bench/strategies.py: intervals that cover, pairs that stay pairs, goals that can fall short."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

BENCH = Path(__file__).parent.parent.parent / "bench"
CPU_S = {"engine": 1.0, "manager": 0.1, "control": 0.1, "client": 0.1}


@pytest.fixture(autouse=True)
def bench_on_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(BENCH)
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "_strategies"]:
        del sys.modules[name]


def queue_like(rng: np.random.Generator) -> list[Any]:
    """Return five rounds of samples around 10: each hangs on the one before it, and on its round's weather."""
    rounds = []
    for _ in range(5):
        weather, value, samples = rng.normal(0, 0.3), 0.0, []
        for _ in range(100):
            value = 0.8 * value + rng.normal()
            samples.append(10 + weather + value)
        rounds.append(np.array(samples))
    return rounds


# ---- intervals -------------------------------------------------------------------------------------------------------


def test_intervals_cover_the_mean_of_samples_that_hang_together(monkeypatch: pytest.MonkeyPatch) -> None:
    from _strategies import intervals

    monkeypatch.setattr(intervals, "NUM_DRAWS", 200)
    rng = np.random.default_rng(1)
    found = [intervals.estimate(queue_like(rng), intervals.mean) for _ in range(100)]
    assert 0.88 <= np.mean([each.low <= 10 <= each.high for each in found]) <= 0.99
    as_if_independent = 2 * 1.96 * np.mean([np.concatenate(queue_like(rng)).std() for _ in range(20)]) / 500**0.5
    assert np.mean([each.high - each.low for each in found]) > 1.5 * as_if_independent


def test_what_two_sides_share_is_no_part_of_their_ratio() -> None:
    from _strategies.intervals import estimate, mean, ratio

    base = queue_like(np.random.default_rng(2))
    half = [samples / 2 for samples in base]
    of_pairs = ratio(half, base, mean)
    assert (of_pairs.value, of_pairs.low, of_pairs.high) == pytest.approx((0.5, 0.5, 0.5))
    alone = estimate(half, mean)
    assert alone.high - alone.low > 0.1
    with pytest.raises(AssertionError, match="not paired"):
        ratio(half[:4], base, mean)


def test_percentiles_and_estimates_are_of_all_rounds_together() -> None:
    from _strategies.intervals import estimate, p99, round_ratios

    rounds = [np.arange(0.0, 100.0), np.arange(100.0, 200.0)]
    found = estimate(rounds, p99)
    assert found.value == pytest.approx(np.quantile(np.arange(200.0), 0.99))
    assert found.low <= found.value <= found.high
    assert found.scaled(-1).low == -found.high
    assert round_ratios([2 * each for each in rounds], rounds, p99) == [2.0, 2.0]


# ---- verdicts --------------------------------------------------------------------------------------------------------


def group(jct: dict[str, list[list[float]]], *, alone_s: float = 0.5) -> Any:
    """Return what was measured under one mix at one rate: JCTs by strategy and round."""
    from _strategies.judge import groups_of
    from _strategies.load import Met
    from _strategies.mixes import MIXES
    from _strategies.model import Shape
    from _strategies.records import Calibrated, Measured, Records, Setup
    from _strategies.strategies import STRATEGIES

    records = Records(None, Setup(Shape(), [256], 4, {}, False))
    records.add(Calibrated(MIXES[0].name, 10.0, {}, [], 0.1, 0.01, alone_s))
    for name, rounds in jct.items():
        for number, samples in enumerate(rounds):
            met = [Met(0.0, each / 4, each, 4) for each in samples]
            records.add(Measured(number, MIXES[0].name, 0.9, name, 9.0, 256, 1.0, CPU_S, met))
    found = groups_of(records, MIXES, STRATEGIES)
    assert len(found) == 1
    return found[0]


def test_adaptive_is_held_against_what_turned_out_best() -> None:
    from _strategies.judge import choices_of

    steady = [[1.0, 1.2, 0.8, 1.0]] * 3
    slower = {"round_robin": [[2.0] * 4] * 3, "one": [[0.1] * 4] * 3}  # Another deployment is no strategy of this one.
    (choice,) = choices_of([group({"least_loaded": steady, "adaptive": [[1.04] * 4] * 3, **slower})])
    assert choice.best == "data parallel: least_loaded"
    assert (choice.is_near, choice.is_ahead) == (True, False)
    (choice,) = choices_of([group({"least_loaded": steady, "adaptive": [[1.2] * 4] * 3, **slower})])
    assert (choice.is_near, choice.is_ahead) == (False, False)
    (choice,) = choices_of([group({"least_loaded": steady, "adaptive": [[0.9] * 4, [1.5] * 4, [1.5] * 4], **slower})])
    assert choice.over.value > 1.05
    assert choice.is_near, "one round of three was faster: its spread does not tell them apart"


def test_cuts_are_of_the_best_strategy_against_the_best_of_each_baseline() -> None:
    from _strategies.judge import cuts_of

    found = cuts_of(
        group(
            {
                "round_robin": [[4.0] * 4] * 2,
                "least_loaded": [[2.0] * 4] * 2,
                "disaggregate": [[1.0, 2.0, 3.0, 20.0]] * 2,
                "balanced-30": [[1.0] * 4] * 2,
                "adaptive": [[1.5] * 4] * 2,
            }
        )
    )
    cuts = {(each.against, each.statistic): each for each in found if each.is_best}
    parallel = cuts["data parallel", "mean"]
    assert (parallel.strategy, parallel.cut.value, parallel.most) == ("balanced 0.3", pytest.approx(0.5), 0.75)
    assert parallel.keeps_up
    assert not cuts["1P1D", "mean"].keeps_up, "its last requests took ever longer"
    assert {each.strategy for each in found if not each.is_best} == {"adaptive"}
    assert ("one engine on both cores", "mean") not in cuts


def test_rounds_that_not_all_strategies_have_do_not_count() -> None:
    found = group({"least_loaded": [[1.0] * 4] * 3, "adaptive": [[1.0] * 4] * 2})
    assert {side.rounds for side in found.sides.values()} == {(0, 1)}


def test_a_failed_request_counts_as_if_it_had_waited_to_the_end() -> None:
    from _strategies.judge import rows_of
    from _strategies.load import TIMEOUT_S, Met

    found = group({"least_loaded": [[1.0] * 4] * 2})
    found.sides["least_loaded"].measured[0].met[0] = Met(0.0, error="ActorDied: gone")
    (row,) = rows_of(found)
    assert row["failed"] == 1
    assert row["JCT ms"].value == pytest.approx(1e3 * (TIMEOUT_S + 7) / 8)
    assert row["goodput/s"].value == 0.0, "TTFT is 250 ms for all of them, and the objective 500, but TPOT is 250"


def test_goodput_counts_what_keeps_both_objectives() -> None:
    from _strategies.judge import rows_of

    # Alone TTFT 100 ms and TPOT 10 ms: at most 500 and 30 ms.
    (row,) = rows_of(group({"least_loaded": [[0.1, 0.11, 0.2, 5.0]] * 2}))
    assert row["SLO ms"] == [500.0, 30.0]
    assert row["goodput/s"].value == pytest.approx(9.0 * 2 / 4)
