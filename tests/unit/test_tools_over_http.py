"""Tools as the official client sees them."""

from __future__ import annotations

import asyncio
import json

import httpx
import openai
import pytest
from fake_coordinator import start_fake_coordinator
from http_server import serving
from tool_calls import (
    ARGUMENTS,
    CALL,
    ENDS,
    HI,
    LOOK,
    PARAMETERS,
    TEMPLATE,
    TOOLS,
    ask,
    put_together,
)

from fastserve_mega.client.testing import WAIT_S, answer
from fastserve_mega.messaging.messages import Submit
from fastserve_mega.text.tokenizer import Tokenizer

pytest.importorskip("llguidance")


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_dir, tmp_path_factory):
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_tokenizer_dir)
    tokenizer.chat_template = TEMPLATE
    directory = tmp_path_factory.mktemp("tools-tokenizer")
    tokenizer.save_pretrained(directory)
    return Tokenizer(directory)


@pytest.fixture(scope="module")
def shared(tokenizer):
    coordinator = start_fake_coordinator(max_context=4096)
    with serving(coordinator, tokenizer) as url:
        yield coordinator, url
    coordinator.close()


@pytest.fixture
def says(shared, tokenizer):
    """Sets the answer to every request."""
    coordinator, _ = shared
    coordinator.reset()

    def says(text):
        coordinator.behaviour = answer([*tokenizer.encode(text), ENDS])
        return coordinator

    return says


@pytest.fixture
def api(shared):
    with openai.OpenAI(
        base_url=f"{shared[1]}/v1", api_key="x", max_retries=0, timeout=WAIT_S
    ) as api:
        yield api


@pytest.mark.parametrize("stream", [False, True])
def test_a_call(api, says, stream, tokenizer):
    coordinator = says(f"Let me see.\n{CALL}\n{CALL}")
    strict = [{**each, "function": {**each["function"], "strict": True}} for each in TOOLS]
    content, calls, reason = ask(api, stream=stream, tools=strict)
    assert content == "Let me see."
    assert [(name, json.loads(arguments)) for name, arguments in calls] == [
        ("look", json.loads(ARGUMENTS))
    ] * 2
    assert reason == "tool_calls"
    (submit,) = coordinator.received(Submit)
    assert list(submit.prompt) == tokenizer.apply_chat_template(HI, TOOLS)
    assert submit.params.structured is None


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_without_a_call(api, says, stream):
    says("No, 日本.")
    assert ask(api, stream=stream) == ("No, 日本.", [], "stop")


@pytest.mark.parametrize("stream", [False, True])
def test_none_keeps_the_tools_from_the_model(api, says, stream, tokenizer):
    coordinator = says("Hello")
    assert ask(api, stream=stream, tool_choice="none") == ("Hello", [], "stop")
    (submit,) = coordinator.received(Submit)
    assert list(submit.prompt) == tokenizer.apply_chat_template(HI)


@pytest.mark.parametrize("form", [{}, {"response_format": {"type": "json_object"}}])
@pytest.mark.parametrize("stream", [False, True])
def test_a_named_tool_is_held_to_its_schema_and_no_other_form(api, says, stream, form):
    coordinator = says(ARGUMENTS)
    answer = ask(api, stream=stream, tool_choice=LOOK, **form)
    assert answer == (None, [("look", ARGUMENTS)], "stop")
    (submit,) = coordinator.received(Submit)
    assert json.loads(submit.params.structured.json_schema) == PARAMETERS


@pytest.mark.parametrize("stream", [False, True])
def test_required_calls_are_held_to_their_schemas(api, says, stream):
    call = f'{{"name": "ask", "arguments": {ARGUMENTS}}}'
    coordinator = says(f"[{call}, {call}]")
    content, calls, reason = ask(api, stream=stream, tool_choice="required")
    assert (content, reason) == (None, "tool_calls")
    assert [(name, json.loads(told)) for name, told in calls] == [
        ("ask", json.loads(ARGUMENTS))
    ] * 2
    (submit,) = coordinator.received(Submit)
    schema = json.loads(submit.params.structured.json_schema)
    assert [each["properties"] for each in schema["items"]["anyOf"]] == [
        {"name": {"const": name}, "arguments": {"$ref": f"#/$defs/{name}"}}
        for name in ("look", "ask")
    ]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("text", "options"),
    [
        (CALL, {}),
        (f'[{{"name": "ask", "arguments": {ARGUMENTS}}}]', {"tool_choice": "required"}),
    ],
)
def test_a_call_that_a_stop_string_cuts_is_not_told_as_made(api, says, stream, text, options):
    says(text)
    _, calls, reason = ask(api, stream=stream, stop="日", **options)
    assert [arguments for _, arguments in calls] == ['{"q": "']
    assert reason == "stop"


def test_a_conversation_with_calls_and_results(api, says, tokenizer):
    coordinator = says("It rains.")
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "look", "arguments": ARGUMENTS},
        "index": 0,
    }
    messages = [
        *HI,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
    ]
    assert ask(api, messages=messages)[0] == "It rains."
    (submit,) = coordinator.received(Submit)
    prompt = tokenizer.decode(submit.prompt)
    assert "[look call_1] rain" in prompt
    # The template writes the arguments, so they are not quoted twice.
    assert f'<tool_call>{{"name": "look", "arguments": {ARGUMENTS}}}</tool_call>' in prompt


