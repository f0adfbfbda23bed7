"""Several replicas in a simulation: what a prefix saves, and what a lost one costs."""

from __future__ import annotations

from typing import Any

import pytest
from fixed_hardware import RoundCosts, run

from fastserve_mega.plan import BlockCopy, CopyDirection
from fastserve_mega.scheduling.scheduler import Scheduler
from fastserve_mega.simulator.replica import Outage, SimulatedCopies
from fastserve_mega.simulator.workload import RequestSpec


def turn(arrival_s: float, prompt: int, output: int, session: str = "s") -> RequestSpec:
    return RequestSpec(arrival_s, prompt, output, session=session)


def test_a_turn_prefills_neither_what_was_asked_nor_what_was_answered() -> None:
    # 40 tokens and 24 of the answer fill 4 blocks of 16, but the KV of the last token is not known.
    result = run(RoundCosts(), [turn(0.0, 40, 24), turn(100.0, 80, 1)])
    assert result.prefill_tokens == 40 + (80 - 48)


def test_sessions_share_nothing() -> None:
    result = run(RoundCosts(), [turn(0.0, 40, 1, "a"), turn(100.0, 40, 1, "b")])
    assert result.prefill_tokens == 80


def test_a_preamble_is_prefilled_once_and_what_follows_it_each_time() -> None:
    requests = [
        RequestSpec(time_s, 64, 1, preamble="p", preamble_tokens=40) for time_s in (0.0, 100.0)
    ]
    assert run(RoundCosts(), requests).prefill_tokens == 64 + (64 - 32)


def test_requests_without_names_are_not_looked_for() -> None:
    assert run(RoundCosts(), [(0.0, 64, 1), (100.0, 64, 1)]).prefill_tokens == 128


def test_a_lost_replicas_requests_go_on_elsewhere_with_the_tokens_they_have() -> None:
    requests = [(0.0, 2, 10), (0.0, 2, 10)]
    result = run(RoundCosts(), requests, replicas=2, outages=[Outage(0, 4.5)])
    first, second = result.records
    # Four tokens had come; the fifth is the prefill's on the other replica, at the end of its step.
    assert (first.finish_s, second.finish_s) == (11.0, 10.0)
    assert result.output_tokens == 20
    # The prompt of each, and once more with the tokens that had been received.
    assert result.prefill_tokens == 2 + 2 + (2 + 4)


def test_a_replica_that_is_back_is_used_again() -> None:
    requests = [(float(time_s), 2, 1) for time_s in (0, 0, 3, 3, 7, 7)]
    options: dict[str, Any] = {"replicas": 2, "max_batch_size": 1}
    result = run(RoundCosts(), requests, outages=[Outage(1, 2.0, 6.0)], **options)
    assert [record.finish_s for record in result.records] == [1, 1, 4, 5, 8, 8]


def test_an_idle_replica_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    step = Scheduler.step

    def counted(self: Scheduler, now: float, events: Any = ()) -> Any:
        asked.append(self)
        return step(self, now, events)

    monkeypatch.setattr(Scheduler, "step", counted)
    run(RoundCosts(), [(0.0, 2, 50)], replicas=64)
    assert len(set(asked)) == 1
    # A plan and the answer that there is no more of them, for each token; and at the end.
    assert len(asked) == 101


def test_a_copy_without_blocks_takes_no_time() -> None:
    engine = SimulatedCopies(RoundCosts(), 16)  # type: ignore[arg-type]
    assert engine.start(BlockCopy(0, CopyDirection.SWAP_IN, (), (), None), 3.0) == 3.0
