"""The books against a plain model of who may write which slot, in pools too large to visit every state."""

import os
from typing import Any

from exploration import problems_of
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from small_world import Asked, Scope, World

NUM_EXAMPLES = int(os.environ.get("CALLBOARD_TEST_EXAMPLES", "20"))

LIKELY = {"reserve": 4, "open": 16, "complete": 40, "graft": 12, "adopt": 4, "lend": 4, "computed": 20, "finish": 4}
"""Else hardly anything would come to its end before somebody gives it up, or dies."""


@st.composite
def reservations(draw: st.DrawFn) -> Asked:
    """A reservation of few distinct tokens, so that prompts share prefixes, cut among up to three writers."""
    prompt = tuple(draw(st.lists(st.integers(0, 1), min_size=1, max_size=9)))
    end = draw(st.integers(1, len(prompt)))
    cuts = sorted(draw(st.sets(st.integers(1, end - 1), max_size=2))) if end > 1 else []
    edges = [0, *cuts, end]
    writers = draw(st.permutations(["p", "q", "self"]))
    writes = tuple(zip(writers, edges, edges[1:], strict=False))
    return Asked(prompt, end, writes, num_tries=2, most=3)


class ManyOwners(RuleBasedStateMachine):
    """Anything that may happen next happens, in any order."""

    @initialize(data=st.data())
    def begin(self, data: Any) -> None:
        asked = {str(i): data.draw(reservations()) for i in range(3)}
        lent = asked["0"].prompt
        others = frozenset({"die", "adopt", "tie", "await", "engine"})
        num_blocks, lent_end = data.draw(st.integers(5, 16)), data.draw(st.sampled_from([0, max(1, len(lent) - 1)]))
        self.world = World(Scope(asked, num_blocks, others, lent, lent_end, num_loans=10**9))

    @rule(choices=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)), min_size=6, max_size=6))
    def some_things_happen(self, choices: list[tuple[int, int]]) -> None:
        for kind, number in choices:
            self.something_happens(kind, number)
            assert problems_of(self.world) == []

    def something_happens(self, kind: int, number: int) -> None:
        events = list(self.world.events())
        kinds = [kind for kind in sorted({event[0] for event in events}) for _ in range(LIKELY.get(kind, 1))]
        of_kind = [event for event in events if event[0] == kinds[kind % len(kinds)]]
        self.world.apply(of_kind[number % len(of_kind)])

    @invariant()
    def nobody_writes_what_is_anothers(self) -> None:
        assert problems_of(self.world) == []

    def teardown(self) -> None:
        """Whatever has happened: once everybody has finished, everything is back."""
        world = self.world
        for _ in range(3):
            for event in list(world.events()):
                if event[0] in ("abort", "release", "finish", "unawait", "end loan", "engine returns"):
                    world.apply(event)
        assert problems_of(world) == []
        assert world.is_over


TestManyOwners = ManyOwners.TestCase
TestManyOwners.settings = settings(max_examples=NUM_EXAMPLES, stateful_step_count=20, deadline=None)
