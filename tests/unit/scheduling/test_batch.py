"""How the tokens of one step are shared out."""

from __future__ import annotations

from fixed_costs import arrived, make_scheduler

from fastserve_mega.scheduling.events import StepDone


def tokens_of(plan):
    return {piece.request_id: piece.num_tokens for piece in plan.batch}


def test_prefills_need_no_tokens_kept_for_places_that_prefills_will_have():
    scheduler = make_scheduler(max_batch_size=64, max_batch_tokens=64)
    plan = scheduler.step(0.0, [arrived(f"r{i}", 60) for i in range(64)])
    assert tokens_of(plan) == {"r0": 60, "r1": 4}


def test_a_prefill_leaves_a_token_to_each_decode_that_stands_behind_it():
    scheduler = make_scheduler(max_batch_size=64, max_batch_tokens=64)
    plan = scheduler.step(0.0, [arrived(f"decode{i}", 10, priority=2) for i in range(3)])
    events = [StepDone(plan.step_id, 1.0), arrived("prompt", 200, priority=-9)]
    plan = scheduler.step(1.0, events)
    assert tokens_of(plan) == {"prompt": 61, "decode0": 1, "decode1": 1, "decode2": 1}


def test_decodes_of_other_pipeline_stages_keep_no_tokens_from_a_prefill():
    scheduler = make_scheduler(max_batch_size=64, max_batch_tokens=64, window=2)
    first = scheduler.step(0.0, [arrived(f"r{i}", 8) for i in range(4)])
    second = scheduler.step(0.0)
    assert len(first.batch) == len(second.batch) == 2
    done = StepDone(first.step_id, 1.0)
    plan = scheduler.step(1.0, [done, arrived("prompt", 200, priority=-9)])
    # Those of the second step are still on their way.
    assert tokens_of(plan) == {"prompt": 62, "r0": 1, "r1": 1}


def test_a_prefill_takes_no_more_than_the_places_behind_it_leave():
    scheduler = make_scheduler(max_batch_size=2, max_batch_tokens=64)
    plan = scheduler.step(0.0, [arrived(f"decode{i}", 10, priority=2) for i in range(2)])
    plan = scheduler.step(1.0, [StepDone(plan.step_id, 1.0), arrived("prompt", 200, priority=-9)])
    assert tokens_of(plan) == {"prompt": 63, "decode0": 1}
