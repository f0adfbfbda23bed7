"""Equal hashes exactly where the tokens are equal from the start."""

from hypothesis import given
from hypothesis import strategies as st

from fastserve_mega.coordinator.live_request import BlockHashChain

TOKENS = st.lists(st.integers(0, 2), max_size=20)


@given(TOKENS, TOKENS)
def test_hashes_are_equal_as_far_as_the_tokens_are(first, second):
    one, two = (BlockHashChain(3, "").extend(tokens) for tokens in (first, second))
    assert len(one) == len(first) // 3
    for index, (a, b) in enumerate(zip(one, two, strict=False)):
        end = 3 * (index + 1)
        assert (a == b) == (first[:end] == second[:end])


@given(TOKENS, st.integers(0, 20))
def test_how_the_tokens_arrive_makes_no_difference(tokens, cut):
    whole, parts = BlockHashChain(4, "salt"), BlockHashChain(4, "salt")
    assert whole.extend(tokens) == parts.extend(tokens[:cut]) + parts.extend(tokens[cut:])


def test_a_salt_changes_every_hash():
    one, two = (BlockHashChain(2, salt).extend(range(8)) for salt in ("", "salt"))
    assert not set(one) & set(two)
