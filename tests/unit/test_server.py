from __future__ import annotations

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import openai.types
import openai.types.chat
import pytest
import tokenizers
import transformers
from fake_coordinator import start_fake_coordinator
from http_server import serving

from fastserve_mega.client.testing import WAIT_S, answer, begin, end
from fastserve_mega.messaging.messages import Cancel, Finished, Submit, Tokens
from fastserve_mega.server.middleware import body_limit
from fastserve_mega.text.tokenizer import Tokenizer
from fastserve_mega.types import FinishReason, Usage

JSON = {"Content-Type": "application/json"}
TEXT = "the quick brown fox 日本 🙂"


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_dir):
    return Tokenizer(tiny_tokenizer_dir)


@pytest.fixture(scope="module")
def shared(tokenizer):
    """One coordinator and one server for all tests here: starting them takes most of the time."""
    coordinator = start_fake_coordinator()
    with serving(coordinator, tokenizer) as url:
        yield coordinator, url
    coordinator.close()


@pytest.fixture
def fake_coordinator(shared):
    shared[0].reset()
    return shared[0]


@pytest.fixture
def url(shared, fake_coordinator):
    return shared[1]


@pytest.fixture
def api(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0, timeout=WAIT_S) as api:
        yield api


@pytest.fixture
def http(url):
    with httpx.Client(base_url=url, timeout=WAIT_S) as http:
        yield http


@pytest.fixture
def says_text(fake_coordinator, tokenizer):
    """The answer to every request is TEXT and the end-of-sequence token; returns its length."""
    ids = [*tokenizer.encode(TEXT), 2]
    fake_coordinator.behaviour = answer(ids)
    return len(ids)


def hi(role="user", content="hi"):
    return [{"role": role, "content": content}]


# --- the official client -------------------------------------------------------------------------


def test_a_completion(api, says_text, tokenizer):
    done = api.completions.create(model="tiny", prompt="hello", max_tokens=100)
    assert done.choices[0].text == TEXT
    assert done.choices[0].finish_reason == "stop"
    prompt = len(tokenizer.encode("hello"))
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (prompt, says_text)
    assert done.usage.total_tokens == prompt + says_text
    assert done.object == "text_completion"


def test_a_streamed_completion(api, says_text):
    stream = api.completions.create(
        model="tiny", prompt="x", max_tokens=100, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    *chunks, last = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == TEXT
    assert [chunk.choices[0].finish_reason for chunk in chunks[-2:]] == [None, "stop"]
    assert all(chunk.usage is None for chunk in chunks)
    assert (last.choices, last.usage.completion_tokens) == ([], says_text)
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_chat_completion(api, says_text, fake_coordinator, tokenizer):
    done = api.chat.completions.create(model="tiny", messages=hi())
    assert done.choices[0].message.content == TEXT
    assert done.choices[0].message.role == "assistant"
    (submit,) = fake_coordinator.received(Submit)
    assert list(submit.prompt) == tokenizer.apply_chat_template(hi())
    assert submit.params.max_tokens == 256 - len(submit.prompt)  # the rest of the context


def test_a_streamed_chat_completion(api, says_text):
    stream = api.chat.completions.create(
        model="tiny", messages=hi(), stream=True, stream_options={"include_usage": True}
    )
    first, *chunks, closing, last = list(stream)
    assert first.choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == TEXT
    assert closing.choices[0].finish_reason == "stop"
    assert last.usage.completion_tokens == says_text


def test_the_async_client(url, says_text):
    async def main():
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="x", timeout=WAIT_S) as api:
            whole = await api.chat.completions.create(model="tiny", messages=hi())
            stream = await api.completions.create(
                model="tiny", prompt="x", max_tokens=100, stream=True
            )
            return whole.choices[0].message.content, [c.choices[0].text async for c in stream]

    content, pieces = asyncio.run(asyncio.wait_for(main(), WAIT_S))
    assert content == "".join(pieces) == TEXT


def test_many_at_once(api, fake_coordinator):
    fake_coordinator.behaviour = lambda submit: answer([submit.prompt[0]] * 9)(submit)
    with ThreadPoolExecutor(8) as pool:
        texts = pool.map(
            lambda t: api.completions.create(model="tiny", prompt=[t, 1]).choices[0].text,
            range(40, 70),
        )
        tokenizer_texts = list(texts)
    assert len(set(tokenizer_texts)) == 30


