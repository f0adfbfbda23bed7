"""Equal hashes exactly where the tokens are equal from the start."""

from hypothesis import given
from hypothesis import strategies as st

from fastserve_mega.coordinator.live_request import LiveRequest, hash_blocks
from fastserve_mega.messaging.messages import Submit
from fastserve_mega.types import SamplingParams

TOKENS = st.lists(st.integers(0, 2), max_size=20)


@given(TOKENS, TOKENS)
def test_hashes_are_equal_as_far_as_the_tokens_are(first, second):
    one, two = (hash_blocks(tokens, 3, b"") for tokens in (first, second))
    assert len(one) == len(first) // 3
    for index, (a, b) in enumerate(zip(one, two, strict=False)):
        end = 3 * (index + 1)
        assert (a == b) == (first[:end] == second[:end])


@given(TOKENS, st.integers(0, 20), st.integers(0, 20))
def test_how_the_tokens_arrive_makes_no_difference(tokens, end, cut):
    def live(prompt, received):
        submit = Submit("r", prompt, SamplingParams(), cache_salt="salt")
        return LiveRequest(submit, b"client", 0.0, received, 4)

    parts = live(tokens[:end], tokens[end:cut])
    hashes = list(parts.arrived().block_hashes)
    for token in tokens[max(end, cut) :]:
        parts.append(token, None, 0.0)
        hashes += [each] if (each := parts.hash_of_filled_block()) else []
    assert tuple(hashes) == live(tokens, []).arrived().block_hashes


def test_a_salt_changes_every_hash():
    one, two = (hash_blocks(range(8), 2, salt) for salt in (b"", b"salt"))
    assert not set(one) & set(two)
