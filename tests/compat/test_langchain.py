"""LangChain's ChatOpenAI against the server."""

import asyncio
import json

import pytest

pytest.importorskip("langchain_openai", reason="needs tools/compat.sh clients")

import langchain_openai
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from pydantic import BaseModel

from fastserve_mega.messaging.messages import Submit

pytestmark = pytest.mark.filterwarnings("ignore")  # not ours


@tool
def weather(city: str) -> str:
    """The weather in a city."""
    return f"rain in {city}"


class Person(BaseModel):
    """Somebody."""

    name: str
    age: int


@pytest.fixture
def model(url):
    return langchain_openai.ChatOpenAI(
        model="tiny", base_url=url, api_key="x", max_retries=0, temperature=0.5, max_tokens=300
    )


def test_invoke(model, says):
    coordinator = says("Hello 日本")
    answer = model.invoke([("system", "be short"), ("human", "hi")])
    assert answer.content == "Hello 日本"
    assert answer.usage_metadata["output_tokens"] > 3
    assert answer.response_metadata["finish_reason"] == "stop"
    assert coordinator.received(Submit)[0].params.temperature == 0.5


def test_stream(model, says):
    says("Hello 日本 🙂")
    assert "".join(chunk.content for chunk in model.stream("hi")) == "Hello 日本 🙂"


def test_async(model, says):
    says("Hello")

    async def main():
        whole = await model.ainvoke("hi")
        return whole.content, [chunk.content async for chunk in model.astream("hi")]

    content, pieces = asyncio.run(main())
    assert content == "".join(pieces) == "Hello"


@pytest.mark.parametrize("stream", [False, True])
def test_tools(model, says, stream):
    says('<tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call>')
    bound = model.bind_tools([weather])
    if stream:
        first, *chunks = bound.stream("hi")
        answer = first
        for chunk in chunks:
            answer = answer + chunk
    else:
        answer = bound.invoke("hi")
    (call,) = answer.tool_calls
    assert (call["name"], call["args"]) == ("weather", {"city": "Paris"})
    says("It rains.")
    asked = AIMessage(content="", tool_calls=[call])
    result = ToolMessage(weather.invoke(call["args"]), tool_call_id=call["id"])
    assert bound.invoke([HumanMessage("hi"), asked, result]).content == "It rains."


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(model, says, method):
    coordinator = says('{"name": "Ann", "age": 3}')
    person = model.with_structured_output(Person, method=method).invoke("who?")
    assert person == Person(name="Ann", age=3)
    schema = json.loads(coordinator.received(Submit)[0].params.structured.json_schema)
    assert set(schema["properties"]) == {"name", "age"}
