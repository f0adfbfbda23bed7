"""One replica: a copy of the model, with ranks and a scheduler of its own."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from fastserve_mega.coordinator.copies_in_flight import CopiesInFlight
from fastserve_mega.coordinator.live_request import LiveRequest
from fastserve_mega.coordinator.worker_group import WorkerGroup, WorkersLostError
from fastserve_mega.messaging.messages import CopyResult, StepCommand, StepResult
from fastserve_mega.metrics import ServingMetrics
from fastserve_mega.plan import Plan
from fastserve_mega.scheduling.events import CopyDone, Event
from fastserve_mega.scheduling.scheduler import Scheduler
from fastserve_mega.types import RequestId

StepFunction = Callable[[float, Sequence[Event]], Plan | None]
"""`Scheduler.step`, or what records it."""


@dataclass(frozen=True, slots=True)
class DispatchedStep:
    """A plan that the ranks are executing."""

    plan: Plan
    dispatched_at: float
    requests: tuple[LiveRequest, ...]
    """Of the plan's batch, in its order."""


class Replica:
    """Carries events to a scheduler and its plans to the ranks."""

    def __init__(
        self,
        scheduler: Scheduler,
        step: StepFunction,
        workers: WorkerGroup,
        step_timeout_s: float,
        metrics: ServingMetrics,
    ) -> None:
        """Put the parts together.

        Args:
            scheduler: of this replica.
            step: its `step`, or a function that records it.
            workers: the ranks of this replica.
            step_timeout_s: longest wait for a step or a copy, seconds.
            metrics: of the server.
        """
        self.scheduler = scheduler
        self._step = step
        self._workers = workers
        self._step_timeout_s = step_timeout_s
        self._metrics = metrics
        self._events: list[Event] = []
        self._steps: deque[DispatchedStep] = deque()
        self._copies = CopiesInFlight(workers.ranks, step_timeout_s)
        self._stalled_since: float | None = None

    @property
    def computing(self) -> set[RequestId]:
        """Requests of the steps that have not returned."""
        return {live.request_id for step in self._steps for live in step.requests}

    def tell(self, event: Event) -> None:
        """Let the scheduler know with the next `advance`."""
        self._events.append(event)

    def returned_steps(self) -> Iterator[tuple[DispatchedStep, StepResult]]:
        """Steps whose results have arrived. Finished copies are told to the scheduler.

        Raises:
            WorkersLostError: a rank failed or sent nonsense.
        """
        for result in self._workers.results():
            match result:
                case StepResult():
                    yield self._returned(result), result
                case CopyResult():
                    self._copy_done(result)

    def advance(self, now: float, requests: Mapping[RequestId, LiveRequest]) -> None:
        """Dispatch what the scheduler plans in answer to all it was not told yet.

        Raises:
            WorkersLostError: a rank does not take its steps, or a step or copy is overdue.
        """
        self._check_deadlines(now)
        events, self._events = self._events, []
        while plan := self._step(now, events):
            self._dispatch(plan, now, requests)
            events = []
        self._observe_stall(now)

    def next_deadline(self) -> float | None:
        """When a step or copy is overdue."""
        deadlines = []
        if self._steps:
            deadlines.append(self._steps[0].dispatched_at + self._step_timeout_s)
        if (copies_due := self._copies.deadline()) is not None:
            deadlines.append(copies_due)
        return min(deadlines, default=None)

    def _returned(self, result: StepResult) -> DispatchedStep:
        if not self._steps or self._steps[0].plan.step_id != result.step_id:
            raise WorkersLostError(f"the workers answered step {result.step_id} out of order")
        step = self._steps.popleft()
        wanted = sum(piece.samples for piece in step.plan.batch)
        if wanted != len(result.token_ids):
            raise WorkersLostError(
                f"step {result.step_id} yielded {len(result.token_ids)} tokens for "
                f"{wanted} requests"
            )
        return step

    def _copy_done(self, result: CopyResult) -> None:
        done = self._copies.reported(result)
        if done is not None:
            self._metrics.observe_copy(done.direction, done.copy_s)
            self.tell(CopyDone(done.copy_id))

    def _check_deadlines(self, now: float) -> None:
        self._copies.check_deadline(now)
        if self._steps and now - self._steps[0].dispatched_at > self._step_timeout_s:
            raise WorkersLostError(
                f"step {self._steps[0].plan.step_id} has not returned within "
                f"{self._step_timeout_s:g} s (coordinator.step_timeout_s)"
            )

    def _dispatch(self, plan: Plan, now: float, requests: Mapping[RequestId, LiveRequest]) -> None:
        batch = tuple(requests[piece.request_id] for piece in plan.batch)
        token_ids = tuple(
            live.input_tokens(piece) for live, piece in zip(batch, plan.batch, strict=True)
        )
        started = tuple(live.sequence_start for live in batch if not live.started)
        for live, piece in zip(batch, plan.batch, strict=True):
            if not live.started:
                live.begin(piece.start, now)
                self._metrics.observe_start(now - live.arrived)
        if plan.batch:
            self._steps.append(DispatchedStep(plan, now, batch))
        self._copies.dispatched(plan.copies, now)
        self._workers.dispatch(StepCommand(plan, token_ids, started))

    def _observe_stall(self, now: float) -> None:
        """Count the time in which nothing is computed since what could be is being copied."""
        stalled = bool(self._copies and self.scheduler.unfinished and not self._steps)
        if stalled and self._stalled_since is None:
            self._stalled_since = now
        elif not stalled and self._stalled_since is not None:
            self._metrics.observe_stall(now - self._stalled_since)
            self._stalled_since = None
