"""One replica: a copy of the model, with ranks and a scheduler of its own."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from fastserve_mega.coordinator.event_log import StepFunction
from fastserve_mega.coordinator.live_request import LiveRequest, LiveRequests
from fastserve_mega.coordinator.waiting import WaitingRequests
from fastserve_mega.coordinator.worker_group import WorkerGroup, WorkersLostError
from fastserve_mega.messaging.rank_messages import CopyResult, StepCommand, StepResult
from fastserve_mega.metrics import ServingMetrics
from fastserve_mega.plan import BlockCopy, Plan
from fastserve_mega.scheduling.events import Aborted, Arrived, CopyDone, Event
from fastserve_mega.scheduling.request import Place
from fastserve_mega.scheduling.scheduler import Scheduler
from fastserve_mega.types import BACKGROUND_PRIORITY, RequestId


@dataclass(frozen=True, slots=True)
class DispatchedStep:
    """A plan that the ranks are executing."""

    plan: Plan
    dispatched_at: float
    requests: Sequence[LiveRequest]
    """One for each slice of the plan's batch, in its order."""
    sampling: Sequence[LiveRequest]
    """Those that are to get a token."""
    embedding: Sequence[LiveRequest]
    """Those of them that are to get an embedding."""

    def flaw(self, result: StepResult, vocab_size: int) -> str | None:
        """What a rank's result has that none of this step can have; None: nothing."""
        count = len(self.sampling)
        for what, yielded, wanted in (
            ("tokens", len(result.token_ids), count),
            ("log probabilities", len(result.logprobs) or count, count),
            ("embeddings", len(result.embeddings), len(self.embedding)),
        ):
            if yielded != wanted:
                return f"{yielded} {what} for {wanted} requests"
        failed = {failure.index for failure in result.failures}
        scored = {each.index for each in result.scored}
        for what, indices, most in (
            ("failures", failed, count),
            ("log probabilities of prompts", scored, len(self.requests)),
        ):
            if indices and max(indices) >= most:
                return f"{what} of request {max(indices)} of {most}"
        for index, token in enumerate(result.token_ids):
            if not 0 <= token < vocab_size and index not in failed:
                return f"token {token} of a vocabulary of {vocab_size}"
        return None


@dataclass(slots=True)
class _CopyInFlight:
    """A copy of KV blocks that some rank has not reported: until then its blocks may be read."""

    copy: BlockCopy
    dispatched_at: float
    ranks: set[int]
    """Ranks that have not reported it."""
    copy_s: float = 0.0
    """What it took on the slowest rank so far."""


