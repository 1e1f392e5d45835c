import pytest
from hypothesis import given
from hypothesis import strategies as st

from callboard.kv.layout import BadRange, SlotRun
from callboard.kv.slots import cut_runs, pair_runs, resolve_range, slot_runs


@pytest.mark.parametrize(
    ("begin", "end", "expected"),
    [(None, None, (0, 10)), (2, -1, (2, 9)), (-3, None, (7, 10)), (10, None, (10, 10)), (0, 0, (0, 0)), (5, 4, (5, 4))],
)
def test_ranges_count_from_either_end(begin, end, expected):
    assert resolve_range(begin, end, 10) == expected


@pytest.mark.parametrize(("begin", "end"), [(0, 11), (-11, None), (0, -11), (11, None)])
def test_a_range_the_prompt_does_not_have_is_refused(begin, end):
    with pytest.raises(BadRange):
        resolve_range(begin, end, 10)


def slots_of(runs):
    return [run.slot + i for run in runs for i in range(run.count)]


def test_adjacent_blocks_make_one_run():
    assert slot_runs([4, 5, 9], 1, 10, 4) == (SlotRun(17, 7), SlotRun(36, 2))


tables = st.permutations(range(6))
bounds = st.tuples(st.integers(0, 24), st.integers(0, 24)).map(sorted)


@given(tables, bounds, bounds)
def test_runs_name_the_slots_of_the_tokens_in_order(table, outer, inner):
    begin, end = outer
    runs = slot_runs(table, begin, end, 4)
    expected = [table[i // 4] * 4 + i % 4 for i in range(begin, end)]
    assert slots_of(runs) == expected
    assert slots_of(cut_runs(runs, *inner)) == expected[inner[0] : inner[1]]


@given(tables, tables, bounds)
def test_copies_carry_every_slot_to_its_counterpart(source, target, bound):
    begin, end = bound
    copies = pair_runs(slot_runs(source, begin, end, 4), slot_runs(target, begin, end, 4))
    carried = [(copy.source + i, copy.target + i) for copy in copies for i in range(copy.count)]
    assert carried == [(source[i // 4] * 4 + i % 4, target[i // 4] * 4 + i % 4) for i in range(begin, end)]
