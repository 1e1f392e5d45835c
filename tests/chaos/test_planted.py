"""Bugs put into the production code on purpose: the simulation finds each of them, and nothing without them.

``make test`` begins near a seed that is known to find a bug, or looks only at seeds that have what it takes. All seeds
from the first on, printing which one found it: ``CHAOS_PLANTED=2000 make test ARGS='-s tests/chaos/test_planted.py'``.
"""

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from unittest.mock import patch

import pytest

from callboard.router import recovery

from .harness import run_seed
from .planted import PLANTED
from .schedule import Schedule
from .strategies import draw

NUM_SEEDS = int(os.environ.get("CHAOS_PLANTED", "0"))
MOST = 5000
WRONG_TOKEN = r"request \w+: token \d+ is \d+ and not"
WRITTEN_WHILE_FREE = r"block \d+ was written while it was free"


@dataclass(frozen=True)
class Search:
    """How a bug is called when it is found, and which seeds ``make test`` looks at."""

    reason: str
    first: int = 0
    is_worth_it: Callable[[Schedule], bool] = lambda schedule: True

    def seeds(self) -> Iterator[int]:
        if NUM_SEEDS:
            return iter(range(NUM_SEEDS))
        return (seed for seed in range(self.first, MOST) if self.is_worth_it(draw(seed)))


def restarts_a_manager_of_reservations_that_are_out(schedule: Schedule) -> bool:
    managers = schedule.managers.values()
    is_restarted = any(fault.kind in ("kill", "stop", "crash") and fault.node in managers for fault in schedule.faults)
    return is_restarted and "renews_its_lease" in schedule.script


def hands_over(schedule: Schedule) -> bool:
    return "hands_over" in schedule.script or any(change.kind == "drain" for change in schedule.changes)


SEARCHES = {
    "a_block_returned_in_flight": Search(f"{WRITTEN_WHILE_FREE}|{WRONG_TOKEN}", first=1030),
    "kv_readable_before_it_arrived": Search(WRONG_TOKEN),
    "a_lost_abort": Search(f"sequences of nobody|{WRITTEN_WHILE_FREE}|knows nothing of that", first=75),
    "a_stale_epoch_accepted": Search(
        f"{WRITTEN_WHILE_FREE}|{WRONG_TOKEN}|is not inside the reservation",
        first=3190,
        is_worth_it=restarts_a_manager_of_reservations_that_are_out,
    ),
    "a_retry_that_repeats_tokens": Search(r"request \w+: token \d+ came again"),
    "a_death_that_ends_requests": Search(
        "it failed without a fault", is_worth_it=lambda schedule: not schedule.may_fail
    ),
    "a_hand_over_that_drops_a_token": Search(
        r"token \d+ came|raised ScriptError|no fault may cause", is_worth_it=hands_over
    ),
    "a_hold_without_an_end": Search("hung: request|failed without a fault", is_worth_it=hands_over),
    "a_tier_that_forgets_the_prefix": Search(
        WRONG_TOKEN, first=22, is_worth_it=lambda schedule: schedule.num_host_blocks > 0
    ),
}


THREE_DEATHS = 587
"""A seed in which three deaths in a row hit the same requests, and nothing else goes wrong."""


def test_a_request_may_end_with_the_third_death_in_a_row_and_with_none_before() -> None:
    outcome = run_seed(THREE_DEATHS)
    assert sum(outcome.faults.values()) == 3
    num_left = 2
    assert (outcome.problems, outcome.num_failed) == ([], num_left + 3), "what seeds stand for has changed: look anew"
    with patch.object(recovery, "NUM_ATTEMPTS", 2):
        problems = run_seed(THREE_DEATHS).problems
    assert any("it failed without a fault" in problem for problem in problems)


def test_every_bug_is_searched_for() -> None:
    assert sorted(SEARCHES) == sorted(PLANTED)


@pytest.mark.parametrize("bug", SEARCHES)
def test_the_simulation_finds_a_planted_bug_and_nothing_without_it(bug: str) -> None:
    search = SEARCHES[bug]
    for seed in search.seeds():
        problems = run_seed(seed, planted=PLANTED[bug]).problems
        found = [problem for problem in problems if re.search(search.reason, problem)]
        if found:
            break
    else:
        pytest.fail(f"no seed finds {bug}")
    print(f"\n{bug}: seed {seed}: {found[0]}")
    assert run_seed(seed).problems == []