class Replica:
    """What one scheduler has been told, and what its ranks have been given to do.

    Steps return in the order of their dispatch. A copy is done when the last rank has reported it.
    """

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
        self.step = step
        self.workers = workers
        self._step_timeout_s = step_timeout_s
        self._metrics = metrics
        self.waiting = WaitingRequests()
        self._events: list[Event] = []
        self._steps: deque[DispatchedStep] = deque()
        self._copies: dict[int, _CopyInFlight] = {}
        """In the order of their dispatch."""
        self._stalled_since: float | None = None
        self.deadline: float | None = None
        """When a turn is due though nothing happens: a step or copy is overdue then, or the
        scheduler asks for it."""

    # --- what the scheduler is to be told ------------------------------------------------------

    def tell(self, event: Event) -> None:
        """Keep an event for the next call of `step`."""
        self._events.append(event)

    def place(self, live: LiveRequest, arrived: Arrived, now: float) -> None:
        """Take a request that was placed here."""
        self.tell(arrived)
        if not _is_background(live):
            self.waiting.join()

    def abort(self, live: LiveRequest, now: float) -> None:
        """End a request that would go on here."""
        self.tell(Aborted(live.request_id))
        if live.started_at is None and not _is_background(live):
            self.waiting.leave(live, now)

    def excess_wait_s(self, live: LiveRequest, max_wait_s: float, now: float) -> float | None:
        """By how many seconds a request that has just come would wait too long; None: it would not.

        Work in the background, and what a coordinator before has begun, waits as long as it takes.
        So does what takes the place of a request that has ended: a client that keeps many under way
        on purpose goes on, until it asks for more.
        """
        has_begun = live.output or live.submit.failed_attempts or live.started_at is not None
        request, fair_share = self.scheduler.find(live.request_id), self.scheduler.fair_share
        if has_begun or _is_background(live) or request is None or fair_share.replaces(request):
            return None
        if pace_s := self.waiting.pace_s(max_wait_s, now):
            wait_s = fair_share.lines.expected_wait_s(request, pace_s)
            if wait_s > max_wait_s:
                fair_share.turn_away(request)
                return wait_s - max_wait_s
            self.waiting.expect(live, now + max_wait_s)
        fair_share.let_in(request)
        return None

    def take_events(self) -> Sequence[Event]:
        """What the scheduler has not been told yet."""
        events, self._events = self._events, []
        return events

    # --- what the ranks are doing --------------------------------------------------------------

    @property
    def computing(self) -> set[RequestId]:
        """Requests of the steps that have not returned."""
        return {live.request_id for step in self._steps for live in step.requests}

    def dispatch(self, plan: Plan, requests: LiveRequests, now: float) -> None:
        """Give the ranks a plan, with the tokens that belong to it.

        Raises:
            WorkersLostError: a rank does not take it.
        """
        batch = [requests[piece.request_id] for piece in plan.batch]
        for request in self.scheduler.preempted:
            if (preempted := requests.get(request.request_id)) is not None:
                preempted.go_away(now, swapped=request.place is Place.SWAPPED)
        token_ids, started, sampling = [], [], []
        for live, piece in zip(batch, plan.batch, strict=True):
            if piece.samples:
                sampling.append(live)
            token_ids.append(live.tokens(piece.start, piece.start + piece.num_tokens))
            if live.started_at is None:
                started.append(live.sequence_start)
                live.begin(piece.start, now)
                if not _is_background(live):
                    self.waiting.start(live)
                self._metrics.requests.observe_start(now - live.arrived_at)
            elif live.away is not None:
                live.come_back(now)
        if batch:
            embedding = [live for live in sampling if live.params.embeds]
            self._steps.append(DispatchedStep(plan, now, batch, sampling, embedding))
            self.waiting.end_step(now)
        for copy in plan.copies:
            self._copies[copy.copy_id] = _CopyInFlight(copy, now, set(self.workers.ranks))
        self.workers.dispatch(StepCommand(plan, tuple(token_ids), tuple(started)))

    def take_step(self, result: StepResult, vocab_size: int) -> DispatchedStep:
        """The step that a result belongs to.

        Raises:
            WorkersLostError: it is not the oldest one, or cannot be the result of that.
        """
        if not self._steps or self._steps[0].plan.step_id != result.step_id:
            raise WorkersLostError(f"the workers answered step {result.step_id} out of order")
        # Still one of the steps while it is looked at: its requests are suspects.
        if flaw := self._steps[0].flaw(result, vocab_size):
            raise WorkersLostError(f"step {result.step_id} yielded {flaw}")
        self._check_duration(max(result.compute_s, result.copy_wait_s), f"step {result.step_id}")
        return self._steps.popleft()

    def take_copy(self, result: CopyResult) -> None:
        """Note that a rank has made a copy; the last one's report becomes an event.

        Raises:
            WorkersLostError: the rank was not asked for it, or cannot have taken so long.
        """
        flying = self._copies.get(result.copy_id)
        if flying is None or result.rank not in flying.ranks:
            raise WorkersLostError(
                f"rank {result.rank} reported copy {result.copy_id}, which it was not asked for"
            )
        self._check_duration(result.copy_s, f"copy {result.copy_id}")
        flying.ranks.remove(result.rank)
        flying.copy_s = max(flying.copy_s, result.copy_s)
        if not flying.ranks:
            del self._copies[result.copy_id]
            self._metrics.observe_copy(flying.copy.direction, flying.copy_s)
            self.tell(CopyDone(result.copy_id))

    def has_turn(self, now: float) -> bool:
        """Whether there is anything to tell the scheduler, to plan, or to check."""
        if self._events or self.scheduler.may_plan:
            return True
        return self.deadline is not None and now >= self.deadline

    def end_turn(self, now: float) -> None:
        """Nothing is planned any more; find out when the next turn is due at the latest."""
        self._observe_stall(now)
        oldest = [flying.dispatched_at for flying in self._oldest_copies()]
        if self._steps:
            oldest.append(self._steps[0].dispatched_at)
        deadlines = [dispatched_at + self._step_timeout_s for dispatched_at in oldest]
        if (asked_at := self.scheduler.next_deadline(now)) is not None:
            deadlines.append(asked_at)
        self.deadline = min(deadlines, default=None)

    def check_deadlines(self, now: float) -> None:
        """Raise WorkersLostError when a step or copy is overdue."""
        limit = f"within {self._step_timeout_s:g} s (coordinator.step_timeout_s)"
        for flying in self._oldest_copies():
            if now - flying.dispatched_at > self._step_timeout_s:
                raise WorkersLostError(
                    f"copy {flying.copy.copy_id} has not been reported by ranks "
                    f"{sorted(flying.ranks)} {limit}"
                )
        if self._steps and now - self._steps[0].dispatched_at > self._step_timeout_s:
            raise WorkersLostError(f"step {self._steps[0].plan.step_id} has not returned {limit}")

    def _check_duration(self, claimed_s: float, what: str) -> None:
        """Raise WorkersLostError when a rank claims to have taken longer than it may."""
        if claimed_s > self._step_timeout_s:
            raise WorkersLostError(
                f"a rank says that {what} took it {claimed_s:g} s, the limit is "
                f"{self._step_timeout_s:g} s (coordinator.step_timeout_s)"
            )

    def _observe_stall(self, now: float) -> None:
        """Count the time in which nothing is computed since what could be is being copied."""
        stalled = bool(self._copies and self.scheduler.unfinished and not self._steps)
        if stalled and self._stalled_since is None:
            self._stalled_since = now
        elif not stalled and self._stalled_since is not None:
            self._metrics.observe_stall(now - self._stalled_since)
            self._stalled_since = None

    def _oldest_copies(self) -> list[_CopyInFlight]:
        """The copy that is due first, if any."""
        return [next(iter(self._copies.values()))] if self._copies else []


def _is_background(live: LiveRequest) -> bool:
    """Whether nobody waits for it."""
    return live.submit.priority >= BACKGROUND_PRIORITY
