"""Some seeds of chaos. ``make chaos SEEDS=10000`` runs more, and ``make chaos SEED=7`` shows one."""

from pathlib import Path

import pytest

from callboard.router import scripts

from .harness import run_seed
from .strategies import STRATEGIES, draw

NUM_SEEDS = 160
BATCH = 20


@pytest.mark.parametrize("first", range(0, NUM_SEEDS, BATCH))
def test_every_request_ends_rightly_and_nothing_leaks_whatever_happens(first: int) -> None:
    outcomes = [run_seed(seed) for seed in range(first, first + BATCH)]
    failing = [outcome for outcome in outcomes if outcome.problems]
    assert not failing, "\n".join(f"make chaos SEED={each.seed}\n    {each.problems[0]}" for each in failing)
    # A batch in which nothing happens would pass, too.
    assert sum(outcome.num_finished for outcome in outcomes) > 5 * BATCH
    assert sum(sum(outcome.faults.values()) for outcome in outcomes) > BATCH / 2
    assert sum(sum(outcome.changes.values()) for outcome in outcomes) > BATCH / 4
    assert sum(outcome.num_continued for outcome in outcomes) > 0


def test_every_strategy_that_ships_is_among_them() -> None:
    shipped = {path.stem for path in Path(scripts.__file__).parent.glob("[a-z]*.py")}
    assert shipped <= STRATEGIES.keys()
    schedules = [draw(seed) for seed in range(NUM_SEEDS)]
    assert {schedule.script for schedule in schedules} == STRATEGIES.keys()
    assert sum(not schedule.may_fail and bool(schedule.faults) for schedule in schedules) > NUM_SEEDS / 10
