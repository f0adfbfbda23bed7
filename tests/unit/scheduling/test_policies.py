"""The baselines, and one worked example through all of them."""

import pytest
from fixed_costs import Driver, arrived, make_scheduler, names

from fastserve_mega.scheduling.policies.level_queues import LevelQueues
from fastserve_mega.scheduling.policies.queues import RequestQueues, SortedQueues
from fastserve_mega.scheduling.request import Place, Request, RequestStatus
from fastserve_mega.types import RequestId


def completion_times(policy, requests, **options):
    """Run (arrival, prompt, output) to the end; completion time of each since its arrival."""
    scheduler = make_scheduler(policy=policy, **options)
    outputs = {f"r{i}": output for i, (_, _, output) in enumerate(requests)}
    driver = Driver(scheduler, outputs)
    waiting = [
        (at, arrived(f"r{i}", prompt, oracle_output_tokens=output if policy == "srpt" else None))
        for i, (at, prompt, output) in enumerate(requests)
    ]
    waiting.sort(key=lambda item: item[0])
    for _ in range(10_000):
        events = []
        done = driver._done()  # advances the clock
        while waiting and waiting[0][0] <= driver.now:
            events.append(waiting.pop(0)[1])
        driver._running = None
        plan = driver.step([*done, *events])
        if plan is None:
            if not waiting:
                break
            driver.now = waiting[0][0]
    return [driver.finished_at[f"r{i}"] - at for i, (at, _, _) in enumerate(requests)]


def test_fcfs_runs_to_completion_in_order_of_arrival():
    scheduler = make_scheduler(policy="fcfs", max_batch_size=1)
    driver = Driver(scheduler, {"long": 5, "short": 1})
    driver.step([arrived("long", 100), arrived("short", 1)])
    driver.run_until_idle()
    assert [names(plan)[0] for plan in driver.plans] == ["long"] * 5 + ["short"]


def test_fixed_priority_prefers_short_prompts_for_ever():
    scheduler = make_scheduler(policy="fixed_priority", max_batch_size=1)
    driver = Driver(scheduler, {"long": 2, "short": 9})
    driver.step([arrived("long", 100)])
    driver.step([arrived("short", 1)])
    driver.run_until_idle()
    assert [names(plan)[0] for plan in driver.plans] == ["long"] + ["short"] * 9 + ["long"]


@pytest.mark.parametrize("policy", ["fixed_priority", "srpt"])
def test_a_long_request_waits_for_as_long_as_shorter_ones_come_and_no_longer(policy):
    """One in each second, which takes a second: there is no limit."""
    scheduler = make_scheduler(policy=policy, max_batch_size=1)
    driver = Driver(scheduler, {"long": 1, **{f"s{i}": 1 for i in range(200)}})
    driver.step([arrived("s0", 10, oracle_output_tokens=1)])
    scheduler.step(0.0, [arrived("long", 100, oracle_output_tokens=1)])
    for i in range(1, 200):
        driver.step([arrived(f"s{i}", 10, oracle_output_tokens=1)])
    driver.run_until_idle()
    order = [name for plan in driver.plans for name in names(plan)]
    assert order == [*(f"s{i}" for i in range(200)), "long"]


def test_srpt_without_the_oracle_says_so():
    scheduler = make_scheduler(policy="srpt")
    with pytest.raises(ValueError, match="true output length"):
        scheduler.step(0.0, [arrived("a", 1)])


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        # One at a time; prefill 0.1 s per token, decode 1 s. r0: 8 s + 3 s of work (80 prompt
        # tokens, 4 outputs), r1: 0.5 + 1 (5 tokens, 2 outputs), r2: 0.5 (5 tokens, 1 output).
        # All are there at 0, in this order.
        ("fcfs", [11.0, 12.5, 13.0]),
        # r1, r2 join Q1; both prefill (0.5 s), r2 is done at 1.0; r1 has 0.5 s of its quantum
        # left and keeps its place, so it runs on first: done at 1.5, and r2 at 2.0.
        ("skip_join_mlfq", [13.0, 1.5, 2.0]),
        # All join Q1 in order: r0's prefill cannot be cut (8 s), then r1 to its end, then r2.
        ("mlfq", [13.0, 9.5, 10.0]),
        ("srpt", [13.0, 2.0, 0.5]),
    ],
)
def test_worked_example_by_hand(policy, expected):
    requests = [(0.0, 80, 4), (0.0, 5, 2), (0.0, 5, 1)]
    assert completion_times(policy, requests, max_batch_size=1) == pytest.approx(expected)


@pytest.mark.parametrize(
    "queues", [SortedQueues(lambda each: (each.arrival_number,)), LevelQueues(1, lambda _: None)]
)
def test_places_are_merged_by_rank_with_those_who_come_in_any_case(queues: RequestQueues):
    requests = [Request(RequestId(f"r{i}"), 1, 1, 0, i, 1) for i in range(12)]
    for request in requests:
        queues.add(request)
    for i in (0, 2, 3, 4, 9, 10):
        queues.put(requests[i], RequestStatus.READY)
    for i in (2, 10):
        queues.put(requests[i], RequestStatus.SWAPPED)
    waiting_and_residents = (Place.WAITING, Place.RESIDENT)

    def merged(places: tuple[Place, ...], limit: int, *also: int) -> list[int]:
        come = queues.merged(places, limit, [requests[i] for i in also])
        return [request.arrival_number for request in come]

    assert merged(waiting_and_residents, 2) == [0, 1, 3, 4, 5, 9]
    assert merged(waiting_and_residents, 2, 8, 1, 6) == [0, 1, 3, 4, 5, 6, 8, 9]
    assert merged((*waiting_and_residents, Place.SWAPPED), 2, 11) == [0, 1, 2, 3, 4, 5, 9, 10, 11]
