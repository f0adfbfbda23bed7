"""Each sampling option reaches the rank that samples and changes the answer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from fake_server import VOCAB, GatedRunner

from fastserve_mega.client import Client
from fastserve_mega.types import FinishReason, SamplingParams, StructuredOutput
from fastserve_mega.worker.grammar import Grammars
from fastserve_mega.worker.model_runner import StepOutput
from fastserve_mega.worker.sampler import Sampler

EOS = 0
EOS_AFTER = 5
"""Output tokens, after which end of sequence is by far the likeliest."""
PROMPT = (5, 6, 7)
BASE = {"max_tokens": 10, "temperature": 1.0, "seed": 7, "ignore_eos": True}


class SamplingRunner(GatedRunner):
    """Logits that depend on the whole context, and the real sampler."""

    grammars: Grammars | None = None

    def execute(self, batch):
        fake = super().execute(batch)
        sampling = [sequence for sequence in batch if sequence.samples]
        rows = [
            torch.randn(VOCAB, generator=torch.Generator().manual_seed(s)) for s in fake.token_ids
        ]
        for row, sequence in zip(rows, sampling, strict=True):
            row[EOS] = 50.0 if sequence.context - sequence.prompt_tokens >= EOS_AFTER else -50.0
            self.adjust(row, sequence)
        sampler = Sampler((EOS,), self.grammars)
        output = sampler(torch.stack(rows), sampling) if rows else StepOutput()
        return replace(output, scored=fake.scored)

    def adjust(self, row, sequence):
        """Tests change the logits of a sequence here, in place."""


@pytest.fixture(scope="module")
def generate(model_directory):
    from fake_server import fake_server

    with (
        fake_server(model_directory, make_runner=SamplingRunner) as server,
        Client(server.endpoint) as client,
    ):
        server.runner.grammars = Grammars(model_directory, VOCAB, (EOS,))

        def generate(**change):
            return client.submit(PROMPT, SamplingParams(**{**BASE, **change})).wait()

        yield generate


def ends_early(base, changed, length):
    return changed.token_ids == base.token_ids[:length] and len(changed.token_ids) == length


def says_other_things(base, changed):
    return changed.token_ids != base.token_ids


EFFECTS = {
    "min_p": ({"min_p": 0.5}, says_other_things),
    "presence_penalty": ({"presence_penalty": -2.0}, says_other_things),
    "frequency_penalty": ({"frequency_penalty": -2.0}, says_other_things),
    "repetition_penalty": ({"repetition_penalty": 0.1}, says_other_things),
    "logit_bias": ({"logit_bias": {9: 100.0}}, lambda _, done: done.token_ids[:5] == (9,) * 5),
    "allowed_token_ids": (
        {"allowed_token_ids": (9, 11)},
        lambda _, done: set(done.token_ids) == {9, 11},
    ),
    "bad_words": (
        {"logit_bias": {9: 100.0, 11: 70.0}, "bad_words": ((9, 9, 9), (11, 9))},
        lambda _, done: done.token_ids == (9, 9, *[11] * 8),
    ),
    "structured": (
        {"structured": StructuredOutput(choice=("fox", "dog")), "ignore_eos": False},
        lambda _, done: done.text in ("fox", "dog") and done.token_ids[-1] == EOS,
    ),
    "logprobs": (
        {"logprobs": 2},
        lambda base, done: (
            done.token_ids == base.token_ids
            and base.logprobs == ()
            and [len(each.top_ids) for each in done.logprobs] == [2] * 10
        ),
    ),
    "prompt_logprobs": (
        {"logprobs": 0, "prompt_logprobs": True},
        lambda base, done: (
            base.prompt_logprobs == ()
            and [each and each.logprob for each in done.prompt_logprobs] == [None, -6.0, -7.0]
        ),
    ),
    "max_tokens": ({"max_tokens": 3}, lambda base, done: ends_early(base, done, 3)),
    "temperature": ({"temperature": 9.0}, says_other_things),
    "top_p": ({"top_p": 1e-6}, says_other_things),
    "top_k": ({"top_k": 2}, says_other_things),
    "seed": ({"seed": 8}, says_other_things),
    "stop_token_ids": (
        {"stop_token_ids": (EOS,)},
        lambda base, done: ends_early(base, done, EOS_AFTER + 1),
    ),
    "ignore_eos": ({"ignore_eos": False}, lambda base, done: ends_early(base, done, EOS_AFTER + 1)),
    "min_tokens": (
        {"ignore_eos": False, "min_tokens": 8},
        lambda base, done: len(done.token_ids) == 9 and EOS not in done.token_ids[:8],
    ),
}


def test_every_sampling_option_is_tested_here():
    # An embedding is no token: tests/process/test_embeddings.py.
    assert {*EFFECTS, "embeds"} == set(SamplingParams.__struct_fields__)


@pytest.mark.parametrize("option", EFFECTS)
def test_each_sampling_option_has_its_effect(generate, option):
    change, has_effect = EFFECTS[option]
    base = generate()
    assert len(base.token_ids) == 10
    assert base.finish_reason is FinishReason.LENGTH
    assert generate().token_ids == base.token_ids
    assert has_effect(base, generate(**change))


def test_greedy_has_three_names(generate):
    greedy = generate(temperature=0.0)
    assert generate(top_k=1).token_ids == generate(top_p=1e-6).token_ids == greedy.token_ids
    assert generate(temperature=0.0, seed=99).token_ids == greedy.token_ids


def test_end_of_sequence_ends_an_answer(generate):
    done = generate(ignore_eos=False)
    assert (done.token_ids[-1], done.finish_reason) == (EOS, FinishReason.STOP)
    assert done.usage.completion_tokens == EOS_AFTER + 1
