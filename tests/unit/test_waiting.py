"""Who is not let in since it would wait too long, and what it is told."""

from __future__ import annotations

import random
import statistics
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_coordinator_turn import World, submit

from fastserve_mega.coordinator.waiting import WaitingRequests
from fastserve_mega.messaging.messages import Cancel, Finished, Message, Submit, Tokens
from fastserve_mega.messaging.rank_messages import StepResult
from fastserve_mega.system.config import SchedulerConfig
from fastserve_mega.types import BACKGROUND_PRIORITY, FinishReason, SamplingParams


class Queue:
    """Requests of which one starts in each step, while others wait."""

    def __init__(self, starts: int, interval_s: float):
        self.waiting, self.now = WaitingRequests(), 0.0
        for _ in range(starts + 2):
            self.waiting.join()
        for _ in range(starts + 1):
            self.start_one(interval_s)

    def start_one(self, interval_s: float):
        self.now += interval_s
        self.waiting.start(None)
        self.waiting.end_step(self.now)


def test_the_pace_is_that_of_the_starts_while_others_wait():
    queue = Queue(starts=100, interval_s=0.5)
    assert queue.waiting.pace_s(10.0, queue.now) == pytest.approx(0.5, rel=0.02)


def test_who_starts_at_once_says_nothing_of_the_pace():
    queue = Queue(starts=100, interval_s=0.5)
    queue.start_one(0.5)  # the last one that waited
    for _ in range(10_000):
        queue.waiting.join()
        queue.start_one(0.001)
    for _ in range(100):
        queue.waiting.join()
    queue.start_one(0.001)
    assert queue.waiting.pace_s(1.0, queue.now + 0.1) == pytest.approx(0.5, rel=0.05)


def test_time_in_which_nobody_waits_does_not_count():
    queue = Queue(starts=100, interval_s=0.1)
    queue.waiting.leave(None, queue.now)
    queue.now += 10_000.0
    for _ in range(30):
        queue.waiting.join()
    for _ in range(20):
        queue.start_one(0.1)
    assert queue.waiting.pace_s(10.0, queue.now) == pytest.approx(0.1, rel=0.05)


def test_a_burst_after_a_calm_is_taken_whatever_it_is():
    queue = Queue(starts=100, interval_s=0.1)
    assert queue.waiting.pace_s(10.0, queue.now) is not None
    queue.waiting.leave(None, queue.now)
    for calm_s, is_burst in ((0.5, False), (1.1, True)):
        for _ in range(30):
            queue.waiting.join()
        queue.start_one(calm_s)
        assert (queue.waiting.pace_s(10.0, queue.now + 0.9) is None) is is_burst
        assert queue.waiting.pace_s(10.0, queue.now + 1.1) is not None
        for _ in range(29):
            queue.waiting.leave(None, queue.now)


def test_nobody_is_refused_before_the_pace_is_known():
    queue = Queue(starts=3, interval_s=10.0)
    assert queue.waiting.pace_s(40.0, queue.now) is None
    assert queue.waiting.pace_s(40.0, queue.now + 20.0) == pytest.approx(50.0 / 4, rel=0.1)
    queue.waiting.join()
    queue.start_one(10.0)
    assert queue.waiting.pace_s(40.0, queue.now) is not None


class Overloaded(World):
    """Requests of one token, one a step of a second: 40 wait, and their client asked for more."""

    def __init__(self, policy="fcfs", max_wait_s=10.0):
        super().__init__(SchedulerConfig(policy=policy, max_batch_size=1), max_wait_s=max_wait_s)
        self.turn(*[submit(f"first-{number}", max_tokens=1) for number in range(60)])
        self.step_id = 0
        for _ in range(20):
            self.pass_second()
        rejected = self.rejected(*[submit(f"more-{n}", max_tokens=1) for n in range(22)])
        assert [each.request_id for each in rejected] == ["more-21"]
        for _ in range(20):
            self.pass_second()

    def pass_second(self, *messages):
        self.now += 1.0
        log = self.turn(*messages, result=StepResult(self.step_id, (7,)))
        self.step_id += 1
        return log

    def rejected(self, *messages):
        return [
            each
            for each in self.pass_second(*messages)
            if isinstance(each, Finished) and each.reason is FinishReason.REJECTED
        ]


