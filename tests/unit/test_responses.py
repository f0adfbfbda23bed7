"""POST /v1/responses as the official client sees it."""

from __future__ import annotations

import json

import httpx
import openai
import pytest
from fake_coordinator import start_fake_coordinator
from http_server import serving
from openai.types.responses import Response
from pydantic import BaseModel
from templates import with_template

from fastserve_mega.client.testing import WAIT_S, answer, end
from fastserve_mega.messaging.messages import Cancel, Submit, Tokens
from fastserve_mega.server.responses.router import ResponseStore
from fastserve_mega.types import FinishReason

TEMPLATE = (
    "{% for t in tools or [] %}{{ t | tojson }}<tool_call></tool_call>{% endfor %}"
    "{% for m in messages %}[{{ m.role }}]{% if m.reasoning_content %}({{ m.reasoning_content }})"
    "{% endif %}{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}"
    "{% endfor %}{% endfor %}[assistant]{# </think> #}"
)
TOOL = {
    "type": "function", "name": "look", "description": None, "strict": True,
    "parameters": {"type": "object", "properties": {"q": {"type": "string"}}},
}  # fmt: skip
CALL = '<tool_call>{"name": "look", "arguments": {"q": "日本"}}</tool_call>'


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_dir, tmp_path_factory):
    return with_template(tiny_tokenizer_dir, tmp_path_factory.mktemp("responses"), TEMPLATE)


@pytest.fixture(scope="module")
def shared(tokenizer):
    coordinator = start_fake_coordinator(max_context=4096)
    with (
        serving(coordinator, tokenizer) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0, timeout=WAIT_S) as api,
    ):
        yield coordinator, api
    coordinator.close()


@pytest.fixture
def api(shared):
    return shared[1]


@pytest.fixture
def says(shared, tokenizer):
    coordinator = shared[0]
    coordinator.reset()

    def says(text, **options):
        coordinator.behaviour = answer([*tokenizer.encode(text), 2], **options)
        return coordinator

    return says


@pytest.fixture
def prompts(shared, tokenizer):
    """The prompts that came, as text."""
    return lambda: [tokenizer.decode(submit.prompt) for submit in shared[0].received(Submit)]


def test_text_in_and_out(api, says, prompts):
    coordinator = says("Hello 日本")
    done = api.responses.create(
        model="tiny", input="hi", instructions="Be short.", max_output_tokens=99, temperature=0.5
    )
    assert (done.output_text, done.status) == ("Hello 日本", "completed")
    assert (done.instructions, done.temperature, done.store) == ("Be short.", 0.5, True)
    assert done.usage.total_tokens == done.usage.input_tokens + done.usage.output_tokens > 0
    assert prompts() == ["[system]Be short.[user]hi[assistant]"]
    params = coordinator.received(Submit)[0].params
    assert (params.max_tokens, params.temperature) == (99, 0.5)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "wrong",
    [
        {"input": "hi", "metadata": {"a": "\udc00"}},
        {
            "input": "hi",
            "text": {"format": {"type": "json_schema", "name": "\udc00", "schema": {}}},
        },
        {"input": [{"type": "function_call_output", "call_id": "\udc00", "output": "x"}]},
    ],
)
def test_half_a_character_that_is_only_repeated_or_kept_is_the_senders_mistake(
    api, says, wrong, stream
):
    says("Hello")
    # The official client would not send it.
    answer = httpx.post(
        f"{api.base_url}responses",
        content=json.dumps({**wrong, "stream": stream}),
        headers={"Content-Type": "application/json"},
        timeout=WAIT_S,
    )
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == (
        "a text of the request is not valid Unicode: surrogates not allowed"
    )


