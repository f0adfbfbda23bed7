"""What cannot be sampled is a failure of its request; the others of its batch notice nothing."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastserve_mega.types import RequestId, SamplingParams, StructuredOutput
from fastserve_mega.worker import drawing
from fastserve_mega.worker.grammar import GrammarError
from fastserve_mega.worker.history import TokenHistory
from fastserve_mega.worker.model_runner import SequenceInput
from fastserve_mega.worker.sampler import Sampler

VOCABULARY = 23
PROMPT = (1, 4, 4, 22)
EOS = 2


def sequence(params=None, *, seed=5, output=(3, 4, 3)):
    params = params or SamplingParams(seed=seed)
    return SequenceInput(
        request_id=RequestId("r"),
        token_ids=[1],
        start=len(PROMPT) + len(output) - 1,
        block_table=[1],
        samples=True,
        params=params,
        seed=seed,
        prompt_tokens=len(PROMPT),
        history=TokenHistory(len(PROMPT), PROMPT, output) if params.needs_history else None,
    )


def random_logits(rows, seed=0):
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3


ORDINARY = [
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=1.0, top_p=0.7),
    SamplingParams(temperature=0.8, top_k=5, presence_penalty=1.0, logprobs=2),
    SamplingParams(temperature=2.0, min_p=0.1, repetition_penalty=1.2),
]


def sample_among_others(params, logits):
    """Sample a row between others; returns its token or why there is none.

    Checks that the others get the tokens and log probabilities of their batch without it.
    """
    others = [sequence(each, seed=number) for number, each in enumerate(ORDINARY)]
    around = random_logits(len(others), seed=9)
    sample = Sampler((EOS,))
    without = sample(around, others)
    output = sample(
        torch.cat((around[:2], logits[None], around[2:])),
        [*others[:2], sequence(params), *others[2:]],
    )
    tokens, logprobs = list(output.token_ids), list(output.logprobs)
    token = tokens.pop(2)
    logprobs.pop(2)
    assert tokens == without.token_ids
    assert tuple(logprobs) == without.logprobs
    assert {failure.index for failure in output.failures} <= {2}
    assert 0 <= token < VOCABULARY
    return output.failures[0].message if output.failures else token


def floats(low, high, *special):
    return st.one_of(
        st.floats(low, high, exclude_min=low == 0 and 0 not in special), st.sampled_from(special)
    )


tiny = (5e-324, 1e-46, 1e-40, 1.2e-38, 1e-30, 1e-10)
extreme_params = st.builds(
    SamplingParams,
    max_tokens=st.just(10),
    temperature=floats(0.0, 100.0, 0.0, *tiny),
    top_p=floats(0.0, 1.0, 1 - 2**-53, *tiny),
    top_k=st.sampled_from((0, 1, 2, VOCABULARY - 1, VOCABULARY, 10**9, 2**63)),
    min_p=floats(0.0, 1.0, 0.0, 1.0, 1 - 2**-53, *tiny),
    min_tokens=st.sampled_from((0, 3, 4, 10)),
    stop_token_ids=st.sampled_from(((), (0, 5), (2**63,), tuple(range(VOCABULARY)))),
    presence_penalty=floats(-2.0, 2.0, 0.0, -2.0, 2.0, *tiny),
    frequency_penalty=floats(-2.0, 2.0, 0.0, -2.0, 2.0, *tiny),
    repetition_penalty=floats(0.0, 100.0, 1.0, 100.0, *tiny),
    logit_bias=st.dictionaries(st.integers(0, VOCABULARY - 1), floats(-100.0, 100.0, *tiny)),
    logprobs=st.sampled_from((None, 0, 20)),
)
huge = torch.finfo(torch.float32).max
extreme_logits = st.lists(
    st.one_of(
        st.floats(-50, 50, width=32),
        st.sampled_from(
            (0.0, -0.0, 1e-45, huge, -huge, 1e30, -1e30, math.inf, -math.inf, math.nan)
        ),
    ),
    min_size=VOCABULARY,
    max_size=VOCABULARY,
)


@given(
    params=extreme_params,
    logits=st.lists(st.floats(-50, 50, width=32), min_size=VOCABULARY, max_size=VOCABULARY),
)
def test_any_parameters_give_a_token_or_a_reason_and_leave_others_alone(params, logits):
    result = sample_among_others(params, torch.tensor(logits))
    nothing_left = params.min_tokens > 3 and len(params.stop_token_ids) == VOCABULARY
    assert isinstance(result, str) == nothing_left


@given(params=extreme_params, logits=extreme_logits)
def test_any_logits_give_a_token_or_a_reason_and_leave_others_alone(params, logits):
    result = sample_among_others(params, torch.tensor(logits))
    largest = max((x if not math.isnan(x) else math.inf) for x in logits)
    if not math.isfinite(largest):
        assert "logits are not finite" in result


@pytest.mark.parametrize("temperature", [5e-324, 1e-46, 1e-40, 1e-30, 1e-6])
@pytest.mark.parametrize("change", [{}, {"top_p": 0.5}, {"min_p": 0.5}, {"top_k": 3}])
def test_a_temperature_that_underflows_is_greedy_also_among_equals(temperature, change):
    logits = random_logits(1)[0]
    logits[[7, 11, 19]] = 40.0
    params = SamplingParams(temperature=temperature, **change)
    assert sample_among_others(params, logits) == 7


@pytest.mark.parametrize("penalty", [5e-324, 1e-46, 1e-40, 1e-31])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_smallest_repetition_penalty_repeats_the_likeliest_known_token(penalty, temperature):
    logits = torch.full((VOCABULARY,), 5.0)
    logits[[1, 4, 22, 3]] = torch.tensor([2.0, 2.5, -1.0, 0.0])
    params = SamplingParams(temperature=temperature, top_p=0.5, repetition_penalty=penalty)
    assert sample_among_others(params, logits) == 4


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_told_as_such(value):
    logits = random_logits(1)[0]
    logits[6] = value
    told = sample_among_others(SamplingParams(), logits)
    assert told == f"the model's logits are not finite: the largest is {value}"


def test_a_row_whose_tokens_are_all_held_back_fails_alone():
    params = SamplingParams(
        temperature=1.0, top_p=0.5, min_tokens=5, stop_token_ids=tuple(range(VOCABULARY))
    )
    assert "no token can be sampled" in sample_among_others(params, random_logits(1)[0])


class ForbidsAll:
    def hold(self, logits, structured, history):
        logits.fill_(-torch.inf)


class Refuses:
    def hold(self, logits, structured, history):
        raise GrammarError("too complex", is_invalid=True)


class Breaks:
    def hold(self, logits, structured, history):
        raise RecursionError("a bug \ud800\nof a library")


@pytest.mark.parametrize(
    ("grammars", "sentence"),
    [
        (ForbidsAll(), "no token can be sampled"),
        (Refuses(), "too complex"),
        (Breaks(), "sampling failed: RecursionError: a bug ? of a library"),
    ],
)
def test_a_grammar_that_fails_in_any_way_ends_its_request_only(grammars, sentence):
    held = sequence(SamplingParams(structured=StructuredOutput(regex="a")))
    free = [sequence(params) for params in ORDINARY]
    logits = random_logits(len(free) + 1)
    output = Sampler((), grammars)(logits, [held, *free])
    (failure,) = output.failures
    assert (failure.index, sentence in failure.message) == (0, True)
    assert failure.is_invalid == isinstance(grammars, Refuses)
    without = Sampler(())(logits[1:], free)
    assert output.token_ids[1:] == without.token_ids
    assert output.logprobs[1:] == without.logprobs


def test_an_exception_of_any_part_ends_the_requests_that_cause_it_only(monkeypatch):
    threshold = drawing._top_p_threshold

    def broken(weights, top_p):
        if top_p == 0.25:
            raise IndexError("index -1 is out of bounds")
        return threshold(weights, top_p)

    sequences = [
        sequence(SamplingParams(top_p=p), seed=s) for s, p in enumerate((0.9, 0.25, 0.5, 0.25))
    ]
    logits = random_logits(4).to(torch.bfloat16)
    expected = Sampler(())(logits, sequences).token_ids
    monkeypatch.setattr(drawing, "_top_p_threshold", broken)
    output = Sampler(())(logits, sequences)
    assert [failure.index for failure in output.failures] == [1, 3]
    assert "IndexError: index -1 is out of bounds" in output.failures[0].message
    assert [output.token_ids[row] for row in (0, 2)] == [expected[0], expected[2]]


def test_a_broken_device_is_a_lost_rank_and_no_failure_of_requests(monkeypatch):
    def broken(weights, top_p):
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(drawing, "_top_p_threshold", broken)
    with pytest.raises(RuntimeError, match="CUDA error"):
        Sampler(())(random_logits(2), [sequence(SamplingParams(top_p=0.5))] * 2)


def test_the_callers_logits_stay_as_they_are():
    logits = random_logits(1)
    before = logits.clone()
    Sampler((EOS,))(logits, [sequence(SamplingParams(logit_bias={1: 9.0}, repetition_penalty=2.0))])
    assert torch.equal(logits, before)
