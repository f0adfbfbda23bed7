"""The coordinator's loop with a heap for sockets and engine models for workers."""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Callable, Sequence

from fastserve_mega.plan import Plan
from fastserve_mega.scheduling.events import (
    Aborted,
    Arrived,
    CopyDone,
    Event,
    StepDone,
    WorkersLost,
)
from fastserve_mega.scheduling.placement import Placement, Placer
from fastserve_mega.scheduling.scheduler import Scheduler
from fastserve_mega.simulator.records import (
    RequestRecord,
    SimulatedRequest,
    SimulationResult,
    Timeline,
)
from fastserve_mega.simulator.replica import (
    CopyStats,
    Outage,
    SimulatedReplica,
    SimulatedStep,
    changes,
)
from fastserve_mega.simulator.workload import RequestSpec
from fastserve_mega.slo import Slo
from fastserve_mega.types import BlockHash, RequestId


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
        make_placer: Callable[[Sequence[Scheduler]], Placer] = Placement,
        outages: Sequence[Outage] = (),
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
            make_placer: says which replica a request goes to.
            outages: of replicas; some replica is there at any time.
        """
        self._replicas = replicas
        schedulers = [replica.scheduler for replica in replicas]
        self._placement = make_placer(schedulers)
        # What one replica has no room for is not given to others either, nor would it be live.
        memories = (scheduler.memory for scheduler in schedulers)
        self._smallest = min(memories, key=lambda memory: memory.device.capacity)
        self._block_size = replicas[0].block_size
        self._requests = requests
        self._max_queued_requests = max_queued_requests
        self._max_context = max_context
        # Clients ask for as many tokens as the longest answer has: it says nothing of their own.
        self._max_tokens = max((spec.output_tokens for spec in requests), default=1)
        self._oracle = oracle
        self._measured = range(warmup, len(requests) - cooldown)
        self._unmeasured_left = len(self._measured)
        self._timeline = Timeline(schedulers, timeline_interval_s)
        self._on_finished = on_finished
        self._slo = slo or Slo()

        self._heap: list[tuple[float, int, int, SimulatedStep | CopyDone]] = []
        """(time, running number, replica, what happens then)."""
        self._pushed = 0
        self._changes = changes(outages)
        self._shares_prefixes = any(spec.shares_tokens for spec in requests)
        self._unsettled: set[int] = set()
        """Replicas that a later turn may plan for though nothing happens to them: others cost a
        turn nothing."""
        self._next_arrival = 0
        self._live: dict[RequestId, SimulatedRequest] = {}
        self._records: dict[int, RequestRecord] = {}
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
            events = self._events_until(now)
            for index in sorted(self._unsettled | events.keys()):
                self._turn(index, events.get(index, ()), now)
            self._placement.settle()
        if self._unmeasured_left:
            unfinished = sum(replica.scheduler.unfinished for replica in self._replicas)
            raise RuntimeError(f"{unfinished} requests are stuck at {end_s:g} s")
        return self._result(end_s)

    def _turn(self, index: int, events: Sequence[Event], now: float) -> None:
        """One replica's part of a turn of the coordinator."""
        scheduler = self._replicas[index].scheduler
        while plan := scheduler.step(now, events):
            self._dispatch(index, plan, now)
            events = ()
        if scheduler.may_plan:
            self._unsettled.add(index)
        else:
            self._unsettled.discard(index)

    # --- time ------------------------------------------------------------------------------------

    def _next_time(self, now: float) -> float | None:
        """When something happens next; a deadline counts only when nothing else will."""
        time_s = self._heap[0][0] if self._heap else math.inf
        if self._next_arrival < len(self._requests):
            time_s = min(time_s, self._requests[self._next_arrival].arrival_s)
        if self._changes:
            time_s = min(time_s, self._changes[-1][0])
        if time_s < math.inf:
            return time_s
        schedulers = (self._replicas[index].scheduler for index in self._unsettled)
        deadlines = (scheduler.next_deadline(now) for scheduler in schedulers)
        return min(
            (time_s for time_s in deadlines if time_s is not None and time_s > now), default=None
        )

    def _events_until(self, now: float) -> dict[int, list[Event]]:
        """Events by replica, in the coordinator's order: ranks first, then new requests."""
        events: dict[int, list[Event]] = defaultdict(list)
        heap = self._heap
        while heap and heap[0][0] <= now:
            _, _, index, happened = heapq.heappop(heap)
            if isinstance(happened, SimulatedStep):
                events[index].append(self._step_done(happened, now))
            else:
                events[index].append(happened)
        while self._changes and self._changes[-1][0] <= now:
            _, index, is_lost = self._changes.pop()
            if is_lost:
                self._lose(index, events)
            else:
                self._placement.restore(index)
        requests = self._requests
        while self._next_arrival < len(requests):
            spec = requests[self._next_arrival]
            if spec.arrival_s > now:
                break
            self._arrive(spec, self._next_arrival, events)
            self._next_arrival += 1
        return events

    def _lose(self, index: int, events: dict[int, list[Event]]) -> None:
        """Take a replica's requests elsewhere, with what their clients have received."""
        self._placement.lose(index)
        self._heap = [entry for entry in self._heap if entry[2] != index]
        heapq.heapify(self._heap)
        events[index].append(WorkersLost())
        for request in [each for each in self._live.values() if each.replica == index]:
            events[index].append(Aborted(RequestId(str(request.index))))
            self._place(request, events)

    # --- clients and workers ---------------------------------------------------------------------

    def _arrive(self, spec: RequestSpec, index: int, events: dict[int, list[Event]]) -> None:
        if self._is_rejected(spec):
            self._rejected += 1
            self._unmeasured_left -= index in self._measured
            return
        request = SimulatedRequest(spec, index)
        self._live[RequestId(str(index))] = request
        self._place(request, events)

    def _place(self, request: SimulatedRequest, events: dict[int, list[Event]]) -> None:
        """Find a replica for a request, and tell it what is known of it."""
        spec, received = request.spec, request.received_tokens
        hashes: tuple[BlockHash, ...] = ()
        if self._shares_prefixes:
            size = self._block_size
            blocks = range((spec.prompt_tokens + received) // size)
            hashes = tuple(spec.block_hash(block, size, request.index) for block in blocks)
        arrived = Arrived(
            RequestId(str(request.index)),
            spec.prompt_tokens,
            self._max_tokens,
            num_received_tokens=received,
            priority=spec.priority,
            block_hashes=hashes,
            oracle_output_tokens=spec.output_tokens if self._oracle else None,
            client=spec.client,
            expected_output_tokens=spec.expected_output_tokens,
            session=spec.session,
        )
        request.replica = self._placement.choose(arrived)
        events[request.replica].append(arrived)

    def _is_rejected(self, spec: RequestSpec) -> bool:
        if len(self._live) >= self._max_queued_requests:
            return True
        tokens = spec.prompt_tokens + spec.output_tokens
        if self._max_context is not None and tokens > self._max_context:
            return True
        needed = self._smallest.blocks_for(spec.prompt_tokens + self._max_tokens)
        return needed > self._smallest.device.capacity

    def _dispatch(self, index: int, plan: Plan, now: float) -> None:
        for time_s, happened in self._replicas[index].dispatch(plan, now):
            self._pushed += 1
            heapq.heappush(self._heap, (time_s, self._pushed, index, happened))
        if plan.batch:
            self._timeline.observe(len(plan.batch), now)

    def _step_done(self, step: SimulatedStep, now: float) -> StepDone:
        """Each sampling slice yields one token; the simulation knows which is the last."""
        finished: list[RequestId] = []
        live, pace_s = self._live, self._slo.tpot_s
        filled: list[tuple[RequestId, BlockHash]] = []
        block_size = self._block_size if self._shares_prefixes else 0
        for piece in step.plan.batch:
            if not piece.samples:
                continue
            self._output_tokens += 1
            request_id = piece.request_id
            request = live[request_id]
            request.output_left -= 1
            if block_size:
                blocks, rest = divmod(piece.start + piece.num_tokens + 1, block_size)
                if not rest:
                    block_hash = request.spec.block_hash(blocks - 1, block_size, request.index)
                    filled.append((request_id, block_hash))
            if now - request.last_token_s > request.harmless_gap_s:
                request.observe_gap(now, pace_s)
            request.last_token_s = now
            if not request.output_left:
                finished.append(request_id)
                self._finish(request_id, now)
        return StepDone(step.plan.step_id, now - step.dispatched_s, tuple(finished), tuple(filled))

    def _finish(self, request_id: RequestId, now: float) -> None:
        request = self._live.pop(request_id)
        self._finished += 1
        if request.index in self._measured:
            self._records[request.index] = request.record(now)
            self._unmeasured_left -= 1
        self._placement.observe_finish(request.spec.output_tokens)
        if self._on_finished:
            self._on_finished()

    # --- results ---------------------------------------------------------------------------------

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
            preemptions=sum(memory.swapper.preemptions for memory in memories),
            recomputed_tokens=sum(memory.swapper.recomputed_tokens for memory in memories),
            copies=sum((replica.copy_engine.stats() for replica in replicas), CopyStats()),
            timeline=tuple(self._timeline.points),
            swapped_tokens=sum(replica.swapped_tokens for replica in replicas),
            slo=self._slo,
        )