def test_the_events_come_in_the_official_order(api, says):
    says("<think>Hm.</think>Look." + CALL)
    events = list(api.responses.create(input="hi", tools=[TOOL], stream=True))
    kinds = [e.type.removeprefix("response.") for e in events]
    deduplicated = [k for k, before in zip(kinds, [None, *kinds], strict=False) if k != before]
    assert deduplicated == [
        "created", "in_progress",
        "output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.done",
        "content_part.done", "output_item.done",
        "output_item.added", "content_part.added", "output_text.delta", "output_text.done",
        "content_part.done", "output_item.done",
        "output_item.added", "function_call_arguments.delta", "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]  # fmt: skip
    assert [e.sequence_number for e in events] == list(range(len(events)))
    deltas = {
        kind: "".join(e.delta for e in events if e.type == f"response.{kind}.delta")
        for kind in ("reasoning_text", "output_text", "function_call_arguments")
    }
    assert [*deltas.values()] == ["Hm.", "Look.", '{"q": "日本"}']
    reasoning, message, call = events[-1].response.output
    assert reasoning.content[0].text == "Hm."
    assert message.content[0].text == "Look."
    assert (call.name, json.loads(call.arguments)) == ("look", {"q": "日本"})
    assert [e.item.id for e in events if e.type == "response.output_item.added"] == [
        reasoning.id, message.id, call.id,
    ]  # fmt: skip
    assert 0 < events[-1].response.usage.output_tokens_details.reasoning_tokens < 10
    for event in events:
        type(event).model_validate(event.model_dump(), strict=False)


def test_the_streaming_helper_and_parsing(api, says):
    class Person(BaseModel):
        name: str

    pytest.importorskip("llguidance")
    says('{"name": "Ann"}')
    parsed = api.responses.parse(model="tiny", input="who?", text_format=Person)
    assert parsed.output_parsed == Person(name="Ann")
    says("Hello")
    with api.responses.stream(model="tiny", input="hi") as stream:
        assert [e.type for e in stream][-1] == "response.completed"
        assert stream.get_final_response().output_text == "Hello"


def test_a_whole_response_is_valid_for_openai(api, says):
    says("<think>Hm.</think>Look." + CALL)
    body = {"input": "hi", "tools": [TOOL], "tool_choice": "auto"}
    raw = httpx.post(f"{api.base_url}responses", json=body, timeout=WAIT_S).json()
    assert [item["type"] for item in Response.model_validate(raw).model_dump()["output"]] == [
        "reasoning", "message", "function_call",
    ]  # fmt: skip


def test_a_conversation_goes_on(api, says, prompts):
    says("<think>Hm.</think>" + CALL)
    first = api.responses.create(model="tiny", input="hi", tools=[TOOL])
    call = first.output[-1]
    says("It rains.")
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    api.responses.create(model="tiny", input=[result], previous_response_id=first.id, tools=[TOOL])
    stateless = [{"role": "user", "content": "hi"}, *first.output, result]
    api.responses.create(model="tiny", input=stateless, tools=[TOOL], store=False)
    by_id, by_items = prompts()[-2:]
    assert by_id == by_items
    assert '[user]hi[assistant](Hm.){"name": "look", "arguments": {"q": "日本"}}[tool]rain' in by_id


def test_what_is_kept_can_be_asked_for_and_deleted(api, says):
    says("Hello")
    kept = api.responses.create(model="tiny", input="hi")
    assert api.responses.retrieve(kept.id).output_text == "Hello"
    api.responses.delete(kept.id)
    for forgotten in (kept, api.responses.create(model="tiny", input="hi", store=False)):
        with pytest.raises(openai.NotFoundError, match="is not kept here") as caught:
            api.responses.create(model="tiny", input="x", previous_response_id=forgotten.id)
        assert caught.value.param == "previous_response_id"


def test_the_store_forgets_what_was_used_longest_ago():
    store = ResponseStore(max_bytes=300)
    for name in "abc":
        store.keep({"id": name, "output": "x" * 60}, [])
    assert store.get("a") is not None
    store.keep({"id": "d", "output": "x" * 60}, [])
    assert [name for name in "abcd" if store.get(name)] == ["a", "c", "d"]
    store.keep({"id": "huge", "output": "x" * 300}, [])
    assert not any(store.get(name) for name in ("a", "c", "d", "huge"))


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_is_cut_says_so(api, says, stream):
    says("Hello there")
    done = api.responses.create(model="tiny", input="hi", max_output_tokens=2, stream=stream)
    if stream:
        *_, item_done, last = done
        assert last.type == "response.incomplete"
        assert item_done.item.status == "incomplete"
        done = last.response
    assert done.status == "incomplete"
    assert done.incomplete_details.reason == "max_output_tokens"


def test_an_error_in_the_middle_is_told(api, shared):
    shared[0].behaviour = lambda submit: [
        Tokens(submit.request_id, 0, (40,)),
        *end(FinishReason.ERROR, "rank 3 is lost")(submit),
    ]
    *_, error, failed = api.responses.create(input="hi", stream=True)
    assert (error.type, error.message) == ("error", "rank 3 is lost")
    assert (failed.type, failed.response.error.message) == ("response.failed", "rank 3 is lost")


def test_a_client_that_goes_away_cancels(api, shared):
    shared[0].reset()
    shared[0].behaviour = lambda submit: [Tokens(submit.request_id, 0, (40,))]
    stream = api.responses.create(input="hi", stream=True)
    next(iter(stream))
    stream.close()
    shared[0].wait_for(Cancel)


@pytest.mark.parametrize(
    ("body", "param", "sentence"),
    [
        ({"input": []}, "input", "the input has 1 to 4096 items, got 0"),
        ({"input": "x", "background": True}, "background", "background=True is not supported"),
        ({"input": "x", "tools": [{"type": "web_search"}]}, "tools.0.type", "should be 'function'"),
        (
            {"input": "x", "tool_choice": {"type": "function", "name": "f"}},
            "tool_choice",
            "names 'f'",
        ),
        ({"input": "x", "max_output_tokens": 0}, "max_output_tokens", "greater than or equal to 1"),
        ({"input": "x", "reasoning": {"effort": "wild"}}, "reasoning.effort", "should be 'none'"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input.0.content.0", "images are not supported: the served model reads text only",
        ),
        ({"input": "x", "model": "gpt-9"}, "model", "is not served here"),
        ({}, "input", "field required"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_refused(api, says, body, param, sentence):
    coordinator = says("x")
    response = httpx.post(f"{api.base_url}responses", json=body, timeout=WAIT_S)
    assert response.status_code in (400, 404)
    error = response.json()["error"]
    assert sentence in error["message"]
    assert error["param"] == param
    assert coordinator.received(Submit) == []