def test_parameters_reach_the_coordinator(api, fake_coordinator):
    api.completions.create(
        model="tiny", prompt=[7, 8, 9], max_tokens=12, temperature=0.5, top_p=0.9, seed=42,
        extra_body={
            "top_k": 5, "min_tokens": 2, "ignore_eos": True, "stop_token_ids": [77],
            "priority": -3, "timeout": 9.5, "cache_salt": "mine",
        },
    )  # fmt: skip
    (submit,) = fake_coordinator.received(Submit)
    assert submit.prompt == (7, 8, 9)
    assert (submit.priority, submit.timeout_s, submit.cache_salt) == (-3, 9.5, "mine")
    params = submit.params
    assert (params.max_tokens, params.temperature, params.top_p, params.seed) == (12, 0.5, 0.9, 42)
    assert (params.top_k, params.min_tokens) == (5, 2)
    assert (params.ignore_eos, params.stop_token_ids) == (True, (77,))


@pytest.mark.parametrize("stream", [False, True])
def test_several_prompts(api, fake_coordinator, tokenizer, stream):
    fake_coordinator.behaviour = lambda submit: answer(submit.prompt)(submit)
    done = api.completions.create(
        model="tiny", prompt=["the fox", "日本語"], max_tokens=50, stream=stream
    )
    texts = {0: "", 1: ""}
    for part in done if stream else [done]:
        for choice in part.choices:
            texts[choice.index] += choice.text
    assert texts == {0: "the fox", 1: "日本語"}


def test_stop_strings_end_the_text_and_the_work(api, says_text, fake_coordinator):
    done = api.completions.create(model="tiny", prompt="x", max_tokens=100, stop=["brown", "zzz"])
    assert done.choices[0].text == "the quick "
    assert done.choices[0].finish_reason == "stop"
    fake_coordinator.wait_for(Cancel)


def test_the_default_limit_of_completions_is_16(api, fake_coordinator):
    fake_coordinator.behaviour = answer([40] * 50)
    done = api.completions.create(model="tiny", prompt="x")
    assert done.usage.completion_tokens == 16
    assert done.choices[0].finish_reason == "length"
    done = api.completions.create(model="tiny", prompt=[40] * 250)
    assert done.usage.completion_tokens == 6


def test_a_timeout_tells_itself(api, fake_coordinator):
    fake_coordinator.behaviour = lambda submit: [
        Tokens(submit.request_id, 0, (40,)),
        Finished(submit.request_id, FinishReason.TIMEOUT, Usage(1, 1)),
    ]
    done = api.completions.create(model="tiny", prompt="x", extra_body={"timeout": 1})
    assert done.choices[0].finish_reason == "timeout"


def test_the_model_may_be_left_out_in_any_way(http):
    for given in ({}, {"model": None}, {"model": ""}, {"model": "tiny"}):
        answer = http.post("/v1/completions", json={"prompt": "x", **given})
        assert (answer.status_code, answer.json()["model"]) == (200, "tiny")
    assert http.get("/v1/models/").json() == http.get("/v1/models").json()


def test_a_completion_keeps_the_space_that_sets_it_apart_and_a_chat_needs_none(tmp_path):
    words = ["<unk>", "<s>", "</s>", "\u2581the", "\u2581fox"]
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    backend.decoder = tokenizers.decoders.Metaspace()
    template = "{% for m in messages %}{{ m.content }}{% endfor %}</s>"
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", chat_template=template
    ).save_pretrained(tmp_path)
    coordinator = start_fake_coordinator()
    coordinator.behaviour = answer([4, 2])
    with (
        serving(coordinator, Tokenizer(tmp_path)) as url,
        httpx.Client(base_url=url, timeout=WAIT_S) as http,
    ):
        asked = {"prompt": "the", "echo": True}
        text = http.post("/v1/completions", json=asked).json()["choices"][0]["text"]
        said = http.post("/v1/chat/completions", json={"messages": hi(content="the")}).json()
    coordinator.close()
    assert text == "the fox"
    assert said["choices"][0]["message"]["content"] == "fox"


def test_models(api):
    (model,) = api.models.list().data
    assert (model.id, model.max_model_len) == ("tiny", 256)
    assert api.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="is not served here"):
        api.models.retrieve("gpt-9")


def test_hints_for_a_cache_change_nothing(http, fake_coordinator):
    part = {"type": "text", "text": "hi"}
    for content in ([part], [{**part, "cache_control": {"type": "ephemeral"}}]):
        http.post("/v1/chat/completions", json={"messages": hi(content=content)})
    plain, hinted = fake_coordinator.received(Submit)
    assert plain.prompt == hinted.prompt


