import json

import pytest

from fastserve_mega.models.generation_config import (
    NO_DEFAULTS,
    SamplingDefaults,
    load_sampling_defaults,
)
from fastserve_mega.server.completions import CompletionRequest


@pytest.fixture
def load(tmp_path):
    def load(text):
        (tmp_path / "generation_config.json").write_text(text)
        return load_sampling_defaults(tmp_path)

    return load


def test_what_the_model_says_stands_for_what_a_request_does_not(load):
    defaults = load(json.dumps({"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": None}))
    assert defaults == SamplingDefaults(temperature=0.6, top_p=0.95, top_k=20)
    body = CompletionRequest.model_validate({"prompt": "x", "temperature": 0, "top_k": -1})
    params = body.sampling_params(9, defaults=defaults)
    assert (params.temperature, params.top_p, params.top_k) == (0, 0.95, 0)
    body = CompletionRequest.model_validate({"prompt": "x", "top_p": 1.0})
    params = body.sampling_params(9, defaults=defaults)
    assert (params.temperature, params.top_p, params.top_k) == (0.6, 1.0, 20)


def test_a_model_that_does_not_sample_is_greedy(load):
    told = {"do_sample": False, "temperature": 0.6, "repetition_penalty": 1.1}
    assert load(json.dumps(told)) == SamplingDefaults(temperature=0, repetition_penalty=1.1)


def test_without_the_file_nothing_is_changed(tmp_path, load):
    assert load_sampling_defaults(tmp_path) == NO_DEFAULTS
    assert load('{"eos_token_id": 2, "top_k": -1}') == NO_DEFAULTS


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"temperature": -1}', "temperature must be between 0 and 100, got -1"),
        ('{"top_p": "x"}', "top_p must be a number, got 'x'"),
        ('{"top_k": 0.5}', "top_k must be a number, got 0.5"),
        ("[]", "must hold a JSON object"),
    ],
)
def test_what_cannot_be_is_told_with_its_file(load, text, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        load(text)
    assert "generation_config.json" in str(caught.value)
