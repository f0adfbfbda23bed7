"""Calls as Qwen3-Coder writes them, in marks: <function=NAME><parameter=KEY>VALUE</parameter>."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastserve_mega.server.tools.pieces import CallPiece, Functions, Piece, held_back

_BEGIN = "<tool_call>"
_FUNCTION = re.compile(r"\s*(?:<tool_call>\s*)?<function=([^>\n]+)>")
_PARAMETER = re.compile(r"\s*<parameter=([^>\n]+)>(.*?)\n?</parameter>", re.DOTALL)
_END = re.compile(r"\s*</function>(?:\s*</tool_call>)?")
_BARE_BEGIN = "<function="
"""Some answers leave the outer mark out."""


class Qwen3CoderParser:
    """A value is told when it is complete: its JSON depends on the type that its schema gives it.

    Args:
        functions: that may be called, with their schemas.
    """

    is_forced = False

    def __init__(self, functions: Functions) -> None:
        self._functions = functions
        self._text = ""
        """Not told yet."""
        self._name: str | None = None
        """Which function the call that is being read names."""
        self._in_call = False
        self._num_arguments = 0
        self._calls = 0

    def push(self, text: str) -> Sequence[Piece]:
        self._text += text
        pieces: list[Piece] = []
        while (new := self._next()) is not None:
            pieces += new
        return pieces

    def finish(self) -> Sequence[Piece]:
        pieces = list(self.push(""))
        rest, self._text = self._text, ""
        if self._name is None:
            return [*pieces, *self._content(rest)]
        # Some models end their answer instead of the call; a value that is cut stays cut.
        return pieces if rest.strip() else [*pieces, self._close()]

    def _next(self) -> list[Piece] | None:
        """What the next whole part of the text tells; None until there is one."""
        if not self._in_call:
            return self._before_call()
        if self._name is None:
            return self._take_name()
        if match := _PARAMETER.match(self._text):
            self._text = self._text[match.end() :]
            return [self._argument(match[1].strip(), match[2].removeprefix("\n"))]
        if match := _END.match(self._text):
            # The outer mark may still be on its way; as content it would be in the way.
            self._text = self._text[match.end() :]
            return [self._close()]
        return None

    def _before_call(self) -> list[Piece] | None:
        starts = [at for mark in (_BEGIN, _BARE_BEGIN) if (at := self._text.find(mark)) >= 0]
        if starts:
            before = self._text[: min(starts)].rstrip()
            # The space goes with the mark: without a call it is content as well.
            self._text = self._text[len(before) :]
            self._in_call = True
            return self._content(before)
        certain = len(self._text) - held_back(self._text, _BEGIN, _BARE_BEGIN, "</tool_call>")
        certain = len(self._text[:certain].rstrip())
        new, self._text = self._text[:certain], self._text[certain:]
        return self._content(new) if new else None

    def _take_name(self) -> list[Piece] | None:
        if match := _FUNCTION.match(self._text):
            self._text = self._text[match.end() :]
            self._name = match[1].strip()
            self._num_arguments = 0
            return [CallPiece(self._calls, self._name, "")]
        begun = self._text.lstrip()
        inside = begun.removeprefix(_BEGIN).lstrip()
        if _BARE_BEGIN.startswith(inside) or inside.startswith(_BARE_BEGIN):
            return None
        # What is not a call is content, as the model wrote it.
        self._in_call = False
        mark = _BEGIN if begun.startswith(_BEGIN) else _BARE_BEGIN
        space = self._text[: len(self._text) - len(begun)]
        self._text = begun.removeprefix(mark)
        return [space + mark]

    def _argument(self, key: str, text: str) -> CallPiece:
        schema = (self._functions.get(self._name or "") or {}).get("properties") or {}
        value = json.dumps(_typed(text, schema.get(key)), ensure_ascii=False)
        before = ", " if self._num_arguments else "{"
        self._num_arguments += 1
        return CallPiece(self._calls, None, f"{before}{json.dumps(key)}: {value}")

    def _close(self) -> CallPiece:
        piece = CallPiece(self._calls, None, "}" if self._num_arguments else "{}")
        self._calls += 1
        self._name, self._in_call = None, False
        return piece

    def _content(self, text: str) -> list[Piece]:
        """Text around calls; the space and the mark that end one are no part of it."""
        if self._calls:
            text = text.replace("</tool_call>", "")
        return [text] if text and not (self._calls and text.isspace()) else []


def _typed(text: str, schema: object) -> Any:
    """A value as JSON: a string where the schema says so or nothing, else what it spells."""
    kinds = schema.get("type") if isinstance(schema, Mapping) else "string"
    if "string" in (kinds if isinstance(kinds, list) else [kinds]):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        lowered = text.strip().lower()
        return {"true": True, "false": False, "none": None}.get(lowered, text)
