"""The loop: what came in becomes events, the scheduler answers with plans, the workers run them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fastserve_mega.coordinator.admission import Admission
from fastserve_mega.coordinator.block_hashes import BlockHashChain
from fastserve_mega.coordinator.front_door import FrontDoor
from fastserve_mega.coordinator.live_request import LiveRequest
from fastserve_mega.coordinator.replica import DispatchedStep, Replica
from fastserve_mega.coordinator.suspects import Gate
from fastserve_mega.coordinator.timeouts import Timeouts
from fastserve_mega.coordinator.traffic import Traffic
from fastserve_mega.messaging.messages import (
    Cancel,
    Finished,
    GetMetrics,
    GetSnapshot,
    Hello,
    Message,
    Metrics,
    Ping,
    Pong,
    Refused,
    Restarting,
    StepResult,
    Submit,
    Welcome,
)
from fastserve_mega.messaging.router import Identity
from fastserve_mega.metrics import ServingMetrics
from fastserve_mega.scheduling.events import Aborted, Arrived, StepDone
from fastserve_mega.scheduling.placement import Placement
from fastserve_mega.types import BlockHash, FinishReason, RequestId, Usage

_MAX_VIEWS = 1_000
"""Requests of each replica that a snapshot shows, whatever is asked for."""


class Coordinator:
    """Everything between the two sockets. It sees tokens; the scheduler sees lengths."""

    def __init__(
        self,
        *,
        welcome: Welcome,
        replicas: Sequence[Replica],
        front_door: FrontDoor,
        metrics: ServingMetrics,
        admission: Admission,
        prefix_block_size: int | None,
        clock: Callable[[], float],
    ) -> None:
        """Put the parts together; `prefix_block_size` is None without prefix cache."""
        self._welcome = welcome
        self._eos_token_ids = frozenset(welcome.eos_token_ids)
        self._replicas = replicas
        self._placement = Placement([replica.scheduler for replica in replicas])
        self._front_door = front_door
        self._metrics = metrics
        self._admission = admission
        self._prefix_block_size = prefix_block_size
        self._clock = clock
        self._requests: dict[RequestId, LiveRequest] = {}
        self._by_client: dict[Identity, set[RequestId]] = {}
        self._timeouts = Timeouts()
        self._replies: list[tuple[Identity, Message]] = []
        self._draining = False
        self._traffic = Traffic()
        self._gate = Gate(clock())

    @property
    def unfinished(self) -> int:
        return len(self._requests)

    def run_once(self) -> None:
        """Handle everything that has arrived, without waiting.

        Raises:
            WorkersLostError: a rank failed, or a step or copy overran `step_timeout_s`.
        """
        now = self._clock()
        self._take_results(now)
        self._take_messages(now)
        self._end_overdue(now)
        for live in self._gate.pass_through():
            self._place(live)
        for replica in self._replicas:
            replica.advance(now, self._requests)
        self._placement.settle()
        for client, message in self._replies:
            self._front_door.send(client, message)
        self._replies.clear()

    def next_deadline(self) -> float | None:
        """When `run_once` has something to do though nothing arrives."""
        deadlines = [self._timeouts.next_deadline()]
        deadlines += [replica.next_deadline() for replica in self._replicas]
        return min((deadline for deadline in deadlines if deadline is not None), default=None)

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
        computing = set().union(*(replica.computing for replica in self._replicas))
        for client, request_ids in self._by_client.items():
            suspects = tuple(sorted(request_ids & computing))
            self._front_door.send(client, Restarting(within_s, reason, suspects))

    # --- what came in --------------------------------------------------------------------------

    def _take_results(self, now: float) -> None:
        for replica in self._replicas:
            for step, result in replica.returned_steps():
                replica.tell(self._step_done(step, result, now))

    def _step_done(self, step: DispatchedStep, result: StepResult, now: float) -> StepDone:
        sampled = [
            live
            for live, piece in zip(step.requests, step.plan.batch, strict=True)
            if piece.samples
        ]
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
            self._gate.clear(live)
            reason = live.accept(token, logprobs[index], self._eos_token_ids)
            self._traffic.generated(now - live.arrived, is_first=live.last_token_at is None)
            self._metrics.observe_token(live.arrived, live.last_token_at, now)
            live.first_token_at = live.first_token_at or now
            live.last_token_at = now
            if live.block_hashes:
                filled += [(live.request_id, each) for each in live.block_hashes.extend((token,))]
            self._replies.append((live.client, live.tokens_from(len(live.output) - 1)))
            if reason:
                finished.append(live.request_id)
                self._placement.observe_finish(len(live.output))
                self._finish(live, reason)
        elapsed_s = now - step.dispatched_at
        self._metrics.observe_step(step.plan, elapsed_s, result.copy_wait_s)
        return StepDone(step.plan.step_id, elapsed_s, tuple(finished), tuple(filled))

    def _take_messages(self, now: float) -> None:
        for client, message in self._front_door.receive(now):
            match message:
                case Submit():
                    self._submit(client, message, now)
                case Cancel():
                    self._cancel(client, message)
                case Hello():
                    self._replies.append((client, self._welcome))
                case Ping():
                    self._replies.append((client, Pong(self._welcome.epoch)))
                case GetMetrics():
                    self._replies.append((client, Metrics(self._metrics.render())))
                case GetSnapshot():
                    limit = min(message.max_requests, _MAX_VIEWS)
                    views = [each.scheduler.view(now, limit) for each in self._replicas]
                    self._replies.append((client, self._traffic.snapshot(now, views)))
        for client, reason in self._front_door.take_lost(now):
            for request_id in list(self._by_client.get(client, ())):
                self._abort(self._requests[request_id], FinishReason.ABORT, reason)

    def _submit(self, client: Identity, submit: Submit, now: float) -> None:
        request_id = submit.request_id
        if live := self._requests.get(request_id):
            self._resume(client, live, submit)
            return
        if refusal := self._admission.refusal(submit):
            self._replies.append((client, Refused(refusal, request_id)))
            return
        if busy := self._admission.rejection(len(self._requests), draining=self._draining):
            usage = Usage(len(submit.prompt), len(submit.received))
            finished = Finished(request_id, FinishReason.REJECTED, usage, busy)
            self._replies.append((client, finished))
            self._metrics.observe_finish(FinishReason.REJECTED, None, usage)
            return
        deadline = None if submit.timeout_s is None else now + submit.timeout_s
        live = LiveRequest(submit, client, now, deadline, list(submit.received))
        if self._prefix_block_size:
            live.block_hashes = BlockHashChain(self._prefix_block_size, submit.cache_salt)
        self._requests[request_id] = live
        self._by_client.setdefault(client, set()).add(request_id)
        if deadline is not None:
            self._timeouts.add(request_id, deadline)
        self._traffic.arrived(len(submit.prompt))
        self._metrics.observe_arrival(len(submit.prompt))
        self._gate.enter(live, now)

    def _place(self, live: LiveRequest) -> None:
        submit = live.submit
        arrived = Arrived(
            live.request_id,
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
        live.replica = self._placement.choose(arrived)
        live.placed = True
        self._replicas[live.replica].tell(arrived)

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

    def _cancel(self, client: Identity, cancel: Cancel) -> None:
        live = self._requests.get(cancel.request_id)
        if live is None or live.client != client:
            # It may have finished while the message travelled: an answer, but no harm done.
            message = f"no unfinished request {cancel.request_id!r} of this client"
            self._replies.append((client, Refused(message, cancel.request_id)))
            return
        self._abort(live, FinishReason.ABORT)

    def _end_overdue(self, now: float) -> None:
        for request_id in self._timeouts.take_overdue(now):
            live = self._requests[request_id]
            message = f"unfinished after its timeout of {live.submit.timeout_s:g} s"
            self._abort(live, FinishReason.TIMEOUT, message)

    # --- ends ----------------------------------------------------------------------------------

    def _abort(self, live: LiveRequest, reason: FinishReason, message: str = "") -> None:
        """End a request that its replica would go on with."""
        if live.placed:
            self._replicas[live.replica].tell(Aborted(live.request_id))
        self._finish(live, reason, message)

    def _finish(self, live: LiveRequest, reason: FinishReason, message: str = "") -> None:
        del self._requests[live.request_id]
        self._gate.leave(live)
        self._timeouts.remove(live.request_id)
        requests = self._by_client[live.client]
        requests.discard(live.request_id)
        if not requests:
            del self._by_client[live.client]
        times = live.times(self._clock())
        self._traffic.finished(times.ended - times.arrived)
        self._metrics.observe_finish(reason, times, live.usage)
        finished = Finished(live.request_id, reason, live.usage, message)
        self._replies.append((live.client, finished))
