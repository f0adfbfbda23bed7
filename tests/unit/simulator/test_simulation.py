from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from fixed_hardware import RoundCosts, run

from fastserve_mega.plan import BlockCopy, CopyDirection, Plan, SequenceSlice
from fastserve_mega.scheduling.events import CopyDone, StepDone
from fastserve_mega.simulator.records import SimulationResult
from fastserve_mega.simulator.replica import SimulatedReplica
from fastserve_mega.simulator.simulation import Simulation
from fastserve_mega.simulator.workload import RequestSpec
from fastserve_mega.slo import Slo
from fastserve_mega.types import RequestId


def times(result: SimulationResult) -> list[tuple[float, float]]:
    return [(record.first_token_s, record.finish_s) for record in result.records]


def test_first_token_comes_at_the_end_of_the_prefill_and_each_decode_yields_one() -> None:
    result = run(RoundCosts(stages=(1.0,), token_s=0.5), [(10.0, 4, 3)])
    # prefill of 4 tokens: 1 + 4 * 0.5 = 3 s; then two decodes of 1 s
    assert times(result) == [(13.0, 15.0)]
    (record,) = result.records
    assert (record.ttft_s, record.tpot_s, record.jct_s) == (3.0, 1.0, 5.0)
    assert record.normalized_latency_s == pytest.approx(5 / 3)
    assert (result.prefill_tokens, result.decode_tokens, result.output_tokens) == (4, 2, 3)


def test_chunks_of_a_long_prompt_yield_no_token_before_the_last() -> None:
    result = run(RoundCosts(stages=(1.0,)), [(0.0, 10, 1)], max_batch_tokens=4)
    assert result.steps == 3
    assert times(result) == [(3.0, 3.0)]


def test_step_overhead_delays_the_result() -> None:
    result = run(RoundCosts(stages=(1.0,), step_overhead_s=0.25), [(0.0, 4, 2)])
    assert times(result) == [(1.25, 2.5)]
    assert result.busy_s == 2.0


def test_a_request_joins_the_running_batch_at_the_next_step() -> None:
    result = run(RoundCosts(stages=(1.0,)), [(0.0, 2, 3), (0.5, 2, 1)])
    assert times(result) == [(1.0, 3.0), (2.0, 2.0)]


def test_the_largest_gap_and_the_latest_token_of_an_answer() -> None:
    # A decode takes 0.25 s, and 2.5 s beside the prompt of 9 tokens.
    costs = RoundCosts(stages=(0.25,), token_s=0.25)
    result = run(costs, [(0.0, 1, 7), (1.2, 9, 1)], slo=Slo(ttft_s=1.0, tpot_s=0.5))
    first, second = result.records
    assert first.largest_gap_s == 2.5
    # Tokens at 0.25, 0.5, 0.75, 1.0, 1.25, 3.75 and 4.0 s: the sixth is the latest.
    assert first.lateness_s == pytest.approx(3.75 - 5 * 0.5)
    assert (second.largest_gap_s, second.lateness_s) == (0.0, second.ttft_s)


def test_gaps_shorter_than_the_pace_make_no_token_late() -> None:
    costs = RoundCosts(stages=(0.25,), token_s=0.25)
    (record,) = run(costs, [(0.0, 1, 3)], slo=Slo(ttft_s=1.0, tpot_s=5.0)).records
    assert (record.largest_gap_s, record.lateness_s) == (0.25, 0.25)


def test_two_stages_overlap_two_steps() -> None:
    costs = RoundCosts(stages=(2.0, 3.0))
    result = run(costs, [(0.0, 2, 1), (0.0, 2, 1)], max_batch_size=1)
    # step 0: 0-2, 2-5; step 1: 2-4, then waits for the second stage: 5-8
    assert times(result) == [(5.0, 5.0), (8.0, 8.0)]
    assert result.busy_s == 4.0


def test_hops_delay_the_next_stage_but_not_the_next_step() -> None:
    costs = RoundCosts(stages=(3.0, 1.0), hop_s=0.5)
    result = run(costs, [(0.0, 2, 1), (0.0, 2, 1)], max_batch_size=1)
    assert times(result) == [(4.5, 4.5), (7.5, 7.5)]


def test_warm_up_and_cool_down_are_not_measured_and_the_run_ends_early() -> None:
    requests = [(0.0, 2, 2), (1.0, 2, 1), (2.0, 2, 100)]
    result = run(RoundCosts(), requests, warmup=1, cooldown=1)
    assert [record.arrival_s for record in result.records] == [1.0]
    assert result.elapsed_s == 2.0
    assert result.finished == 2


def test_requests_beyond_queue_or_memory_are_rejected() -> None:
    requests = [(0.0, 2, 2), (0.0, 2, 2), (5.0, 1000, 1)]
    result = run(RoundCosts(), requests, max_queued_requests=1, device_blocks=4)
    assert (len(result.records), result.rejected) == (1, 2)


def test_requests_beyond_the_context_are_rejected() -> None:
    result = run(RoundCosts(), [(0.0, 6, 4), (0.0, 6, 5)], max_context=10)
    assert (len(result.records), result.rejected) == (1, 1)


def test_replicas_share_the_requests_and_run_side_by_side() -> None:
    requests = [(0.0, 2, 3), (0.0, 2, 3)]
    alone = run(RoundCosts(), requests, max_batch_size=1)
    assert times(alone) == [(1.0, 3.0), (4.0, 6.0)]
    both = run(RoundCosts(), requests, max_batch_size=1, replicas=2, timeline_interval_s=1.0)
    assert times(both) == [(1.0, 3.0), (1.0, 3.0)]
    assert (both.steps, both.busy_s, both.output_tokens) == (6, 3.0, 6)
    assert both.timeline[1].level_lengths == (2,)


