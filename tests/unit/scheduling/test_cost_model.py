import pytest

from fastserve_mega.scheduling.cost_model import (
    DecodePoint,
    PrefillPoint,
    Profile,
    ProfiledCostModel,
)

PROFILE = Profile(
    prefill=(PrefillPoint(10, 1.0), PrefillPoint(20, 2.0), PrefillPoint(100, 18.0)),
    decode=(
        DecodePoint(1, 100, 0.5),
        DecodePoint(1, 200, 0.7),
        DecodePoint(9, 100, 1.3),
        DecodePoint(9, 200, 2.3),
    ),
)


@pytest.mark.parametrize(
    ("tokens", "seconds"),
    [(10, 1.0), (15, 1.5), (20, 2.0), (60, 10.0), (100, 18.0), (110, 20.0), (1, 1.0)],
)
def test_prefill_is_piecewise_linear(tokens, seconds):
    assert ProfiledCostModel(PROFILE).prefill_s(tokens) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("batch", "context", "seconds"),
    [(1, 100, 0.5), (1, 150, 0.6), (9, 200, 2.3), (5, 100, 0.9), (5, 150, 1.2), (1, 300, 0.9)],
)
def test_decode_is_linear_in_batch_and_context(batch, context, seconds):
    assert ProfiledCostModel(PROFILE).decode_s(batch, context) == pytest.approx(seconds)


def test_observed_steps_refine_it():
    model = ProfiledCostModel(PROFILE)
    for _ in range(500):
        model.observe(prefill_tokens=10, decodes=0, context=0, elapsed_s=1.5)
        model.observe(prefill_tokens=0, decodes=1, context=100, elapsed_s=0.25)
    assert model.prefill_s(20) == pytest.approx(3.0, rel=0.01)
    assert model.decode_s(1, 100) == pytest.approx(0.25, rel=0.01)


def test_load_does_not_move_it():
    """Long contexts, and decodes beside a prefill, take what the profile says they do."""
    model = ProfiledCostModel(PROFILE)
    for _ in range(500):
        model.observe(prefill_tokens=0, decodes=9, context=200, elapsed_s=2.3)
        # 20 tokens through the layers 2.0 s; nine contexts of 200 instead of none 2.3 - 1.3 s.
        model.observe(prefill_tokens=11, decodes=9, context=200, elapsed_s=3.0)
    assert model.decode_s(1, 100) == pytest.approx(0.5)
    assert model.prefill_s(20) == pytest.approx(2.0)


def test_one_stalled_step_hardly_moves_it():
    model = ProfiledCostModel(PROFILE)
    model.observe(prefill_tokens=10, decodes=0, context=0, elapsed_s=1000.0)
    assert model.prefill_s(10) < 1.03


def test_a_profile_must_have_both_kinds_and_positive_times():
    with pytest.raises(ValueError, match="at least one prefill and one decode"):
        Profile(prefill=(), decode=PROFILE.decode)
    with pytest.raises(ValueError, match="positive"):
        Profile(prefill=(PrefillPoint(1, 0.0),), decode=PROFILE.decode)
