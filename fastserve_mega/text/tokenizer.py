"""The model's tokenizer, loaded from its directory, and the bytes of its tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from fastserve_mega.text.chat_template import ChatTemplate, PromptEnd, special_tokens
from fastserve_mega.text.detokenizer import TokenDecoder

_FILES = ("tokenizer", "vocab", "spiece", "sentencepiece")
"""How names of a tokenizer's files begin, where there is no tokenizer.json."""
_LFS_POINTER = b"version https://git-lfs"
"""How a file begins that stands for another one."""
_SPACE = "\u2581"
"""What SentencePiece writes for a space."""
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Tokenizer:
    """Text to token ids and back, with the chat template of the model.

    `encode` and `apply_chat_template` release the GIL for most of their time, so a long text can
    be given to a thread. Safe to use from several threads.

    Args:
        directory: local directory in Hugging Face layout; nothing is downloaded.

    Raises:
        FileNotFoundError: the directory does not exist.
        ValueError: it holds no usable tokenizer.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory).expanduser()
        if not self.directory.is_dir():
            raise FileNotFoundError(f"the tokenizer directory {self.directory} does not exist")
        try:
            self._backend, settings = _load(self.directory)
            self.chat_template = ChatTemplate.load(self.directory, settings)
        except Exception as error:
            # The tokenizers library raises bare Exceptions, and transformers whole paragraphs.
            said = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"no usable tokenizer in {self.directory}: {said}") from error
        self._token_bytes = TokenBytes(self._backend)
        added = self._backend.get_added_tokens_decoder()
        self._added = {token.content: token_id for token_id, token in added.items()}
        self._special_ids = frozenset(each for each in added if added[each].special)
        vocabulary = self._backend.get_vocab()
        self.longest_token: int = max(map(len, vocabulary), default=1)
        """Characters of the longest token: no text of so many tokens is longer than that."""
        self.vocab_size: int = max(vocabulary.values(), default=-1) + 1
        """Ids from here on have no meaning, as some below may have none: a model's own vocabulary
        may be padded beyond it."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text.

        Raises:
            ValueError: the text is not valid Unicode (it contains a lone surrogate).
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"the text is not valid Unicode: {error.reason}") from None
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def spellings(self, word: str) -> list[tuple[int, ...]]:
        """Tokens of a word at the beginning of a text, and behind a space.

        Raises:
            ValueError: the text is not valid Unicode (it contains a lone surrogate).
        """
        texts = (word.lstrip(), f" {word.lstrip()}")
        spelled = [tuple(self.encode(text, add_special_tokens=False)) for text in texts]
        return list(dict.fromkeys(spelled))

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> list[int]:
        """Token ids of a conversation; `render_chat` writes the special tokens, too."""
        return self.encode(self.render_chat(messages, tools), add_special_tokens=False)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        variables: Mapping[str, Any] | None = None,
        end: PromptEnd = "answer",
    ) -> str:
        """A conversation as text, by default up to where the assistant's answer begins.

        Args:
            messages: with `role` and `content`, and `tool_calls` and `tool_call_id`.
            tools: that may be called, as OpenAI describes them.
            variables: of the template, by their names; not those of the conversation itself.
            end: of the conversation.

        Raises:
            ValueError: the model has no chat template, or its template refuses the messages.
        """
        if self.chat_template is None:
            raise ValueError("the model has no chat template; send a plain prompt instead")
        return self.chat_template.render(messages, tools, variables, end)

    def token_id(self, text: str) -> int | None:
        """The id of the added token that is this text, if there is one."""
        return self._added.get(text)

    def showing(self, marks: Collection[str]) -> TokenDecoder:
        """What decodes as this tokenizer does, but shows the special tokens among `marks`."""
        shown = {self._added[mark] for mark in marks if mark in self._added} & self._special_ids
        return _Showing(self, frozenset(shown)) if shown else self

    def showing_all(self) -> TokenDecoder:
        """What decodes as this tokenizer does, but shows the special tokens."""
        return _Showing(self, self._special_ids)

    def special_tokens(self, texts: Sequence[str]) -> dict[int, str]:
        """Those of some texts that are special tokens, which `decode` skips, by their ids."""
        found = {self._added[text]: text for text in texts if text in self._added}
        return {token: text for token, text in found.items() if token in self._special_ids}

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids; special and unknown ones are skipped."""
        return self.decode_all(self.visible(token_ids))

    def decode_all(self, token_ids: Sequence[int]) -> str:
        """Text of token ids of the vocabulary, special ones included."""
        return self._backend.decode(token_ids, skip_special_tokens=False)

    def token_bytes(self, token_id: int) -> bytes:
        """What a single token stands for; a character may be spread over several tokens."""
        return self._token_bytes(token_id)

    def visible(self, token_ids: Sequence[int], shown: Collection[int] = frozenset()) -> list[int]:
        """The ids that stand for text: neither special, but for `shown`, nor unknown."""
        return [
            token
            for token in token_ids
            if token < self.vocab_size and (token not in self._special_ids or token in shown)
        ]


class _Showing:
    """A tokenizer that shows some of its special tokens."""

    def __init__(self, tokenizer: Tokenizer, shown: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._shown = shown

    def decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode_all(self.visible(token_ids))

    def visible(self, token_ids: Sequence[int]) -> list[int]:
        return self._tokenizer.visible(token_ids, self._shown)


def _load(directory: Path) -> tuple[Backend, Mapping[str, Any]]:
    """The tokenizer, and what tokenizer_config.json says beside it."""
    config = directory / "tokenizer_config.json"
    settings = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    if not isinstance(settings, dict):
        raise ValueError(f"{config.name} must hold a JSON object")
    path = directory / "tokenizer.json"
    backend = _read(path) if path.is_file() else _convert(directory)
    backend.no_truncation()  # as for training; the server checks lengths
    backend.no_padding()
    _add_special_tokens(backend, settings)
    return backend, settings


def _read(path: Path) -> Backend:
    with path.open("rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise ValueError(f"{path.name} is a pointer of Git LFS; fetch it by git lfs pull")
    try:
        return Backend.from_file(str(path))
    except Exception as error:
        raise ValueError(f"{path.name}: {error}") from None


def _add_special_tokens(backend: Backend, settings: Mapping[str, Any]) -> None:
    """Make special, in the order of their ids, what only tokenizer_config.json says is so."""
    described = settings.get("added_tokens_decoder") or {}
    for token_id in sorted(described, key=int):
        token = dict(described[token_id])
        content, special = token.pop("content"), token.pop("special", False)
        if backend.token_to_id(content) in (int(token_id), None):
            backend.add_tokens([AddedToken(content, special=special, **token)])
    named = (token for token in special_tokens(settings).values())
    backend.add_special_tokens([each for each in named if backend.token_to_id(each) is not None])


def _convert(directory: Path) -> Backend:
    """Convert the tokenizer of a directory that has it in another form, such as SentencePiece's."""
    if not any(path.name.startswith(_FILES) for path in directory.iterdir()):
        raise ValueError("there are no files of one")
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise ValueError(
            "there is no tokenizer.json; other forms need transformers: "
            "pip install 'fastserve_mega[tokenizers]'"
        ) from None
    if (directory / "tokenizer.model").is_file() and find_spec("sentencepiece") is None:
        raise ValueError("tokenizer.model needs another package: pip install sentencepiece")
    # Else transformers asks on the terminal whether to run what the model brings along.
    converted: Any = AutoTokenizer.from_pretrained(
        directory, local_files_only=True, trust_remote_code=False
    )
    backend: Backend | None = getattr(converted, "backend_tokenizer", None)
    if backend is None:
        raise ValueError("there is no tokenizer.json, and transformers cannot make one")
    return backend


class TokenBytes:
    """Token ids to bytes: a character may be spread over several tokens."""

    def __init__(self, tokenizer: Backend) -> None:
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


def _decoder_kinds(tokenizer: Backend) -> set[str]:
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
