"""Sampled tokens follow the distribution that is asked for, by Pearson's chi-square."""

from __future__ import annotations

import math

import pytest
import torch
from sampled import SAID, VOCABULARY, sequence

from fastserve_mega.types import SamplingParams
from fastserve_mega.worker.penalties import add_logit_bias, penalize
from fastserve_mega.worker.sampler import Sampler

DRAWS = 20_000
EXPECTED_TOO_RARE = 5.0
CHI_SQUARE_LIMIT = 3.09
"""Standard deviations above its mean that one fair sample in a thousand exceeds."""
DISTRIBUTIONS = {
    "temperature 1": {},
    "temperature 0.6": {"temperature": 0.6},
    "temperature 2.5": {"temperature": 2.5},
    "top_p": {"top_p": 0.85},
    "top_k": {"top_k": 12},
    "min_p": {"min_p": 0.05},
    "min_p at a temperature": {"min_p": 0.1, "temperature": 1.7},
    "all": {"temperature": 1.4, "top_k": 40, "min_p": 0.01, "top_p": 0.95},
    "bias": {"logit_bias": {3: 4.0, 7: -100.0}},
    "allowed": {"allowed_token_ids": (3, 4, 5, 9, 40), "presence_penalty": 1.0},
    "bad words": {"bad_words": ((5,), (9, 6), (7, 9, 8), (3, 9, 10), (9, 11, 12), (7, 9, 9, 13))},
    "penalties": {"presence_penalty": 1.5, "frequency_penalty": 0.5, "repetition_penalty": 1.3},
}
PROMPTED = (1, 2, 3)


def changed_logits(logits, params):
    """By the definitions, token by token, in double precision."""
    logits = logits.double().clone()
    if params.allowed_token_ids:
        logits[
            [token for token in range(VOCABULARY) if token not in params.allowed_token_ids]
        ] = -torch.inf
    for *begun, last in params.bad_words:
        if list(SAID[len(SAID) - len(begun) :]) == begun:
            logits[last] = -torch.inf
    for token, bias in params.logit_bias.items():
        logits[token] += bias
    if params.counts_tokens:
        for token in {*SAID, *PROMPTED}:
            factor = params.repetition_penalty
            logits[token] = logits[token] / factor if logits[token] > 0 else logits[token] * factor
        for token in set(SAID):
            logits[token] -= params.presence_penalty
            logits[token] -= params.frequency_penalty * SAID.count(token)
    return logits


def expected_distribution(logits, params):
    """Of the changed logits, what the filters leave."""
    weights = torch.softmax(changed_logits(logits, params) / params.temperature, dim=-1)
    if params.top_k:
        weights[weights < weights.topk(params.top_k).values[-1]] = 0
    weights[weights < params.min_p * weights.max()] = 0
    weights /= weights.sum()
    values, order = weights.sort(descending=True)
    weights[order[int((values.cumsum(0) < params.top_p).sum()) + 1 :]] = 0
    return weights / weights.sum()


def chi_square_deviation(observed, expected):
    """How many standard deviations Pearson's statistic lies above its mean.

    Tokens that are expected too rarely count as one; what is never expected must not occur.
    """
    assert observed[expected == 0].sum() == 0
    rare = expected * DRAWS < EXPECTED_TOO_RARE
    observed = torch.cat((observed[~rare], observed[rare].sum()[None])).double()
    expected = torch.cat((expected[~rare], expected[rare].sum()[None])) * DRAWS
    keep = expected > 0
    statistic = ((observed - expected)[keep] ** 2 / expected[keep]).sum()
    freedom = int(keep.sum()) - 1
    return float((statistic - freedom) / math.sqrt(2 * freedom))


def draw(logits, params):
    """20,000 tokens, in batches, of which no two share seed and position."""
    counts = torch.zeros(logits.shape[-1], dtype=torch.long)
    sampler, batch = Sampler(()), 2000
    for seed in range(DRAWS // batch):
        sequences = [
            sequence(params, seed=seed, position=p, prompt=PROMPTED, output=SAID)
            for p in range(10, 10 + batch)
        ]
        tokens = sampler(logits.expand(batch, -1).clone(), sequences).token_ids
        counts += torch.bincount(torch.tensor(tokens), minlength=len(counts))
    return counts


@pytest.mark.parametrize(
    ("name", "vocabulary"),
    [*((name, VOCABULARY) for name in DISTRIBUTIONS), ("temperature 1", 1000), ("all", 1000)],
)
def test_samples_follow_the_distribution(name, vocabulary):
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(5)) * 1.5
    params = SamplingParams(**DISTRIBUTIONS[name])
    deviation = chi_square_deviation(draw(logits, params), expected_distribution(logits, params))
    assert deviation < CHI_SQUARE_LIMIT


@pytest.fixture(scope="module")
def drawn_plainly(logits):
    return draw(logits, SamplingParams())


@pytest.mark.parametrize("name", [name for name, change in DISTRIBUTIONS.items() if change])
def test_the_test_of_the_distribution_notices_an_ignored_option(name, logits, drawn_plainly):
    """What is sampled without the option does not pass for what is expected with it."""
    params = SamplingParams(**DISTRIBUTIONS[name])
    observed, expected = drawn_plainly, expected_distribution(logits, params)
    impossible = observed[expected == 0].sum() > 0
    assert impossible or chi_square_deviation(observed, expected) > 5 * CHI_SQUARE_LIMIT


@pytest.mark.parametrize(
    "change",
    [
        {"presence_penalty": 1.5},
        {"frequency_penalty": -0.5},
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.5, "presence_penalty": -1.0, "frequency_penalty": 2.0},
        {"logit_bias": {0: 4.0, 49: -100.0}, "presence_penalty": 1.0},
    ],
)
def test_logits_are_changed_as_defined_and_in_their_rows_only(change, logits):
    logits = logits.clone()
    logits[[1, 3, 7]], logits[[2, 9]] = -1.0, 1.0  # said or prompted, of both signs
    params = SamplingParams(**change)
    rows = logits.expand(3, -1).clone()
    sequences = [sequence(), sequence(params, prompt=PROMPTED, output=SAID), sequence()]
    add_logit_bias(rows, sequences)
    penalize(rows, sequences)
    assert torch.equal(rows[[0, 2]], logits.expand(2, -1))
    assert torch.allclose(rows[1], changed_logits(logits, params).float(), atol=1e-6)