def test_who_would_wait_too_long_is_rejected_at_once_and_told_when_to_come_again():
    world = Overloaded()
    assert world.coordinator.num_unfinished == 40
    (rejected,) = world.rejected(submit("late", max_tokens=1))
    assert rejected.request_id == "late"
    assert rejected.retry_after_s == pytest.approx(28.0, abs=3.0)
    assert rejected.message == (
        f"it would wait about {rejected.retry_after_s:.0f} s longer than "
        "scheduler.max_wait_s allows"
    )
    for _ in range(31):
        world.pass_second()
    assert not world.rejected(submit("late", max_tokens=1))
    assert not world.rejected(submit("later", max_tokens=1))


def test_what_was_rejected_leaves_nothing_behind():
    world = Overloaded()
    world.rejected(*[submit(f"late-{number}", max_tokens=1) for number in range(9)])
    for _ in range(39):
        world.pass_second()
    scheduler = world.coordinator._replicas[0].scheduler
    assert (world.coordinator.num_unfinished, scheduler.unfinished) == (0, 0)
    assert scheduler.memory.device.free_count == scheduler.memory.device.capacity
    assert 'finished_total{finish_reason="rejected"} 10.0' in world.metrics.render()
    assert "prompt_tokens_total 162.0" in world.metrics.render()


@pytest.mark.parametrize(
    "kept",
    [
        pytest.param({"priority": BACKGROUND_PRIORITY}, id="background"),
        pytest.param({"received": (7,)}, id="resumed"),
        pytest.param({"failed_attempts": 1}, id="lost with its ranks"),
        pytest.param({"priority": -10}, id="urgent"),
    ],
)
def test_who_waits_anyway_or_does_not_have_to_is_let_in(kept):
    world = Overloaded()
    params = SamplingParams(max_tokens=2)
    assert not world.rejected(Submit("late", (5, 6), params, **kept))


def test_a_short_request_that_passes_the_others_is_let_in():
    long = [Submit(f"long-{n}", (5,) * 40, SamplingParams(max_tokens=20)) for n in range(10)]
    world = World(SchedulerConfig(policy="paced", max_batch_size=1), max_wait_s=1.0)
    world.turn(*long[:9])
    waiting = world.coordinator._replicas[0].waiting
    for _ in range(50):  # so that the pace is known
        waiting.join()
        waiting.start(None)
        world.now += 0.2
        waiting.end_step(world.now)
    short = submit("short", max_tokens=1)
    ends = [each for each in world.turn(short, long[9]) if isinstance(each, Finished)]
    assert [each.request_id for each in ends] == ["long-9"]


@pytest.mark.parametrize("policy", ["fcfs", "skip_join_mlfq", "paced"])
def test_a_client_that_keeps_many_under_way_is_not_rejected_until_it_asks_for_more(policy):
    config = SchedulerConfig(policy=policy, max_batch_size=2)
    world, number, result = World(config, blocks=4096, max_wait_s=5.0), 0, None
    wanted, outcomes = 100, Counter[FinishReason]()
    while number < 400:
        messages = [submit(f"r{number + each}", max_tokens=4) for each in range(wanted)]
        number, wanted, log = number + wanted, 0, world.turn(*messages, result=result)
        for each in log:
            match each:
                case Finished():
                    outcomes[each.reason] += 1
                    wanted += 1
                case ("dispatch", step_id, token_ids):
                    result = StepResult(step_id, (7,) * len(token_ids))
        world.now += 0.1
    assert outcomes.keys() == {FinishReason.LENGTH}
    world.turn(*[submit(f"r{number + each}") for each in range(wanted)], result=result)
    log = world.turn(*[submit(f"more-{each}") for each in range(100)])
    assert FinishReason.REJECTED in [each.reason for each in log if isinstance(each, Finished)]


def test_who_was_expected_to_start_and_is_passed_all_the_time_is_told_so():
    world = Overloaded()
    for _ in range(35):
        world.pass_second()
    assert not world.rejected(submit("late", max_tokens=1))
    urgent = [
        Submit(f"u{n}", (5, 6), SamplingParams(max_tokens=1), priority=-10) for n in range(30)
    ]
    ends = {second: world.rejected(urgent[second]) for second in range(1, 12)}
    (late,) = ends.pop(10)
    assert not any(ends.values())
    assert (late.request_id, late.message) == (
        "late",
        "it has waited for scheduler.max_wait_s: others came that went before it",
    )