def test_timeline_samples_levels_and_blocks() -> None:
    result = run(RoundCosts(), [(0.0, 20, 3)], timeline_interval_s=2.0)
    assert [point.time_s for point in result.timeline] == [0.0, 2.0]
    assert [point.device_blocks_in_use for point in result.timeline] == [2, 2]
    assert result.timeline[0].level_lengths == (1,)


def test_srpt_learns_the_true_lengths_and_runs_the_shorter_first() -> None:
    requests = [(0.0, 2, 9), (0.0, 2, 1)]
    result = run(RoundCosts(), requests, policy="srpt", oracle=True, max_batch_size=1)
    assert times(result) == [(2.0, 10.0), (1.0, 1.0)]


class Script:
    """A scheduler that answers each call from a list, and keeps what it was told."""

    memory = SimpleNamespace(
        swapper=SimpleNamespace(preemptions=0, recomputed_tokens=0),
        device=SimpleNamespace(capacity=9),
        blocks_for=lambda tokens: 1,
    )
    unfinished = 1
    may_plan = True

    def __init__(self, plans: list[Plan | None], deadlines: Sequence[float] = ()) -> None:
        self.plans = plans
        self.deadlines = list(deadlines)
        self.told: list[tuple[float, Any]] = []

    def step(self, now: float, events: Sequence[Any] = ()) -> Plan | None:
        self.told += [(now, event) for event in events]
        return self.plans.pop(0) if self.plans else None

    def next_deadline(self, now: float) -> float | None:
        return self.deadlines.pop(0) if self.deadlines else None


def simulate(script: Script, costs: RoundCosts, output_tokens: int) -> SimulationResult:
    requests = [RequestSpec(0.0, 2, output_tokens)]
    replica = SimulatedReplica(script, costs, stages=1, block_size=16)  # type: ignore[arg-type]
    return Simulation([replica], requests, max_queued_requests=9).run()


def plan(step_id: int, *copies: BlockCopy, batch: bool = True) -> Plan:
    piece = SequenceSlice(RequestId("0"), step_id, 1, True, 0, ())
    return Plan(step_id, (piece,) if batch else (), copies)


def copy(copy_id: int, direction: str, blocks: int, step: int | None, first: int = 1) -> BlockCopy:
    ids = tuple(range(first, first + blocks))
    return BlockCopy(copy_id, CopyDirection(direction), ids, ids, step)


def test_a_copy_overlaps_compute_and_delays_only_the_step_it_precedes() -> None:
    script = Script(
        [
            plan(0, copy(0, "swap_out", 2, None), copy(1, "swap_in", 3, 1, first=5)),
            None,  # then the step is done at 1 s
            plan(1),
            None,  # swap_out done at 2 s
            None,  # swap_in done at 3 s, so step 1 runs from 3 to 4 s
        ]
    )
    result = simulate(script, RoundCosts(), output_tokens=2)
    told = [(now, event) for now, event in script.told if isinstance(event, StepDone | CopyDone)]
    first = StepDone(0, 1.0)
    last = StepDone(1, 3.0, (RequestId("0"),))
    assert told == [(1.0, first), (2.0, CopyDone(0)), (3.0, CopyDone(1)), (4.0, last)]
    assert times(result) == [(1.0, 4.0)]
    assert (result.copies.busy_s, result.copies.exposed_s) == (5.0, 2.0)
    assert (result.copies.swapped_out_blocks, result.copies.swapped_in_blocks) == (2, 3)


def test_copies_of_one_direction_queue_and_the_directions_do_not_share() -> None:
    script = Script(
        [
            plan(0, copy(0, "swap_out", 1, None), copy(1, "swap_out", 1, None)),
            plan(1, copy(2, "swap_in", 1, None, first=5), batch=False),
        ]
    )
    simulate(script, RoundCosts(stages=(9.0,)), output_tokens=1)
    told = [(now, event.copy_id) for now, event in script.told if isinstance(event, CopyDone)]
    assert told == [(1.0, 0), (1.0, 2), (2.0, 1)]


def test_a_copy_waits_for_the_copy_that_still_reads_its_target_blocks() -> None:
    out, back = copy(0, "swap_out", 2, 0), copy(1, "swap_in", 1, 0)
    script = Script([plan(0, out, back)])
    result = simulate(script, RoundCosts(), output_tokens=1)
    assert times(result) == [(4.0, 4.0)]  # out 0-2, in 2-3, the step 3-4
    assert result.copies.exposed_s == 3.0


def test_a_plan_of_copies_alone_yields_no_step_done() -> None:
    script = Script([plan(0, copy(0, "swap_in", 4, 1), batch=False), plan(1)])
    result = simulate(script, RoundCosts(), output_tokens=1)
    done = [event for _, event in script.told if isinstance(event, StepDone)]
    assert [(event.step_id, event.elapsed_s) for event in done] == [(1, 5.0)]
    assert times(result) == [(5.0, 5.0)]
    assert result.copies.exposed_s == 4.0


def test_a_deadline_wakes_the_loop_when_nothing_else_will() -> None:
    script = Script([None, plan(0)], deadlines=[7.0])
    assert times(simulate(script, RoundCosts(), output_tokens=1)) == [(8.0, 8.0)]


def test_a_scheduler_that_forgets_a_request_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="1 requests are stuck at 0 s"):
        simulate(Script([]), RoundCosts(), output_tokens=1)
