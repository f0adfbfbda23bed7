"""A tokenizer whose tokens are the bytes of UTF-8, for servers that have no model."""

from __future__ import annotations

import json
from pathlib import Path

from fastserve_mega.text.tokenizer import byte_of_character

BEGIN, END = 256, 257
"""Ids of the special tokens around a message of a conversation."""
VOCAB_SIZE = 258
_SPECIAL = {"<|im_start|>": BEGIN, "<|im_end|>": END}
_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_byte_tokenizer(directory: Path) -> None:
    """Write the files from which `Tokenizer` reads it."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                  "use_regex": False}  # fmt: skip
    added = [
        {"id": token_id, "content": content, "single_word": False, "lstrip": False,
         "rstrip": False, "normalized": False, "special": True}
        for content, token_id in _SPECIAL.items()
    ]  # fmt: skip
    tokenizer = {
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": {**byte_of_character(), **_SPECIAL}, "merges": []},
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "chat_template": _CHAT_TEMPLATE,
    }
    for name, content in (("tokenizer.json", tokenizer), ("tokenizer_config.json", config)):
        (directory / name).write_text(json.dumps(content), encoding="utf-8")


def decode_bytes(token_ids: tuple[int, ...]) -> str:
    """Text of such tokens without the special ones."""
    return bytes(token for token in token_ids if token < BEGIN).decode("utf-8", "replace")
