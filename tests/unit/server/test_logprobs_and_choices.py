"""Log probabilities, several answers and echo, as the official client sees them."""

from __future__ import annotations

import math

import pytest

from fastserve_mega.client.testing import answer
from fastserve_mega.messaging.messages import Finished, PromptLogprobs, Submit, Tokens
from fastserve_mega.types import FinishReason, TokenLogprobs, Usage

TEXT = "fox 日本 🙂"
EOS = 2


def logprobs_of(token, top):
    """The token itself is the second most probable."""
    ids = (token + 1, token, *range(300, 320))[:top]
    return TokenLogprobs(-1.5, ids, tuple(-1.0 - 0.5 * i for i in range(top)))


def saying(tokens):
    """One token a message, with log probabilities when asked for, and none for what is resumed."""

    def behaviour(submit):
        top = submit.params.logprobs
        if submit.params.prompt_logprobs:
            scores = tuple(logprobs_of(token, top) for token in submit.prompt[1:])
            yield PromptLogprobs(submit.request_id, 1, scores)
        for offset, token in enumerate(tokens):
            told = () if top is None else (logprobs_of(token, top),)
            yield Tokens(submit.request_id, offset, (token,), told)
        yield Finished(submit.request_id, FinishReason.STOP, Usage(len(submit.prompt), len(tokens)))

    return behaviour


@pytest.fixture
def ids(fake_coordinator, tokenizer):
    ids = tokenizer.encode(TEXT)
    fake_coordinator.behaviour = saying([*ids, EOS])
    return ids


def test_chat_logprobs(api, ids, tokenizer):
    (choice,) = api.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "x"}], logprobs=True, top_logprobs=2
    ).choices
    content = choice.logprobs.content
    assert [bytes(each.bytes) for each in content] == [tokenizer.token_bytes(t) for t in ids]
    assert b"".join(bytes(each.bytes) for each in content).decode() == TEXT
    assert {each.logprob for each in content} == {-1.5}
    for each, token in zip(content, ids, strict=True):
        assert [top.logprob for top in each.top_logprobs] == [-1.0, -1.5]
        assert bytes(each.top_logprobs[1].bytes) == tokenizer.token_bytes(token)
    assert content[0].token == "fo"
    assert any(each.token.startswith("\\x") for each in content)  # a part of a character


def test_completion_logprobs(api, ids, tokenizer):
    (choice,) = api.completions.create(model="tiny", prompt="x", logprobs=1).choices
    told = choice.logprobs
    assert len(told.tokens) == len(ids)
    assert told.token_logprobs == [-1.5] * len(ids)
    for token, top in zip(told.tokens, told.top_logprobs, strict=True):
        assert top[token] == -1.5  # besides the most probable one
        assert len(top) == 2
    for token, offset in zip(told.tokens, told.text_offset, strict=True):
        if not token.startswith("bytes:"):
            assert choice.text[offset : offset + len(token)] == token
    assert told.text_offset[0] == 0
    assert told.text_offset == sorted(told.text_offset)


def test_offsets_are_those_of_the_text_which_has_no_special_tokens(
    api, fake_coordinator, tokenizer
):
    special = 0
    fox, dog = tokenizer.encode("fox"), tokenizer.encode("dog")
    fake_coordinator.behaviour = saying([*fox, special, *dog, EOS])
    (choice,) = api.completions.create(model="tiny", prompt="x", logprobs=0).choices
    assert choice.text == "foxdog"
    told = choice.logprobs
    assert told.tokens[len(fox)] == "<|endoftext|>"
    for token, offset in zip(told.tokens, told.text_offset, strict=True):
        assert token == "<|endoftext|>" or choice.text[offset:].startswith(token)


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_without_a_token_has_an_empty_list_of_logprobs(api, fake_coordinator, stream):
    fake_coordinator.behaviour = saying([EOS])
    messages = [{"role": "user", "content": "x"}]

    def told(done):
        choices = [part.choices[0] for part in (done if stream else [done])]
        return [choice.logprobs for choice in choices if choice.logprobs is not None]

    chat = api.chat.completions.create(
        model="tiny", messages=messages, logprobs=True, stream=stream
    )
    assert [each.content for each in told(chat)] == [[]]
    done = api.completions.create(model="tiny", prompt="x", logprobs=1, stream=stream)
    assert [(each.tokens, each.text_offset) for each in told(done)] == [([], [])]


