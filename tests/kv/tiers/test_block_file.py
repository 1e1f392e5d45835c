"""A block's file: what was written is read, and nothing else is ever taken for it."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from callboard.kv.layout import KvLayout
from callboard.kv.tiers import BadBlockFile, BlockName, Chain
from callboard.kv.tiers.block_file import decode, encode_prefix, file_bytes
from callboard.kv.tokens import pack_tokens

LAYOUT = KvLayout(num_layers=2, num_kv_heads=1, head_dim=2, block_size=4)
CHAIN = Chain(LAYOUT, "a model")
(NAME,) = CHAIN.names(CHAIN.root, pack_tokens([1, 2, 3, 4]), 0)
DATA = bytes(range(LAYOUT.block_bytes))


def file_of(chain: Chain, name: BlockName, data: bytes = DATA) -> bytes:
    return encode_prefix(chain, name, memoryview(data)) + data


GOOD = file_of(CHAIN, NAME)


def test_what_was_written_is_read() -> None:
    assert decode(CHAIN, NAME, memoryview(GOOD)) == DATA
    assert len(GOOD) == file_bytes(LAYOUT, "a model") <= file_bytes(LAYOUT)


@settings(deadline=None)
@given(st.integers(0, len(GOOD) - 1), st.integers(1, 255))
def test_no_byte_can_be_changed_unnoticed(at: int, change: int) -> None:
    broken = bytearray(GOOD)
    broken[at] ^= change
    with pytest.raises(BadBlockFile):
        decode(CHAIN, NAME, memoryview(broken))


@settings(deadline=None)
@given(st.integers(0, len(GOOD)), st.binary(max_size=40), st.integers(0, 40))
def test_nothing_can_be_cut_out_or_put_in_unnoticed(at: int, more: bytes, less: int) -> None:
    broken = GOOD[:at] + more + GOOD[at + less :]
    if broken == GOOD:
        return
    with pytest.raises(BadBlockFile):
        decode(CHAIN, NAME, memoryview(broken))


@settings(deadline=None)
@given(st.binary(max_size=300))
@example(b"")
@example(GOOD[:16] + b"\xff" * 200)
def test_any_bytes_are_refused_and_break_nothing(content: bytes) -> None:
    with pytest.raises(BadBlockFile):
        decode(CHAIN, NAME, memoryview(content))


def test_a_block_of_other_tokens_another_prefix_model_or_layout_is_not_taken_for_it() -> None:
    tokens = pack_tokens([1, 2, 3, 4])
    other_model, other_layout = Chain(LAYOUT, "b model"), Chain(KvLayout(2, 1, 2, 4, "float16"), "a model")
    names = [
        (CHAIN, CHAIN.child(CHAIN.root, pack_tokens([1, 2, 3, 5]))),
        (CHAIN, CHAIN.child(NAME.key, tokens)),
        (other_model, other_model.child(other_model.root, tokens)),
    ]
    for chain, name in names:
        assert name.key != NAME.key
        # Even under the right name, as if two hashes were equal.
        with pytest.raises(BadBlockFile, match="another block"):
            decode(CHAIN, NAME, memoryview(file_of(chain, name)))
    name = other_layout.child(other_layout.root, tokens)
    assert name.key != NAME.key
    with pytest.raises(BadBlockFile):
        decode(CHAIN, NAME, memoryview(file_of(other_layout, name, DATA[: other_layout.layout.block_bytes])))


def test_a_name_stands_for_all_the_tokens_before_it() -> None:
    names = list(CHAIN.names(CHAIN.root, pack_tokens(range(14)), 0))
    assert [name.tokens for name in names] == [pack_tokens(range(i, i + 4)) for i in (0, 4, 8)]
    assert [name.parent for name in names] == [CHAIN.root, names[0].key, names[1].key]
    assert list(CHAIN.names(names[0].key, pack_tokens(range(14)), 1)) == names[1:]
    others = list(CHAIN.names(CHAIN.root, pack_tokens([99, *range(1, 12)]), 0))
    assert not {name.key for name in names} & {name.key for name in others}


def test_a_long_fingerprint_is_kept_apart_by_its_whole_length() -> None:
    one, other = Chain(LAYOUT, "x" * 500 + "1"), Chain(LAYOUT, "x" * 500 + "2")
    tokens = pack_tokens([1, 2, 3, 4])
    assert one.child(one.root, tokens).key != other.child(other.root, tokens).key
    name = one.child(one.root, tokens)
    assert len(file_of(one, name)) <= file_bytes(LAYOUT)
    assert decode(one, name, memoryview(file_of(one, name))) == DATA