def test_message_parts_and_the_developer_role(api, fake_coordinator, tokenizer):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    api.chat.completions.create(
        model="tiny",
        messages=[*hi("developer", "be short"), *hi(content=parts), *hi("assistant", None)],
    )
    (submit,) = fake_coordinator.received(Submit)
    plain = [*hi("system", "be short"), *hi(content="ab"), *hi("assistant", "")]
    assert list(submit.prompt) == tokenizer.apply_chat_template(plain)


# --- the shape on the wire -----------------------------------------------------------------------


def events(response):
    *events, done = [line for line in response.text.split("\n\n") if line]
    assert done == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events]


def test_each_event_is_valid_for_openai(http, says_text):
    body = {"prompt": "x", "max_tokens": 100, "stream": True}
    response = http.post("/v1/completions", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    for event in events(response):
        assert "usage" not in event
        for choice in event["choices"]:
            # The model is that of a whole answer; in a stream it is null until the end.
            choice["finish_reason"] = choice["finish_reason"] or "stop"
        openai.types.Completion.model_validate(event, strict=True)
    body = {"messages": hi(), "stream": True, "stream_options": {"include_usage": True}}
    for event in events(http.post("/v1/chat/completions", json=body)):
        openai.types.chat.ChatCompletionChunk.model_validate(event, strict=True)
        assert "usage" in event
    options = {"include_usage": True, "continuous_usage_stats": True}
    whole_usage = http.post("/v1/chat/completions", json={"messages": hi()}).json()["usage"]
    pieces = list(
        events(http.post("/v1/chat/completions", json={**body, "stream_options": options}))
    )
    counts = [piece["usage"]["completion_tokens"] for piece in pieces]
    assert counts == sorted(counts)
    assert counts[-1] == whole_usage["completion_tokens"] > 0
    assert len({piece["usage"]["prompt_tokens"] for piece in pieces}) == 1
    body = {"messages": hi()}
    whole = http.post("/v1/chat/completions", json=body).json()
    openai.types.chat.ChatCompletion.model_validate(whole, strict=True)


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({"prompt": "x", "bogus": 1}, "unknown field 'bogus'"),
        ({"prompt": "x", "logprobs": 21}, "logprobs: input should be less than or equal to 20"),
        ({"prompt": "x", "n": 0}, "n: input should be greater than or equal to 1"),
        ({"prompt": "x", "n": 2, "best_of": 3}, "best_of=3 is not supported unless it is n (2)"),
        ({"prompt": ["x"] * 9, "n": 128}, "at most 1024 answers, got 9 prompts with n=128"),
        ({"prompt": "x", "suffix": "y"}, "suffix='y' is not supported"),
        (
            {"prompt": "x", "presence_penalty": 3},
            "presence_penalty must be between -2 and 2, got 3",
        ),
        ({"prompt": "x", "stop_token_ids": [2**70]}, "a number in the request has more than 64"),
        ({"prompt": "x", "temperature": -1}, "temperature must be between 0 and 100, got -1"),
        ({"prompt": "x", "temperature": "hot"}, "temperature: input should be a valid number"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens must be at least 1, got 0; 0 is for echo"),
        ({"prompt": "x", "top_p": -0.1}, "top_p must be between 0 and 1"),
        ({"prompt": "x", "stream_options": {"include_usage": True}}, "stream_options are for"),
        ({"prompt": "x", "seed": 2**63}, "seed must be between -9223372036854775808 and"),
        ({"prompt": ["a", 5]}, "prompt.1: input should be a valid string"),
        ({"prompt": "x", "stop": {"a": 1}}, "stop must be a string or a list of strings, got"),
        ({"prompt": "x", "guided_json": 5}, "guided_json: input should be a valid dictionary; or"),
        (
            {"prompt": "x", "response_format": {"type": "json_schema"}},
            "response_format.json_schema: field required",
        ),
        ({"prompt": "x", "stop": ["a", ""]}, "a stop string must not be empty"),
        ({"prompt": "x", "timeout": 0}, "timeout: input should be greater than 0"),
        ({"prompt": "x", "max_tokens": 999}, "the context is 256 tokens"),
        ({"prompt": [40] * 256}, "the prompt has 256 and max_tokens is at least 1"),
        ({"prompt": [40, 400]}, "token id 400 is not in the vocabulary of 400"),
        ({"prompt": [-1]}, "token id -1 is not in the vocabulary"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": []}, "the prompt is empty"),
        ({"prompt": {"a": 1}}, "prompt: input should be a valid string"),
        ({"prompt": "\ud800"}, "not valid Unicode"),
        ({}, "prompt: field required"),
    ],
)
def test_a_wrong_completion_request_gets_one_sentence(http, fake_coordinator, body, sentence):
    response = http.post("/v1/completions", content=json.dumps(body), headers=JSON)
    assert response.status_code == 400
    error = response.json()["error"]
    assert sentence in error["message"]
    assert error["type"] == "invalid_request_error"
    assert set(error) == {"message", "type", "param", "code"}
    assert fake_coordinator.received(Submit) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [("frequency_penalty", -2.5), ("min_p", 1.5), ("top_k", -3), ("seed", -(2**63) - 1),
     ("min_tokens", 99), ("repetition_penalty", 0.0), ("max_tokens", -1),
     ("logit_bias", {"1": 101}), ("stop_token_ids", [-1]), ("timeout", -1), ("n", 129),
     ("stop", [""]), ("echo", "yes"), ("best_of", 2), ("suffix", "x"), ("top_p", 1.1),
     ("stream_options", {})],
)  # fmt: skip
def test_the_error_about_a_value_names_its_field(http, name, value):
    response = http.post("/v1/completions", json={"prompt": "x", name: value})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == name


