"""Two hundred seeds of chaos. ``make chaos SEEDS=10000`` runs more, and ``make chaos SEED=7`` shows one."""

import pytest

from .harness import run_seed

NUM_SEEDS = 200
BATCH = 20


@pytest.mark.parametrize("first", range(0, NUM_SEEDS, BATCH))
def test_every_request_ends_rightly_and_nothing_leaks_whatever_happens(first: int) -> None:
    outcomes = [run_seed(seed) for seed in range(first, first + BATCH)]
    failing = [outcome for outcome in outcomes if outcome.problems]
    assert not failing, "\n".join(f"make chaos SEED={each.seed}\n    {each.problems[0]}" for each in failing)
    # A batch in which nothing happens would pass, too.
    assert sum(outcome.num_finished for outcome in outcomes) > 5 * BATCH
    assert sum(sum(outcome.faults.values()) for outcome in outcomes) > BATCH / 2
