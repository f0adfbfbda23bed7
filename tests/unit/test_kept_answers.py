"""How long, and how many, answers are kept for those who ask again."""

import pytest

from fastserve_mega.coordinator.intake import KeptAnswers
from fastserve_mega.coordinator.live_request import LiveRequest
from fastserve_mega.messaging.messages import Submit
from fastserve_mega.types import FinishReason, SamplingParams


def ended(name: str, *, fingerprint: str = "f", tokens: int = 8) -> LiveRequest:
    submit = Submit(name, (1, 2), SamplingParams(max_tokens=99), fingerprint=fingerprint)
    return LiveRequest(submit, b"client", 0.0, [5] * tokens)


def test_an_answer_is_kept_for_a_minute():
    kept = KeptAnswers()
    kept.keep(ended("a"), FinishReason.STOP, now=10.0)
    assert kept.get("a", 69.9).is_whole
    assert kept.get("a", 70.0) is None


@pytest.mark.parametrize(
    ("fingerprint", "reason"), [("", FinishReason.STOP), ("f", FinishReason.ERROR)]
)
def test_failures_and_what_nobody_may_ask_for_are_not_kept(fingerprint, reason):
    kept = KeptAnswers()
    kept.keep(ended("a", fingerprint=fingerprint), reason, now=0.0)
    assert len(kept) == 0


def test_the_oldest_make_room():
    kept = KeptAnswers(most_tokens=25)
    for name in ("a", "b", "c"):
        kept.keep(ended(name), FinishReason.LENGTH, now=0.0)
    assert [kept.get(name, 0.0) is not None for name in "abc"] == [False, True, True]


def test_what_goes_on_is_not_counted_twice():
    kept = KeptAnswers(most_tokens=25)
    for _ in range(5):
        kept.keep(ended("a"), FinishReason.ABORT, now=0.0)
    kept.keep(ended("b"), FinishReason.ABORT, now=0.0)
    kept.take("a", 0.0)
    assert kept.get("a", 0.0) is None
    kept.keep(ended("c"), FinishReason.ABORT, now=0.0)
    assert not kept.get("b", 0.0).is_whole
