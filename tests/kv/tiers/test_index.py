"""What a tier holds stays within its size; the least recently used goes first, and of a chain its tail."""

from hypothesis import given, settings
from hypothesis import strategies as st

from callboard.kv.tiers.index import TierIndex

ROOT = b"root"


def index_of(*chain: bytes, most: int = 4) -> TierIndex:
    index = TierIndex(most, ROOT)
    for parent, key in zip((ROOT, *chain), chain, strict=False):
        index.add(key, parent, 1)
    return index


def test_the_tail_goes_before_what_it_continues() -> None:
    index = index_of(b"a", b"b", b"c", most=3)
    assert index.make_room(2) == [(b"c", b"b"), (b"b", b"a")]
    assert list(index) == [b"a"]


def test_the_least_recently_used_goes_first() -> None:
    index = TierIndex(3, ROOT)
    for key in (b"a", b"b", b"c"):
        index.add(key, ROOT, 1)
    index.touch([b"a", b"unknown"])
    assert index.make_room(1) == [(b"b", ROOT)]


def test_what_a_block_continues_does_not_give_way_to_it() -> None:
    index = index_of(b"a", b"b", most=2)
    assert index.make_room(1, b"b") == []
    assert not index.fits(1)
    assert index.make_room(1, b"a") == [(b"b", b"a")]
    assert index.fits(1)
    assert index.check_integrity() == []


def test_nothing_gives_way_to_a_block_that_nobody_can_find() -> None:
    index = index_of(b"a", b"b", most=2)
    assert index.make_room(1, b"unknown") == []
    assert not index.fits(1)
    assert index.make_room(1, ROOT) == [(b"b", b"a")]


def test_children_may_come_before_their_parent_and_stay_after_it() -> None:
    index = TierIndex(3, ROOT)
    index.add(b"b", b"a", 1)
    index.add(b"a", ROOT, 1)
    index.remove(b"a")
    assert index.check_integrity() == []
    index.add(b"a", ROOT, 1)
    index.add(b"x", ROOT, 1)
    assert index.make_room(1) == [(b"b", b"a")]


keys = st.integers(0, 9)


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["add", "touch", "remove"]), keys, st.integers(1, 3)), max_size=60))
def test_after_any_history_it_is_within_its_size_and_forgets_nothing(steps: list[tuple[str, int, int]]) -> None:
    index = TierIndex(8, ROOT)
    held: dict[bytes, int] = {}
    # A tree: the parent of block n is block n // 2.
    names = [b"%d" % n for n in range(10)]
    for action, n, size in steps:
        key, parent = names[n], names[n // 2] if n > 1 else ROOT
        if action == "add":
            index.remove(key)
            held.pop(key, None)
            had_room_made = parent == ROOT or parent in held
            for gone, its_parent in index.make_room(size, parent):
                assert its_parent == (names[int(gone) // 2] if int(gone) > 1 else ROOT)
                assert gone != parent
                assert had_room_made
                del held[gone]
            if index.fits(size):
                index.add(key, parent, size)
                held[key] = size
        elif action == "touch":
            index.touch([key])
        else:
            index.remove(key)
            held.pop(key, None)
        assert dict.fromkeys(index) == dict.fromkeys(held)
        assert index.num_bytes == sum(held.values()) <= 8
        assert index.check_integrity() == []
    index.make_room(8)
    assert len(index) == 0


def test_its_queue_stays_bounded_however_often_blocks_come_and_go() -> None:
    index = TierIndex(10**9, ROOT)
    for n in range(5000):
        index.add(b"%d" % (n % 7), ROOT, 1)
    assert len(index._queue) < 200
