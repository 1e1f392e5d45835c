"""What may be shown: whole characters, nothing of a stop string, and in the end exactly the full text."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models

from callboard.actors.frontend.text import REPLACEMENT, Detokenizer, SequenceText, StopStrings
from callboard.actors.frontend.tokenizer import Tokenizer, _byte_alphabet
from callboard.actors.protocol import Token, Usage

WORDS = ["ab", "th", "the", "Ġthe", "llo", "👩"]


def tokenizer_of(rust: RustTokenizer) -> Tokenizer:
    return Tokenizer(rust, special_tokens={}, chat_template=None, eos_token_ids=(0,))


def byte_level() -> Tokenizer:
    """Ids 1 to 256 are single bytes, then a few words, and 0 is special."""
    of_byte = {byte: character for character, byte in _byte_alphabet().items()}
    tokens = [of_byte[byte] for byte in range(256)]
    tokens += ["".join(of_byte[byte] for byte in word.encode()) for word in ("ab", "the", " the", "\xa0好", "👩‍")]
    tokens += ["".join(of_byte[byte] for byte in data) for data in (b"\xa0\xe4\xbd", b"\x82\xac!", b"\xf0\x9f")]
    rust = RustTokenizer(models.BPE(vocab={token: id + 1 for id, token in enumerate(tokens)}, merges=[]))
    rust.decoder = decoders.ByteLevel()
    rust.add_special_tokens(["<end>"])
    return tokenizer_of(rust)


def byte_fallback() -> Tokenizer:
    """As in SentencePiece models: words with a marked space, bytes for all else, the first space stripped."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)}
    vocab |= {word: 256 + index for index, word in enumerate(["▁the", "▁", "fox", "▁好", "é"])}
    rust = RustTokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    rust.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer_of(rust)


BYTES = byte_level()
FALLBACK = byte_fallback()
NUM_BYTE_LEVEL = BYTES.vocab_size - 1


def pieces_of(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.push(id) for id in ids), detokenizer.flush()]


@given(st.lists(st.integers(1, NUM_BYTE_LEVEL), max_size=120))
def test_any_tokens_give_the_full_text_in_valid_pieces(ids: list[int]) -> None:
    pieces = pieces_of(BYTES, ids)
    assert "".join(pieces) == BYTES.decode(ids)
    for piece in pieces:
        piece.encode()


@given(st.text(max_size=60))
def test_no_half_character_is_ever_shown(text: str) -> None:
    pieces = pieces_of(BYTES, [1 + byte for byte in text.encode()])
    assert "".join(pieces) == text
    if REPLACEMENT not in text:
        assert not any(REPLACEMENT in piece for piece in pieces)


@given(st.lists(st.sampled_from(["好", "é", "🙂", "the", "x", "▁the", "fox", "▁", "\u0301"]), max_size=40))
def test_byte_fallback_shows_whole_characters_too(words: list[str]) -> None:
    vocab = FALLBACK._rust.get_vocab()
    ids = [id for word in words for id in ([vocab[word]] if word in vocab else list(word.encode()))]
    pieces = pieces_of(FALLBACK, ids)
    assert "".join(pieces) == FALLBACK.decode(ids)
    assert not any(REPLACEMENT in piece for piece in pieces)


@given(st.lists(st.integers(0, 260), max_size=80))
def test_byte_fallback_never_breaks(ids: list[int]) -> None:
    for piece in pieces_of(FALLBACK, ids):
        piece.encode()


@pytest.mark.parametrize("byte", [0x80, 0xE2, 0xF0, 0xFF])
def test_endless_garbage_is_shown_and_never_piles_up(byte: int) -> None:
    detokenizer = Detokenizer(BYTES)
    pieces = []
    for _ in range(500):
        pieces.append(detokenizer.push(1 + byte))
        assert len(detokenizer._ids) < 80
    pieces.append(detokenizer.flush())
    assert "".join(pieces) == BYTES.decode([1 + byte] * 500)


def test_a_space_after_the_prompt_is_kept() -> None:
    vocab = FALLBACK._rust.get_vocab()
    assert Detokenizer(FALLBACK).push(vocab["▁the"]) == "the"
    assert Detokenizer(FALLBACK, [vocab["fox"]]).push(vocab["▁the"]) == " the"


