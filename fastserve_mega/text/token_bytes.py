"""The bytes that single tokens stand for: a character may be spread over several tokens."""

from __future__ import annotations

import json
import re
from functools import cache

from tokenizers import Tokenizer

_SPACE = "\u2581"
"""What SentencePiece writes for a space."""
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenBytes:
    """Token ids to bytes, for the kinds of tokenizers that models have."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self._added = {token_id: token.content for token_id, token in added.items()}
        kinds = _decoder_kinds(tokenizer)
        self._byte_level = "ByteLevel" in kinds
        self._pieces = bool(kinds & {"ByteFallback", "Replace", "Metaspace"})

    def __call__(self, token_id: int) -> bytes:
        """The bytes of a token, those of a special token included; empty for an unknown id."""
        if token_id in self._added:
            return self._added[token_id].encode()
        piece = self._tokenizer.id_to_token(token_id)
        if piece is None:
            return b""
        if self._byte_level:
            table = byte_of_character()
            return bytes(table[character] for character in piece if character in table)
        if not self._pieces:
            return self._tokenizer.decode([token_id]).encode()
        if match := _BYTE_PIECE.fullmatch(piece):
            return bytes((int(match[1], 16),))
        return piece.replace(_SPACE, " ").encode()


def _decoder_kinds(tokenizer: Tokenizer) -> set[str]:
    if tokenizer.decoder is None:
        return set()
    state = json.loads(tokenizer.decoder.__getstate__())
    return {part["type"] for part in (state, *state.get("decoders", ()))}


@cache
def byte_of_character() -> dict[str, int]:
    """GPT-2's printable character for each byte, the other way round."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in printable]
    return table | {chr(256 + index): byte for index, byte in enumerate(others)}
