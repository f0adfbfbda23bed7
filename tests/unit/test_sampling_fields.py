"""Every field that OpenAI's own client can send has an effect, or is refused by its name."""

from __future__ import annotations

from pathlib import Path

import openai.types.chat.completion_create_params as chat_params
import openai.types.completion_create_params as completion_params
import pytest
from pydantic import ValidationError

from fastserve_mega.server.chat_protocol import ChatRequest
from fastserve_mega.server.completions import CompletionRequest
from fastserve_mega.types import SamplingParams, StructuredOutput

COMPLETION = {"prompt": "x"}
CHAT = {"messages": [{"role": "user", "content": "x"}]}
ABOUT_WHO_ASKS = {"user", "safety_identifier", "prompt_cache_key", "metadata"}
ANSWERED = {
    "model",
    "prompt",
    "messages",
    "stream",
    "stream_options",
    "stop",
    "n",
    "echo",
    "best_of",
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "reasoning_effort",
    "chat_template_kwargs",
    "add_generation_prompt",
    "continue_final_message",
    "add_special_tokens",
    "include_stop_str_in_output",
    "bad_words",
    "truncate_prompt_tokens",
    "skip_special_tokens",
}
"""By the server itself; tests of the server over HTTP have their effects."""
STRUCTURED = {
    "response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice",
}  # fmt: skip
LOGPROBS = {"logprobs", "top_logprobs", "prompt_logprobs"}
LIMITS = {"max_tokens": 3, "max_completion_tokens": 3}
SAMPLING = {
    "temperature": 0.5, "top_p": 0.5, "seed": 3, "top_k": 3, "min_tokens": 2, "ignore_eos": True,
    "stop_token_ids": [4], "min_p": 0.1, "presence_penalty": 0.5, "frequency_penalty": -0.5,
    "repetition_penalty": 1.2, "allowed_token_ids": [4],
}  # fmt: skip
SCHEDULING = {
    "priority": -1, "timeout": 2.5, "cache_salt": "mine", "expected_output_tokens": 7,
    "session": "agent",
}  # fmt: skip


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
def test_what_the_official_client_offers_is_honoured_or_refused_by_name(kind, body, module):
    names = offered(module)
    assert len(names) > 15
    for name in names - set(kind.model_fields):
        with pytest.raises(ValidationError, match=name):
            kind.model_validate({**body, name: "something that has an effect"})


@pytest.mark.parametrize(("kind", "body", "module"), KINDS)
def test_each_accepted_field_is_one_with_an_effect(kind, body, module):
    known = ABOUT_WHO_ASKS | ANSWERED | LOGPROBS | STRUCTURED | {"logit_bias"}
    known |= set(LIMITS) | set(SAMPLING) | set(SCHEDULING)
    assert set(kind.model_fields) <= known
    plain = kind.model_validate(body).sampling_params(10)
    for name, value in SAMPLING.items():
        changed = kind.model_validate({**body, name: value}).sampling_params(10)
        assert changed != plain
        said = getattr(changed, name)
        assert said == (tuple(value) if isinstance(value, list) else value)


@pytest.mark.parametrize(("kind", "body", "module"), KINDS)
def test_an_unknown_field_is_refused_by_name(kind, body, module):
    with pytest.raises(ValidationError, match="temprature"):
        kind.model_validate({**body, "temprature": 0.5})


def test_logit_bias_has_token_ids_for_names():
    asked = ChatRequest.model_validate({**CHAT, "logit_bias": {"17": -100, "4": 1.5}})
    assert asked.sampling_params(10).logit_bias == {17: -100.0, 4: 1.5}
    wrong = ChatRequest.model_validate({**CHAT, "logit_bias": {"the": 1}})
    with pytest.raises(ValueError, match="logit_bias must be for token ids, got 'the'"):
        wrong.sampling_params(10)


