"""The model's tokenizer, loaded from its directory."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastserve_mega.text.token_bytes import TokenBytes

_GENERATION = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
"""Marks of transformers' own, which Jinja does not know."""
_ADVICE = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
_NO_LIMIT = 10**30
"""In place of the tokenizer's own model_max_length: the context is checked by the server, and the
tokenizer would only warn."""


class Tokenizer:
    """Text to token ids and back, with the chat template of the model.

    `encode` and `apply_chat_template` release the GIL for most of their time, so a long text can
    be given to a thread. Safe to use from several threads.

    Args:
        directory: local directory in Hugging Face layout; nothing is downloaded.

    Raises:
        FileNotFoundError: the directory does not exist.
        ValueError: it holds no tokenizer that transformers can load.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory).expanduser()
        if not self.directory.is_dir():
            raise FileNotFoundError(f"the tokenizer directory {self.directory} does not exist")
        self._tokenizer = _load(self.directory)
        self._token_bytes = TokenBytes(self._tokenizer)
        self._special_ids = frozenset(self._tokenizer.all_special_ids)
        self.longest_token: int = max(map(len, self._tokenizer.get_vocab()), default=1)
        """Characters of the longest token: no text of so many tokens is longer than that."""
        self.vocab_size: int = len(self._tokenizer)
        """Number of ids with a meaning; a model's own vocabulary may be padded beyond it."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text.

        Raises:
            ValueError: the text is not valid Unicode (it contains a lone surrogate).
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"the text is not valid Unicode: {error.reason}") from None
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return ids

    @property
    def has_chat_template(self) -> bool:
        return self._tokenizer.chat_template is not None

    @property
    def tools_template(self) -> str | None:
        """The chat template for conversations with tools; None when it knows nothing of tools."""
        templates = self._tokenizer.chat_template
        if isinstance(templates, dict):
            templates = templates.get("tool_use", templates.get("default"))
        if templates is None:
            return None
        from jinja2 import Environment, TemplateError, meta

        try:
            # Templates of Hugging Face use these two extensions of Jinja.
            parsed = Environment(
                autoescape=False, extensions=["jinja2.ext.loopcontrols", "jinja2.ext.do"]
            ).parse(_GENERATION.sub("", templates))
        except TemplateError:
            return None
        return str(templates) if "tools" in meta.find_undeclared_variables(parsed) else None

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> list[int]:
        """Token ids of a conversation, up to where the assistant's answer begins.

        Args:
            messages: with `role` and `content`, and `tool_calls` and `tool_call_id`.
            tools: that may be called, as OpenAI describes them.

        Raises:
            ValueError: the model has no chat template, or its template refuses the messages.
        """
        if not self.has_chat_template:
            raise ValueError("the model has no chat template; send a plain prompt instead")
        from jinja2 import TemplateError

        try:
            text: str = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=[dict(tool) for tool in tools] or None,
                tokenize=False,
                add_generation_prompt=True,
            )
        except (TemplateError, TypeError, AttributeError, LookupError) as error:
            # Not all templates check what they are given before they use it.
            raise ValueError(f"the model's chat template refuses the messages: {error}") from None
        # The template has written the special tokens already.
        return self.encode(text, add_special_tokens=False)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids; special and unknown ones are skipped."""
        text: str = self._tokenizer.decode(self.visible(token_ids), skip_special_tokens=True)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """What a single token stands for; a character may be spread over several tokens."""
        return self._token_bytes(token_id)

    def visible(self, token_ids: Sequence[int]) -> list[int]:
        """The ids that stand for text: neither special nor out of the vocabulary."""
        return [
            token
            for token in token_ids
            if token < self.vocab_size and token not in self._special_ids
        ]


def _load(directory: Path) -> Any:
    """Take the fast tokenizer by its file where there is one: AutoTokenizer would import torch."""
    with _without_advice():
        import transformers

        fast = (directory / "tokenizer.json").is_file()
        loader: Any = getattr(transformers, "PreTrainedTokenizerFast" if fast else "AutoTokenizer")
        try:
            return loader.from_pretrained(
                directory, local_files_only=True, model_max_length=_NO_LIMIT
            )
        except Exception as error:
            # Its errors are of many kinds, the bare Exception of the tokenizers library included.
            raise ValueError(f"no usable tokenizer in {directory}: {error}") from error


@contextmanager
def _without_advice() -> Iterator[None]:
    """Keep transformers from advising to install torch, which a tokenizer has no use for."""
    previous = os.environ.get(_ADVICE)
    os.environ[_ADVICE] = "1"
    try:
        yield
    finally:
        if previous is None:
            del os.environ[_ADVICE]
        else:
            os.environ[_ADVICE] = previous
