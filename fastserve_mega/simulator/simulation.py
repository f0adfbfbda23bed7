"""The coordinator's loop with a heap for sockets and a cost model for workers."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fastserve_mega.plan import Plan
from fastserve_mega.scheduling.events import Arrived, CopyDone, Event, StepDone
from fastserve_mega.scheduling.scheduler import Scheduler
from fastserve_mega.simulator.analytic_cost_model import step_work
from fastserve_mega.simulator.engine_model import EngineModel
from fastserve_mega.simulator.pipeline import CopyEngine, Pipeline
from fastserve_mega.simulator.records import RequestRecord, SimulationResult, TimelinePoint
from fastserve_mega.simulator.workload import RequestSpec
from fastserve_mega.types import RequestId


class _LiveRequest:
    """What the workers and the client know of a request; the scheduler never sees it."""

    __slots__ = ("first_token_s", "index", "output_left", "spec")

    def __init__(self, spec: RequestSpec, index: int) -> None:
        self.spec = spec
        self.index = index
        self.output_left = spec.output_tokens
        self.first_token_s = -1.0


@dataclass(frozen=True, slots=True)
class _DispatchedStep:
    plan: Plan
    dispatched_s: float


class Simulation:
    """One run of the live `Scheduler` on a virtual clock. Used once."""

    def __init__(
        self,
        scheduler: Scheduler,
        cost_model: EngineModel,
        requests: Sequence[RequestSpec],
        *,
        stages: int,
        block_size: int,
        max_queued_requests: int,
        oracle: bool = False,
        warmup: int = 0,
        cooldown: int = 0,
        timeline_interval_s: float | None = None,
        on_finished: Callable[[], None] | None = None,
    ) -> None:
        """Prepare a run.

        Args:
            scheduler: fresh, with a window of `stages`.
            cost_model: the times of steps and copies.
            requests: in order of arrival.
            stages: pipeline stages.
            block_size: tokens of a KV block.
            max_queued_requests: unfinished requests held at once; one more is rejected.
            oracle: tell the scheduler the true output lengths (policy srpt).
            warmup: so many first requests are not measured.
            cooldown: so many last requests keep up the load and are not measured; the run ends
                when all others have finished.
            timeline_interval_s: least time between points of the timeline; None records none.
            on_finished: called for each finished request.
        """
        self._scheduler = scheduler
        self._cost_model = cost_model
        self._requests = requests
        self._max_queued_requests = max_queued_requests
        # Clients ask for as many tokens as the longest answer has: it says nothing of their own.
        self._max_tokens = max((spec.output_tokens for spec in requests), default=1)
        self._oracle = oracle
        self._measured = range(warmup, len(requests) - cooldown)
        self._unmeasured_left = len(self._measured)
        self._timeline_interval_s = timeline_interval_s
        self._on_finished = on_finished
        self._pipeline = Pipeline(stages)
        self._copy_engine = CopyEngine(cost_model, block_size)

        self._heap: list[tuple[float, int, _DispatchedStep | CopyDone]] = []
        self._pushed = 0
        self._next_arrival = 0
        self._live: dict[RequestId, _LiveRequest] = {}
        self._records: dict[int, RequestRecord] = {}
        self._timeline: list[TimelinePoint] = []
        self._rejected = self._finished = 0
        self._steps = self._slices = self._decode_tokens = self._prefill_tokens = (
            self._output_tokens
        ) = 0

    def run(self) -> SimulationResult:
        """Run until every measured request has finished.

        Raises:
            RuntimeError: the scheduler left requests unfinished though nothing is under way.
        """
        step = self._scheduler.step
        now: float | None = 0.0
        end_s = 0.0
        while self._unmeasured_left and (now := self._next_time(end_s)) is not None:
            end_s = now
            plan = step(now, self._events_until(now))
            while plan is not None:
                self._dispatch(plan, now)
                plan = step(now)
        if self._unmeasured_left:
            raise RuntimeError(f"{self._scheduler.unfinished} requests are stuck at {end_s:g} s")
        return self._result(end_s)

    # --- time ------------------------------------------------------------------------------------

    def _next_time(self, now: float) -> float | None:
        """When something happens next; a deadline counts only when nothing else will."""
        arrival_s = None
        if self._next_arrival < len(self._requests):
            arrival_s = self._requests[self._next_arrival].arrival_s
        if self._heap:
            time_s = self._heap[0][0]
            return time_s if arrival_s is None or time_s < arrival_s else arrival_s
        if arrival_s is not None:
            return arrival_s
        deadline_s = self._scheduler.next_deadline(now)
        return deadline_s if deadline_s is not None and deadline_s > now else None

    def _events_until(self, now: float) -> list[Event]:
        """Like the coordinator: what the workers did first, then what clients sent."""
        events: list[Event] = []
        heap = self._heap
        while heap and heap[0][0] <= now:
            happened = heapq.heappop(heap)[2]
            if isinstance(happened, _DispatchedStep):
                events.append(self._step_done(happened, now))
            else:
                events.append(happened)
        requests = self._requests
        while self._next_arrival < len(requests):
            spec = requests[self._next_arrival]
            if spec.arrival_s > now:
                break
            if arrived := self._arrive(spec, self._next_arrival):
                events.append(arrived)
            self._next_arrival += 1
        return events

    def _push(self, time_s: float, happened: _DispatchedStep | CopyDone) -> None:
        self._pushed += 1
        heapq.heappush(self._heap, (time_s, self._pushed, happened))

    # --- clients and workers ---------------------------------------------------------------------

    def _arrive(self, spec: RequestSpec, index: int) -> Arrived | None:
        is_full = len(self._live) >= self._max_queued_requests
        if is_full or self._scheduler.refusal(spec.prompt_tokens, self._max_tokens):
            self._rejected += 1
            self._unmeasured_left -= index in self._measured
            return None
        request_id = RequestId(str(index))
        self._live[request_id] = _LiveRequest(spec, index)
        return Arrived(
            request_id,
            spec.prompt_tokens,
            self._max_tokens,
            oracle_output_tokens=spec.output_tokens if self._oracle else None,
        )

    def _dispatch(self, plan: Plan, now: float) -> None:
        engine = self._copy_engine
        for copy in plan.copies:
            self._push(engine.start(copy, now), CopyDone(copy.copy_id))
        if not plan.batch:
            return
        work = step_work(plan.batch)
        self._steps += 1
        self._slices += len(plan.batch)
        self._decode_tokens += work.decode_slices
        self._prefill_tokens += work.tokens - work.decode_slices
        pipeline, cost_model = self._pipeline, self._cost_model
        ready_s = engine.ready_s(plan.step_id, now, pipeline.first_stage_free_s)
        done_s = pipeline.run(
            ready_s, cost_model.stage_times(work), cost_model.hop_times(work.tokens)
        )
        self._push(done_s + cost_model.step_overhead_s, _DispatchedStep(plan, now))
        if self._timeline_interval_s is not None:
            self._extend_timeline(plan, now, self._timeline_interval_s)

    def _step_done(self, step: _DispatchedStep, now: float) -> StepDone:
        """Each sampling slice yields one token; the simulation knows which is the last."""
        finished: list[RequestId] = []
        live = self._live
        for request_id, _, _, samples, _, _ in step.plan.batch:
            if not samples:
                continue
            request = live[request_id]
            request.output_left -= 1
            self._output_tokens += 1
            if request.first_token_s < 0:
                request.first_token_s = now
            if not request.output_left:
                finished.append(request_id)
                self._finish(request_id, now)
        return StepDone(step.plan.step_id, now - step.dispatched_s, tuple(finished))

    def _finish(self, request_id: RequestId, now: float) -> None:
        request = self._live.pop(request_id)
        self._finished += 1
        if request.index in self._measured:
            spec = request.spec
            self._records[request.index] = RequestRecord(
                spec.prompt_tokens, spec.output_tokens, spec.arrival_s, request.first_token_s, now
            )
            self._unmeasured_left -= 1
        if self._on_finished:
            self._on_finished()

    # --- results ---------------------------------------------------------------------------------

    def _extend_timeline(self, plan: Plan, now: float, interval_s: float) -> None:
        if self._timeline and now < self._timeline[-1].time_s + interval_s:
            return
        device, host = self._scheduler.memory.device, self._scheduler.memory.host
        self._timeline.append(
            TimelinePoint(
                now,
                self._scheduler.level_lengths(),
                device.capacity - device.free_count,
                host.capacity - host.free_count,
                len(plan.batch),
            )
        )

    def _result(self, end_s: float) -> SimulationResult:
        memory = self._scheduler.memory
        return SimulationResult(
            records=tuple(self._records[index] for index in sorted(self._records)),
            rejected=self._rejected,
            elapsed_s=end_s - (self._requests[0].arrival_s if self._requests else 0.0),
            steps=self._steps,
            slices=self._slices,
            decode_tokens=self._decode_tokens,
            prefill_tokens=self._prefill_tokens,
            output_tokens=self._output_tokens,
            finished=self._finished,
            busy_s=self._pipeline.busy_s,
            preemptions=memory.preemptions,
            recomputed_tokens=memory.recomputed_tokens,
            copies=self._copy_engine.stats(),
            timeline=tuple(self._timeline),
        )