@pytest.mark.parametrize(
    ("kind", "body", "expected"),
    [
        (CompletionRequest, COMPLETION, None),
        (CompletionRequest, {**COMPLETION, "logprobs": 0}, 0),
        (CompletionRequest, {**COMPLETION, "logprobs": 20}, 20),
        (ChatRequest, CHAT, None),
        (ChatRequest, {**CHAT, "logprobs": False, "top_logprobs": 0}, None),
        (ChatRequest, {**CHAT, "logprobs": True}, 0),
        (ChatRequest, {**CHAT, "logprobs": True, "top_logprobs": 5}, 5),
    ],
)
def test_both_ways_to_ask_for_logprobs(kind, body, expected):
    assert kind.model_validate(body).sampling_params(10).logprobs == expected


def test_each_answer_has_a_seed_of_its_own_that_depends_on_the_given_one_only():
    asked = ChatRequest.model_validate({**CHAT, "seed": 3, "n": 4})
    seeds = [asked.sampling_params(10, number).seed for number in range(4)]
    assert seeds[0] == 3
    assert len(set(seeds)) == 4
    again = ChatRequest.model_validate({**CHAT, "seed": 3})
    assert [again.sampling_params(10, number).seed for number in range(4)] == seeds
    other = ChatRequest.model_validate({**CHAT, "seed": 4, "n": 4})
    assert not {other.sampling_params(10, number).seed for number in range(4)} & set(seeds)


OUT_OF_RANGE = {
    "min_p": -0.1, "presence_penalty": 2.5, "frequency_penalty": -2.5, "repetition_penalty": 0.0,
    "logit_bias": {5: 101.0}, "logprobs": 21, "temperature": float("nan"),
}  # fmt: skip


@pytest.mark.parametrize("name", OUT_OF_RANGE)
def test_what_is_out_of_range_is_refused_with_value_and_limit(name):
    value = OUT_OF_RANGE[name]
    with pytest.raises(ValueError, match=name) as caught:
        SamplingParams(**{name: value})
    shown = value[5] if isinstance(value, dict) else value
    assert str(shown) in str(caught.value)


@pytest.mark.parametrize("token", ["the", "01", "-1", "٣", " 1", "1.0", "", "9" * 5000])
def test_a_biased_token_has_one_way_to_be_written(token):
    asked = CompletionRequest.model_validate({**COMPLETION, "logit_bias": {token: 1}})
    with pytest.raises(ValueError, match="logit_bias must be for token ids, got ") as caught:
        asked.sampling_params(10)
    assert len(str(caught.value)) < 120


def test_logit_bias_and_stop_tokens_are_bounded():
    with pytest.raises(ValueError, match="at most 1024 tokens, got 1025"):
        SamplingParams(stop_token_ids=(1,) * 1025)
    with pytest.raises(ValueError, match="allowed_token_ids must not be negative, got -1"):
        SamplingParams(allowed_token_ids=(-1,))
    with pytest.raises(ValueError, match="has 1 to 64 tokens, got 65"):
        SamplingParams(bad_words=((1,) * 65,))
    with pytest.raises(ValueError, match="at most 1024 sequences of tokens, got 1025"):
        SamplingParams(bad_words=((1,),) * 1025)
    with pytest.raises(ValueError, match="must not be negative, got -7"):
        SamplingParams(stop_token_ids=(1, -7))
    with pytest.raises(ValueError, match="at most 4096 texts, got 4097"):
        StructuredOutput(choice=("a",) * 4097)
    with pytest.raises(ValueError, match="at most 1024 tokens, got 1025"):
        SamplingParams(logit_bias=dict.fromkeys(range(1025), 1.0))
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        SamplingParams(logit_bias={-1: 1.0})


@pytest.mark.parametrize("kind", [CompletionRequest, ChatRequest])
def test_the_documentation_lists_each_field(kind):
    text = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")
    for name in {*kind.model_fields, *kind.unsupported}:
        assert f"`{name}`" in text, name
