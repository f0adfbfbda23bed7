"""LiteLLM against the server."""

import asyncio
import os

import pytest

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it asks the network when imported
pytest.importorskip("litellm", reason="needs tools/compat.sh litellm")

import litellm

from fastserve_mega.messaging.messages import Submit

pytestmark = pytest.mark.filterwarnings("ignore")  # not ours

HI = [{"role": "user", "content": "hi"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


@pytest.fixture
def options(url):
    return {
        "model": "openai/tiny", "api_base": url, "api_key": "x", "messages": HI, "max_retries": 0,
        "max_tokens": 300,
    }  # fmt: skip


def test_completion(options, says):
    coordinator = says("Hello 日本")
    done = litellm.completion(**options, temperature=0.5, seed=3, presence_penalty=0.5)
    assert done.choices[0].message.content == "Hello 日本"
    assert done.choices[0].finish_reason == "stop"
    assert done.usage.completion_tokens > 3
    params = coordinator.received(Submit)[0].params
    assert (params.temperature, params.seed, params.presence_penalty) == (0.5, 3, 0.5)


def test_stream(options, says):
    says("Hello 日本 🙂")
    pieces = [
        chunk.choices[0].delta.content for chunk in litellm.completion(**options, stream=True)
    ]
    assert "".join(piece or "" for piece in pieces) == "Hello 日本 🙂"


def test_async(options, says):
    says("Hello")
    done = asyncio.run(litellm.acompletion(**options))
    assert done.choices[0].message.content == "Hello"


@pytest.mark.parametrize("stream", [False, True])
def test_tools(options, says, stream):
    says('<tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call>')
    done = litellm.completion(**options, tools=[TOOL], stream=stream)
    if stream:
        done = litellm.stream_chunk_builder(list(done))
    (call,) = done.choices[0].message.tool_calls
    assert (call.function.name, call.function.arguments) == ("weather", '{"city": "Paris"}')
    assert done.choices[0].finish_reason == "tool_calls"


def test_json_schema(options, says):
    coordinator = says('{"a": 1}')
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    wanted = {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}
    done = litellm.completion(**options, response_format=wanted)
    assert done.choices[0].message.content == '{"a": 1}'
    assert coordinator.received(Submit)[0].params.structured is not None
