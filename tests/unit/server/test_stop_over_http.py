"""`stop` in all its forms, as HTTP clients send it."""

from __future__ import annotations

import json

import pytest

from fastserve_mega.client.testing import answer
from fastserve_mega.messaging.messages import Cancel, Submit
from fastserve_mega.text.detokenizer import MAX_STOPS
from fastserve_mega.types import MAX_BIASED_TOKENS, MAX_CHOICES, MAX_STOP_TOKENS

TEXT = "the quick brown fox 日本 🙂 fin"
HI = [{"role": "user", "content": "hi"}]
ENDS = 2


@pytest.fixture(autouse=True)
def coordinator(fake_coordinator, tokenizer):
    fake_coordinator.behaviour = answer([*tokenizer.encode(TEXT), ENDS])
    return fake_coordinator


def completions(api, **options):
    """(text, finish reason) of each answer, streamed or not."""
    done = api.completions.create(model="tiny", prompt="hi", max_tokens=100, **options)
    texts, reasons = {}, {}
    for part in done if options.get("stream") else [done]:
        for choice in part.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
            reasons[choice.index] = choice.finish_reason or reasons.get(choice.index)
    return [(texts[index], reasons[index]) for index in sorted(texts)]


def chat(api, **options):
    """(content, finish reason), streamed or not."""
    done = api.chat.completions.create(model="tiny", messages=HI, max_tokens=100, **options)
    if not options.get("stream"):
        return done.choices[0].message.content, done.choices[0].finish_reason
    parts = [part.choices[0] for part in done]
    return "".join(part.delta.content or "" for part in parts), parts[-1].finish_reason


STOPS = [
    ("brown", "the quick "),
    (["brown"], "the quick "),
    ("x", "the quick brown fo"),
    ("ick brown fox 日", "the qu"),
    ("日本 🙂 f", "the quick brown fox "),
    ("本", "the quick brown fox 日"),
    (["zzz", "🙂", "fin"], "the quick brown fox 日本 "),
    (["fox", "brown fox"], "the quick "),
    ("xof", TEXT),
    ([], TEXT),
    (None, TEXT),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("stop", "text"), STOPS)
def test_stop_may_be_one_string_or_several_at_both_endpoints(api, coordinator, stop, text, stream):
    assert completions(api, stop=stop, stream=stream) == [(text, "stop")]
    assert chat(api, stop=stop, stream=stream) == (text, "stop")
    if text != TEXT:
        coordinator.wait_for(Cancel)


@pytest.mark.parametrize("stream", [False, True])
def test_one_stop_string_with_several_answers_and_an_echo(api, stream):
    answers = completions(api, stop="brown", n=3, echo=True, stream=stream)
    assert answers == [("hithe quick ", "stop")] * 3


def test_the_prompt_and_its_echo_may_have_the_stop_string(api):
    done = api.completions.create(
        model="tiny", prompt="a brown fox", max_tokens=100, echo=True, stop="brown"
    )
    assert done.choices[0].text == "a brown foxthe quick "


@pytest.mark.parametrize("stop", ["dog", ["dog"]])
def test_min_tokens_holds_back_stop_strings(api, coordinator, tokenizer, stop):
    said = tokenizer.encode("a dog, a dog, a dog")
    coordinator.behaviour = answer([*said, ENDS])
    first = next(count for count in range(1, 99) if "dog" in tokenizer.decode(said[:count]))
    assert completions(api, stop=stop) == [("a ", "stop")]
    extra = {"min_tokens": first}
    assert completions(api, stop=stop, extra_body=extra) == [("a dog, a ", "stop")]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ("ick brown", "the quick brown"),
        (["fox", "x 日"], "the quick brown fox"),
        ("本", "the quick brown fox 日本"),
        ("<|endoftext|>", TEXT),
        (None, TEXT),
    ],
)
def test_the_stop_string_may_be_part_of_the_text(api, stop, text, stream):
    extra = {"include_stop_str_in_output": True}
    asked = {"stop": stop, "stream": stream, "extra_body": extra}
    assert completions(api, **asked) == [(text, "stop")]
    assert chat(api, **asked) == (text, "stop")


def test_stop_tokens_and_special_tokens_are_text_where_that_is_asked_for(
    api, coordinator, tokenizer
):
    (letter,) = tokenizer.encode("z")
    special = tokenizer.token_id("<|endoftext|>")
    coordinator.behaviour = answer([*tokenizer.encode("a"), special, letter])
    extra = {"stop_token_ids": [letter], "ignore_eos": True}
    assert completions(api, extra_body=extra) == [("a", "stop")]
    extra["include_stop_str_in_output"] = True
    assert completions(api, extra_body=extra) == [("az", "stop")]
    extra["skip_special_tokens"] = False
    shown = "a<|endoftext|>z"
    assert completions(api, extra_body=extra) == [(shown, "stop")]
    assert chat(api, extra_body=extra) == (shown, "stop")
    assert completions(api, stop="<|endoftext|>", extra_body=extra) == [("a<|endoftext|>", "stop")]


FORM = "must be a string or a list of strings, got "


@pytest.mark.parametrize(
    ("stop", "sentence"),
    [
        ("", "stop: a stop string must not be empty"),
        (["a", ""], "stop: a stop string must not be empty"),
        ([None], f"stop: stop {FORM}[None]"),
        (["a", None], f"stop: stop {FORM}['a', None]"),
        (["a", 5, None, []], f"stop: stop {FORM}"),
        (5, f"stop: stop {FORM}5"),
        (True, f"stop: stop {FORM}True"),
        ({"a": "b"}, f"stop: stop {FORM}"),
        (["x"] * 200_000, f"stop: stop must have at most {MAX_STOPS} strings, got 200000"),
        ([None] * 200_000, f"stop: stop must have at most {MAX_STOPS} strings, got 200000"),
        ("x" * 100_000, "stop: a stop string has 100000 characters"),
    ],
)
def test_what_is_no_stop_string_gets_one_sentence(http, coordinator, stop, sentence):
    bodies = {"/v1/completions": {"prompt": "x"}, "/v1/chat/completions": {"messages": HI}}
    for path, body in bodies.items():
        response = http.post(path, json={**body, "stop": stop})
        assert response.status_code == 400
        error = response.json()["error"]
        assert error["message"].startswith(sentence.replace("stop: stop ", "stop "))
        assert "; or " not in error["message"]
        assert len(error["message"]) < 200
        assert error["param"] == "stop"
    assert coordinator.received(Submit) == []


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"stop_token_ids": [1] * 300_000},
            f"stop_token_ids: at most {MAX_STOP_TOKENS} tokens, got 300000",
        ),
        (
            {"logit_bias": {str(token): 0 for token in range(5000)}},
            f"logit_bias: at most {MAX_BIASED_TOKENS} tokens, got 5000",
        ),
        (
            {"guided_choice": [""] * 100_000 + ["a"]},
            f"at most {MAX_CHOICES} texts, got 100001",
        ),
    ],
)
def test_long_lists_are_refused_whole(http, coordinator, change, sentence):
    body = json.dumps({"prompt": "x", "n": 16, **change})
    response = http.post(
        "/v1/completions", content=body, headers={"Content-Type": "application/json"}
    )
    assert response.status_code == 400
    assert sentence in response.json()["error"]["message"]
    assert coordinator.received(Submit) == []
