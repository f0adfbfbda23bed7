"""Worked examples whose schedules were drawn by hand: who runs in each step, until when.

Times are whole ticks, so that nothing is rounded. A prefill takes a tick per token, a decode one
tick, and the quanta of the queue are 10, 20, 40, ... ticks. One request runs at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from fastserve_mega.plan import Plan
from fastserve_mega.scheduling.events import Arrived, Event, StepDone
from fastserve_mega.scheduling.kv.pool import PoolSizes
from fastserve_mega.scheduling.scheduler import Scheduler
from fastserve_mega.system.config import MlfqConfig, PolicyName, SchedulerConfig, SwapConfig
from fastserve_mega.types import RequestId


class Ticks:
    """A tick per token of a prefill, a tick per decode step."""

    def prefill_s(self, tokens: int) -> float:
        return tokens

    def decode_s(self, batch: int, context: int) -> float:
        return 1

    def observe(self, prefill_tokens: int, decodes: int, context: int, elapsed_s: float) -> None:
        pass


@dataclass(frozen=True)
class Job:
    """`output` tokens, the first of them after `prefill` ticks."""

    name: str
    prefill: int
    output: int
    arrives: int = 0

    def arrived(self, policy: PolicyName) -> Arrived:
        oracle = self.output if policy == "srpt" else None
        return Arrived(RequestId(self.name), self.prefill, 100, oracle_output_tokens=oracle)


Trace = list[tuple[str, int]]
"""Per step: who runs, and the time at which the step ends."""


class Run:
    """The real scheduler, and a clock that moves from the end of one step to that of the next."""

    def __init__(
        self, policy: PolicyName, jobs: Sequence[Job], starvation_limit_s: float | None
    ) -> None:
        mlfq = MlfqConfig(levels=6, base_quantum_s=10, starvation_limit_s=starvation_limit_s)
        config = SchedulerConfig(policy=policy, max_batch_size=1, max_batch_tokens=1000, mlfq=mlfq)
        swap = SwapConfig(strategy="recompute")
        self._policy: PolicyName = policy
        self._scheduler = Scheduler(config, Ticks(), PoolSizes(1000, 0, 4), swap=swap)
        self._waiting = sorted(jobs, key=lambda job: job.arrives)
        self._left = {job.name: job.output for job in jobs}
        self._now = 0
        self.trace: Trace = []
        self.completed: dict[str, int] = {}

    def to_the_end(self) -> Run:
        """Every step until nobody is left."""
        events: list[Event] = []
        while True:
            plan = self._scheduler.step(self._now, [*events, *self._arrivals()])
            self._scheduler.check_integrity()
            if plan is None:
                assert not self._left
                return self
            events = [self._execute(plan)]

    def _arrivals(self) -> list[Event]:
        there = [job for job in self._waiting if job.arrives <= self._now]
        self._waiting = self._waiting[len(there) :]
        return [job.arrived(self._policy) for job in there]

    def _execute(self, plan: Plan) -> Event:
        (piece,) = plan.batch
        assert piece.samples
        self._now += piece.num_tokens
        self.trace.append((piece.request_id, self._now))
        self._left[piece.request_id] -= 1
        if self._left[piece.request_id]:
            return StepDone(plan.step_id, piece.num_tokens)
        del self._left[piece.request_id]
        self.completed[piece.request_id] = self._now
        return StepDone(plan.step_id, piece.num_tokens, (piece.request_id,))


def run(policy: PolicyName, jobs: Sequence[Job], starvation_limit_s: float | None = None) -> Run:
    return Run(policy, jobs, starvation_limit_s).to_the_end()


PAPER = (Job("J1", 29, 4), Job("J2", 2, 3), Job("J3", 22, 2))

PAPER_TRACES: list[tuple[PolicyName, Trace, float]] = [
    # To completion, in order of arrival. (32 + 36 + 59) / 3 / 10 = 4.23
    (
        "fcfs",
        [("J1", 29), ("J1", 30), ("J1", 31), ("J1", 32),
         ("J2", 34), ("J2", 35), ("J2", 36),
         ("J3", 58), ("J3", 59)],
        4.23,
    ),
    # All join Q1 (10). J1 uses its quantum up with the first iteration, and so does J3; J2 does
    # not, and keeps its place. In Q2 (20) J1 stands before J3. (58 + 33 + 59) / 3 / 10 = 5.0
    (
        "mlfq",
        [("J1", 29),
         ("J2", 31), ("J2", 32), ("J2", 33),
         ("J3", 55),
         ("J1", 56), ("J1", 57), ("J1", 58),
         ("J3", 59)],
        5.0,
    ),
    # J1 (29) and J3 (22) join Q3 (40), J2 (2) joins Q1 (10). In Q3 J1 uses 32 of its 40 and keeps
    # its place. (36 + 4 + 59) / 3 / 10 = 3.3
    (
        "skip_join_mlfq",
        [("J2", 2), ("J2", 3), ("J2", 4),
         ("J1", 33), ("J1", 34), ("J1", 35), ("J1", 36),
         ("J3", 58), ("J3", 59)],
        3.3,
    ),
    # By the work that is left: J2 4, J3 23, J1 32. (59 + 4 + 27) / 3 / 10 = 3.0
    (
        "srpt",
        [("J2", 2), ("J2", 3), ("J2", 4),
         ("J3", 26), ("J3", 27),
         ("J1", 56), ("J1", 57), ("J1", 58), ("J1", 59)],
        3.0,
    ),
]  # fmt: skip


@pytest.mark.parametrize(("policy", "trace", "mean"), PAPER_TRACES)
def test_the_four_means_of_the_papers_example(policy, trace, mean):
    """Mean completion FCFS 4.23, MLFQ 5.0, skip-join MLFQ 3.3, SRPT 3.0 (paper, section 4.1).

    The paper's three jobs were not at hand. These were found by search, so that the four means
    come out; a tick is a tenth of the paper's unit, Q1's quantum one unit.

    ```
    ticks   0         10        20        30        40        50
    fcfs    J1...........................111J222J3....................3
    mlfq    J1...........................J222J3....................1113
    skip    J222J1...........................111J3....................3
    srpt    J222J3....................3J1...........................111
    ```
    """
    done = run(policy, PAPER)
    assert done.trace == trace
    assert round(sum(done.completed.values()) / 3 / 10, 2) == mean


def test_preemption_and_demotion_at_each_token():
    """Skip-join, step by step: a long answer comes down the queue, and newcomers pass it by.

    ```
    time   what                                              Q1 (10)   Q2 (20)   Q3 (40)
       0   L joins Q2: its prefill of 12 fits into 20                  L
      12   L has used 12 of 20
      17   after five decodes: 17 of 20; S came at 17        S         L
      17   S preempts, prefill of 9: 9 of 10
      26   S keeps its place and decodes: 10 of 10
      27   demoted behind L, which has 3 left                          L S
      30   L has used 20 of 20 and is demoted                          S         L
      30   S decodes to its end                                        S         L
      32   L decodes to its end                                                  L
    ```
    """
    jobs = [Job("L", 12, 11), Job("S", 9, 4, arrives=17)]
    done = run("skip_join_mlfq", jobs)
    before = [("L", time) for time in range(12, 18)]
    assert done.trace[:6] == before
    assert done.trace[6:] == [
        ("S", 26), ("S", 27),
        ("L", 28), ("L", 29), ("L", 30),
        ("S", 31), ("S", 32),
        ("L", 33), ("L", 34),
    ]  # fmt: skip
    assert done.completed == {"S": 32, "L": 34}


def test_promotion_of_the_starving():
    """A limit of 20 ticks; one short request after the other keeps Q1 (10) busy.

    ```
    time   what                                              Q1 (10)      Q2 (20)   Q3 (40)
       0   L (30) joins Q3; A runs first                     A                      L
       8   B came at 5                                       B                      L
      16   C came at 13, D at 14: L has waited for 16        C D                    L
      24   L has waited for 24: promoted, behind D           D L
      32   E came at 31, behind L; L runs, 30 of 10          L E
      62   demoted to Q2; E                                  E            L
      70   L decodes to its end                                           L
    ```
    """
    shorts = [Job(name, 8, 1, at) for name, at in zip("ABCDE", (0, 5, 13, 14, 31), strict=True)]
    done = run("skip_join_mlfq", [shorts[0], Job("L", 30, 2), *shorts[1:]], starvation_limit_s=20)
    assert done.trace == [
        ("A", 8), ("B", 16), ("C", 24), ("D", 32), ("L", 62), ("E", 70), ("L", 71),
    ]  # fmt: skip
    never = run("skip_join_mlfq", [shorts[0], Job("L", 30, 2), *shorts[1:]])
    assert [name for name, _ in never.trace] == ["A", "B", "C", "D", "E", "L", "L"]
