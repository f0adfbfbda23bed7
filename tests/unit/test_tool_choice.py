"""What a request lets the model call, as chat completions and responses say it."""

from __future__ import annotations

import json

import pytest
from http_server import hi
from pydantic import ValidationError

from fastserve_mega.server.chat_protocol import ChatRequest
from fastserve_mega.server.errors import ApiError
from fastserve_mega.server.responses.protocol import ResponsesRequest
from fastserve_mega.server.service import structure_of

NAMES = ("look", "ask", "tell")
TOOLS = [{"type": "function", "function": {"name": name}} for name in NAMES]


def named(name):
    return {"type": "function", "function": {"name": name}}


def allowed(mode, *names):
    choice = {"mode": mode, "tools": [named(name) for name in names]}
    return {"type": "allowed_tools", "allowed_tools": choice}


def chat(**body):
    return ChatRequest.model_validate({"messages": hi(), "tools": TOOLS, **body})


@pytest.mark.parametrize("mode", ["auto", "required"])
def test_the_model_is_told_of_allowed_tools_only(mode):
    asked = chat(tool_choice=allowed(mode, "tell", "look"))
    assert [tool["function"]["name"] for tool in asked.offered_tools] == ["look", "tell"]
    assert list(asked.functions) == ["look", "tell"]
    assert asked.forces_call == (mode == "required")
    assert (asked.structured_output is not None) == (mode == "required")


def test_a_forced_call_with_parameters_nested_too_deeply_is_refused():
    parameters = json.loads('{"not": ' * 400 + "{}" + "}" * 400)
    tool = {"type": "function", "function": {"name": "look", "parameters": parameters}}
    with pytest.raises(ApiError, match="the JSON schema is nested too deeply"):
        structure_of(chat(tools=[tool], tool_choice="required"))


def test_responses_allow_tools_in_a_form_of_their_own():
    body = {
        "input": "x",
        "tools": [{"type": "function", "name": name} for name in NAMES],
        "tool_choice": {
            "type": "allowed_tools",
            "mode": "required",
            "tools": [{"type": "function", "name": "ask"}],
        },
    }
    told = ResponsesRequest.model_validate(body)
    asked = ChatRequest.model_validate(told.chat(told.messages()))
    assert (list(asked.functions), asked.forces_call) == (["ask"], True)


@pytest.mark.parametrize(
    ("choice", "sentence"),
    [
        (allowed("auto", "look", "nobody"), "tool_choice names 'nobody', which is not among"),
        (named("nobody"), "tool_choice names 'nobody', which is not among"),
        (allowed("auto"), "at least 1 item"),
        (allowed("any", "look"), "'auto' or 'required'"),
    ],
)
def test_what_is_not_among_the_tools_cannot_be_chosen(choice, sentence):
    with pytest.raises(ValidationError, match=sentence):
        chat(tool_choice=choice)
