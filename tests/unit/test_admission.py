"""What a rank is told of a request fits into a frame, or the request is refused."""

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from fastserve_mega.coordinator.admission import Admission, bytes_to_tell
from fastserve_mega.coordinator.live_request import LiveRequest
from fastserve_mega.messaging.frames import MAX_FRAME_BYTES, encode
from fastserve_mega.messaging.messages import Submit
from fastserve_mega.messaging.rank_messages import SequencesStarted
from fastserve_mega.types import MAX_SEED, SamplingParams, StructuredOutput

tokens = st.lists(st.sampled_from((0, 127, 65_536, 2**32 - 1)), max_size=300).map(tuple)
texts = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=300)
structures = st.one_of(
    st.none(),
    st.builds(lambda text: StructuredOutput(regex=text), texts),
    st.builds(lambda text: StructuredOutput(json_schema=text), texts),
    st.builds(
        lambda choice: StructuredOutput(choice=(*choice, "a")),
        st.lists(st.one_of(texts, st.just("")), max_size=50),
    ),
)
params = st.builds(
    SamplingParams,
    max_tokens=st.just(2**62),
    seed=st.just(MAX_SEED),
    top_k=st.just(2**62),
    repetition_penalty=st.just(1.1),
    logprobs=st.just(20),
    stop_token_ids=st.lists(st.sampled_from((1, 2**62)), max_size=300).map(tuple),
    logit_bias=st.dictionaries(st.integers(0, 2**32), st.sampled_from((0.0, 1.5)), max_size=300),
    allowed_token_ids=st.lists(st.integers(0, 2**32), max_size=300).map(tuple),
    bad_words=st.lists(
        st.lists(st.integers(0, 2**32), min_size=1, max_size=9).map(tuple), max_size=99
    ).map(tuple),
    structured=structures,
)


@given(params=params, prompt=tokens, received=tokens, request_id=st.text("r🙂", max_size=256))
def test_no_frame_is_longer_than_was_thought(params, prompt, received, request_id):
    submit = Submit(request_id, prompt, params, received)
    live = LiveRequest(submit, b"client", 0.0, list(received))
    assert len(encode(SequencesStarted((live.sequence_start,)))) <= bytes_to_tell(submit)


def test_a_request_that_no_rank_would_be_told_of_is_refused_with_the_limit():
    admission = Admission(
        vocab_size=100,
        eos_token_ids=(0,),
        max_context=10**9,
        max_queued_requests=9,
        max_queued_tokens=9,
    )
    longest = Submit("r", (1,) * (MAX_FRAME_BYTES // 5 - 1000), SamplingParams())
    assert admission.refusal(longest) is None
    over = msgspec.structs.replace(longest, prompt=(1,) * (MAX_FRAME_BYTES // 5))
    assert f"the limit is {MAX_FRAME_BYTES}" in str(admission.refusal(over))
