import json
import re

import pytest

from fastserve_mega.coordinator.profile_file import load_profile, save_profile
from fastserve_mega.coordinator.profile_grid import ProfileLimits
from fastserve_mega.scheduling.cost_model import (
    ChunkPoint,
    DecodePoint,
    FirstPoint,
    MixedPoint,
    PrefillPoint,
    Profile,
)

PROFILE = Profile(
    (PrefillPoint(1, 0.1), PrefillPoint(2, 1 / 3)),
    (DecodePoint(1, 16, 0.05),),
    (MixedPoint(0, (1, 5), 0.06), MixedPoint(3, (2,), 0.07)),
    (ChunkPoint(16, 4, 0.08),),
    (FirstPoint(7, 0.0), FirstPoint(9, 0.01)),
    Profile((PrefillPoint(1, 0.06),), (DecodePoint(1, 16, 0.03),)),
)


def test_what_is_saved_is_loaded(tmp_path):
    path = tmp_path / "profile.json"
    save_profile(PROFILE, path)
    assert load_profile(path) == PROFILE
    assert list(tmp_path.iterdir()) == [path]
    assert json.loads(path.read_text())["decode"] == [{"batch": 1, "context": 16, "seconds": 0.05}]
    assert '\n  {"prefill_tokens": 0, "contexts": [1, 5], "seconds": 0.06},\n' in path.read_text()
    assert '\n   {"batch": 1, "context": 16, "seconds": 0.03}\n' in path.read_text()


def test_a_file_may_leave_out_what_only_simulations_need(tmp_path):
    path = tmp_path / "profile.json"
    path.write_text(f'{{"prefill": [{PREFILL}], "decode": [{DECODE}]}}')
    profile = load_profile(path)
    assert (profile.mixed, profile.chunks, profile.first, profile.pipelined) == ((), (), (), None)


PREFILL, DECODE = '{"tokens": 1, "seconds": 1.0}', '{"batch": 1, "context": 1, "seconds": 1.0}'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Input data was truncated"),
        ("[]", "Expected `object`, got `array`"),
        ("{}", "missing required field `prefill`"),
        ('{"prefill": [], "decode": [], "colour": 1}', "unknown field 'colour'"),
        (
            f'{{"prefill": [{PREFILL}], "decode": [{DECODE}], '
            '"mixed": [{"prefill_tokens": 1, "contexts": [], "seconds": 1.0}]}',
            "a mixed step of a profile has decodes",
        ),
        (
            f'{{"prefill": [{PREFILL}], "decode": [{DECODE}], '
            '"chunks": [{"start": 0, "tokens": 1, "seconds": 1.0}]}',
            "a later chunk of a profile has tokens",
        ),
        (
            f'{{"prefill": [{PREFILL}], "decode": [{DECODE}], '
            '"first": [{"tokens": 1, "extra_s": -1.0}]}',
            "the first steps of a profile have tokens, and no negative times",
        ),
        (
            f'{{"prefill": [{PREFILL}], "decode": [{DECODE}], "pipelined": {{"colour": 1}}}}',
            "unknown field 'pipelined.colour'",
        ),
        ('{"prefill": [], "decode": []}', "at least one prefill and one decode"),
        (f'{{"prefill": [{PREFILL}], "decode": [{{"batch": "1"}}]}}', "got `str`"),
        (f'{{"prefill": [{PREFILL}, {PREFILL}], "decode": [{DECODE}]}}', "of the same size"),
        (
            f'{{"prefill": [{{"tokens": 0, "seconds": 1.0}}], "decode": [{DECODE}]}}',
            "sizes of a profile must be positive",
        ),
        (
            f'{{"prefill": [{{"tokens": 1, "seconds": -1.0}}], "decode": [{DECODE}]}}',
            "times of a profile must be positive",
        ),
    ],
)
def test_mistakes_are_told_in_one_sentence(tmp_path, text, message):
    path = tmp_path / "profile.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        load_profile(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_a_missing_file(tmp_path):
    with pytest.raises(OSError, match="No such file"):
        load_profile(tmp_path / "missing.json")


@pytest.mark.parametrize("device_blocks", [2, 3, 17, 2048])
def test_the_grid_fits_into_the_pool(device_blocks):
    limits = ProfileLimits(
        device_blocks=device_blocks, block_size=16, max_batch_size=16, max_batch_tokens=256,
        max_context=4096,
    )  # fmt: skip
    room = device_blocks - 1
    lengths, shapes, mixed = limits.prefill_grid(), limits.decode_grid(), limits.mixed_grid()
    assert lengths
    assert shapes
    assert all(-(-length // 16) <= room for length in lengths)
    assert all(batch * -(-(context + 1) // 16) <= room for batch, context in shapes)
    assert all(1 <= batch <= 16 and context < 4096 for batch, context in shapes)
    assert len(set(shapes)) == len(shapes)
    for tokens, contexts in mixed:
        assert sum(-(-(context + 1) // 16) for context in contexts) + -(-tokens // 16) <= room
        assert len(contexts) <= 16
        assert tokens + len(contexts) <= 256
    if device_blocks == 2048:
        assert {tokens for tokens, _ in mixed} == {0, 16, 64}
        assert {len(contexts) for _, contexts in mixed} == {8, 15, 16}
    known = {*lengths, *(tokens for _, tokens in limits.chunk_grid())}
    known |= {batch for batch, _ in shapes} | {tokens + len(contexts) for tokens, contexts in mixed}
    first = limits.first_grid()
    assert not known & set(first)
    assert all(1 <= length <= limits.max_prefill for length in first)
    assert len(set(first)) == len(first)
    for start, tokens in limits.chunk_grid():
        assert start + tokens <= limits.max_decode_context
    for batch, context in limits.quick_decodes():
        assert 1 <= batch <= limits.max_decodes(context)
