"""Seeds that found a bug, and what it was. A change of how schedules are drawn makes others of them: look anew then.

These are run without what seeds got since: other strategies, and changes while they serve.
"""

import pytest

from .harness import run_schedule
from .schedule import draw_plain

FOUND = {
    132: "blocks lent to an engine actor that crashed were given back while its last step was still writing them",
    174: "the same, with a manager to each engine",
    1575: "an engine that had attached itself anew was lent blocks for what it had asked under the attachment before",
    830: "a refill that ended with its attachment woke nobody: a sequence that lacked a block waited for ever",
}


@pytest.mark.parametrize("seed", FOUND)
def test_a_seed_that_found_a_bug_passes(seed: int) -> None:
    outcome = run_schedule(draw_plain(seed))
    assert not outcome.problems, f"seed {seed}: {FOUND[seed]}?\n" + "\n".join(outcome.problems)