def test_a_prompt_that_ends_inside_a_character_does_no_harm() -> None:
    start, *rest = [1 + byte for byte in "€uro".encode()]
    detokenizer = Detokenizer(BYTES, [start])
    assert "".join(detokenizer.push(id) for id in rest).endswith("uro")


texts = st.text(alphabet="abc", max_size=30)


@given(st.lists(st.text(alphabet="abc", min_size=1, max_size=4), min_size=1, max_size=4), st.lists(texts, max_size=12))
@settings(max_examples=300)
def test_stop_strings_cut_the_same_text_however_it_arrives(stops: list[str], parts: list[str]) -> None:
    whole, text = StopStrings(stops), "".join(parts)
    stopper = StopStrings(stops)
    shown = ""
    for part in parts:
        shown += stopper.push(part)
        assert not any(stop in shown for stop in stops)
    shown += stopper.flush()
    by_one = StopStrings(stops)
    assert shown == "".join(map(by_one.push, text)) + by_one.flush()
    assert shown == whole.push(text) + whole.flush()
    assert text.startswith(shown)
    assert stopper.is_matched == any(stop in text for stop in stops)
    assert stopper.is_matched or shown == text


def test_only_a_possible_start_of_a_stop_string_is_held() -> None:
    stopper = StopStrings(["\n\nQ:"])
    assert [stopper.push(text) for text in ("one", " two\n", "\nP", "\n", "\nQ", ":x")] == [
        "one",
        " two",
        "\n\nP",
        "",
        "",
        "",
    ]
    assert stopper.is_matched


def run(ids: list[int], finish: str, **settings: object) -> tuple[SequenceText, list[tuple[str, list[bytes]]]]:
    text = SequenceText(BYTES, **settings)  # type: ignore[arg-type]
    usage = Usage(3, 1, 2, 0, 0.0, 0.0, 0.0)
    shown = []
    for position, id in enumerate(ids):
        is_last = position == len(ids) - 1
        token = Token(position, id, -1.0, finish if is_last else None, usage if is_last else None)  # type: ignore[arg-type]
        piece = text.push(token)
        shown.append((piece.text, [entry.data for entry in piece.logprobs]))
        if piece.finish_reason is not None:
            break
    return text, shown


def ids_of(text: str) -> list[int]:
    return [1 + byte for byte in text.encode()]


def test_the_end_mark_is_counted_and_not_shown() -> None:
    text, shown = run([*ids_of("hi"), ids_of("!")[0]], "stop")
    assert "".join(piece for piece, _ in shown) == "hi"
    assert (text.finish_reason, text.num_tokens) == ("stop", 3)
    assert text.usage is not None


def test_a_half_character_at_the_length_limit_is_shown_as_replacement() -> None:
    _, shown = run(ids_of("a🙂")[:3], "length")
    assert "".join(piece for piece, _ in shown) == "a" + REPLACEMENT


def test_held_text_is_shown_when_the_sequence_ends_without_a_match() -> None:
    text, shown = run(ids_of("abST"), "length", stops=["STOP"])
    assert "".join(piece for piece, _ in shown) == "abST"
    assert (text.finish_reason, text.is_cut) == ("length", False)


def test_a_match_ends_the_sequence_and_takes_its_logprobs_along() -> None:
    text, shown = run(ids_of("abSTOPcd"), "length", stops=["STOP"], has_logprobs=True)
    assert shown == [("a", [b"a"]), ("b", [b"b"]), ("", []), ("", []), ("", []), ("", [])]
    assert (text.finish_reason, text.is_cut, text.num_tokens, text.usage) == ("stop", True, 6, None)


def test_logprobs_come_with_the_text_they_belong_to() -> None:
    _, shown = run(ids_of("aé!"), "length", has_logprobs=True)
    assert shown == [("a", [b"a"]), ("", []), ("é", [b"\xc3", b"\xa9"]), ("!", [b"!"])]


def test_the_byte_alphabet_is_that_of_the_library() -> None:
    from tokenizers import pre_tokenizers

    assert sorted(_byte_alphabet()) == sorted(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(_byte_alphabet().values()) == list(range(256))
    assert json.loads(json.dumps(_byte_alphabet()))["A"] == 65
