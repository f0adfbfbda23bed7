"""Who is not let in since it would wait too long, and what it is told."""

from __future__ import annotations

import random
import statistics

import pytest
from test_coordinator_turn import World, submit

from fastserve_mega.coordinator.waiting import WaitingRequests
from fastserve_mega.messaging.messages import Finished, Submit, Tokens
from fastserve_mega.messaging.rank_messages import StepResult
from fastserve_mega.system.config import SchedulerConfig
from fastserve_mega.types import BACKGROUND_PRIORITY, FinishReason, SamplingParams


def standing(waiting: WaitingRequests, starts: int, interval_s: float) -> float:
    """Let so many start, one after the other, while others wait; return the time after that."""
    for _ in range(starts + 1):
        waiting.join(0.0)
    for number in range(starts):
        waiting.start((number + 1) * interval_s)
    return starts * interval_s


def test_the_wait_is_what_those_ahead_take_at_the_rate_at_which_requests_start():
    waiting = WaitingRequests()
    now = standing(waiting, starts=100, interval_s=0.5)
    # 100 places and its own, half a second each; the rate is known to one start in a hundred.
    assert waiting.excess_s(100, 30.0, now) == pytest.approx(50.5 - 30.0, abs=2.0)
    assert waiting.excess_s(50, 30.0, now) is None


def test_a_rate_is_measured_only_while_somebody_waits():
    waiting = WaitingRequests()
    now = standing(waiting, starts=100, interval_s=0.1)
    waiting.leave(now)
    later = now + 10_000.0
    waiting.join(later)
    # 12 s of waiting with 100 starts.
    assert waiting.excess_s(1000, 10.0, later + 2.0) == pytest.approx(120.0 - 10.0, rel=0.05)


def test_a_burst_is_taken_whatever_it_is():
    waiting = WaitingRequests()
    now = standing(waiting, starts=100, interval_s=0.1)
    waiting.leave(now)
    waiting.join(now + 60.0)
    assert waiting.excess_s(1_000_000, 10.0, now + 60.9) is None
    assert waiting.excess_s(1_000_000, 10.0, now + 61.1) is not None


def test_nobody_is_refused_before_the_rate_is_known_nor_when_nobody_is_ahead():
    waiting = WaitingRequests()
    now = standing(waiting, starts=15, interval_s=10.0)
    assert waiting.excess_s(1000, 1.0, now) is None
    waiting.start(now)
    assert waiting.excess_s(0, 1.0, now) is None


def test_a_step_that_takes_long_makes_no_wait_endless():
    waiting = WaitingRequests()
    now = standing(waiting, starts=16, interval_s=0.1)
    excess_s = waiting.excess_s(1, 10.0, now + 3600.0)
    assert excess_s is not None
    assert excess_s < 2 * 3700.0


class Overloaded(World):
    """Requests of one token, one a step of a second, of which many wait already."""

    def __init__(self, policy="fcfs", max_wait_s=10.0):
        super().__init__(SchedulerConfig(policy=policy, max_batch_size=1), max_wait_s=max_wait_s)
        self.turn(*[submit(f"first-{number}", max_tokens=1) for number in range(60)])
        self.step_id = 0
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
    assert 'finished_total{finish_reason="rejected"} 9.0' in world.metrics.render()
    assert "prompt_tokens_total 120.0" in world.metrics.render()


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
    waiting = world.coordinator._replicas[0]._waiting
    for _ in range(50):  # so that the rate is known
        waiting.join(9.0)
        waiting.start(9.0)
    world.now = 9.0
    short = submit("short", max_tokens=1)
    ends = [each for each in world.turn(short, long[9]) if isinstance(each, Finished)]
    assert [each.request_id for each in ends] == ["long-9"]


def first_waits(policy: str, max_wait_s: float, load: float) -> tuple[list[float], int]:
    """Poisson arrivals for 10 s at ranks whose steps take 20 ms and have 16 places.

    Returns how long those that were let in waited for their first token, and all tokens.
    """
    config = SchedulerConfig(policy=policy, max_batch_size=16)
    world, draw = World(config, blocks=4096, max_wait_s=max_wait_s), random.Random(1)
    came: dict[str, float] = {}
    waits, tokens, at_s, result = [], 0, 0.0, None
    while world.now < 10.0:
        messages = []
        while at_s <= world.now:
            came[name := f"r{len(came)}"] = at_s
            messages.append(submit(name, max_tokens=32))
            at_s += draw.expovariate(load * 16 / 0.02 / 32)
        result, log = None, world.turn(*messages, result=result)
        for each in log:
            match each:
                case Tokens():
                    tokens += 1
                    if each.offset == 0:
                        waits.append(world.now - came[each.request_id])
                case ("dispatch", step_id, token_ids):
                    result = StepResult(step_id, (7,) * len(token_ids))
        world.now += 0.02
    return waits, tokens


@pytest.mark.parametrize("policy", ["fcfs", "skip_join_mlfq", "paced"])
def test_the_limit_holds_under_overload_and_costs_no_throughput(policy):
    _, tokens = first_waits(policy, float("inf"), load=3.0)
    waits, limited = first_waits(policy, 0.1, load=3.0)
    assert statistics.quantiles(waits, n=20)[-1] < 0.5
    assert limited > 0.97 * tokens
