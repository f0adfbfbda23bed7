"""POST /v1/messages, Anthropic's API; tests/compat has its own client."""

from __future__ import annotations

import json

import httpx
import pytest
from fake_coordinator import start_fake_coordinator
from http_server import serving
from templates import with_template

from fastserve_mega.client.testing import WAIT_S, answer, end
from fastserve_mega.messaging.messages import Submit, Tokens
from fastserve_mega.server.api_keys import ApiKeys
from fastserve_mega.system.api_keys import hash_secret
from fastserve_mega.types import FinishReason

TEMPLATE = (
    "{% for t in tools or [] %}{{ t | tojson }}<tool_call></tool_call>{% endfor %}"
    "{% for m in messages %}[{{ m.role }}]{% if m.reasoning_content %}({{ m.reasoning_content }})"
    "{% endif %}{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}"
    "{% endfor %}{% endfor %}[assistant]{% if enable_thinking is false %}-{% endif %}"
    "{# </think> #}"
)
HI = [{"role": "user", "content": "hi"}]
TOOL = {
    "name": "look",
    "input_schema": {"type": "object", "properties": {"q": {"type": "string"}}},
}
CALL = '<tool_call>{"name": "look", "arguments": {"q": "日本"}}</tool_call>'


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_dir, tmp_path_factory):
    return with_template(tiny_tokenizer_dir, tmp_path_factory.mktemp("messages"), TEMPLATE)


@pytest.fixture(scope="module")
def shared(tokenizer, tmp_path_factory):
    keys = tmp_path_factory.mktemp("keys") / "keys.yaml"
    keys.write_text(f"keys: [{{name: mine, sha256: {hash_secret('k')}}}]")
    coordinator = start_fake_coordinator(max_context=4096)
    with (
        serving(coordinator, tokenizer, api_keys=ApiKeys(keys)) as url,
        httpx.Client(base_url=url, timeout=WAIT_S, headers={"x-api-key": "k"}) as http,
    ):
        yield coordinator, http
    coordinator.close()


@pytest.fixture
def says(shared, tokenizer):
    coordinator = shared[0]
    coordinator.reset()

    def says(text):
        coordinator.behaviour = answer([*tokenizer.encode(text), 2])
        return coordinator

    return says


@pytest.fixture
def ask(shared):
    def ask(path="/v1/messages", **body):
        return shared[1].post(path, json={"max_tokens": 200, "messages": HI, **body})

    return ask


@pytest.fixture
def prompt(shared, tokenizer):
    return lambda: tokenizer.decode(shared[0].received(Submit)[-1].prompt)


def events(response):
    pairs = [event.split("\n") for event in response.text.split("\n\n") if event]
    read = [json.loads(data.removeprefix("data: ")) for _, data in pairs]
    assert [name.removeprefix("event: ") for name, _ in pairs] == [e["type"] for e in read]
    return read


def test_text_in_and_out(ask, says, prompt):
    says("Hello 日本")
    done = ask(model="tiny", system="Be short.", temperature=0.5).json()
    assert done["content"] == [{"type": "text", "text": "Hello 日本"}]
    assert (done["type"], done["role"], done["model"]) == ("message", "assistant", "tiny")
    assert (done["stop_reason"], done["stop_sequence"]) == ("end_turn", None)
    assert done["usage"]["input_tokens"] > 0
    assert prompt() == "[system]Be short.[user]hi[assistant]"


def test_the_events_come_in_the_official_order(ask, says):
    says("<think>Hm.</think>Look." + CALL)
    read = events(ask(stream=True, tools=[TOOL]))
    kinds = [event["type"] for event in read]
    deduplicated = [k for k, before in zip(kinds, [None, *kinds], strict=False) if k != before]
    block = ["content_block_start", "content_block_delta", "content_block_stop"]
    assert deduplicated == ["message_start", *block * 3, "message_delta", "message_stop"]
    assert read[0]["message"]["content"] == []
    assert read[0]["message"]["stop_reason"] is None
    assert read[0]["message"]["usage"]["input_tokens"] > 0
    starts = [e["content_block"] for e in read if e["type"] == "content_block_start"]
    assert [start["type"] for start in starts] == ["thinking", "text", "tool_use"]
    assert (starts[2]["name"], starts[2]["input"]) == ("look", {})
    told = {}
    for event in read:
        if event["type"] == "content_block_delta":
            (value,) = (v for k, v in event["delta"].items() if k != "type")
            told[event["index"]] = told.get(event["index"], "") + value
    assert told == {0: "Hm.", 1: "Look.", 2: '{"q": "日本"}'}
    assert read[-2]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert read[-2]["usage"]["output_tokens"] > 0


def test_a_whole_message_has_the_same_blocks(ask, says):
    says("<think>Hm.</think>Look." + CALL)
    thinking, text, call = ask(tools=[TOOL]).json()["content"]
    assert (thinking["thinking"], text["text"]) == ("Hm.", "Look.")
    assert (call["name"], call["input"]) == ("look", {"q": "日本"})


def test_calls_and_results_go_back(ask, says, prompt):
    says("It rains.")
    turns = [
        *HI,
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "Hm.", "signature": ""},
            {"type": "text", "text": "Look."},
            {"type": "tool_use", "id": "c1", "name": "look", "input": {"q": "x"}},
        ]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "c1", "content": [
                {"type": "text", "text": "rain"}]},
            {"type": "tool_result", "tool_use_id": "c2", "content": "gone", "is_error": True},
            {"type": "text", "text": "so?", "cache_control": {"type": "ephemeral"}},
        ]},
    ]  # fmt: skip
    ask(messages=turns)
    assert prompt() == (
        '[user]hi[assistant](Hm.)Look.{"name": "look", "arguments": {"q": "x"}}'
        "[tool]rain[tool]Error: gone[user]so?[assistant]"
    )


