"""The loop: what came in becomes events, the scheduler answers with plans, the workers run them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fastserve_mega.config import CoordinatorConfig
from fastserve_mega.coordinator.admission import Admission
from fastserve_mega.coordinator.block_hashes import BlockHashChain
from fastserve_mega.coordinator.copies_in_flight import CopiesInFlight
from fastserve_mega.coordinator.event_log import RecordingScheduler
from fastserve_mega.coordinator.front_door import FrontDoor
from fastserve_mega.coordinator.live_request import LiveRequest
from fastserve_mega.coordinator.timeouts import Timeouts
from fastserve_mega.coordinator.worker_group import WorkerGroup, WorkersLostError
from fastserve_mega.messaging.messages import (
    Cancel,
    CopyResult,
    Finished,
    GetMetrics,
    Hello,
    Message,
    Metrics,
    Ping,
    Pong,
    Refused,
    Restarting,
    StepCommand,
    StepResult,
    Submit,
    Welcome,
)
from fastserve_mega.messaging.router import Identity
from fastserve_mega.metrics import ServingMetrics
from fastserve_mega.plan import Plan
from fastserve_mega.scheduling.events import Aborted, Arrived, CopyDone, Event, StepDone
from fastserve_mega.scheduling.scheduler import Scheduler
from fastserve_mega.types import BlockHash, FinishReason, RequestId, Usage


@dataclass(frozen=True, slots=True)
class _DispatchedStep:
    plan: Plan
    dispatched_at: float
    requests: tuple[LiveRequest, ...]


class Coordinator:
    """Everything between the two sockets. It sees tokens; the scheduler sees lengths."""

    def __init__(
        self,
        *,
        config: CoordinatorConfig,
        welcome: Welcome,
        scheduler: Scheduler | RecordingScheduler,
        front_door: FrontDoor,
        workers: WorkerGroup,
        world_size: int,
        metrics: ServingMetrics,
        admission: Admission,
        prefix_block_size: int | None,
        clock: Callable[[], float],
    ) -> None:
        """Put the parts together; `prefix_block_size` is None without prefix cache."""
        self._config = config
        self._welcome = welcome
        self._eos_token_ids = frozenset(welcome.eos_token_ids)
        self._scheduler = scheduler
        self._front_door = front_door
        self._workers = workers
        self._metrics = metrics
        self._admission = admission
        self._prefix_block_size = prefix_block_size
        self._clock = clock
        self._requests: dict[RequestId, LiveRequest] = {}
        self._by_client: dict[Identity, set[RequestId]] = {}
        self._steps: deque[_DispatchedStep] = deque()
        self._copies = CopiesInFlight(world_size, config.step_timeout_s)
        self._stalled_since: float | None = None
        self._timeouts = Timeouts()
        self._replies: list[tuple[Identity, Message]] = []
        self._draining = False

    @property
    def unfinished(self) -> int:
        return len(self._requests)

    def run_once(self) -> None:
        """Handle everything that has arrived, without waiting.

        Raises:
            WorkersLostError: a rank failed, or a step or copy overran `step_timeout_s`.
        """
        now = self._clock()
        events: Sequence[Event] = [
            *self._from_workers(now),
            *self._from_clients(now),
            *self._overdue(now),
        ]
        while plan := self._scheduler.step(now, events):
            self._dispatch(plan, now)
            events = ()
        self._observe_stall(now)
        for client, message in self._replies:
            self._front_door.send(client, message)
        self._replies.clear()

    def next_deadline(self) -> float | None:
        """When `run_once` has something to do though nothing arrives."""
        deadlines = []
        if (timeout := self._timeouts.next_deadline()) is not None:
            deadlines.append(timeout)
        if self._steps:
            deadlines.append(self._steps[0].dispatched_at + self._config.step_timeout_s)
        if (copies_due := self._copies.deadline()) is not None:
            deadlines.append(copies_due)
        return min(deadlines, default=None)

    def drain(self) -> None:
        """Accept nothing new from here on."""
        self._draining = True

    def end_all(self, reason: FinishReason, message: str) -> None:
        """End every request, as the last thing that is done for clients."""
        for live in list(self._requests.values()):
            self._finish(live, reason, message)
        for client, reply in self._replies:
            self._front_door.send(client, reply)
        self._replies.clear()

    def announce_restart(self, within_s: float, reason: str) -> None:
        """Leave every request unfinished, for its client to submit again to the next epoch."""
        for client in self._by_client:
            self._front_door.send(client, Restarting(within_s, reason))

    # --- what came in --------------------------------------------------------------------------

    def _from_workers(self, now: float) -> list[Event]:
        events: list[Event] = []
        for result in self._workers.results():
            match result:
                case StepResult():
                    events.append(self._step_done(result, now))
                case CopyResult():
                    events += self._copy_done(result)
        return events

    def _copy_done(self, result: CopyResult) -> list[Event]:
        done = self._copies.reported(result)
        if done is None:
            return []
        self._metrics.observe_copy(done.direction, done.copy_s)
        return [CopyDone(done.copy_id)]

    def _step_done(self, result: StepResult, now: float) -> StepDone:
        if not self._steps or self._steps[0].plan.step_id != result.step_id:
            raise WorkersLostError(f"the workers answered step {result.step_id} out of order")
        step = self._steps.popleft()
        sampled = [
            live
            for live, piece in zip(step.requests, step.plan.batch, strict=True)
            if piece.samples
        ]
        if len(sampled) != len(result.token_ids):
            raise WorkersLostError(
                f"step {result.step_id} yielded {len(result.token_ids)} tokens for "
                f"{len(sampled)} requests"
            )
        finished: list[RequestId] = []
        filled: list[tuple[RequestId, BlockHash]] = []
        logprobs = result.logprobs or (None,) * len(sampled)
        failures = {failure.index: failure.message for failure in result.failures}
        for index, (live, token) in enumerate(zip(sampled, result.token_ids, strict=True)):
            if self._requests.get(live.request_id) is not live:
                continue  # ended while the step ran
            if index in failures:
                finished.append(live.request_id)
                self._finish(live, FinishReason.ERROR, failures[index])
                continue
            reason = live.accept(token, logprobs[index], self._eos_token_ids)
            self._metrics.observe_token(live.arrived, live.first_token_at, now)
            live.first_token_at = live.first_token_at or now
            if live.block_hashes:
                filled += [(live.request_id, each) for each in live.block_hashes.extend((token,))]
            self._replies.append((live.client, live.tokens_from(len(live.output) - 1)))
            if reason:
                finished.append(live.request_id)
                self._finish(live, reason)
        elapsed_s = now - step.dispatched_at
        self._metrics.observe_step(step.plan, elapsed_s, result.copy_wait_s)
        return StepDone(step.plan.step_id, elapsed_s, tuple(finished), tuple(filled))

    def _from_clients(self, now: float) -> list[Event]:
        events: list[Event] = []
        for client, message in self._front_door.receive(now):
            match message:
                case Submit():
                    events += self._submit(client, message, now)
                case Cancel():
                    events += self._cancel(client, message)
                case Hello():
                    self._replies.append((client, self._welcome))
                case Ping():
                    self._replies.append((client, Pong(self._welcome.epoch)))
                case GetMetrics():
                    self._replies.append((client, Metrics(self._metrics.render())))
        for client, reason in self._front_door.take_lost(now):
            for request_id in list(self._by_client.get(client, ())):
                self._finish(self._requests[request_id], FinishReason.ABORT, reason)
                events.append(Aborted(request_id))
        return events

    def _submit(self, client: Identity, submit: Submit, now: float) -> list[Event]:
        request_id = submit.request_id
        if live := self._requests.get(request_id):
            self._resume(client, live, submit)
            return []
        if refusal := self._admission.refusal(submit):
            self._replies.append((client, Refused(refusal, request_id)))
            return []
        if busy := self._admission.rejection(len(self._requests), draining=self._draining):
            usage = Usage(len(submit.prompt), len(submit.received))
            finished = Finished(request_id, FinishReason.REJECTED, usage, busy)
            self._replies.append((client, finished))
            self._metrics.observe_finish(FinishReason.REJECTED, None)
            return []
        deadline = None if submit.timeout_s is None else now + submit.timeout_s
        live = LiveRequest(submit, client, now, deadline, list(submit.received))
        if self._prefix_block_size:
            live.block_hashes = BlockHashChain(self._prefix_block_size, submit.cache_salt)
        self._requests[request_id] = live
        self._by_client.setdefault(client, set()).add(request_id)
        if deadline is not None:
            self._timeouts.add(request_id, deadline)
        self._metrics.observe_arrival(len(submit.prompt))
        return [
            Arrived(
                request_id,
                prompt_tokens=len(submit.prompt),
                max_tokens=submit.params.max_tokens,
                received_tokens=len(submit.received),
                priority=submit.priority,
                block_hashes=(
                    live.block_hashes.extend((*submit.prompt, *submit.received))
                    if live.block_hashes
                    else ()
                ),
            )
        ]

    def _resume(self, client: Identity, live: LiveRequest, submit: Submit) -> None:
        """The same request again: its client lost the connection and holds some of the tokens."""
        if (submit.prompt, submit.params) != (live.submit.prompt, live.submit.params):
            message = f"request id {submit.request_id!r} is in use by an unfinished request"
            self._replies.append((client, Refused(message, submit.request_id)))
            return
        self._by_client[live.client].discard(live.request_id)
        live.client = client
        self._by_client.setdefault(client, set()).add(live.request_id)
        held = len(submit.received)
        if held < len(live.output):
            self._replies.append((client, live.tokens_from(held)))

    def _cancel(self, client: Identity, cancel: Cancel) -> list[Event]:
        live = self._requests.get(cancel.request_id)
        if live is None or live.client != client:
            # It may have finished while the message travelled: an answer, but no harm done.
            message = f"no unfinished request {cancel.request_id!r} of this client"
            self._replies.append((client, Refused(message, cancel.request_id)))
            return []
        self._finish(live, FinishReason.ABORT)
        return [Aborted(live.request_id)]

    def _overdue(self, now: float) -> list[Event]:
        self._copies.check_deadline(now)
        if self._steps and now - self._steps[0].dispatched_at > self._config.step_timeout_s:
            raise WorkersLostError(
                f"step {self._steps[0].plan.step_id} has not returned within "
                f"{self._config.step_timeout_s:g} s (coordinator.step_timeout_s)"
            )
        events: list[Event] = []
        for request_id in self._timeouts.take_overdue(now):
            live = self._requests[request_id]
            message = f"unfinished after its timeout of {live.submit.timeout_s:g} s"
            self._finish(live, FinishReason.TIMEOUT, message)
            events.append(Aborted(request_id))
        return events

    # --- what goes out -------------------------------------------------------------------------

    def _dispatch(self, plan: Plan, now: float) -> None:
        requests = tuple(self._requests[piece.request_id] for piece in plan.batch)
        token_ids = tuple(
            live.input_tokens(piece) for live, piece in zip(requests, plan.batch, strict=True)
        )
        started = tuple(live.sequence_start for live in requests if not live.started)
        for live, piece in zip(requests, plan.batch, strict=True):
            if not live.started:
                live.begin(piece.start)
        if plan.batch:
            self._steps.append(_DispatchedStep(plan, now, requests))
        self._copies.dispatched(plan.copies, now)
        self._workers.dispatch(StepCommand(plan, token_ids, started))

    def _observe_stall(self, now: float) -> None:
        """Count the time in which nothing is computed since what could be is being copied."""
        stalled = bool(self._copies and self._requests and not self._steps)
        if stalled and self._stalled_since is None:
            self._stalled_since = now
        elif not stalled and self._stalled_since is not None:
            self._metrics.observe_stall(now - self._stalled_since)
            self._stalled_since = None

    def _finish(self, live: LiveRequest, reason: FinishReason, message: str = "") -> None:
        del self._requests[live.request_id]
        self._timeouts.remove(live.request_id)
        requests = self._by_client[live.client]
        requests.discard(live.request_id)
        if not requests:
            del self._by_client[live.client]
        self._metrics.observe_finish(reason, self._clock() - live.arrived)
        finished = Finished(live.request_id, reason, live.usage, message)
        self._replies.append((live.client, finished))
