from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve_mega.text.detokenizer import MAX_WINDOW, SHIFT_AT, Detokenizer
from fastserve_mega.text.tokenizer import Tokenizer


class ByteDecoder:
    """Each id is a byte; the hardest case of a byte-level tokenizer. Counts its work."""

    def __init__(self):
        self.longest = 0

    def decode(self, token_ids):
        self.longest = max(self.longest, len(token_ids))
        return bytes(token_ids).decode("utf-8", errors="replace")

    def visible(self, token_ids):
        return [token for token in token_ids if token < 256]


class SpaceStrippingDecoder:
    """As SentencePiece: a word carries its space in front, and the text loses the first one."""

    def __init__(self, words):
        self._words = words

    def decode(self, token_ids):
        return "".join(self._words[token] for token in token_ids).removeprefix(" ")

    def visible(self, token_ids):
        return list(token_ids)


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_dir: Path) -> Tokenizer:
    return Tokenizer(tiny_tokenizer_dir)


def stream(decoder, ids, sizes=()):
    """All deltas of ids that arrive in pieces of these sizes, then one by one."""
    detokenizer = Detokenizer(decoder)
    deltas = []
    rest = list(ids)
    for size in sizes:
        deltas.append(detokenizer.push(rest[:size]))
        rest = rest[size:]
    deltas += [detokenizer.push([token]) for token in rest]
    return [*deltas, detokenizer.flush()]


texts = st.text(
    st.one_of(st.characters(codec="utf-8"), st.sampled_from("日本語国🙂🙃é\ufffd\u200d👩‍🚀"))
)
sizes = st.lists(st.integers(0, 7), max_size=20)


@given(text=texts, sizes=sizes)
def test_deltas_of_any_text_concatenate_to_it(tokenizer, text, sizes):
    assert "".join(stream(tokenizer, tokenizer.encode(text), sizes)) == text


@given(ids=st.lists(st.integers(0, 360), max_size=200), sizes=sizes)
def test_deltas_of_random_tokens_concatenate_to_the_full_decode(tokenizer, ids, sizes):
    assert "".join(stream(tokenizer, ids, sizes)) == tokenizer.decode(ids)


@given(data=st.binary(max_size=400), sizes=sizes)
def test_deltas_of_random_bytes_concatenate_to_the_full_decode(data, sizes):
    assert "".join(stream(ByteDecoder(), data, sizes)) == data.decode("utf-8", errors="replace")


@given(text=texts)
def test_whole_characters_come_out_as_soon_as_they_are_complete(text):
    detokenizer = Detokenizer(ByteDecoder())
    for character in text:
        if character == "\ufffd":
            continue
        *firsts, last = character.encode()
        assert all(detokenizer.push([byte]) == "" for byte in firsts)
        assert detokenizer.push([last]) == character


@pytest.mark.parametrize("data", ["a", "日", "🙂"])
def test_the_work_of_a_token_does_not_grow_with_the_answer(data):
    decoder = ByteDecoder()
    stream(decoder, data.encode() * 1000)
    assert decoder.longest <= SHIFT_AT + 5


@pytest.mark.parametrize("piece", [b"\xff", b"\x80", b"\x9f\x99\x82\xf0"])
def test_not_even_when_no_token_ends_with_a_character(piece):
    decoder = ByteDecoder()
    detokenizer = Detokenizer(decoder)
    out = "".join(detokenizer.push(piece) for _ in range(500))
    assert decoder.longest <= MAX_WINDOW + len(piece)
    assert out + detokenizer.flush() == (piece * 500).decode("utf-8", errors="replace")


def test_the_space_of_a_first_word_is_lost_once_only():
    decoder = SpaceStrippingDecoder([" a", "b", " c"])
    ids = [0, 1, 2, 0] * 50
    assert "".join(stream(decoder, ids)) == decoder.decode(ids)


@pytest.mark.parametrize("after", [[], [0], [3, 0], [0, 3]])
def test_an_answer_that_goes_on_with_a_text_keeps_its_first_space(after):
    decoder = SpaceStrippingDecoder([" Hello", " world", "!", " "])
    detokenizer = Detokenizer(decoder)
    detokenizer.follow(after)
    text = "".join(detokenizer.push([token]) for token in (1, 2, 1)) + detokenizer.flush()
    assert decoder.decode(after) + text == decoder.decode([*after, 1, 2, 1])


@given(prompt=texts, data=st.binary(max_size=80), cut=st.integers(0, 3))
def test_a_prompt_before_an_answer_changes_none_of_its_characters(prompt, data, cut):
    decoder = ByteDecoder()
    before = prompt.encode()
    detokenizer = Detokenizer(decoder)
    detokenizer.follow(before[: len(before) - cut])
    text = "".join(detokenizer.push([byte]) for byte in data) + detokenizer.flush()
    assert text == decoder.decode(data)


def test_special_tokens_inside_a_character_do_not_cut_it():
    assert stream(ByteDecoder(), [0xE2, 999, 0x82, 0xAC]) == ["", "", "", "€", ""]


def test_an_unfinished_character_comes_out_at_the_end():
    assert stream(ByteDecoder(), [0x61, 0xE2, 0x82]) == ["a", "", "", "\ufffd"]
