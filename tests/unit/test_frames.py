from typing import get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve_mega.messaging import messages, rank_messages
from fastserve_mega.messaging.frames import (
    MAX_FRAME_BYTES,
    PROTOCOL_VERSION,
    BadFrameError,
    OtherVersionError,
    decode,
    encode,
    encode_refusal,
)
from fastserve_mega.plan import BlockCopy, CopyDirection, Plan, SequenceSlice
from fastserve_mega.types import (
    FinishReason,
    SamplingParams,
    StructuredOutput,
    TokenLogprobs,
    Usage,
)

counts = st.integers(0, 2**40)
names = st.text(min_size=1, max_size=20)
ids = st.lists(st.integers(0, 2**31), max_size=8).map(tuple)
params = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 10_000),
    temperature=st.floats(0, 100),
    top_p=st.floats(0.01, 1),
    top_k=st.integers(0, 1000),
    seed=st.none() | st.integers(0, 2**63 - 1),
    stop_token_ids=ids,
    ignore_eos=st.just(False),
    min_tokens=st.just(0),
    min_p=st.floats(0, 1),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
    repetition_penalty=st.floats(0.1, 10),
    logit_bias=st.dictionaries(st.integers(0, 2**31), st.floats(-100, 100), max_size=3),
    logprobs=st.none() | st.integers(0, 20),
    structured=st.none()
    | st.builds(StructuredOutput, regex=names)
    | st.builds(StructuredOutput, choice=st.tuples(names, names)),
)
logprobs = st.lists(
    st.none()
    | st.builds(TokenLogprobs, st.floats(-99, 0), ids, st.lists(st.floats(-99, 0)).map(tuple)),
    max_size=3,
).map(tuple)
slices = st.builds(
    SequenceSlice, names, st.integers(0, 99), st.integers(1, 9), st.booleans(), counts, ids
)
copies = st.builds(BlockCopy, counts, st.sampled_from(CopyDirection), ids, ids, st.none() | counts)
plans = st.builds(
    Plan,
    counts,
    st.lists(slices, max_size=3).map(tuple),
    st.lists(copies, max_size=2).map(tuple),
    st.lists(names, max_size=2).map(tuple),
)
starts = st.builds(
    rank_messages.SequenceStart, names, params, st.integers(-(2**63), 2**63 - 1), counts, ids, ids
)
failures = st.lists(
    st.builds(rank_messages.SamplingFailure, counts, names, st.booleans()), max_size=2
).map(tuple)
all_messages = st.one_of(
    st.just(messages.Hello()),
    st.just(messages.Ping()),
    st.builds(rank_messages.Shutdown, st.booleans()),
    st.just(rank_messages.KeepAlive()),
    st.just(messages.GetMetrics()),
    st.builds(
        messages.Submit, names, ids, params, ids, st.integers(-9, 9), st.none() | st.floats(0, 99)
    ),
    st.builds(messages.Cancel, names),
    st.builds(messages.Welcome, names, names, names, counts, counts, ids),
    st.builds(messages.Tokens, names, counts, ids, logprobs),
    st.builds(
        messages.Finished,
        names,
        st.sampled_from(FinishReason),
        st.builds(Usage, counts, counts),
        names,
        st.booleans(),
    ),
    st.builds(messages.Refused, names, st.none() | names),
    st.builds(messages.Pong, names),
    st.builds(messages.Metrics, names),
    st.builds(rank_messages.WorkerReady, counts, counts, counts, counts),
    st.builds(
        rank_messages.StepCommand, plans, st.lists(ids, max_size=3).map(tuple), st.tuples(starts)
    ),
    st.builds(rank_messages.StepResult, counts, ids, st.floats(0, 99), logprobs, failures),
    st.builds(rank_messages.CopyResult, counts, counts, st.floats(0, 99)),
    st.builds(rank_messages.WorkerFailed, counts, names),
)


@given(message=all_messages)
def test_every_message_survives_the_wire(message):
    assert decode(encode(message)) == message


