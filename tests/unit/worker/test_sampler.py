from __future__ import annotations

import math

import pytest
import torch

from fastserve_mega.types import RequestId, SamplingParams
from fastserve_mega.worker.history import TokenHistory
from fastserve_mega.worker.largest import find_largest
from fastserve_mega.worker.model_runner import SequenceInput
from fastserve_mega.worker.penalties import add_logit_bias, penalize
from fastserve_mega.worker.sampler import Sampler, uniform

VOCABULARY = 50


CHI_SQUARE_LIMIT = 3.09
"""Standard deviations above its mean that one fair sample in a thousand exceeds."""


def sequence(params=None, *, seed=0, position=10, prompt_tokens=10, prompt=(), output=()):
    params = params or SamplingParams()
    return SequenceInput(
        request_id=RequestId("r"),
        token_ids=[1],
        start=position - 1,
        block_table=[1],
        samples=True,
        params=params,
        seed=seed,
        prompt_tokens=prompt_tokens,
        history=(TokenHistory(prompt_tokens, prompt, output) if params.needs_history else None),
    )


def sample_many(logits, params, count=4000):
    """Relative frequency of each token over many positions."""
    sequences = [sequence(params, position=p) for p in range(10, 10 + count)]
    tokens = Sampler(())(logits.expand(count, -1).clone(), sequences).token_ids
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


# --- the distribution, by Pearson's chi-square ---------------------------------------------------

DRAWS = 20_000
EXPECTED_TOO_RARE = 5.0
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
    "penalties": {"presence_penalty": 1.5, "frequency_penalty": 0.5, "repetition_penalty": 1.3},
}
SAID = (3, 7, 7, 9)
PROMPTED = (1, 2, 3)


def changed_logits(logits, params):
    """By the definitions, token by token, in double precision."""
    logits = logits.double().clone()
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


@pytest.mark.parametrize("name", [name for name, change in DISTRIBUTIONS.items() if change])
def test_the_test_of_the_distribution_notices_an_ignored_option(name, logits):
    """What is sampled without the option does not pass for what is expected with it."""
    params = SamplingParams(**DISTRIBUTIONS[name])
    observed, expected = draw(logits, SamplingParams()), expected_distribution(logits, params)
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
    logits[[1, 3, 7]], logits[[2, 9]] = -1.0, 1.0  # said or prompted, of both signs
    params = SamplingParams(**change)
    rows = logits.expand(3, -1).clone()
    sequences = [sequence(), sequence(params, prompt=PROMPTED, output=SAID), sequence()]
    add_logit_bias(rows, sequences)
    penalize(rows, sequences)
    assert torch.equal(rows[[0, 2]], logits.expand(2, -1))
    assert torch.allclose(rows[1], changed_logits(logits, params).float(), atol=1e-6)


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
