import pytest

from fastserve_mega.messaging.rank_messages import SequenceStart, StepCommand
from fastserve_mega.plan import Plan, SequenceSlice
from fastserve_mega.types import SamplingParams
from fastserve_mega.worker.history import TokenCounts, TokenHistory
from fastserve_mega.worker.model_runner import SequenceTable

PROMPT = (4, 5, 6, 4)
OUTPUT = [7, 4, 7]


def counted(counts):
    return dict(zip(counts.ids.tolist(), counts.counts.tolist(), strict=True))


def test_counts_are_of_the_output_and_know_the_prompt():
    counts = TokenCounts(PROMPT)
    counts.add(OUTPUT)
    assert counted(counts) == {4: 1, 5: 0, 6: 0, 7: 2}


def test_counts_grow():
    counts = TokenCounts()
    counts.add(range(1000))
    counts.add(range(500))
    assert counted(counts) == {token: 1 + (token < 500) for token in range(1000)}


WAYS = {
    "undisturbed": ((0, PROMPT), (4, (7,)), (5, (4,)), (6, (7,))),
    "in chunks": ((0, PROMPT[:1]), (1, PROMPT[1:]), (4, (7,)), (5, (4,)), (6, (7,))),
    "recomputed": ((0, PROMPT), (4, (7,)), (0, PROMPT[:3]), (3, (4, 7, 4)), (6, (7,))),
    "twice": ((0, PROMPT), (4, (7,)), (5, (4,)), (0, (*PROMPT, 7, 4)), (0, (*PROMPT, *OUTPUT))),
    "prompt from the prefix cache": ((3, PROMPT[3:]), (4, (7,)), (5, (4,)), (6, (7,))),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_history_is_the_same_in_whatever_slices_it_comes(way):
    history = TokenHistory(len(PROMPT), PROMPT)
    for start, tokens in WAYS[way]:
        history.follow(start, tokens)
    assert history.output == OUTPUT
    assert counted(history.counts) == {4: 1, 5: 0, 6: 0, 7: 2}


def test_a_resumed_request_brings_its_output_along():
    """Also when the prefix cache knows prompt and output, so that no slice shows them."""
    history = TokenHistory(len(PROMPT), PROMPT, OUTPUT)
    history.follow(6, (7,))
    history.follow(7, (9,))
    assert history.output == [*OUTPUT, 9]


def test_a_gap_is_an_error():
    with pytest.raises(ValueError, match="2 tokens before position 6 are missing"):
        TokenHistory(len(PROMPT)).follow(6, (1,))


@pytest.mark.parametrize(
    ("options", "samples", "kept"),
    [
        ({}, True, False),
        ({"temperature": 0.3, "min_p": 0.1, "logprobs": 3, "logit_bias": {3: 1.0}}, True, False),
        ({"presence_penalty": 0.1}, True, True),
        ({"frequency_penalty": 0.1}, True, True),
        ({"repetition_penalty": 1.1}, True, True),
        ({"repetition_penalty": 1.1}, False, False),
        ({"bad_words": ((3,),), "allowed_token_ids": (3, 4)}, True, False),
        ({"bad_words": ((3, 4),)}, True, True),
    ],
)
def test_only_the_sampling_rank_keeps_a_history_and_only_if_asked(options, samples, kept):
    table = SequenceTable(samples=samples)
    start = SequenceStart("a", SamplingParams(**options), 0, len(PROMPT))
    piece = SequenceSlice("a", 0, len(PROMPT), True, 0, (1,))
    (sequence,) = table.apply(StepCommand(Plan(0, (piece,)), (PROMPT,), (start,)))
    assert (sequence.history is not None) == kept
