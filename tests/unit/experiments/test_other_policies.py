"""A log of a few calls, written by hand: what its requests were, and what they would have been."""

import pytest

from fastserve_mega.coordinator.event_log import SchedulerSetup, StepCall
from fastserve_mega.experiments.other_policies import (
    Recording,
    latencies,
    read_recording,
    simulate_policy,
)
from fastserve_mega.plan import BlockCopy, CopyDirection, Plan, SequenceSlice
from fastserve_mega.scheduling.cost_model import DecodePoint, PrefillPoint, Profile
from fastserve_mega.scheduling.events import Aborted, Arrived, CopyDone, StepDone
from fastserve_mega.scheduling.kv.pool import PoolSizes
from fastserve_mega.simulator.records import RequestRecord
from fastserve_mega.system.config import MlfqConfig, SchedulerConfig, SwapConfig
from fastserve_mega.types import RequestId

LONG, SHORT, GONE = (RequestId(name) for name in ("long", "short", "gone"))


def plan(step_id, *names, copies=()):
    batch = tuple(SequenceSlice(name, 0, 1, True, 0, ()) for name in names)
    return Plan(step_id, batch, copies)


def copy(copy_id, blocks):
    ids = tuple(range(blocks))
    return BlockCopy(copy_id, CopyDirection.SWAP_OUT, ids, ids, None)


CALLS = [
    StepCall(10.0, (Arrived(LONG, 9, 100), Arrived(GONE, 4, 8)), plan(0, LONG)),
    StepCall(11.0, (StepDone(0, 1.0), Arrived(SHORT, 2, 8, num_received_tokens=3)), plan(1, SHORT)),
    StepCall(12.0, (StepDone(1, 1.0, (SHORT,)),), plan(2, LONG, copies=(copy(0, 2), copy(1, 0)))),
    StepCall(13.0, (CopyDone(0), Aborted(GONE)), None),
    StepCall(14.0, (StepDone(2, 2.0), CopyDone(1)), plan(3, LONG)),
    StepCall(15.0, (Aborted(LONG), Aborted(LONG)), None),
    StepCall(16.0, (StepDone(3, 2.0),), None),
]


def test_requests_are_read_from_the_calls():
    recording = read_recording(CALLS)
    long, short = recording.records
    assert (long.prompt_tokens, long.output_tokens) == (9, 2)
    assert (long.arrival_s, long.first_token_s, long.finish_s) == (0.0, 1.0, 5.0)
    assert (short.prompt_tokens, short.output_tokens) == (5, 1)
    assert (short.arrival_s, short.first_token_s, short.finish_s) == (1.0, 2.0, 2.0)
    assert recording.left_out == 1
    assert recording.copy_block_s == 0.5


def test_a_log_without_tokens_cannot_be_simulated():
    with pytest.raises(ValueError, match="no request of the log got a token"):
        read_recording(CALLS[:1])


def test_a_short_request_waits_for_a_long_one_under_fcfs_alone():
    profile = Profile(
        prefill=(PrefillPoint(1, 1.0), PrefillPoint(100, 1.0)), decode=(DecodePoint(1, 1, 1.0),)
    )
    setup = SchedulerSetup(
        scheduler=SchedulerConfig(
            policy="skip_join_mlfq",
            max_batch_size=1,
            mlfq=MlfqConfig(base_quantum_s=1.0, starvation_limit_s=None),
        ),
        swap=SwapConfig(), pools=PoolSizes(100, 100, 16), profile=profile, window=1,
        first_step_id=0,
    )  # fmt: skip
    long = RequestRecord(9, 50, 0.0, 1.0, 50.0, 1.0, 1.0)
    short = RequestRecord(9, 2, 4.5, 51.0, 52.0, 1.0, 47.4)
    recording = Recording((long, short), left_out=0, copy_block_s=0.0)
    by_policy = {
        policy: simulate_policy(setup, recording, policy) for policy in ("fcfs", "skip_join_mlfq")
    }
    lengths = [(r.prompt_tokens, r.output_tokens) for r in by_policy["fcfs"]]
    assert lengths == [(9, 50), (9, 2)]
    assert by_policy["fcfs"][1].jct_s == pytest.approx(50.0 + 2.0 - 4.5)
    assert by_policy["skip_join_mlfq"][1].jct_s < 5.0


def test_latencies_are_summarized_by_measure():
    found = latencies(read_recording(CALLS).records)
    assert found["TTFT"]["mean"] == pytest.approx(1.0)
    assert found["JCT"]["mean"] == pytest.approx((5.0 + 1.0) / 2)
    assert found["JCT per token"]["mean"] == pytest.approx((2.5 + 1.0) / 2)