def test_every_message_is_named_by_its_class():
    kinds = get_args(messages.Message)
    assert len(kinds) == 23
    for kind in kinds:
        assert kind.__struct_config__.tag == kind.__name__
        assert kind.__struct_config__.tag_field == "type"


def frame_of(fields):
    return bytes((PROTOCOL_VERSION,)) + msgspec.msgpack.encode(fields)


def refusal_of(frame):
    """What is wrong with a frame; empty when nothing is."""
    try:
        decode(frame)
    except BadFrameError as error:
        return str(error)
    return ""


def test_a_huge_frame_is_refused_unread():
    with pytest.raises(BadFrameError, match=f"at most {MAX_FRAME_BYTES} bytes"):
        decode(bytes(MAX_FRAME_BYTES + 1))


def test_defaults_may_be_left_out():
    fields = {"type": "Submit", "request_id": "r", "prompt": [1], "params": {}}
    assert decode(frame_of(fields)) == messages.Submit("r", (1,), SamplingParams())


def test_a_client_skips_fields_of_a_newer_coordinator():
    usage = {"prompt_tokens": 1, "completion_tokens": 2, "reasoning_tokens": 1}
    finished = {"type": "Finished", "request_id": "r", "reason": "stop", "usage": usage, "new": 1}
    assert decode(frame_of(finished)) == messages.Finished("r", FinishReason.STOP, Usage(1, 2))


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"type": "Pong"}, "Pong: Object missing required field `epoch`"),
        (
            {"type": "CopyResult", "copy_id": 1, "rank": -1, "copy_s": 0.5},
            "CopyResult: rank must be at least 0, got -1",
        ),
        (
            {
                "type": "StepCommand", "token_ids": [],
                "plan": {"step_id": 1, "batch": [["r", 0, -3, True, 0, []]]},
            },
            "StepCommand: plan.batch[0][2] must be at least 0, got -3",
        ),
        (
            {"type": "StepCommand", "token_ids": [], "plan": {"step_id": 1, "bach": []}},
            "StepCommand: unknown field 'plan.bach'; known fields are step_id, batch, copies, "
            "released",
        ),
    ],
)  # fmt: skip
def test_a_wrong_field_is_named_with_its_value_and_limit(fields, sentence):
    with pytest.raises(BadFrameError) as caught:
        decode(frame_of(fields))
    assert str(caught.value) == sentence


def test_messages_of_other_versions_are_told_apart():
    with pytest.raises(OtherVersionError, match="version 2, got a message of version 1") as caught:
        decode(b"\x01\x01\x80")
    assert caught.value.version == 1


def test_a_refusal_can_be_read_by_a_client_of_version_1():
    refused = messages.Refused("no")
    version, kind, body = (frame := encode_refusal(refused, 1))[0], frame[1], frame[2:]
    assert (version, kind) == (1, 35)
    assert msgspec.msgpack.decode(body) == {"type": "Refused", "message": "no", "request_id": None}
    assert encode_refusal(refused, 9) == encode(refused)


@pytest.mark.parametrize("request_id", ["r", None, 7])
def test_a_bad_frame_names_its_request_where_it_can(request_id):
    with pytest.raises(BadFrameError) as caught:
        decode(frame_of({"type": "Submit", "request_id": request_id, "prompt": [], "params": 0}))
    assert caught.value.request_id == (request_id if request_id == "r" else None)


field_names = st.sampled_from(
    sorted(
        {name for kind in get_args(messages.Message) for name in kind.__struct_fields__}
        | {*Plan.__struct_fields__, *SamplingParams.__struct_fields__, "colour", "type"}
    )
)
anything = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2**40) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(field_names, inner, max_size=3),
    max_leaves=8,
)


@given(
    fields=st.dictionaries(field_names, anything, max_size=6),
    kind=anything | st.sampled_from([kind.__name__ for kind in get_args(messages.Message)]),
)
def test_whatever_a_map_has_it_is_a_message_or_refused_in_one_sentence(fields, kind):
    assert "\n" not in refusal_of(frame_of({**fields, "type": kind}))
