from __future__ import annotations

from pathlib import Path

from fastserve_mega.text.output import OutputText
from fastserve_mega.text.tokenizer import Tokenizer


def test_a_stop_string_over_several_tokens_ends_the_text(tiny_tokenizer_dir: Path):
    tokenizer = Tokenizer(tiny_tokenizer_dir)
    output = OutputText(tokenizer, stops=["lazy"])
    deltas = [output.push([token]) for token in tokenizer.encode("the lazy dog")]
    assert "".join(deltas) == "the "
    assert output.stopped
    assert output.flush() == ""


def test_a_stop_string_completed_by_the_flush_counts(tiny_tokenizer_dir: Path):
    tokenizer = Tokenizer(tiny_tokenizer_dir)
    output = OutputText(tokenizer, stops=["\ufffd"])
    half = tokenizer.encode("ø")[:1]
    assert output.push([*tokenizer.encode("a"), *half]) == "a"
    assert not output.stopped
    assert output.flush() == ""
    assert output.stopped


def test_the_token_that_ends_an_answer_is_not_text(tiny_tokenizer_dir: Path):
    tokenizer = Tokenizer(tiny_tokenizer_dir)
    (letter,) = tokenizer.encode("a")
    output = OutputText(tokenizer, silent={letter})
    assert output.push([*tokenizer.encode("b"), letter]) + output.flush() == "b"
