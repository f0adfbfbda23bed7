import pytest
from msgspec.structs import replace

from fastserve_mega.scheduling.cost_model import (
    ChunkPoint,
    DecodePoint,
    FirstPoint,
    MixedPoint,
    PrefillPoint,
    Profile,
)
from fastserve_mega.simulator.engine_model import StepWork
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


def chunk(start, tokens):
    return StepWork(tokens, 1, 0, 0, start + tokens, 0, start * tokens)


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


def test_a_later_chunk_reads_what_came_before():
    # 0.002 s for each token before a chunk of 10 tokens, 0.004 s before one of 30.
    chunks = (
        ChunkPoint(100, 10, 2.0 + 0.2), ChunkPoint(200, 10, 2.0 + 0.4), ChunkPoint(100, 30, 4.4)
    )  # fmt: skip
    engine = ProfiledEngine(replace(PROFILE, chunks=chunks), (30,))
    assert engine.step_s(chunk(50, 10)) == pytest.approx(2.1)
    assert engine.step_s(chunk(50, 20)) == pytest.approx(3.0 + 50 * 0.003)
    assert engine.step_s(chunk(0, 20)) == pytest.approx(3.0)
    assert ENGINE.step_s(chunk(50, 20)) == pytest.approx(3.0)


def test_the_first_step_of_a_size_takes_longer_once():
    first = (FirstPoint(20, 0.4), FirstPoint(21, 0.5), FirstPoint(22, 9.0))
    engine = ProfiledEngine(replace(PROFILE, first=first), (20, 10))
    assert sum(engine.stage_times(work(20))) == pytest.approx(3.0 + 0.5)
    assert sum(engine.stage_times(work(20))) == pytest.approx(3.0)
    # Twenty tokens are twenty tokens, whoever they are of.
    assert sum(engine.stage_times(work(19, [0]))) == pytest.approx(engine.step_s(work(19, [0])))
    assert engine.stage_times(work(10)) == pytest.approx([2 / 3 * 2.5, 1 / 3 * 2.5])


def test_stages_share_by_layers():
    engine = ProfiledEngine(PROFILE, (16, 14))
    assert engine.stage_times(work(20)) == pytest.approx([1.6, 1.4])
    assert list(engine.hop_times(20)) == [0.0, 0.0]


def test_copies_take_their_blocks_time():
    assert ProfiledEngine(PROFILE, (30,), copy_block_s=0.002).copy_s(5, 16) == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("interval_share", "layers", "stages"),
    [
        (0.6, (15, 15), [1.2, 1.8]),  # the last has the output layer
        (0.6, (20, 10), [1.8, 1.2]),
        (1.2, (15, 15), [0.0, 3.6]),  # stages that disturb each other
        (0.4, (10, 10, 10), [0.9, 0.9, 1.2]),
        (0.3, (15, 15), [0.9, 0.9]),  # no stage is slower than the slowest
    ],
)
def test_the_slowest_stage_takes_the_interval_of_the_results(interval_share, layers, stages):
    pipelined = replace(
        PROFILE,
        prefill=tuple(replace(p, seconds=interval_share * p.seconds) for p in PROFILE.prefill),
    )
    engine = ProfiledEngine(replace(PROFILE, pipelined=pipelined), layers)
    assert engine.stage_times(work(20)) == pytest.approx(stages)
