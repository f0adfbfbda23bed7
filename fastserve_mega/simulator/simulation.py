"""The coordinator's loop with a heap for sockets and engine models for workers."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence

from fastserve_mega.plan import Plan
from fastserve_mega.scheduling.events import Arrived, CopyDone, Event, StepDone
from fastserve_mega.scheduling.placement import Placement
from fastserve_mega.simulator.pipeline import CopyStats
from fastserve_mega.simulator.records import RequestRecord, SimulationResult, TimelinePoint
from fastserve_mega.simulator.replica import DispatchedStep, SimulatedReplica
from fastserve_mega.simulator.workload import RequestSpec
from fastserve_mega.slo import Slo
from fastserve_mega.types import RequestId


class _LiveRequest:
    """What the workers and the client know of a request; the scheduler never sees it."""

    __slots__ = (
        "first_token_s", "harmless_gap_s", "index", "largest_gap_s", "last_token_s", "lateness_s",
        "output_left", "spec",
    )  # fmt: skip

    def __init__(self, spec: RequestSpec, index: int) -> None:
        self.spec = spec
        self.index = index
        self.output_left = spec.output_tokens
        self.first_token_s = -1.0
        self.last_token_s = spec.arrival_s
        self.largest_gap_s = 0.0
        self.lateness_s = 0.0
        self.harmless_gap_s = -1.0
        """No shorter gap is the largest one, nor its token later than the one before."""

    def observe_gap(self, now: float, pace_s: float) -> None:
        """Note the first token, or one that came more slowly than the pace."""
        waited_s = now - self.spec.arrival_s
        if self.first_token_s < 0:
            self.first_token_s = now
            self.lateness_s = waited_s
            self.harmless_gap_s = 0.0
            return
        before = self.spec.output_tokens - self.output_left - 1
        self.largest_gap_s = max(self.largest_gap_s, now - self.last_token_s)
        self.lateness_s = max(self.lateness_s, waited_s - pace_s * before)
        self.harmless_gap_s = pace_s


class Simulation:
    """One run of the live `Scheduler` of each replica on a virtual clock. Used once."""

    def __init__(
        self,
        replicas: Sequence[SimulatedReplica],
        requests: Sequence[RequestSpec],
        *,
        max_queued_requests: int,
        max_context: int | None = None,
        oracle: bool = False,
        warmup: int = 0,
        cooldown: int = 0,
        timeline_interval_s: float | None = None,
        on_finished: Callable[[], None] | None = None,
        slo: Slo | None = None,
    ) -> None:
        """Prepare a run.

        Args:
            replicas: fresh.
            requests: in order of arrival.
            max_queued_requests: unfinished requests held at once; one more is rejected.
            max_context: tokens of prompt and answer together, of which more are rejected.
            oracle: tell the scheduler the true output lengths (policy srpt).
            warmup: so many first requests are not measured.
            cooldown: so many last requests keep up the load and are not measured; the run ends
                when all others have finished.
            timeline_interval_s: least time between points of the timeline; None records none.
            on_finished: called for each finished request.
            slo: by whose pace tokens are late; None takes the default.
        """
        self._replicas = replicas
        self._placement = Placement([replica.scheduler for replica in replicas])
        self._requests = requests
        self._max_queued_requests = max_queued_requests
        self._max_context = max_context
        # Clients ask for as many tokens as the longest answer has: it says nothing of their own.
        self._max_tokens = max((spec.output_tokens for spec in requests), default=1)
        self._oracle = oracle
        self._measured = range(warmup, len(requests) - cooldown)
        self._unmeasured_left = len(self._measured)
        self._timeline_interval_s = timeline_interval_s
        self._on_finished = on_finished
        self._slo = slo or Slo()

        self._heap: list[tuple[float, int, int, DispatchedStep | CopyDone]] = []
        """(time, running number, replica, what happens then)."""
        self._pushed = 0
        self._next_arrival = 0
        self._live: dict[RequestId, _LiveRequest] = {}
        self._records: dict[int, RequestRecord] = {}
        self._timeline: list[TimelinePoint] = []
        self._rejected = self._finished = self._output_tokens = 0

    def run(self) -> SimulationResult:
        """Run until every measured request has finished.

        Raises:
            RuntimeError: the scheduler left requests unfinished though nothing is under way.
        """
        now: float | None = 0.0
        end_s = 0.0
        while self._unmeasured_left and (now := self._next_time(end_s)) is not None:
            end_s = now
            for index, events in enumerate(self._events_until(now)):
                step = self._replicas[index].scheduler.step
                plan = step(now, events)
                while plan is not None:
                    self._dispatch(index, plan, now)
                    plan = step(now)
            self._placement.settle()
        if self._unmeasured_left:
            unfinished = sum(replica.scheduler.unfinished for replica in self._replicas)
            raise RuntimeError(f"{unfinished} requests are stuck at {end_s:g} s")
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
        deadlines = (replica.scheduler.next_deadline(now) for replica in self._replicas)
        return min(
            (time_s for time_s in deadlines if time_s is not None and time_s > now), default=None
        )

    def _events_until(self, now: float) -> list[list[Event]]:
        """Events of each replica in the coordinator's order: ranks first, then new requests."""
        events: list[list[Event]] = [[] for _ in self._replicas]
        heap = self._heap
        while heap and heap[0][0] <= now:
            _, _, index, happened = heapq.heappop(heap)
            if isinstance(happened, DispatchedStep):
                events[index].append(self._step_done(happened, now))
            else:
                events[index].append(happened)
        requests = self._requests
        while self._next_arrival < len(requests):
            spec = requests[self._next_arrival]
            if spec.arrival_s > now:
                break
            if arrived := self._arrive(spec, self._next_arrival):
                events[self._placement.choose(arrived)].append(arrived)
            self._next_arrival += 1
        return events

    # --- clients and workers ---------------------------------------------------------------------

    def _arrive(self, spec: RequestSpec, index: int) -> Arrived | None:
        if self._is_rejected(spec):
            self._rejected += 1
            self._unmeasured_left -= index in self._measured
            return None
        request_id = RequestId(str(index))
        self._live[request_id] = _LiveRequest(spec, index)
        return Arrived(
            request_id,
            spec.prompt_tokens,
            self._max_tokens,
            priority=spec.priority,
            oracle_output_tokens=spec.output_tokens if self._oracle else None,
        )

    def _is_rejected(self, spec: RequestSpec) -> bool:
        if len(self._live) >= self._max_queued_requests:
            return True
        tokens = spec.prompt_tokens + spec.output_tokens
        if self._max_context is not None and tokens > self._max_context:
            return True
        # The replicas are alike: what one of them has no room for, none has.
        scheduler = self._replicas[0].scheduler
        return bool(scheduler.refusal(spec.prompt_tokens, self._max_tokens))

    def _dispatch(self, index: int, plan: Plan, now: float) -> None:
        for time_s, happened in self._replicas[index].dispatch(plan, now):
            self._pushed += 1
            heapq.heappush(self._heap, (time_s, self._pushed, index, happened))
        if plan.batch and self._timeline_interval_s is not None:
            self._extend_timeline(plan, now, self._timeline_interval_s)

    def _step_done(self, step: DispatchedStep, now: float) -> StepDone:
        """Each sampling slice yields one token; the simulation knows which is the last."""
        finished: list[RequestId] = []
        live, pace_s = self._live, self._slo.tpot_s
        tokens = 0
        for piece in step.plan.batch:
            if not piece.samples:
                continue
            tokens += 1
            request_id = piece.request_id
            request = live[request_id]
            request.output_left -= 1
            gap_s = now - request.last_token_s
            if gap_s > request.harmless_gap_s:
                if request.first_token_s >= 0 and gap_s <= pace_s:
                    request.largest_gap_s = request.harmless_gap_s = gap_s
                else:
                    request.observe_gap(now, pace_s)
            request.last_token_s = now
            if not request.output_left:
                finished.append(request_id)
                self._finish(request_id, now)
        self._output_tokens += tokens
        return StepDone(step.plan.step_id, now - step.dispatched_s, tuple(finished))

    def _finish(self, request_id: RequestId, now: float) -> None:
        request = self._live.pop(request_id)
        self._finished += 1
        if request.index in self._measured:
            spec = request.spec
            self._records[request.index] = RequestRecord(
                spec.prompt_tokens, spec.output_tokens, spec.arrival_s, request.first_token_s, now,
                request.largest_gap_s, request.lateness_s, spec.client,
            )  # fmt: skip
            self._unmeasured_left -= 1
        self._placement.observe_finish(request.spec.output_tokens)
        if self._on_finished:
            self._on_finished()

    # --- results ---------------------------------------------------------------------------------

    def _extend_timeline(self, plan: Plan, now: float, interval_s: float) -> None:
        if self._timeline and now < self._timeline[-1].time_s + interval_s:
            return
        schedulers = [replica.scheduler for replica in self._replicas]
        levels = zip(*(each.level_lengths() for each in schedulers), strict=True)
        devices = [each.memory.device for each in schedulers]
        hosts = [each.memory.host for each in schedulers]
        self._timeline.append(
            TimelinePoint(
                now,
                tuple(sum(lengths) for lengths in levels),
                sum(pool.capacity - pool.free_count for pool in devices),
                sum(pool.capacity - pool.free_count for pool in hosts),
                len(plan.batch),
            )
        )

    def _result(self, end_s: float) -> SimulationResult:
        replicas = self._replicas
        memories = [replica.scheduler.memory for replica in replicas]
        return SimulationResult(
            records=tuple(self._records[index] for index in sorted(self._records)),
            rejected=self._rejected,
            elapsed_s=end_s - (self._requests[0].arrival_s if self._requests else 0.0),
            steps=sum(replica.steps for replica in replicas),
            slices=sum(replica.slices for replica in replicas),
            decode_tokens=sum(replica.decode_tokens for replica in replicas),
            prefill_tokens=sum(replica.prefill_tokens for replica in replicas),
            output_tokens=self._output_tokens,
            finished=self._finished,
            busy_s=sum(replica.pipeline.busy_s for replica in replicas) / len(replicas),
            preemptions=sum(memory.preemptions for memory in memories),
            recomputed_tokens=sum(memory.recomputed_tokens for memory in memories),
            copies=sum((replica.copy_engine.stats() for replica in replicas), CopyStats()),
            timeline=tuple(self._timeline),
            swapped_tokens=sum(replica.swapped_tokens for replica in replicas),
            slo=self._slo,
        )
