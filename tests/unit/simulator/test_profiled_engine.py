from dataclasses import replace

import pytest

from fastserve_mega.scheduling.cost_model import DecodePoint, MixedPoint, PrefillPoint, Profile
from fastserve_mega.simulator.analytic_cost_model import StepWork
from fastserve_mega.simulator.profiled_engine import ProfiledEngine

# Prefill: 1 s and 0.1 s per token. Decode: 1 s, 0.2 s per request, 0.01 s per request and token.
PROFILE = Profile(
    prefill=(PrefillPoint(1, 1.1), PrefillPoint(101, 11.1)),
    decode=tuple(
        DecodePoint(batch, context, 1 + batch * (0.2 + 0.01 * context))
        for batch in (1, 8)
        for context in (0, 100)
    ),
)
ENGINE = ProfiledEngine(PROFILE, (30,))


def work(prefill_tokens, decode_contexts=()):
    """`decode_contexts`: tokens before the new one."""
    count = len(decode_contexts)
    total = sum(decode_contexts) + count
    return StepWork(prefill_tokens + count, count, count, total, prefill_tokens, 0)


@pytest.mark.parametrize(
    ("step", "seconds"),
    [
        (work(20), 3.0),
        (work(0, [0]), 1.2),
        (work(0, [50]), 1.7),
        (work(0, [10, 30]), 1 + 2 * (0.2 + 0.01 * 20)),
        # One prefill of 22 tokens; beyond its two tokens of linear layers a decode of two requests
        # costs 2 x (0.2 + 0.01 x 20 - 0.1).
        (work(20, [10, 30]), 1 + 22 * 0.1 + 2 * 0.3),
    ],
)
def test_steps_by_hand(step, seconds):
    assert ENGINE.step_s(step) == pytest.approx(seconds)
    assert ENGINE.stage_times(step) == [pytest.approx(seconds)]


def test_mixed_measurements_correct_it():
    mixed = (
        # Twice as long as equal requests of the mean context.
        MixedPoint(0, (10, 30), 2 * (1 + 2 * (0.2 + 0.01 * 20))),
        # 22 tokens are 3.2 s, the KV of the decodes (spread) is 3.6 - 1.2 s; 0.5 s is left.
        MixedPoint(20, (10, 30), 3.2 + 2.4 + 0.5),
    )
    engine = ProfiledEngine(replace(PROFILE, mixed=mixed), (30,))
    assert engine.step_s(work(20)) == pytest.approx(3.0)
    assert engine.step_s(work(0, [50])) == pytest.approx(1.7)
    assert engine.step_s(work(0, [50, 50])) == pytest.approx(2 * (1 + 2 * 0.7))
    for point in mixed:
        step = work(point.prefill_tokens, point.contexts)
        assert engine.step_s(step) == pytest.approx(point.seconds)


def test_stages_share_by_layers():
    engine = ProfiledEngine(PROFILE, (16, 14))
    assert engine.stage_times(work(20)) == pytest.approx([1.6, 1.4])
    assert list(engine.hop_times(20)) == [0.0, 0.0]


def test_copies_take_their_blocks_time():
    assert ProfiledEngine(PROFILE, (30,), copy_block_s=0.002).copy_s(5, 16) == pytest.approx(0.01)
