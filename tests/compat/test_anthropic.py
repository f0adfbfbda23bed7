"""Anthropic's own client against the server."""

import asyncio
import json

import pytest

pytest.importorskip("anthropic", reason="needs tools/compat.sh clients")

import anthropic

from fastserve_mega.messaging.messages import Submit

pytestmark = pytest.mark.filterwarnings("ignore")  # not ours

HI = [{"role": "user", "content": "hi"}]
TOOL = {
    "name": "weather",
    "description": "The weather in a city.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call>'
OPTIONS = {"model": "tiny", "max_tokens": 300, "messages": HI}


@pytest.fixture
def api(url):
    return anthropic.Anthropic(base_url=url.removesuffix("/v1"), api_key="x", max_retries=0)


def test_create(api, says):
    coordinator = says("Hello 日本")
    body = {"temperature": 0.5, "top_k": 3}  # its newest version has no arguments for these
    done = api.messages.create(**OPTIONS, system="be short", extra_body=body)
    assert done.content[0].text == "Hello 日本"
    assert (done.stop_reason, done.usage.output_tokens > 3) == ("end_turn", True)
    assert coordinator.received(Submit)[0].params.temperature == 0.5


def test_stream(api, says):
    says("Hello 日本 🙂")
    with api.messages.stream(**OPTIONS) as stream:
        assert "".join(stream.text_stream) == "Hello 日本 🙂"
        final = stream.get_final_message()
    assert final.content[0].text == "Hello 日本 🙂"
    assert final.usage.input_tokens > 0


def test_async(url, says):
    says("Hello")

    async def main():
        async with anthropic.AsyncAnthropic(
            base_url=url.removesuffix("/v1"), api_key="x", max_retries=0
        ) as api:
            return (await api.messages.create(**OPTIONS)).content[0].text

    assert asyncio.run(main()) == "Hello"


@pytest.mark.parametrize("stream", [False, True])
def test_tools(api, says, stream):
    says(f"I look. {CALL}")
    if stream:
        with api.messages.stream(**OPTIONS, tools=[TOOL]) as events:
            done = events.get_final_message()
    else:
        done = api.messages.create(**OPTIONS, tools=[TOOL])
    text, call = done.content
    assert (text.text, done.stop_reason) == ("I look.", "tool_use")
    assert (call.name, call.input) == ("weather", {"city": "Paris"})
    coordinator = says("It rains.")
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "rain"}
    turns = [*HI, {"role": "assistant", "content": done.content},
             {"role": "user", "content": [result]}]  # fmt: skip
    done = api.messages.create(**{**OPTIONS, "messages": turns}, tools=[TOOL])
    assert done.content[0].text == "It rains."
    forced = {"type": "tool", "name": "weather"}
    says('{"city": "Rome"}')
    done = api.messages.create(**OPTIONS, tools=[TOOL], tool_choice=forced)
    assert done.content[0].input == {"city": "Rome"}
    structured = coordinator.received(Submit)[-1].params.structured
    assert "city" in json.loads(structured.json_schema)["properties"]


def test_stop_sequences_and_counts(api, says):
    says("one two three")
    done = api.messages.create(**OPTIONS, stop_sequences=["two"])
    assert (done.stop_reason, done.stop_sequence) == ("stop_sequence", "two")
    assert done.content[0].text == "one "
    counted = api.messages.count_tokens(model="tiny", messages=HI)
    assert counted.input_tokens == done.usage.input_tokens


def test_errors(api, says):
    says("x")
    with pytest.raises(anthropic.NotFoundError, match="is not served here"):
        api.messages.create(**{**OPTIONS, "model": "claude"})
    with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
        api.messages.create(**{**OPTIONS, "max_tokens": 0})
