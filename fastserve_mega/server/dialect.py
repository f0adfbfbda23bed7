"""How the served model reads conversations and writes answers, as its chat template tells."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastserve_mega.server.reasoning import ThinkMarks, choose_marks
from fastserve_mega.server.tools.formats import FORMATS, ToolFormat, choose_format
from fastserve_mega.server.tools.harmony import HarmonyParser
from fastserve_mega.server.tools.pieces import PLAIN_TEXT, Functions, ToolParser
from fastserve_mega.system.config import ReasoningParserName, ToolParserName
from fastserve_mega.text.tokenizer import Tokenizer

_HARMONY = FORMATS["harmony"]
Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Dialect:
    """How one model writes tool calls and reasoning."""

    knows_tools: bool
    """The chat template can tell the model of tools."""
    tools: ToolFormat | None
    """How it writes calls; None when that is not known."""
    think: ThinkMarks | None
    """What stands around its reasoning."""
    is_harmony: bool
    """It writes all that it says in channels, whether there are tools or not."""
    tells_reasoning: bool
    """Reasoning is told apart from the answer."""
    efforts: frozenset[str]
    """Variables of the template that say how much is to be thought."""

    @property
    def marks(self) -> tuple[str, ...]:
        """Special tokens that have to be seen to read an answer."""
        tools = (_HARMONY if self.is_harmony else self.tools) or None
        return (*(tools.marks if tools else ()), *(self.think or ()))

    def effort_variables(self, effort: str) -> Mapping[str, Any]:
        """Variables of the template for OpenAI's reasoning_effort.

        Raises:
            ValueError: the template knows none for it.
        """
        values: dict[str, Any] = {
            "reasoning_effort": effort,
            "enable_thinking": effort != "none",
            "thinking": effort != "none",
        }
        known = {name: value for name, value in values.items() if name in self.efforts}
        if not known and effort != "none":
            raise ValueError(
                f"reasoning_effort={effort!r} has no effect: the model's chat template knows "
                "neither reasoning_effort nor enable_thinking"
            )
        return known

    def new_parser(self, functions: Functions) -> ToolParser:
        """Reads an answer as the model writes it, but for the reasoning between marks.

        Args:
            functions: that it may call; without any, nothing is taken for a call.
        """
        if self.is_harmony:
            return HarmonyParser(tells_reasoning=self.tells_reasoning)
        return self.tools.new_parser(functions) if self.tools and functions else PLAIN_TEXT


def dialect_of(
    tokenizer: Tokenizer,
    tool_parser: ToolParserName = "auto",
    reasoning_parser: ReasoningParserName = "auto",
) -> Dialect:
    """The dialect of a model, as configured and by its chat template."""
    template = tokenizer.chat_template.source if tokenizer.chat_template else None
    variables = tokenizer.chat_template.variables if tokenizer.chat_template else frozenset()
    knows_tools = "tools" in variables
    tools = choose_format(tool_parser, template if knows_tools else None)
    think = choose_marks(reasoning_parser, template)
    by_template = choose_format("auto", template) is _HARMONY and reasoning_parser == "auto"
    return Dialect(
        knows_tools=knows_tools,
        tools=tools,
        think=think,
        is_harmony=_HARMONY in (tools, FORMATS.get(reasoning_parser)) or by_template,
        tells_reasoning=reasoning_parser != "none",
        efforts=variables & {"reasoning_effort", "enable_thinking", "thinking"},
    )


def describe_tools(messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> list[Message]:
    """A conversation in which tools, calls and results are text of the common roles.

    For models whose chat template knows nothing of tools.
    Calls are written as those that a request forces are (`RequiredCalls`).

    Args:
        messages: as chat templates with tools know them.
        tools: that may be called.
    """
    plain: list[Message] = []
    for message in messages:
        told = _as_text(message)
        if plain and message["role"] == "tool" and plain[-1]["role"] == "user":
            # Many templates want user and assistant in turn.
            plain[-1] = {**plain[-1], "content": f"{plain[-1]['content']}\n{told['content']}"}
        else:
            plain.append(told)
    if tools:
        # The first message has a role that the template knows; a system message may not.
        first = plain[0]
        plain[0] = {**first, "content": f"{_description(tools)}\n\n{first['content']}"}
    return plain


def _as_text(message: Message) -> Message:
    if message["role"] == "tool":
        name = message.get("name", "the call")
        return {"role": "user", "content": f"Result of {name}: {message['content']}"}
    if calls := message.get("tool_calls"):
        told = json.dumps([call["function"] for call in calls], ensure_ascii=False)
        content = f"{message['content']}\n{told}" if message["content"] else told
        return {"role": message["role"], "content": content}
    return message


def _description(tools: Sequence[dict[str, Any]]) -> str:
    lines = [json.dumps(tool["function"], ensure_ascii=False) for tool in tools]
    return "\n".join(["You can call these functions:", *lines])
