import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve_mega.messaging import messages
from fastserve_mega.messaging.codec import MAX_FRAME_BYTES, BadFrameError, decode, encode
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
    messages.SequenceStart, names, params, st.integers(0, 2**63 - 1), counts, ids, ids
)
failures = st.lists(st.builds(messages.SamplingFailure, counts, names), max_size=2).map(tuple)
all_messages = st.one_of(
    st.just(messages.Hello()),
    st.just(messages.Ping()),
    st.just(messages.Shutdown()),
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
    ),
    st.builds(messages.Refused, names, st.none() | names),
    st.builds(messages.Pong, names),
    st.builds(messages.Metrics, names),
    st.builds(messages.WorkerReady, counts, counts, counts, counts),
    st.builds(messages.StepCommand, plans, st.lists(ids, max_size=3).map(tuple), st.tuples(starts)),
    st.builds(messages.StepResult, counts, ids, st.floats(0, 99), logprobs, failures),
    st.builds(messages.CopyResult, counts, counts, st.floats(0, 99)),
    st.builds(messages.WorkerFailed, counts, names),
)


@given(message=all_messages, trusted=st.booleans())
def test_every_message_survives_the_wire(message, trusted):
    assert decode(encode(message), trusted=trusted) == message


def test_kinds_are_unique_and_every_message_has_one():
    kinds = list(messages.KIND_OF.values())
    assert len(set(kinds)) == len(kinds) == len(messages.Kind)


def test_a_huge_frame_is_refused_unread():
    with pytest.raises(BadFrameError, match=f"at most {MAX_FRAME_BYTES} bytes"):
        decode(bytes(MAX_FRAME_BYTES + 1))


def test_defaults_may_be_left_out():
    import msgspec

    body = msgspec.msgpack.encode({"request_id": "r", "prompt": [1], "params": {}})
    frame = bytes((1, messages.Kind.SUBMIT)) + body
    assert decode(frame) == messages.Submit("r", (1,), SamplingParams())
