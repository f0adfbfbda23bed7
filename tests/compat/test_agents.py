"""Agents' libraries against the server: openai-agents, pydantic-ai, instructor."""

import asyncio

import pytest

pytest.importorskip("agents", reason="needs tools/compat.sh agents")

import agents
import instructor
import openai
import pydantic_ai
from pydantic import BaseModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

from fastserve_mega.client.testing import answer
from fastserve_mega.messaging.messages import Submit

pytestmark = pytest.mark.filterwarnings("ignore")  # not ours

CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>'
PERSON = '{"name": "Ann", "age": 30}'


class Person(BaseModel):
    """Somebody."""

    name: str
    age: int


@pytest.fixture
def says_in_turn(says, tokenizer):
    """Sets the answers to the requests that come, one after the other."""

    def says_in_turn(*texts):
        coordinator = says("")
        behaviours = [answer([*tokenizer.encode(text), 2]) for text in texts]

        def behave(*args, **kwargs):
            return behaviours.pop(0)(*args, **kwargs)

        coordinator.behaviour = behave
        return coordinator

    return says_in_turn


@pytest.fixture(params=["chat", "responses"])
def api(request):
    return request.param


@pytest.fixture
def agent(url, api):
    """An agent of openai-agents with one function."""
    agents.set_tracing_disabled(True)
    shape = {"chat": agents.OpenAIChatCompletionsModel, "responses": agents.OpenAIResponsesModel}

    @agents.function_tool
    def weather(city: str) -> str:
        """The weather in a city."""
        return f"rain in {city}"

    def make(**options):
        client = openai.AsyncOpenAI(base_url=url, api_key="x", max_retries=0)
        model = shape[api](model="tiny", openai_client=client)
        return agents.Agent(name="a", instructions="be short", model=model, **options)

    make.tools = [weather]
    return make


def test_an_agent_calls_a_function_and_answers(agent, says_in_turn):
    coordinator = says_in_turn(CALL, "It rains.")
    asked = agents.Runner.run(agent(tools=agent.tools), "weather in Rome?")
    assert asyncio.run(asked).final_output == "It rains."
    assert len(coordinator.received(Submit)) == 2


def test_an_agent_that_streams(agent, says_in_turn):
    says_in_turn(CALL, "It rains.")

    async def main():
        run = agents.Runner.run_streamed(agent(tools=agent.tools), "weather in Rome?")
        return {event.type async for event in run.stream_events()}, run.final_output

    events, text = asyncio.run(main())
    assert text == "It rains."
    assert {"raw_response_event", "run_item_stream_event"} <= events


def test_an_agent_whose_first_answer_must_be_a_call_and_whose_last_has_a_form(agent, says_in_turn):
    coordinator = says_in_turn('[{"name": "weather", "arguments": {"city": "Rome"}}]', PERSON)
    asked = agents.Runner.run(
        agent(
            tools=agent.tools,
            output_type=Person,
            model_settings=agents.ModelSettings(tool_choice="required"),
        ),
        "who?",
    )
    assert asyncio.run(asked).final_output == Person(name="Ann", age=30)
    assert all(each.params.structured for each in coordinator.received(Submit))


def test_pydantic_ai(url, api, says_in_turn):
    says_in_turn(CALL, PERSON)
    shape = {"chat": OpenAIChatModel, "responses": OpenAIResponsesModel}[api]
    model = shape("tiny", provider=OpenAIProvider(base_url=url, api_key="x"))
    agent = pydantic_ai.Agent(model, output_type=pydantic_ai.PromptedOutput(Person))

    @agent.tool_plain
    def weather(city: str) -> str:
        """The weather in a city."""
        return f"rain in {city}"

    assert asyncio.run(agent.run("who?")).output == Person(name="Ann", age=30)


@pytest.mark.parametrize("mode", ["TOOLS", "JSON", "JSON_SCHEMA", "MD_JSON"])
def test_instructor(url, says, mode):
    says(PERSON)
    client = instructor.from_openai(
        openai.OpenAI(base_url=url, api_key="x", max_retries=0), mode=instructor.Mode[mode]
    )
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "who?"}]}
    assert client.chat.completions.create(response_model=Person, **asked).name == "Ann"


def test_instructor_over_responses(url, says):
    says(PERSON)
    client = instructor.from_openai(
        openai.OpenAI(base_url=url, api_key="x", max_retries=0),
        mode=instructor.Mode.RESPONSES_TOOLS,
    )
    asked = {"model": "tiny", "input": "who?"}
    assert client.responses.create(response_model=Person, **asked).name == "Ann"
