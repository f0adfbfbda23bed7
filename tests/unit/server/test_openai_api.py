"""The OpenAI API as its official client sees it."""

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
from http_server import TEXT, hi, serving

from fastserve_mega.client.testing import WAIT_S, answer
from fastserve_mega.messaging.messages import Cancel, Finished, Submit, Tokens
from fastserve_mega.text.tokenizer import Tokenizer
from fastserve_mega.types import FinishReason, Usage


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
            "priority": -3, "timeout": 9.5, "cache_salt": "mine", "expected_output_tokens": 7,
            "session": "agent",
        },
    )  # fmt: skip
    (submit,) = fake_coordinator.received(Submit)
    assert submit.prompt == (7, 8, 9)
    assert (submit.priority, submit.timeout_s, submit.cache_salt) == (-3, 9.5, "mine")
    assert (submit.expected_output_tokens, submit.session) == (7, "agent")
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
