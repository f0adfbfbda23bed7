from __future__ import annotations

import math

import pytest
import torch
from sampled import SAID, VOCABULARY, sequence

from fastserve_mega.types import SamplingParams
from fastserve_mega.worker.drawing import find_largest, uniform
from fastserve_mega.worker.sampler import Sampler


def sample_many(logits, params, count=4000):
    """Relative frequency of each token over many positions."""
    sequences = [sequence(params, position=p) for p in range(10, 10 + count)]
    tokens = Sampler(())(logits.expand(count, -1).clone(), sequences).token_ids
    return torch.bincount(torch.tensor(tokens), minlength=logits.shape[-1]) / count


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
    output = Sampler(())(logits[None].clone(), [sequence(SamplingParams(**params))])
    assert output.token_ids == [int(logits.argmax())]


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
    tokens = Sampler(())(logits.expand(2, -1).clone(), [sequence(p) for p in params]).token_ids
    assert tokens[0] == tokens[1]


def test_a_top_p_of_0_is_the_most_probable_token(logits):
    frequencies = sample_many(logits, SamplingParams(temperature=5.0, top_p=0.0), count=50)
    assert frequencies[int(logits.argmax())] == 1.0


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
    together = Sampler(())(rows.clone(), sequences).token_ids
    alone = [
        Sampler(())(rows[i : i + 1].clone(), [s]).token_ids[0] for i, s in enumerate(sequences)
    ]
    assert together == alone
    backwards = Sampler(())(rows.flip(0).clone(), sequences[::-1]).token_ids
    assert backwards[::-1] == together


def test_min_tokens_holds_back_end_and_stop_tokens():
    logits = torch.zeros(1, VOCABULARY)
    logits[0, 3], logits[0, 4], logits[0, 5] = 9.0, 8.0, 7.0
    params = SamplingParams(temperature=0.0, stop_token_ids=(4, 10**6), min_tokens=2)
    sampler = Sampler([3])
    first, second, third = (
        sampler(logits.clone(), [sequence(params, position=p, prompt_tokens=10)]).token_ids
        for p in (10, 11, 12)
    )
    assert (first, second, third) == ([5], [5], [3])


def test_half_precision_logits_are_sampled_too(logits):
    rows = logits.to(torch.bfloat16)[None]
    sequences = [sequence(SamplingParams(temperature=0.7, top_p=0.9))]
    (token,) = Sampler(())(rows, sequences).token_ids
    assert 0 <= token < VOCABULARY
    assert math.isfinite(rows.float().sum())


# --- log probabilities -------------------------------------------------------------------------


def test_logprobs_are_the_models_own_whatever_the_options(logits):
    plain = {"temperature": 0.0, "logprobs": 3}
    bent = {
        **plain, "temperature": 3.0, "min_p": 0.3, "logit_bias": {1: 9.0}, "top_k": 4,
        "presence_penalty": 2.0, "min_tokens": 1, "max_tokens": 2,
    }  # fmt: skip
    params = [SamplingParams(**plain), SamplingParams(), SamplingParams(**bent)]
    rows = logits.expand(3, -1).clone()
    output = Sampler((5,))(rows, [sequence(p, output=SAID) for p in params])
    expected = torch.log_softmax(logits, dim=-1)
    greedy, nothing, other = output.logprobs
    assert nothing is None
    assert greedy.top_ids == other.top_ids == tuple(expected.topk(3).indices.tolist())
    assert greedy.top_logprobs == pytest.approx(expected.topk(3).values.tolist(), abs=1e-5)
    assert greedy.logprob == greedy.top_logprobs[0]
    assert other.logprob == pytest.approx(float(expected[output.token_ids[2]]), abs=1e-5)


def test_logprobs_of_the_chosen_token_alone_and_of_a_small_vocabulary():
    logits = torch.tensor([[0.0, 1.0, -1.0]])
    none, all_of_them = SamplingParams(logprobs=0), SamplingParams(logprobs=20)
    rows = logits.expand(2, -1).clone()
    first, second = Sampler(())(rows, [sequence(none), sequence(all_of_them)]).logprobs
    assert (first.top_ids, first.top_logprobs) == ((), ())
    assert second.top_ids == (1, 0, 2)
    assert Sampler(())(rows, [sequence(), sequence()]).logprobs == ()


@pytest.mark.parametrize("columns", [1, 15, 16, 33, 4097])
def test_the_largest_logit_is_torchs(columns):
    logits = torch.randn(5, columns, generator=torch.Generator().manual_seed(columns))
    logits[1] = 2.0  # the first of equals
    logits[2, columns // 2] = math.nan
    logits[3] = -math.inf
    tokens, values = find_largest(logits)
    assert tokens == logits.argmax(dim=-1).tolist()
    torch.testing.assert_close(
        torch.tensor(values), logits.amax(dim=-1), rtol=0, atol=0, equal_nan=True
    )


def test_logits_that_no_request_changes_stay_as_they_are(logits):
    rows = torch.stack([logits, -logits])
    before = rows.clone()
    held = SamplingParams(temperature=0.0, min_tokens=5, stop_token_ids=(int(logits.argmax()),))
    plain = SamplingParams(temperature=0.0)
    sampler = Sampler(())
    alone = sampler(rows[1:], [sequence(plain)]).token_ids
    assert sampler(rows, [sequence(held), sequence(plain)]).token_ids[1:] == alone
    assert torch.equal(rows, before)
