"""Which replica a request goes to, on schedulers with known costs."""

import pytest
from fixed_costs import FixedCosts, make_scheduler

from fastserve_mega.scheduling.events import Arrived, StepDone
from fastserve_mega.scheduling.placement import Placement


def make_schedulers(count):
    return [make_scheduler() for _ in range(count)]


def arrival(number, prompt_tokens=8, hashes=()):
    return Arrived(f"r{number}", prompt_tokens, max_tokens=16, block_hashes=hashes)


def place(placement, schedulers, arrived):
    replica = placement.choose(arrived)
    schedulers[replica].step(0.0, [arrived])
    placement.settle()
    return replica


def test_equal_requests_go_round():
    schedulers = make_schedulers(3)
    placement = Placement(schedulers)
    chosen = [place(placement, schedulers, arrival(i)) for i in range(6)]
    assert chosen == [0, 1, 2, 0, 1, 2]


def test_a_burst_is_spread_before_any_scheduler_has_heard_of_it():
    placement = Placement(make_schedulers(3))
    assert [placement.choose(arrival(i)) for i in range(6)] == [0, 1, 2, 0, 1, 2]


def test_prefills_that_wait_count_by_their_length():
    schedulers = make_schedulers(2)
    placement = Placement(schedulers)
    assert place(placement, schedulers, arrival(0, prompt_tokens=3_000)) == 0
    # All of these together are less work than the long prompt.
    chosen = [place(placement, schedulers, arrival(1 + i)) for i in range(4)]
    assert chosen == [1, 1, 1, 1]


def test_a_prefill_that_has_run_counts_no_more():
    schedulers = make_schedulers(2)
    busy = schedulers[0]
    before = busy.expected_work_s(10)
    plan = busy.step(0.0, [arrival(0, prompt_tokens=100)])
    waiting = busy.expected_work_s(10)
    busy.step(1.0, [StepDone(plan.step_id, 1.0)])
    assert before == 0.0
    assert waiting - busy.expected_work_s(10) == pytest.approx(FixedCosts().prefill_s(100))
    busy.check_integrity()


def test_a_conversation_stays_where_its_prefix_is_cached():
    schedulers = make_schedulers(2)
    placement = Placement(schedulers)
    hashes = tuple(bytes([i]) * 16 for i in range(20))
    first = arrival(0, prompt_tokens=81, hashes=hashes)
    plan = schedulers[1].step(0.0, [first])
    while plan:
        schedulers[1].step(1.0, [StepDone(plan.step_id, 1.0, finished=("r0",))])
        plan = schedulers[1].step(1.0)
    assert placement.choose(arrival(1, prompt_tokens=85, hashes=hashes)) == 1
    assert Placement(schedulers).choose(arrival(2, prompt_tokens=85)) == 0


def test_unless_the_other_replica_is_much_less_busy():
    schedulers = make_schedulers(2)
    hashes = tuple(bytes([i]) * 16 for i in range(20))
    plan = schedulers[1].step(0.0, [arrival(0, prompt_tokens=81, hashes=hashes)])
    assert plan
    schedulers[1].step(1.0, [StepDone(plan.step_id, 1.0, finished=("r0",))])
    schedulers[1].step(1.0, [arrival(10 + i, prompt_tokens=400) for i in range(8)])
    assert Placement(schedulers).choose(arrival(1, prompt_tokens=85, hashes=hashes)) == 0


def test_longer_answers_make_unfinished_requests_weigh_more():
    schedulers = make_schedulers(2)
    for i in range(6):
        schedulers[0].step(0.0, [arrival(i, prompt_tokens=1)])
    schedulers[1].step(0.0, [arrival(9, prompt_tokens=300)])
    short, long = Placement(schedulers), Placement(schedulers)
    for _ in range(50):
        short.observe_finish(1)
        long.observe_finish(2_000)
    assert short.choose(arrival(20)) == 0
    assert long.choose(arrival(20)) == 1
