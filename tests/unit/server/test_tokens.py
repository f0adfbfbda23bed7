"""POST /tokenize and /detokenize."""

from __future__ import annotations

import json

import pytest
from templates import with_template

from fastserve_mega.messaging.messages import Submit
from fastserve_mega.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_dir, tmp_path_factory):
    """One that begins each text with a token of its own."""
    directory = tmp_path_factory.mktemp("begins")
    with_template(tiny_tokenizer_dir, directory, "{{ messages[0].content }}")
    path = directory / "tokenizer.json"
    backend = json.loads(path.read_text(encoding="utf-8"))
    (begin,) = (a["id"] for a in backend["added_tokens"] if a["content"] == "<|im_start|>")
    backend["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            "<|im_start|>": {"id": "<|im_start|>", "ids": [begin], "tokens": ["<|im_start|>"]}
        },
    }
    path.write_text(json.dumps(backend), encoding="utf-8")
    return Tokenizer(directory)


def tokens_of(http, **body):
    return http.post("/tokenize", json=body).json()["tokens"]


def test_tokens_are_text_again_special_ones_included(http, tokenizer):
    begin = tokenizer.token_id("<|im_start|>")
    plain = tokens_of(http, prompt="fox", add_special_tokens=False)
    assert tokens_of(http, prompt="fox") == [begin, *plain]
    assert tokens_of(http, messages=[{"role": "user", "content": "fox"}]) == plain
    for tokens, text in (([begin, *plain], "<|im_start|>fox"), (plain, "fox"), ([], "")):
        assert http.post("/detokenize", json={"tokens": tokens}).json() == {"prompt": text}


def test_of_a_long_prompt_the_end_is_kept(http, fake_coordinator, says_text, tokenizer):
    text = "the quick fox " * 200
    everything = tokenizer.encode(text)
    for kept, room in ((7, 7), (-1, 256 - 16), (9999, None)):
        body = {"prompt": text, "truncate_prompt_tokens": kept, "max_tokens": 16, "echo": True}
        done = http.post("/v1/completions", json=body)
        if room is None:
            assert done.json()["error"]["code"] == "context_length_exceeded"
            continue
        sent = fake_coordinator.received(Submit)[-1].prompt
        assert list(sent) == everything[-room:]
        assert done.json()["usage"]["prompt_tokens"] == room
        assert done.json()["choices"][0]["text"].startswith(tokenizer.decode(sent))
    body = {"messages": [{"role": "user", "content": text}], "truncate_prompt_tokens": 5}
    assert http.post("/v1/chat/completions", json=body).status_code == 200
    assert len(fake_coordinator.received(Submit)[-1].prompt) == 5
    refused = http.post("/v1/completions", json={"prompt": "x", "truncate_prompt_tokens": 0})
    assert (refused.status_code, refused.json()["error"]["param"]) == (
        400,
        "truncate_prompt_tokens",
    )


def test_bad_words_are_spelled_as_they_begin_a_text_and_behind_a_space(
    http, fake_coordinator, says_text, tokenizer
):
    body = {"prompt": "x", "bad_words": ["quick", " quick"]}
    assert http.post("/v1/completions", json=body).status_code == 200
    expected = [
        tuple(tokenizer.encode(text, add_special_tokens=False)) for text in ("quick", " quick")
    ]
    (submit,) = fake_coordinator.received(Submit)
    assert [*dict.fromkeys(submit.params.bad_words)] == expected
    for words in (["a"] * 129, [""], [" "], ["a" * 257], ["a😀" * 100], "a"):
        refused = http.post("/v1/completions", json={"prompt": "x", "bad_words": words})
        assert refused.status_code == 400
        assert "bad_words" in refused.json()["error"]["message"]
        assert len(refused.json()["error"]["message"]) < 200


def test_a_completion_may_do_without_the_tokens_of_the_tokenizers_own(
    http, fake_coordinator, says_text, tokenizer
):
    for special in (None, True, False):
        body = {"prompt": ["fox", "quick"], "add_special_tokens": special}
        assert http.post("/v1/completions", json=body).status_code == 200
        sent = [list(each.prompt) for each in fake_coordinator.received(Submit)[-2:]]
        add = special is not False
        assert sent == [tokenizer.encode(text, add_special_tokens=add) for text in ("fox", "quick")]


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"prompt": "a", "messages": [{"role": "user", "content": "a"}]},
        {"add_special_tokens": False},
    ],
)
def test_either_a_text_or_a_conversation_is_tokenized(http, body):
    response = http.post("/tokenize", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["message"] == "send either prompt or messages"