def first_waits(
    policy: str, max_wait_s: float, loads: Sequence[float]
) -> tuple[list[list[float]], int]:
    """Poisson arrivals for 10 s of each load at ranks whose steps take 20 ms and have 16 places.

    A tenth is cancelled when it has half of its answer. Returns for each load how long those that
    got their first token waited for it; and how many tokens there were in all.
    """
    config = SchedulerConfig(policy=policy, max_batch_size=16)
    world, draw = World(config, blocks=4096, max_wait_s=max_wait_s), random.Random(1)
    came: dict[str, float] = {}
    waits: list[list[float]] = [[] for _ in loads]
    tokens, at_s, result, leaving = 0, 0.0, None, set[str]()
    while (part := int(world.now / 10.0)) < len(loads):
        messages: list[Message] = [Cancel(name) for name in leaving]
        leaving.clear()
        while at_s <= world.now:
            came[name := f"r{len(came)}"] = at_s
            messages.append(submit(name, max_tokens=32, ignore_eos=True))
            at_s += draw.expovariate(loads[part] * 16 / 0.02 / 32)
        result, log = None, world.turn(*messages, result=result)
        for each in log:
            match each:
                case Tokens():
                    tokens += 1
                    if each.offset == 0:
                        waits[part].append(world.now - came[each.request_id])
                    if each.offset == 16 and each.request_id.endswith("7"):
                        leaving.add(each.request_id)
                case ("dispatch", step_id, token_ids):
                    result = StepResult(step_id, (7,) * len(token_ids))
        world.now += 0.02
    return waits, tokens


@pytest.mark.parametrize("policy", ["fcfs", "skip_join_mlfq", "paced"])
def test_the_limit_holds_under_overload_and_costs_no_throughput(policy):
    _, tokens = first_waits(policy, float("inf"), (0.8, 3.0))
    waits, limited = first_waits(policy, 0.1, (0.8, 3.0))
    easy, hard = (statistics.quantiles(each, n=20)[-1] for each in waits)
    assert hard < min(0.15, 2 * max(easy, 0.07))  # four steps: no shorter wait was asked for
    assert limited > 0.95 * tokens


@pytest.mark.parametrize("policy", ["fcfs", "skip_join_mlfq", "paced"])
def test_a_limit_of_seconds_holds_from_the_first_request_on(policy):
    (waits,), _ = first_waits(policy, 2.0, (3.0,))
    assert max(waits) < 3.0


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    policy=st.sampled_from(["fcfs", "skip_join_mlfq", "paced"]),
    max_wait_s=st.sampled_from([0.1, 0.5, 3.0]),
    clients=st.integers(1, 3),
)
def test_whatever_comes_and_goes_who_waits_is_counted_and_none_waits_in_vain(
    seed, policy, max_wait_s, clients
):
    draw, world = random.Random(seed), World(SchedulerConfig(policy=policy, max_batch_size=2),
                                             blocks=64, max_wait_s=max_wait_s)  # fmt: skip
    replica, requests, result = world.coordinator._replicas[0], world.coordinator._requests, None
    for turn in range(150):
        messages: list[Message] = [
            Cancel(live.request_id) for live in requests.all() if draw.random() < 0.03
        ]
        for number in range(draw.choice([0, 0, 0, 1, 1, 8])):
            params = SamplingParams(max_tokens=draw.choice([1, 4, 20]))
            priority, client = draw.choice([0, 0, 0, -1, 1000]), f"c{draw.randrange(clients)}"
            kept = {"priority": priority, "client": client}
            messages.append(Submit(f"r{turn}-{number}-{priority}", (5, 6), params, **kept))
        result, log = None, world.turn(*messages, result=result)
        for each in log:
            match each:
                case Finished(reason=FinishReason.REJECTED):
                    assert not each.request_id.endswith("-1000")
                    assert each.usage.completion_tokens == 0
                case ("dispatch", step_id, token_ids):
                    result = StepResult(step_id, (7,) * len(token_ids))
        waits = {live for live in requests.all() if live.started_at is None}
        hurried = {live for live in waits if live.submit.priority < BACKGROUND_PRIORITY}
        assert replica.waiting._waiting == len(hurried)
        assert replica.waiting._latest.keys() <= hurried
        assert all(latest > world.now for latest in replica.waiting._latest.values())
        world.now += draw.choice([0.02, 0.02, 0.5])
