"""Watching harms nothing: fleets under faults, watched by one that is slow, stopped and killed as well."""

import pytest

from .harness import run_seed


@pytest.mark.parametrize("first", [0, 10])
def test_a_watcher_that_misbehaves_harms_nothing_and_leaves_nothing_behind(first: int) -> None:
    outcomes = [run_seed(seed, is_watched=True) for seed in range(first, first + 10)]
    failing = [outcome for outcome in outcomes if outcome.problems]
    assert not failing, "\n".join(f"seed {each.seed}: {each.problems[0]}" for each in failing)
    assert sum(outcome.num_seen for outcome in outcomes) > 1000
    assert sum(outcome.num_stories for outcome in outcomes) > 20


def test_a_watched_run_is_a_function_of_its_seed_too() -> None:
    first, second = (run_seed(3, is_watched=True) for _ in range(2))
    assert (first.log_digest, first.num_seen) == (second.log_digest, second.num_seen)