def test_the_async_client_streams_calls(shared, says):
    says(CALL)

    async def main():
        async with openai.AsyncOpenAI(base_url=f"{shared[1]}/v1", api_key="x") as api:
            stream = await api.chat.completions.create(
                model="tiny", messages=HI, tools=TOOLS, stream=True
            )
            return [chunk async for chunk in stream]

    _, calls, reason = put_together(asyncio.run(asyncio.wait_for(main(), WAIT_S)))
    assert [name for name, _ in calls] == ["look"]
    assert reason == "tool_calls"


@pytest.mark.parametrize("given", [None, "", {"q": "日本 🙂"}])
def test_arguments_may_come_back_as_clients_keep_them(api, says, given, tokenizer):
    coordinator = says("x")
    call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": given}}
    ask(api, messages=[*HI, {"role": "assistant", "tool_calls": [call]}])
    (submit,) = coordinator.received(Submit)
    told = ARGUMENTS if given else "{}"
    assert f'"arguments": {told}' in tokenizer.decode(submit.prompt)


REFUSED = [
    ({"tools": [{"type": "function"}]}, "tools.0.function: field required"),
    ({"tools": [{"type": "web"}]}, "tools.0.type: input should be 'function'"),
    ({"tools": TOOLS[:1] * 2}, "tools must have names of their own, got ['look', 'look']"),
    ({"tools": [], "tool_choice": "required"}, "tool_choice='required' needs tools"),
    ({"tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice names 'x'"),
    ({"functions": [{"name": "x"}]}, "functions="),
    (
        {"tool_choice": LOOK, "tools": [{"type": "function", "function": {
            "name": "look", "parameters": {"properties": {"q": {"type": "banana"}}}}}]},
        "the JSON schema cannot be used: Invalid type: banana",
    ),
    (
        {"tool_choice": "required", "tools": [{"type": "function", "function": {
            "name": "look", "parameters": {"type": "array"}}}]},
        "the parameters of the function 'look' must be of type 'object', got 'array'",
    ),
    (
        {"messages": [{"role": "assistant", "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "look", "arguments": "{"}}]}]},
        "the arguments of a call of look are not valid JSON: '{'",
    ),
    ({"messages": [{"role": "user", "content": "x", "tool_call_id": "1"}]}, "tool_call_id is for"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "sentence"), REFUSED)
def test_what_is_wrong_is_refused(api, says, options, sentence):
    coordinator = says("x")
    with pytest.raises(openai.BadRequestError) as caught:
        ask(api, **options)
    assert sentence in caught.value.body["message"]
    assert coordinator.received(Submit) == []


def test_the_tokens_of_a_conversation_are_counted_with_its_tools(api, shared, says):
    coordinator = says("x")
    call = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    messages = [
        *HI,
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
    ]
    ask(api, messages=messages)
    (submit,) = coordinator.received(Submit)
    asked = {"messages": messages, "tools": TOOLS, "chat_template_kwargs": {}}
    counted = httpx.post(f"{shared[1]}/tokenize", json=asked, timeout=WAIT_S).json()
    assert counted["tokens"] == list(submit.prompt)
    for wrong, sentence in (
        ({"messages": [{"role": "fool"}]}, "messages.0.role: input should be"),
        ({"tools": TOOLS}, "messages: field required"),
        ({"prompt": "x", "tools": TOOLS}, "send either prompt or messages"),
    ):
        told = httpx.post(f"{shared[1]}/tokenize", json=wrong, timeout=WAIT_S)
        assert (told.status_code, sentence in told.text) == (400, True)


def nested(depth):
    schema = {}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


@pytest.mark.parametrize("choice", ["auto", "required", LOOK])
def test_what_is_nested_without_end_is_refused(api, says, choice):
    coordinator = says("x")
    tool = {"type": "function", "function": {"name": "look", "parameters": nested(400)}}
    with pytest.raises(openai.BadRequestError, match=r"nested too deeply|the context is"):
        ask(api, tools=[tool], tool_choice=choice)
    call = {"name": "look", "arguments": "[" * 90_000 + "]" * 90_000}
    history = {"role": "assistant", "tool_calls": [
        {"id": "1", "type": "function", "function": call}]}  # fmt: skip
    with pytest.raises(openai.BadRequestError, match="the arguments of a call of look are not"):
        ask(api, messages=[history])
    assert coordinator.received(Submit) == []


@pytest.mark.parametrize("parser", ["auto", "none"])
def test_models_without_tools_make_calls_that_are_forced(tiny_tokenizer_dir, parser):
    coordinator = start_fake_coordinator()
    tokenizer = Tokenizer(tiny_tokenizer_dir)
    with (
        serving(coordinator, tokenizer, tool_parser=parser) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0, timeout=WAIT_S) as api,
    ):
        tools = [{"type": "function", "function": {"name": "look"}}]
        with pytest.raises(openai.BadRequestError, match="not supported with tool_choice='auto'"):
            ask(api)
        assert ask(api, tools=[], max_tokens=50)[2] == "stop"
        assert ask(api, tool_choice="none", max_tokens=50)[2] == "stop"
        coordinator.reset()
        coordinator.behaviour = answer([*tokenizer.encode("{}"), 2])
        asked = ask(api, tools=tools, tool_choice=LOOK, max_tokens=50)
        assert asked == (None, [("look", "{}")], "stop")
        call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
        called = {"role": "assistant", "tool_calls": [call]}
        result = {"role": "tool", "content": "rain", "tool_call_id": "1"}
        assert ask(api, tools=[], messages=[*HI, called, result], max_tokens=50)[2] == "stop"
        first, second = (tokenizer.decode(s.prompt) for s in coordinator.received(Submit))
        assert 'You can call these functions:\n{"name": "look"}\n\nhi' in first
        assert '[{"name": "look", "arguments": {}}]' in second
        assert "user\nResult of look: rain" in second
    coordinator.close()