@pytest.mark.parametrize(("seed", "sent"), [(-5, -5), (0, 0), (-(2**63), -(2**63)), (-1, None)])
def test_any_seed_of_64_bits_is_taken_and_minus_1_draws_one(api, fake_coordinator, seed, sent):
    api.completions.create(model="tiny", prompt="x", seed=seed)
    (submit,) = fake_coordinator.received(Submit)
    assert submit.params.seed == sent or (sent is None and submit.params.seed >= 0)


@pytest.mark.parametrize(
    ("content", "headers", "status", "sentence"),
    [
        (b'{"prompt": "caf\xe9"}', {}, 400, "the body is not valid UTF-8: "),
        (b"[" * 99_000, {}, 400, "the body is nested too deeply"),
        (b"\x1f\x8b", {"Content-Encoding": "gzip"}, 415, "Content-Encoding: gzip"),
        (b'{"prompt": "x"}', {"Content-Encoding": "identity"}, 200, ""),
    ],
)
def test_a_body_that_cannot_be_read_is_told_why(http, content, headers, status, sentence):
    response = http.post("/v1/completions", content=content, headers={**JSON, **headers})
    assert response.status_code == status
    assert sentence in response.text


@pytest.mark.parametrize("path", ["/", "/health", "/version", "/metrics", "/v1/models"])
def test_head_is_answered_as_get_without_the_body(http, path):
    head, get = http.head(path), http.get(path)
    assert (head.status_code, head.content) == (get.status_code, b"") == (200, b"")
    assert head.headers["content-type"] == get.headers["content-type"]


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({"messages": []}, "messages: a conversation has 1 to 4096 messages, got 0"),
        ({"messages": hi(), "top_logprobs": 2}, "top_logprobs=2 needs logprobs=true"),
        ({"messages": hi("nobody")}, "messages.0.role: input should be 'system'"),
        (
            {"messages": hi("user"), "audio": {"voice": "x"}},
            "audio={'voice': 'x'} is not supported",
        ),
        (
            {"messages": hi(content=[{"type": "text", "text": "x"}, {"type": "image_url"}])},
            "messages.0.content.1: images are not supported: the served model reads text only",
        ),
        ({"messages": hi(content=5)}, "messages.0.content: input should be a valid string; or"),
        ({"messages": hi(content=[{"text": "x"}])}, "messages.0.content.0.type: field required"),
        ({"messages": hi(), "tool_choice": "any"}, "tool_choice: input should be 'none', 'auto'"),
        ({"messages": hi(), "max_tokens": 1, "max_completion_tokens": 2}, "are the same thing"),
        ({"messages": hi(content="fox " * 300)}, "the context is 256 tokens"),
        ({"messages": hi(), "max_completion_tokens": 250}, "max_tokens is 250"),
    ],
)
def test_a_wrong_chat_request_gets_one_sentence(http, fake_coordinator, body, sentence):
    response = http.post("/v1/chat/completions", json=body)
    assert response.status_code == 400
    assert sentence in response.json()["error"]["message"]
    assert fake_coordinator.received(Submit) == []


