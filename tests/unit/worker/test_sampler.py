from __future__ import annotations

import math

import pytest
import torch

from fastserve_mega.types import RequestId, SamplingParams
from fastserve_mega.worker.runner import SequenceInput
from fastserve_mega.worker.sampler import Sampler, uniform

VOCABULARY = 50


def sequence(params=None, *, seed=0, position=10, prompt_tokens=10):
    return SequenceInput(
        request_id=RequestId("r"),
        token_ids=[1],
        start=position - 1,
        block_table=[1],
        samples=True,
        params=params or SamplingParams(),
        seed=seed,
        prompt_tokens=prompt_tokens,
    )


def sample_many(logits, params, count=4000):
    """Relative frequency of each token over many positions."""
    sequences = [sequence(params, position=p) for p in range(10, 10 + count)]
    tokens = Sampler(())(logits.expand(count, -1).clone(), sequences)
    return torch.bincount(torch.tensor(tokens), minlength=logits.shape[-1]) / count


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(VOCABULARY, generator=generator) * 2


def test_uniform_numbers_are_uniform_and_differ_between_seeds_and_positions():
    numbers = [uniform(seed, position) for seed in range(50) for position in range(200)]
    assert len(set(numbers)) == len(numbers)
    assert min(numbers) >= 0.0
    assert max(numbers) < 1.0
    counts = torch.histc(torch.tensor(numbers), bins=10, min=0.0, max=1.0)
    assert counts.min() > 900
    assert counts.max() < 1100


def test_uniform_is_the_same_for_ever():
    """A resumed stream may meet another version of this program."""
    assert uniform(0, 0) == 0.28176129772258496
    assert uniform(2**63 - 1, 131072) == 0.6374942878925155


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {"temperature": 5.0, "top_k": 1}])
def test_greedy_takes_the_largest(logits, params):
    assert Sampler(())(logits[None].clone(), [sequence(SamplingParams(**params))]) == [
        int(logits.argmax())
    ]


def test_temperature_gives_the_softmax(logits):
    expected = torch.softmax(logits / 1.5, dim=-1)
    frequencies = sample_many(logits, SamplingParams(temperature=1.5))
    assert (frequencies - expected).abs().max() < 0.03


def test_a_tiny_temperature_is_greedy(logits):
    frequencies = sample_many(logits, SamplingParams(temperature=1e-30), count=20)
    assert frequencies.argmax() == logits.argmax()
    assert frequencies.max() == 1.0


def test_top_k_keeps_the_k_largest(logits):
    frequencies = sample_many(logits, SamplingParams(temperature=2.0, top_k=5))
    kept = set(frequencies.nonzero().flatten().tolist())
    assert kept == set(logits.topk(5).indices.tolist())


def test_top_k_beyond_the_vocabulary_keeps_all(logits):
    params = [SamplingParams(top_k=10**6), SamplingParams()]
    tokens = Sampler(())(logits.expand(2, -1).clone(), [sequence(p) for p in params])
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
def test_top_p_keeps_the_smallest_sufficient_set(logits, top_p):
    frequencies = sample_many(logits, SamplingParams(temperature=1.0, top_p=top_p), count=6000)
    probabilities, order = torch.softmax(logits, dim=-1).sort(descending=True)
    size = int((probabilities.cumsum(0) < top_p).sum()) + 1
    kept = set(frequencies.nonzero().flatten().tolist())
    assert kept <= set(order[:size].tolist())
    assert int(order[0]) in kept
    expected = probabilities[0] / probabilities[:size].sum()
    assert abs(frequencies[order[0]] - expected) < 0.03


def test_a_token_does_not_depend_on_the_rest_of_the_batch(logits):
    generator = torch.Generator().manual_seed(4)
    rows = torch.cat((logits[None], torch.randn(7, VOCABULARY, generator=generator)))
    params = [SamplingParams(temperature=0.9, top_p=0.8, top_k=20)]
    params += [SamplingParams(temperature=t) for t in (0.0, 0.5, 1.0)]
    params += [SamplingParams(top_p=0.3), SamplingParams(top_k=3), SamplingParams(), params[0]]
    sequences = [sequence(p, seed=i, position=20 + i) for i, p in enumerate(params)]
    together = Sampler(())(rows.clone(), sequences)
    alone = [Sampler(())(rows[i : i + 1].clone(), [s])[0] for i, s in enumerate(sequences)]
    assert together == alone
    backwards = Sampler(())(rows.flip(0).clone(), sequences[::-1])
    assert backwards[::-1] == together


def test_min_tokens_holds_back_end_and_stop_tokens():
    logits = torch.zeros(1, VOCABULARY)
    logits[0, 3], logits[0, 4], logits[0, 5] = 9.0, 8.0, 7.0
    params = SamplingParams(temperature=0.0, stop_token_ids=(4, 10**6), min_tokens=2)
    sampler = Sampler([3])
    first, second, third = (
        sampler(logits.clone(), [sequence(params, position=p, prompt_tokens=10)])
        for p in (10, 11, 12)
    )
    assert (first, second, third) == ([5], [5], [3])


def test_half_precision_logits_are_sampled_too(logits):
    rows = logits.to(torch.bfloat16)[None]
    (token,) = Sampler(())(rows, [sequence(SamplingParams(temperature=0.7, top_p=0.9))])
    assert 0 <= token < VOCABULARY
    assert math.isfinite(rows.float().sum())
