"""Messages of a conversation, in the forms in which clients keep them."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from fastserve_mega.server.chat_protocol import ChatRequest

HINT = {"cache_control": {"type": "ephemeral"}}


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_reasoning_comes_back_under_either_name(name):
    messages = [
        {"role": "user", "content": "hi", **HINT},
        {"role": "assistant", "content": "a", name: "hm"},
    ]
    tools = [{"type": "function", "function": {"name": "look"}, **HINT}]
    body = ChatRequest.model_validate({"messages": messages, "tools": tools})
    assert body.plain_messages() == [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "a", "reasoning_content": "hm"},
    ]
    assert body.offered_tools == [{"type": "function", "function": {"name": "look"}}]


def test_a_call_without_arguments_has_none_however_that_is_written():
    for arguments in (None, "", "null", "{}", {}):
        function = {"name": "look", "arguments": arguments}
        call = {"id": "1", "type": "function", "function": function}
        body = ChatRequest.model_validate(
            {"messages": [{"role": "assistant", "content": None, "tool_calls": [call]}]}
        )
        (message,) = body.plain_messages()
        assert message["tool_calls"][0]["function"] == {"name": "look", "arguments": {}}


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        ({"role": "user", "content": "x", "reasoning": "hm"}, "for the role 'assistant'"),
        (
            {"role": "assistant", "content": "x", "reasoning": "hm", "reasoning_content": "no"},
            "are the same thing",
        ),
    ],
)
def test_reasoning_that_is_not_clear_is_refused(message, sentence):
    with pytest.raises(ValidationError, match=sentence):
        ChatRequest.model_validate({"messages": [message]})