@pytest.mark.parametrize("kind", ["chat", "completion"])
def test_a_stream_tells_what_the_whole_answer_does(api, ids, kind):
    def ask(stream):
        if kind == "completion":
            return api.completions.create(model="tiny", prompt="x", logprobs=2, stream=stream)
        return api.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "x"}], logprobs=True,
            top_logprobs=2, stream=stream,
        )  # fmt: skip

    whole = ask(False).choices[0].logprobs
    parts = [c.choices[0].logprobs for c in ask(True) if c.choices[0].logprobs is not None]
    assert len(parts) > 3
    for name in ("content",) if kind == "chat" else ("tokens", "text_offset", "top_logprobs"):
        streamed = [each for part in parts for each in getattr(part, name)]
        assert [str(each) for each in streamed] == [str(each) for each in getattr(whole, name)]


def test_no_logprobs_unless_asked_for(api, ids, fake_coordinator):
    (choice,) = api.completions.create(model="tiny", prompt="x").choices
    assert choice.logprobs is None
    (submit,) = fake_coordinator.received(Submit)
    assert submit.params.logprobs is None


def test_minus_infinity_can_be_written(api, fake_coordinator):
    fake_coordinator.behaviour = lambda submit: [
        Tokens(submit.request_id, 0, (40,), (TokenLogprobs(-math.inf),)),
        Finished(submit.request_id, FinishReason.LENGTH, Usage(1, 1)),
    ]
    (choice,) = api.completions.create(model="tiny", prompt="x", logprobs=0).choices
    assert choice.logprobs.token_logprobs == [-9999.0]


@pytest.mark.parametrize("stream", [False, True])
def test_several_answers_to_several_prompts(api, fake_coordinator, tokenizer, stream):
    fake_coordinator.behaviour = lambda submit: answer(submit.prompt)(submit)
    done = api.completions.create(
        model="tiny", prompt=["the fox", "日本語"], max_tokens=50, n=2, seed=5, stream=stream
    )
    texts = dict.fromkeys(range(4), "")
    for part in done if stream else [done]:
        for choice in part.choices:
            texts[choice.index] += choice.text
    assert texts == {0: "the fox", 1: "the fox", 2: "日本語", 3: "日本語"}
    submits = fake_coordinator.received(Submit)
    assert len({submit.params.seed for submit in submits}) == 2
    if not stream:
        lengths = [len(tokenizer.encode(text)) for text in ("the fox", "日本語")]
        assert done.usage.prompt_tokens == sum(lengths)
        assert done.usage.completion_tokens == 2 * sum(lengths)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["the fox ", [81, 82]])
def test_echo(api, fake_coordinator, tokenizer, stream, prompt):
    fake_coordinator.behaviour = answer(tokenizer.encode(TEXT))
    done = api.completions.create(
        model="tiny", prompt=prompt, max_tokens=50, echo=True, stream=stream
    )
    text = "".join(part.choices[0].text for part in (done if stream else [done]))
    said = prompt if isinstance(prompt, str) else tokenizer.decode(prompt)
    assert text == said + TEXT


# --- of the prompt, as lm-evaluation-harness asks for them ----------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_the_prompt_is_told_before_the_answer(api, fake_coordinator, tokenizer, stream):
    prompt = tokenizer.encode("the fox")
    fake_coordinator.behaviour = saying([EOS])
    done = api.completions.create(
        model="tiny", prompt=[prompt, prompt[:2]], echo=True, logprobs=1, max_tokens=1,
        temperature=0, stream=stream,
    )  # fmt: skip
    tokens, scores, tops, offsets, texts = {}, {}, {}, {}, {}
    for part in done if stream else [done]:
        for choice in part.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
            if choice.logprobs is not None:
                tokens.setdefault(choice.index, []).extend(choice.logprobs.tokens)
                scores.setdefault(choice.index, []).extend(choice.logprobs.token_logprobs)
                tops.setdefault(choice.index, []).extend(choice.logprobs.top_logprobs)
                offsets.setdefault(choice.index, []).extend(choice.logprobs.text_offset)
    assert texts[0] == "".join(tokens[0][:-1]) == "the fox"
    # The end of sequence is told as well, so that those who count find the prompt's last token.
    assert tokens[0][-1] == "<|im_end|>"
    assert scores == {0: [None, *[-1.5] * len(prompt)], 1: [None, -1.5, -1.5]}
    assert (tops[0][0], len(tops[0])) == (None, len(prompt) + 1)
    assert (offsets[0][0], offsets[0][-1]) == (0, len("the fox"))
    assert all(submit.params.prompt_logprobs for submit in fake_coordinator.received(Submit))


