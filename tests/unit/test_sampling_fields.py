"""Every field that OpenAI's own client can send has an effect, or is refused by its name."""

from __future__ import annotations

import openai.types.chat.completion_create_params as chat_params
import openai.types.completion_create_params as completion_params
import pytest
from pydantic import ValidationError

from fastserve_mega.server.protocol import ChatRequest, CompletionRequest

COMPLETION = {"prompt": "x"}
CHAT = {"messages": [{"role": "user", "content": "x"}]}
ABOUT_WHO_ASKS = {"user", "safety_identifier", "prompt_cache_key", "metadata"}
ANSWERED = {"model", "prompt", "messages", "stream", "stream_options", "stop"}
"""By the server itself; test_server.py has their effects."""
LIMITS = {"max_tokens": 3, "max_completion_tokens": 3}
SAMPLING = {
    "temperature": 0.5, "top_p": 0.5, "seed": 3, "top_k": 3, "min_tokens": 2, "ignore_eos": True,
    "stop_token_ids": [4],
}  # fmt: skip
SCHEDULING = {"priority": -1, "timeout": 2.5, "cache_salt": "mine"}


def offered(module) -> set[str]:
    """Names of the fields in openai's types."""
    return {
        name
        for kind in ("Base", "NonStreaming", "Streaming")
        for types in [getattr(module, f"CompletionCreateParams{kind}")]
        for name in types.__annotations__
    }


KINDS = [
    pytest.param(CompletionRequest, COMPLETION, completion_params, id="completion"),
    pytest.param(ChatRequest, CHAT, chat_params, id="chat"),
]


@pytest.mark.parametrize(("kind", "body", "module"), KINDS)
def test_flaw_13_what_the_official_client_offers_is_honoured_or_refused_by_name(kind, body, module):
    names = offered(module)
    assert len(names) > 15
    for name in names - set(kind.model_fields):
        with pytest.raises(ValidationError, match=name):
            kind.model_validate({**body, name: "something that has an effect"})


@pytest.mark.parametrize(("kind", "body", "module"), KINDS)
def test_flaw_13_each_accepted_field_is_one_with_an_effect(kind, body, module):
    known = ABOUT_WHO_ASKS | ANSWERED | set(LIMITS) | set(SAMPLING) | set(SCHEDULING)
    assert set(kind.model_fields) <= known
    plain = kind.model_validate(body).sampling_params(10)
    for name, value in SAMPLING.items():
        changed = kind.model_validate({**body, name: value}).sampling_params(10)
        assert changed != plain
        said = getattr(changed, name)
        assert said == (tuple(value) if isinstance(value, list) else value)


@pytest.mark.parametrize(("kind", "body", "module"), KINDS)
def test_flaw_13_an_unknown_field_is_refused_by_name(kind, body, module):
    with pytest.raises(ValidationError, match="temprature"):
        kind.model_validate({**body, "temprature": 0.5})