@pytest.mark.parametrize("stream", [False, True])
def test_stop_sequences_tell_which(ask, says, stream):
    says("one two three")
    response = ask(stop_sequences=["two", "x"], stream=stream)
    told = events(response)[-2]["delta"] if stream else response.json()
    assert (told["stop_reason"], told["stop_sequence"]) == ("stop_sequence", "two")
    response = ask(max_tokens=1, stream=stream)
    told = events(response)[-2]["delta"] if stream else response.json()
    assert (told["stop_reason"], told["stop_sequence"]) == ("max_tokens", None)


def test_tools_are_forced_and_thinking_is_switched_off(ask, says, prompt):
    pytest.importorskip("llguidance")
    coordinator = says('{"q": "x"')
    done = ask(tools=[TOOL], tool_choice={"type": "tool", "name": "look"}).json()
    assert done["content"][0]["input"] == {"INVALID_JSON": '{"q": "x"'}
    schema = json.loads(coordinator.received(Submit)[-1].params.structured.json_schema)
    assert schema["properties"] == {"q": {"type": "string"}}
    ask(thinking={"type": "disabled"})
    assert prompt().endswith("[assistant]-")
    ask(thinking={"type": "enabled", "budget_tokens": 1024})
    assert prompt().endswith("[assistant]")


def test_what_agents_send_along_has_no_effect(ask, says, prompt):
    says("x")
    call = {
        "type": "tool_use",
        "id": "1",
        "name": "look",
        "input": {},
        "caller": {"type": "direct"},
    }
    turns = [*HI, {"role": "assistant", "content": [call]}, *HI]
    eager = {**TOOL, "eager_input_streaming": True, "defer_loading": False, "input_examples": []}
    assert ask(tools=[TOOL], messages=turns).status_code == 200
    plain = prompt()
    assert ask(tools=[eager], messages=turns).status_code == 200
    assert prompt() == plain
    keeps = {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}
    adaptive = {"type": "adaptive"}
    done = ask(tools=[TOOL], messages=turns, context_management=keeps, thinking=adaptive)
    assert done.status_code == 200
    assert prompt() == plain


def test_system_words_may_come_later_and_the_answer_may_have_no_beginning_yet(ask, says, prompt):
    says("x")
    later = {"role": "system", "content": [{"type": "text", "text": "Be kind."}]}
    empty = {"role": "assistant", "content": ""}
    for turns in ([*HI, later], [*HI, later, empty], [*HI, later, {**empty, "content": []}]):
        assert ask(system="Be short.", messages=turns).status_code == 200
        assert prompt() == "[system]Be short.[user]hi[system]Be kind.[assistant]"


def test_tokens_are_counted_as_they_are_used(ask, says, shared):
    says("x")
    body = {"system": "Be short.", "tools": [TOOL], "messages": HI}
    used = ask(**body).json()["usage"]["input_tokens"]
    counted = shared[1].post("/v1/messages/count_tokens", json=body).json()
    assert counted == {"input_tokens": used}
    # What it has no use for is refused, as everywhere.
    assert ask("/v1/messages/count_tokens", **body).status_code == 400


def test_an_error_in_the_middle_is_an_event(ask, shared):
    shared[0].behaviour = lambda submit: [
        Tokens(submit.request_id, 0, (40,)),
        *end(FinishReason.ERROR, "rank 3 is lost")(submit),
    ]
    last = events(ask(stream=True))[-1]
    assert last == {"type": "error", "error": {"type": "api_error", "message": "rank 3 is lost"}}


def test_what_the_client_does_wrong_is_no_error_of_the_api(shared):
    for refused in (
        shared[1].get("/v1/messages"),
        shared[1].post("/v1/messages", content=b"x", headers={"Content-Encoding": "gzip"}),
    ):
        assert refused.status_code in (405, 415)
        assert refused.json()["error"]["type"] == "invalid_request_error"


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}
REFUSED = [
    ({"messages": []}, 400, "a conversation has 1 to 4096 messages, got 0"),
    ({"messages": [{"role": "user", "content": [IMAGE]}]}, 400, "images are not supported"),
    ({"messages": [{"role": "tool", "content": "x"}]}, 400, "input should be 'user'"),
    ({"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}}, 400, "context_man"),
    ({"tool_choice": {"type": "tool"}}, 400, "tool_choice has a name if its type is 'tool'"),
    ({"max_tokens": 0}, 400, "max_tokens must be at least 1, got 0"),
    ({"container": "x"}, 400, "container='x' is not supported"),
    ({"model": "claude"}, 404, "is not served here"),
]


@pytest.mark.parametrize(("body", "status", "sentence"), REFUSED)
def test_what_is_wrong_is_refused_in_anthropics_shape(ask, says, body, status, sentence):
    coordinator = says("x")
    response = ask(**body)
    assert response.status_code == status
    told = response.json()
    assert sentence in told["error"]["message"]
    assert (told["type"], set(told["error"])) == ("error", {"type", "message"})
    assert coordinator.received(Submit) == []


def test_a_wrong_key_is_refused_in_anthropics_shape(shared):
    response = shared[1].post("/v1/messages", headers={"x-api-key": "z"}, json={})
    assert response.status_code == 401
    assert response.json()["error"]["type"] == "authentication_error"
