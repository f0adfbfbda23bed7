from __future__ import annotations

from pathlib import Path

import pytest

from fastserve_mega.text.detokenizer import Detokenizer
from fastserve_mega.text.tokenizer import Tokenizer


def test_a_stop_string_over_several_tokens_ends_the_text(tiny_tokenizer_dir: Path):
    tokenizer = Tokenizer(tiny_tokenizer_dir)
    output = Detokenizer(tokenizer, stops=["lazy"])
    deltas = [output.push([token]) for token in tokenizer.encode("the lazy dog")]
    assert "".join(deltas) == "the "
    assert output.stopped
    assert output.flush() == ""


def test_a_stop_string_completed_by_the_flush_counts(tiny_tokenizer_dir: Path):
    tokenizer = Tokenizer(tiny_tokenizer_dir)
    output = Detokenizer(tokenizer, stops=["\ufffd"])
    half = tokenizer.encode("ø")[:1]
    assert output.push([*tokenizer.encode("a"), *half]) == "a"
    assert not output.stopped
    assert output.flush() == ""
    assert output.stopped


def test_the_token_that_ends_an_answer_is_not_text(tiny_tokenizer_dir: Path):
    tokenizer = Tokenizer(tiny_tokenizer_dir)
    (letter,) = tokenizer.encode("a")
    output = Detokenizer(tokenizer, silent={letter})
    assert output.push([*tokenizer.encode("b"), letter]) + output.flush() == "b"


@pytest.mark.parametrize(
    ("stops", "text"),
    [
        (["日本 🙂 f"], "brown fox "),
        (["own fox 日", "zzz"], "br"),
        (["🙂 fi", "fox 日本 🙂 fi"], "brown "),
        (["🙂"], "brown fox 日本 "),
    ],
)
def test_a_stop_string_longer_than_any_token_is_found_wherever_tokens_are_cut(
    tiny_tokenizer_dir: Path, stops, text
):
    tokenizer = Tokenizer(tiny_tokenizer_dir)
    tokens = tokenizer.encode("brown fox 日本 🙂 fin")
    for chunk in (1, 2, 3, 100):
        output = Detokenizer(tokenizer, stops)
        pieces = [tokens[at : at + chunk] for at in range(0, len(tokens), chunk)]
        assert "".join(map(output.push, pieces)) + output.flush() == text
        assert output.stopped


def test_min_tokens_holds_back_stop_strings_as_well(tiny_tokenizer_dir: Path):
    tokenizer = Tokenizer(tiny_tokenizer_dir)
    said = tokenizer.encode("a dog, a dog, a dog")
    first = next(count for count in range(1, 99) if "dog" in tokenizer.decode(said[:count]))
    for chunk in (1, 3, 100):
        output = Detokenizer(tokenizer, ["dog"], min_tokens=first)
        pieces = [said[at : at + chunk] for at in range(0, len(said), chunk)]
        assert "".join(map(output.push, pieces)) + output.flush() == "a dog, a "
        assert output.stopped


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize(("min_tokens", "text"), [(0, "the fox"), (6, "the fox 日 dog")])
def test_a_stop_string_that_is_a_special_token_ends_the_text_where_that_comes(
    tiny_tokenizer_dir: Path, together, min_tokens, text
):
    tokenizer = Tokenizer(tiny_tokenizer_dir)
    stops = ["<|endoftext|>", " dogs", "<|no token|>"]
    special = tokenizer.special_tokens(stops)
    assert list(special.values()) == stops[:1]
    output = Detokenizer(tokenizer, stops, min_tokens=min_tokens, stop_tokens=special)
    tokens = [*tokenizer.encode("the fox"), *special, *tokenizer.encode(" 日 dog")]
    pieces = [tokens] if together else [[token] for token in tokens]
    assert "".join(map(output.push, pieces)) + output.flush() == text
    assert output.stopped == (min_tokens == 0)
