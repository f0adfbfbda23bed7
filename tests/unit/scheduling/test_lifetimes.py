"""How long answers go on: learned from those before, their prompts, hints and clients."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastserve_mega.scheduling.policies.lifetimes import (
    EDGES,
    KindsOfAnswers,
    Lifetimes,
    bucket_of,
)
from fastserve_mega.scheduling.request import ClientShare, Request
from fastserve_mega.types import RequestId


def ask(hint: int | None = None, client: str = "c", prompt: int = 100) -> Request:
    return Request(
        RequestId("r"),
        prompt,
        5000,
        0,
        1,
        prompt,
        expected_output_tokens=hint,
        share=ClientShare(client),
    )


def answer(lifetimes: Lifetimes, tokens: int) -> None:
    for bucket in range(bucket_of(tokens)):
        lifetimes.survived(bucket)
    lifetimes.ended(tokens)


def test_lengths_are_learned_from_answers_under_way_too():
    lifetimes = Lifetimes()
    before = lifetimes.effort_tokens(0)
    for _ in range(200):
        answer(lifetimes, 1000)
    assert lifetimes.effort_tokens(0) > 3 * before
    assert lifetimes.effort_tokens(900) < 300


def test_who_has_outlived_the_short_ones_is_expected_to_be_long():
    lifetimes = Lifetimes()
    for number in range(400):
        tokens = 1000 if number % 10 == 0 else 40
        answer(lifetimes, tokens)
    assert lifetimes.effort_tokens(0) < 60
    assert lifetimes.effort_tokens(100) > 500


@given(st.lists(st.integers(1, 20_000), max_size=200), st.integers(0, 30_000))
def test_an_effort_is_always_positive_and_finite(lengths, age):
    whole = Lifetimes()
    part = Lifetimes(whole)
    for tokens in lengths:
        answer(part, tokens)
    assert 0 < part.effort_tokens(age) < 1e9
    assert part.effort_tokens(age) == part.effort_tokens(age)


def test_buckets_cover_all_ages():
    assert all(earlier < later for earlier, later in pairwise(EDGES))
    assert bucket_of(0) == 0
    assert bucket_of(10**9) == len(EDGES) - 1


@settings(max_examples=20)
@given(st.floats(-1.0, 1.0))
def test_hints_that_are_wrong_by_the_same_factor_say_as_much_as_right_ones(exponent):
    factor = 10.0**exponent
    kinds = KindsOfAnswers()
    short, long = round(20 * factor), round(400 * factor)
    for _ in range(40):
        answer(kinds.of(ask(short)), 20)
        answer(kinds.of(ask(long)), 400)
    assert kinds.of(ask(short)).effort_tokens(0) < 40
    assert kinds.of(ask(long)).effort_tokens(0) > 200


def test_hints_that_mean_nothing_change_nothing():
    draw = random.Random(1)
    kinds = KindsOfAnswers()
    for _ in range(1000):
        tokens = draw.choice([20, 60, 200, 600])
        answer(kinds.of(ask(client="silent")), tokens)
        answer(kinds.of(ask(hint=1, client="liar")), tokens)
        answer(kinds.of(ask(hint=draw.choice([20, 60, 200, 600]), client="lost")), tokens)
    for age in (0, 30, 100, 300):
        silent = kinds.of(ask(client="silent")).effort_tokens(age)
        liar = kinds.of(ask(hint=1, client="liar")).effort_tokens(age)
        lost = kinds.of(ask(hint=20, client="lost")).effort_tokens(age)
        assert liar == pytest.approx(silent, rel=0.35)
        assert lost == pytest.approx(silent, rel=0.35)


@settings(max_examples=20)
@given(st.integers(1, 10_000), st.integers(1, 3000), st.integers(1, 300))
def test_what_one_client_says_hardly_changes_what_is_expected_of_another(hint, tokens, answers):
    kinds = KindsOfAnswers()
    for _ in range(100):
        answer(kinds.of(ask(hint=100, client="honest")), 100)
    before = kinds.of(ask(hint=100, client="honest")).effort_tokens(0)
    for _ in range(answers):
        answer(kinds.of(ask(hint=hint, client="liar")), tokens)
    for _ in range(16):  # and its own answers go on
        answer(kinds.of(ask(hint=100, client="honest")), 100)
    assert kinds.of(ask(hint=100, client="honest")).effort_tokens(0) == pytest.approx(
        before, rel=0.25
    )


def test_programs_repeat_themselves():
    kinds = KindsOfAnswers()
    for _ in range(100):
        answer(kinds.of(ask(client="classifier")), 3)
        answer(kinds.of(ask(client="writer")), 900)
    assert kinds.of(ask(client="classifier")).effort_tokens(0) < 10
    assert kinds.of(ask(client="writer")).effort_tokens(0) > 150


def test_of_many_clients_the_last_are_remembered():
    kinds = KindsOfAnswers()
    for number in range(2000):
        kinds.of(ask(client=f"c{number}"))
    assert len(kinds._of_clients) == 512
    assert kinds.of(ask(client="c1999")) is kinds.of(ask(client="c1999"))