def test_neutral_values_of_unsupported_fields_are_fine(http):
    neutral = {
        "n": 1,
        "logprobs": None,
        "best_of": 1,
        "echo": False,
        "logit_bias": {},
        "user": "me",
    }
    assert http.post("/v1/completions", json={"prompt": "x", **neutral}).status_code == 200
    neutral = {"n": 1, "logprobs": False, "tools": [], "response_format": {"type": "text"}}
    assert http.post("/v1/chat/completions", json={"messages": hi(), **neutral}).status_code == 200


def test_errors_outside_of_the_endpoints_have_the_same_shape(http):
    for response, status in [
        (http.post("/v1/completions", content=b"{", headers=JSON), 400),
        (http.post("/v1/completions", content=b"{}"), 400),
        (http.post("/v1/completions", content=b"3", headers=JSON), 400),
        (http.get("/v1/nothing"), 404),
        (http.get("/v1/completions"), 405),
        (http.post("/v1/completions", json={"prompt": "x", "model": "gpt-9"}), 404),
        (http.post("/v1/completions", content=b" " * (body_limit(0) + 1)), 413),
    ]:
        assert response.status_code == status
        assert response.json()["error"]["message"]


# --- trouble behind the server -------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_server_is_429_with_retry_after(api, fake_coordinator, stream):
    fake_coordinator.behaviour = end(FinishReason.REJECTED, "1000 requests are queued")
    with pytest.raises(openai.RateLimitError, match="1000 requests") as caught:
        api.completions.create(model="tiny", prompt="x", stream=stream)
    assert caught.value.response.headers["retry-after"] == "1"


@pytest.mark.parametrize("stream", [False, True])
def test_a_failed_server_is_500(api, fake_coordinator, stream):
    fake_coordinator.behaviour = end(FinishReason.ERROR, "rank 3 is lost")
    with pytest.raises(openai.InternalServerError, match="rank 3"):
        api.chat.completions.create(model="tiny", messages=hi(), stream=stream)


def test_an_error_in_the_middle_of_a_stream_is_an_event(api, fake_coordinator):
    fake_coordinator.behaviour = lambda submit: [
        Tokens(submit.request_id, 0, (40,)),
        *end(FinishReason.ERROR, "rank 3 is lost")(submit),
    ]
    with pytest.raises(openai.APIError, match="rank 3"):
        list(api.completions.create(model="tiny", prompt="x", stream=True))


def test_health_and_metrics(http, fake_coordinator):
    assert http.get("/health").status_code == 200
    metrics = http.get("/metrics")
    assert metrics.text == "fake_requests_total 1\n"
    assert metrics.headers["content-type"].startswith("text/plain; version=0.0.4")


def test_a_coordinator_that_is_gone_is_503(tokenizer):
    coordinator = start_fake_coordinator()
    coordinator.silent = True
    with (
        serving(coordinator, tokenizer, patience_s=1.5) as url,
        httpx.Client(base_url=url, timeout=WAIT_S) as http,
    ):

        def complete():
            response = http.post("/v1/completions", json={"prompt": "x"})
            return response.status_code, response.json()["error"]["message"]

        assert complete()[0] == http.get("/metrics").status_code == 503
        coordinator.silent = False
        assert http.get("/v1/models").status_code == 200
        coordinator.silent = True
        assert http.get("/health").status_code == 503
        status, message = complete()
        assert status == 503
        assert "has not answered for 1.5 s" in message
        coordinator.silent = False
        assert http.get("/health").status_code == 200
    coordinator.close()


def test_a_client_that_goes_away_in_the_middle_cancels_its_request(api, fake_coordinator):
    fake_coordinator.behaviour = begin([40, 41])
    stream = api.completions.create(model="tiny", prompt="x", stream=True)
    next(iter(stream))
    stream.close()
    fake_coordinator.wait_for(Cancel)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_before_the_first_token_as_well(url, fake_coordinator, stream):
    fake_coordinator.behaviour = begin([])

    async def main():
        async with httpx.AsyncClient(base_url=url) as http:
            body = {"prompt": "x", "stream": stream}
            post = asyncio.create_task(http.post("/v1/completions", json=body))
            await asyncio.to_thread(fake_coordinator.wait_for, Submit)
            post.cancel()
            await asyncio.gather(post, return_exceptions=True)

    asyncio.run(asyncio.wait_for(main(), WAIT_S))
    fake_coordinator.wait_for(Cancel)
