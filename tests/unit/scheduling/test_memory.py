"""Admission, growth and preemption, by example."""

import pytest
from fixed_costs import Driver, arrived, make_scheduler, names

from fastserve_mega.scheduling.events import Aborted, CopyDone, StepDone, WorkersLost
from fastserve_mega.system.config import SwapConfig


def test_a_long_prompt_does_not_block_requests_behind_it():
    scheduler = make_scheduler(policy="fcfs", max_batch_tokens=8, max_batch_size=2)
    driver = Driver(scheduler, {"long": 1, "short": 1})
    driver.step([arrived("long", 100), arrived("short", 1)])
    driver.run_until_idle()  # prefilled in chunks
    assert max(plan.num_tokens for plan in driver.plans) == 8

    scheduler = make_scheduler(policy="fcfs", device_blocks=6, max_batch_size=3)
    driver = Driver(scheduler, {"first": 10, "big": 1, "small": 1})
    plan = driver.step([arrived("first", 8, 10), arrived("big", 16, 1), arrived("small", 2, 1)])
    assert names(plan) == ["first", "small"]
    driver.run_until_idle()


def test_who_is_passed_over_too_often_is_served_before_those_behind_it():
    scheduler = make_scheduler(policy="fcfs", device_blocks=6, max_batch_size=3, max_passed_over=2)
    outputs = {"first": 10, "big": 1, **{f"s{i}": 1 for i in range(100)}}
    driver = Driver(scheduler, outputs)
    driver.step([arrived("first", 8, 10), arrived("big", 16, 1)])
    for i in range(100):
        plan = driver.step([arrived(f"s{i}", 2, 1)])
        if "big" in names(plan):
            break
    served_before = sum(name.startswith("s") for plan in driver.plans for name in names(plan))
    assert "big" in driver.finished_at or "big" in names(driver.plans[-1])
    assert served_before <= 3


def test_abort_in_flight_frees_blocks_only_after_the_step():
    scheduler = make_scheduler(device_blocks=6, max_batch_size=1)
    plan = scheduler.step(0.0, [arrived("a", 16)])
    assert scheduler.step(0.1, [Aborted("a")]) is None
    assert scheduler.memory.device.free_count == 1
    scheduler.check_integrity()
    after = scheduler.step(1.0, [StepDone(plan.step_id, 1.0), arrived("b", 4)])
    assert scheduler.memory.device.free_count == 4
    assert after.released == ("a",)


def test_an_id_can_be_used_again_while_its_old_step_runs():
    scheduler = make_scheduler(max_batch_size=1)
    plan = scheduler.step(0.0, [arrived("a", 4)])
    scheduler.step(0.1, [Aborted("a"), arrived("a", 8)])
    again = scheduler.step(1.0, [StepDone(plan.step_id, 1.0)])
    assert again.released == ("a",)
    (piece,) = again.batch
    assert (piece.request_id, piece.start, piece.num_tokens, piece.samples) == ("a", 0, 8, True)
    scheduler.check_integrity()


def test_aborting_an_unknown_request_does_nothing():
    scheduler = make_scheduler()
    assert scheduler.step(0.0, [Aborted("nobody")]) is None


def test_lower_priority_gives_up_memory_and_is_prefilled_again():
    scheduler = make_scheduler(device_blocks=6, max_batch_size=1)
    driver = Driver(scheduler, {"long": 6, "short": 3})
    driver.step([arrived("long", 12, 6)])
    driver.step()
    plan = driver.step([arrived("short", 8, 3)])
    assert names(plan) == ["short"]
    assert scheduler.memory.swapper.preemptions == 1
    driver.run_until_idle()
    prefills = [
        piece
        for plan in driver.plans
        for piece in plan.batch
        if piece.request_id == "long" and piece.num_tokens > 1
    ]
    assert [(piece.start, piece.num_tokens) for piece in prefills] == [(0, 12), (0, 14)]
    assert scheduler.memory.swapper.recomputed_tokens == 13


def test_two_that_cannot_both_stay_still_finish():
    scheduler = make_scheduler(device_blocks=6, max_batch_size=2, starvation_limit_s=0.5)
    driver = Driver(scheduler, {"a": 12, "b": 12})
    driver.step([arrived("a", 8, 12), arrived("b", 8, 12)])
    driver.run_until_idle(limit=200)
    assert set(driver.finished_at) == {"a", "b"}


def test_losing_the_workers_loses_no_request():
    scheduler = make_scheduler(window=2, max_batch_size=1)
    scheduler.step(0.0, [arrived("a", 4, 2), arrived("b", 4, 2)])
    scheduler.step(0.0)
    assert scheduler.view(0.0, 0).steps_in_flight == 2
    plan = scheduler.step(1.0, [WorkersLost()])
    scheduler.check_integrity()
    assert plan.batch[0].start == 0
    assert scheduler.unfinished == 2


def test_a_window_keeps_requests_in_flight_apart():
    scheduler = make_scheduler(window=2, max_batch_size=4)
    first = scheduler.step(0.0, [arrived(name, 4) for name in "abcd"])
    second = scheduler.step(0.0)
    assert scheduler.step(0.0) is None
    assert (names(first), names(second)) == (["a", "b"], ["c", "d"])


def test_the_same_id_twice_is_an_error_of_the_caller():
    scheduler = make_scheduler()
    scheduler.step(0.0, [arrived("a", 4)])
    with pytest.raises(ValueError, match="arrived again"):
        scheduler.step(0.0, [arrived("a", 4)])


def test_abort_in_flight_while_its_blocks_are_written_through():
    """The copy may be reported before the step: both ends must come before the blocks are free."""
    swap = SwapConfig(strategy="proactive", write_through_occupancy=0.0)
    scheduler = make_scheduler(device_blocks=20, host_blocks=20, swap=swap, max_batch_size=1)
    driver = Driver(scheduler, {"a": 50, "b": 50})
    driver.step([arrived("a", 10)])
    copies = []
    while not copies:
        plan = driver.step([arrived("b", 10)] if len(driver.plans) == 1 else [])
        copies = [copy for copy in plan.copies if copy.precedes_step is None]
    scheduler.step(driver.now, [Aborted("a"), Aborted("b")])
    scheduler.step(driver.now, [CopyDone(copy.copy_id) for copy in copies])
    scheduler.check_integrity()
    scheduler.step(driver.now, [StepDone(plan.step_id, 1.0)])
    scheduler.check_integrity()
    assert scheduler.memory.device.free_count == 19
    assert scheduler.memory.host.free_count == 19


def test_blocks_are_not_held_for_who_will_not_come_back():
    """Else, with nothing in flight, nobody would ever be admitted."""
    swap = SwapConfig(strategy="proactive")
    scheduler = make_scheduler(device_blocks=9, host_blocks=30, swap=swap, max_batch_size=1)
    first = scheduler.step(0.0, [arrived("long", 12, 18)])
    second = scheduler.step(1.0, [StepDone(first.step_id, 1.0), arrived("short", 20, 8)])
    copies = [CopyDone(copy.copy_id) for copy in second.copies]
    third = scheduler.step(2.0, [StepDone(second.step_id, 1.0)] if second.batch else [])
    if third:
        copies += [CopyDone(copy.copy_id) for copy in third.copies]
    fourth = scheduler.step(3.0, copies)
    flying = next(plan for plan in (fourth, third, second) if plan and plan.batch)
    done = StepDone(flying.step_id, 1.0, tuple(names(flying)))
    left = ({"long", "short"} - set(names(flying))).pop()
    plan = scheduler.step(4.0, [done, Aborted(left), arrived("late", 28, 4)])
    assert names(plan) == ["late"]
