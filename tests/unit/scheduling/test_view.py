"""What a watcher sees of a scheduler."""

import pytest
from fixed_costs import arrived, make_scheduler

from fastserve_mega.scheduling.events import StepDone


@pytest.mark.parametrize("policy", ["skip_join_mlfq", "paced", "mlfq", "fcfs", "fixed_priority"])
def test_the_first_ones_by_priority_and_all_that_run(policy):
    scheduler = make_scheduler(policy=policy, max_batch_size=3)
    plan = scheduler.step(0.0, [arrived(f"r{i:02}", 8) for i in range(20)])
    view = scheduler.view(2.0, 5)
    assert sum(view.levels) == 20
    assert len(view.requests) == 5
    running = [each.request_id for each in view.requests if each.running]
    assert sorted(running) == sorted(piece.request_id for piece in plan.batch)
    waiting = [each for each in view.requests if not each.running]
    assert all(each.place == "waiting" and each.waited_s == 2.0 for each in waiting)
    assert all(each.num_computed_tokens == each.num_output_tokens == 0 for each in view.requests)
    scheduler.step(3.0, [StepDone(plan.step_id, 1.0)])
    after = {each.request_id: each for each in scheduler.view(3.0, 20).requests}
    assert all(after[name].num_output_tokens == 1 for name in running)
    assert all(after[name].place == "resident" for name in running)


def test_an_aborted_request_in_flight_is_not_shown():
    from fastserve_mega.scheduling.events import Aborted

    scheduler = make_scheduler()
    scheduler.step(0.0, [arrived("gone", 8), arrived("there", 8)])
    scheduler.step(0.5, [Aborted("gone")])
    assert [each.request_id for each in scheduler.view(1.0, 10).requests] == ["there"]


def test_only_mlfq_has_quanta():
    assert len(make_scheduler().view(0.0, 1).quanta_s) == 6
    assert make_scheduler(policy="fcfs").view(0.0, 1).quanta_s == ()
