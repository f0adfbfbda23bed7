"""Tools for models whose chat template knows nothing of them: all of it becomes text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

Message = dict[str, Any]


def describe_tools(messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> list[Message]:
    """A conversation in which tools, calls and results are text of the common roles.

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
