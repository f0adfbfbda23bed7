"""Tokenizers with a chat template of the test's own."""

from __future__ import annotations

from pathlib import Path

from fastserve_mega.text.tokenizer import Tokenizer


def with_template(tokenizer_dir: Path, directory: Path, template: str, *special: str) -> Tokenizer:
    """The tokenizer of a directory with another template, and further special tokens."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_dir)
    tokenizer.chat_template = template
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    tokenizer.save_pretrained(directory)
    return Tokenizer(directory)
