"""The story of a request names what happened to it, and why."""

from __future__ import annotations

from fixed_costs import arrived, make_scheduler

from fastserve_mega.experiments.story import Storyteller
from fastserve_mega.scheduling.events import Aborted, CopyDone, StepDone, WorkersLost
from fastserve_mega.system.config import SwapConfig
from fastserve_mega.types import RequestId


class Told:
    """Drives a scheduler by hand and keeps the stories of some requests."""

    def __init__(self, *names: str, **options) -> None:
        self.scheduler = make_scheduler(**options)
        self.tellers = {name: Storyteller(self.scheduler, RequestId(name)) for name in names}

    def step(self, now: float, *events):
        plan = self.scheduler.step(now, events)
        for teller in self.tellers.values():
            teller.follow(now, events, plan)
        return plan

    def of(self, name: str) -> list[str]:
        return [f"{each.time_s:g} {each.text}" for each in self.tellers[name].happenings]


def test_a_request_that_nobody_disturbs():
    told = Told("a")
    told.step(0.0, arrived("a", 15, 3))  # quanta 1, 2, 4 s; a prefill of 1.5 s
    told.step(1.5, StepDone(0, 1.5))
    told.step(2.5, StepDone(1, 1.0))
    told.step(3.5, StepDone(2, 1.0, (RequestId("a"),)))
    assert told.of("a") == [
        "0 arrived with 15 prompt tokens, max_tokens 3; joins Q2 of 6",
        "0 gets 4 device blocks",
        "0 ran in 2 of the steps 0 to 1: 16 tokens",
        "2.5 used up Q2: to Q3",
        "2.5 ran in step 2: 1 tokens",
        "3.5 finished after 3 tokens",
    ]


def test_under_pacing_levels_have_their_names():
    told = Told("a", policy="paced")
    told.step(0.0, arrived("a", 15, 3))  # cannot have its first token within a second
    told.step(1.5, StepDone(0, 1.5))
    story = told.of("a")
    assert story[0] == "0 arrived with 15 prompt tokens, max_tokens 3"
    assert "1.5 was late, is urgent" in story


def test_preempted_swapped_and_promoted():
    swap = SwapConfig(strategy="proactive", write_through_blocks=0)
    told = Told(
        "long", device_blocks=12, host_blocks=50, swap=swap, max_batch_size=1,
        starvation_limit_s=6.0,
    )  # fmt: skip
    told.step(0.0, arrived("long", 30, 9))
    # One decode, then a short prompt needs most of the pool.
    told.step(3.0, StepDone(0, 3.0))
    plan = told.step(4.0, StepDone(1, 1.0), arrived("short", 20, 2))
    copies = [copy.copy_id for copy in plan.copies] if plan else []
    assert copies
    plan = told.step(4.5, *(CopyDone(copy_id) for copy_id in copies))
    assert [piece.request_id for piece in plan.batch] == ["short"]
    told.step(6.5, StepDone(plan.step_id, 2.0))
    assert told.of("long")[3:6] == [
        "4 used up Q3: to Q4",
        "4 preempted for short: 8 blocks go to the host, 0 are there already",
        "4.5 is in host memory",
    ]
    plan = told.step(7.5, StepDone(plan.step_id + 1, 1.0, (RequestId("short"),)))
    story = told.of("long")
    assert "7.5 comes back to 8 device blocks" in story
    for copy in plan.copies:
        plan = told.step(10.5, CopyDone(copy.copy_id))
    assert told.of("long")[-2:] == ["10.5 waited 6.500 s: from Q4 to Q1", "10.5 is back"]
    assert [piece.request_id for piece in plan.batch] == ["long"]


def test_an_abort_and_lost_ranks():
    told = Told("a", "b")
    told.step(0.0, arrived("a", 8), arrived("b", 8))
    told.step(1.0, WorkersLost())
    told.step(2.0, Aborted(RequestId("b")))
    assert "1 the ranks were lost, and with them its KV" in told.of("a")
    assert told.of("a")[-1] == "1 gets 2 device blocks"
    assert told.of("b")[-1] == "2 aborted after 0 tokens"


def test_what_was_dropped_says_so():
    told = Told("long", device_blocks=12, max_batch_size=1)  # strategy recompute
    told.step(0.0, arrived("long", 30, 9))
    told.step(3.0, StepDone(0, 3.0))
    told.step(4.0, StepDone(1, 1.0), arrived("short", 20, 2))
    assert "4 preempted for short: the KV of 31 tokens will be computed again" in told.of("long"), (
        told.of("long")
    )


def test_nothing_is_told_of_a_request_that_never_came():
    told = Told("nobody")
    told.step(0.0, arrived("a", 8))
    assert told.of("nobody") == []
