"""What a model thinks before it answers, between two marks: <think>…</think>."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from fastserve_mega.server.tools.pieces import Piece, Reasoning, ToolParser, held_back
from fastserve_mega.system.config import ReasoningParserName


class ThinkMarks(NamedTuple):
    """What stands around the reasoning of a family of models."""

    begin: str
    end: str

    def opened_by(self, prompt: str, begun: str = "") -> bool:
        """Whether the chat template, or the beginning of the answer, has begun the reasoning."""
        return prompt.rstrip().endswith(self.begin) or (
            begun.rfind(self.begin) > begun.rfind(self.end)
        )


_MARKS = {
    "think": ThinkMarks("<think>", "</think>"),  # Qwen 3, SmolLM3, DeepSeek-R1
    "mistral": ThinkMarks("[THINK]", "[/THINK]"),
}


def choose_marks(name: ReasoningParserName, template: str | None) -> ThinkMarks | None:
    """The marks of a model; None when it has none, or they are not wanted.

    Args:
        name: as configured; `auto` goes by the template.
        template: the chat template.
    """
    if name != "auto":
        return _MARKS.get(name)
    return next((marks for marks in _MARKS.values() if marks.end in (template or "")), None)


class ThinkParser:
    """Reasoning comes first, if at all; what follows it is another parser's.

    Space next to the marks sets them apart and is no part of either text.

    Args:
        marks: of the model.
        inner: reads the answer proper.
        opened: whether the prompt has the first mark already.
    """

    def __init__(self, marks: ThinkMarks, inner: ToolParser, *, opened: bool) -> None:
        self._marks = marks
        self._inner = inner
        self._text = ""
        """Not told yet: it may be the beginning of a mark, or space next to one."""
        self._state = "begun" if opened else "unknown"
        self.is_forced = inner.is_forced

    def push(self, text: str) -> Sequence[Piece]:
        if self._state == "answer":
            return self._inner.push(text)
        self._text += text
        pieces: list[Piece] = []
        if self._state == "unknown":
            self._look_for_begin()
        if self._state in ("begun", "told"):
            pieces += self._reasoning()
        if self._state == "ended" and self._text.lstrip():
            self._text, self._state = self._text.lstrip(), "answer"
        if self._state == "answer":
            text, self._text = self._text, ""
            pieces += self._inner.push(text)
        return pieces

    def finish(self) -> Sequence[Piece]:
        text, self._text = self._text, ""
        if self._state in ("begun", "told"):
            return [Reasoning(rest)] if (rest := text.rstrip()) else []
        before = self._inner.push(text) if self._state == "unknown" else ()
        return [*before, *self._inner.finish()]

    def _look_for_begin(self) -> None:
        begin = self._text.lstrip()
        if begin.startswith(self._marks.begin):
            self._text, self._state = begin.removeprefix(self._marks.begin), "begun"
        elif not self._marks.begin.startswith(begin):
            self._state = "answer"

    def _reasoning(self) -> Sequence[Piece]:
        if self._state == "begun":
            self._text = self._text.lstrip()
        new, ended, after = self._text.partition(self._marks.end)
        if ended:
            new, self._text, self._state = new.rstrip(), after, "ended"
        else:
            certain = len(new) - held_back(new, self._marks.end)
            new = new[:certain].rstrip()
            self._text = self._text[len(new) :]
        if new and not ended:
            self._state = "told"
        return [Reasoning(new)] if new else []
