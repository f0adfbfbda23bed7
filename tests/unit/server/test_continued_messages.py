"""An answer that goes on with a message of the assistant's, or with the closed conversation."""

from __future__ import annotations

import pytest

from fastserve_mega.messaging.messages import Submit

USER = {"role": "user", "content": "name a color"}
BEGUN = {"role": "assistant", "content": "It is "}
GOES_ON = {"continue_final_message": True}


def prompt_of(http, fake_coordinator, path="/v1/chat/completions", **body):
    """What the model reads, as text."""
    response = http.post(path, json={"messages": [USER, BEGUN], "max_tokens": 9, **body})
    assert response.status_code == 200, response.text
    (submit,) = fake_coordinator.received(Submit)
    return submit.prompt


@pytest.fixture(autouse=True)
def _answers(says_text):
    """Whatever is asked is answered."""


@pytest.mark.parametrize(
    ("options", "end"),
    [
        ({}, "assistant\nIt is \nassistant\n"),
        ({"add_generation_prompt": False}, "assistant\nIt is \n"),
        ({**GOES_ON, "add_generation_prompt": False}, "assistant\nIt is "),
        (GOES_ON, "assistant\nIt is "),
    ],
)
def test_the_prompt_ends_where_it_is_asked_to(http, fake_coordinator, tokenizer, options, end):
    prompt = prompt_of(http, fake_coordinator, **options)
    assert tokenizer.decode(prompt) == f"user\nname a color\n{end}"
    counted = http.post("/tokenize", json={"messages": [USER, BEGUN], **options}).json()
    assert counted["tokens"] == list(prompt)


def test_the_last_message_of_anthropics_api_may_be_the_beginning_of_the_answer(
    http, fake_coordinator, tokenizer
):
    prompt = prompt_of(http, fake_coordinator, "/v1/messages")
    assert tokenizer.decode(prompt) == "user\nname a color\nassistant\nIt is "


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({"messages": [USER]}, "messages must end with one of the assistant's"),
        ({"messages": [USER, {**BEGUN, "content": ""}]}, "that has text and no calls"),
        ({"add_generation_prompt": True}, "send one of them"),
        ({"messages": [USER, {**BEGUN, "content": "\ue000the rest is to come\ue000"}]}, "refuses"),
    ],
)
def test_what_cannot_go_on_is_refused(http, fake_coordinator, body, sentence):
    asked = {"messages": [USER, BEGUN], **GOES_ON, **body}
    response = http.post("/v1/chat/completions", json=asked)
    assert response.status_code == 400
    assert sentence in response.json()["error"]["message"]
    assert fake_coordinator.received(Submit) == []