@pytest.mark.parametrize("stream", [False, True])
def test_no_token_need_be_generated(api, fake_coordinator, tokenizer, stream):
    fake_coordinator.behaviour = saying([40])
    done = api.completions.create(
        model="tiny", prompt="the fox", echo=True, logprobs=0, max_tokens=0, stream=stream
    )
    parts = list(done) if stream else [done]
    assert "".join(part.choices[0].text for part in parts) == "the fox"
    assert parts[-1].choices[0].finish_reason == "length"
    told = [p.choices[0].logprobs.token_logprobs for p in parts if p.choices[0].logprobs]
    assert told == [[None, *[-1.5] * (len(tokenizer.encode("the fox")) - 1)]]
    if not stream:
        assert done.usage.completion_tokens == 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_of_special_tokens_is_told_where_its_text_stands(
    api, fake_coordinator, tokenizer, stream
):
    fake_coordinator.behaviour = saying([40])
    written = "<|im_start|>fox<|im_end|>"
    for prompt, text in ((written, written), ([1], ""), (tokenizer.encode(written), "fox")):
        done = api.completions.create(
            model="tiny", prompt=prompt, echo=True, logprobs=0, max_tokens=1, stream=stream
        )
        parts = [part.choices[0] for part in (done if stream else [done])]
        told = [part.logprobs for part in parts if part.logprobs]
        tokens = [token for each in told for token in each.tokens]
        offsets = [offset for each in told for offset in each.text_offset]
        assert tokens[0] == "<|im_start|>"
        shown = "".join(part.text for part in parts)
        assert shown.startswith(text)
        assert offsets[-1] == len(text)  # where the answer begins
        for token, offset in zip(tokens, offsets, strict=True):
            assert shown.startswith(token, offset) or token not in shown


# --- of the prompt, as vLLM tells them ------------------------------------------------------------


def test_the_prompt_is_scored_once_for_several_answers(http, ids, tokenizer, fake_coordinator):
    prompt = tokenizer.encode("the fox")
    body = {"prompt": "the fox", "prompt_logprobs": 2, "logprobs": 0, "n": 2, "echo": False}
    first, second = http.post("/v1/completions", json=body).json()["choices"]
    assert first["prompt_logprobs"] == second["prompt_logprobs"]
    none, *told = first["prompt_logprobs"]
    assert none is None
    for token, tokens in zip(prompt[1:], told, strict=True):
        assert {int(each): tokens[each]["rank"] for each in tokens} == {token: 2, token + 1: 1}
        assert tokens[str(token)]["logprob"] == -1.5
        assert tokens[str(token)]["decoded_token"]
    # What is told of the answer is what was asked for of it.
    assert first["logprobs"]["text_offset"][0] == 0
    assert {len(each) for each in first["logprobs"]["top_logprobs"]} == {1}
    assert len(first["logprobs"]["tokens"]) == len(ids)
    scored = [submit.params.prompt_logprobs for submit in fake_coordinator.received(Submit)]
    assert sorted(scored) == [False, True]


def test_a_conversation_is_scored_without_a_word_of_the_answers_tokens(http, ids):
    body = {"messages": [{"role": "user", "content": "x"}], "prompt_logprobs": 0}
    done = http.post("/v1/chat/completions", json=body).json()
    assert done["choices"][0]["logprobs"] is None
    none, *told = done["prompt_logprobs"]
    assert none is None
    assert [each["rank"] for tokens in told for each in tokens.values()] == [None] * len(told)
    assert (
        "prompt_logprobs"
        not in http.post("/v1/chat/completions", json={**body, "prompt_logprobs": None}).json()
    )
    refused = http.post("/v1/chat/completions", json={**body, "stream": True})
    assert refused.status_code == 400
    assert "whole answers only" in refused.json()["error"]["message"]
