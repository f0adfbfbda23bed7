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
