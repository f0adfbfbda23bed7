"""The loop: what came in becomes events, the scheduler answers with plans, the workers run them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from msgspec import structs

from fastserve_mega.coordinator.admission import PASSED_TOO_LONG, Admission
from fastserve_mega.coordinator.front_door import ClientMessage, FrontDoor
from fastserve_mega.coordinator.intake import Intake
from fastserve_mega.coordinator.live_request import LiveRequest, LiveRequests
from fastserve_mega.coordinator.replica import Replica
from fastserve_mega.coordinator.reports import Reports
from fastserve_mega.messaging.frames import Identity
from fastserve_mega.messaging.messages import (
    Cancel,
    Finished,
    GetMetrics,
    GetSnapshot,
    Hello,
    Message,
    Ping,
    Pong,
    Restarting,
    Submit,
    Welcome,
)
from fastserve_mega.messaging.rank_messages import CopyResult, StepResult
from fastserve_mega.metrics import ServingMetrics
from fastserve_mega.scheduling.events import StepDone
from fastserve_mega.scheduling.placement import Placement
from fastserve_mega.types import BlockHash, FinishReason, RequestId

_LISTEN_S = 0.02
"""So long a turn reads what clients send, and twice that until what they left behind has ended."""


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
        poll: Callable[[float | None], None],
    ) -> None:
        """Put the parts together.

        Args:
            welcome: what clients are told of the server.
            replicas: with ranks that are ready.
            front_door: the clients' end.
            metrics: of the server.
            admission: its limits.
            prefix_block_size: tokens of a block; None without prefix cache.
            clock: in seconds; does not go back.
            poll: waits until a socket has something, or to a time of the clock, or less long.
        """
        self._welcome = welcome
        self._eos_token_ids = frozenset(welcome.eos_token_ids)
        self._replicas = replicas
        self._max_wait_s = admission.max_wait_s
        self._placement = Placement([replica.scheduler for replica in replicas])
        self._front_door = front_door
        self._metrics = metrics
        self._clock = clock
        self._poll = poll
        self._requests = LiveRequests()
        self._lost: dict[Identity, str] = {}
        """Clients whose requests are to end, and why."""
        self._reports = Reports(replicas, metrics)
        self._replies: list[tuple[Identity, Message | bytes]] = []
        self._intake = Intake(
            requests=self._requests,
            admission=admission,
            prefix_block_size=prefix_block_size,
            metrics=metrics.requests,
            reply=self._reply,
            now=clock(),
        )

    # The invariant of `turn`: when it ends, all that had arrived when it began to look, and that
    # was read within _LISTEN_S,
    #   - is answered, if it is a question or was refused, or else
    #   - is an event that its replica's scheduler has been told, once and in order of arrival
    #     (a request only when the gate lets it through, where it waits for suspects);
    # all ranks of a replica have every plan of its scheduler, in order; and the scheduler has
    # nothing more to run. So between two turns requests wait for memory and for ranks, and never
    # for this process. Plans go out before replies, since ranks stand still and clients do not.

    def turn(self) -> None:
        """Poll, then results and messages → events → plans → dispatch → replies.

        Raises:
            WorkersLostError: a rank failed, or a step or copy overran `step_timeout_s`.
        """
        self._poll(self._next_deadline())
        now = self._clock()
        for replica in self._replicas:
            self._take_results(replica, now)
        for client, question in self._front_door.receive(now):
            self._answer(client, question, now)
            if self._clock() - now >= _LISTEN_S:
                break
        self._lost.update(self._front_door.take_lost(now))
        for live, reason, message in self._unwanted(now):
            self._abort(live, reason, message)
            if self._clock() - now >= 2 * _LISTEN_S:
                break
        newcomers = [(live, self._place(live, now)) for live in self._intake.gate.pass_through()]
        # Of many replicas only a few have results in a turn.
        for replica in [each for each in self._replicas if each.has_turn(now)]:
            replica.check_deadlines(now)
            events = replica.take_events()
            while plan := replica.step(now, events):
                replica.dispatch(plan, self._requests, now)
                events = ()
            replica.end_turn(now)
        for live, replica in newcomers:
            self._let_in(live, replica, now)
        self._placement.settle()
        self._send_replies()
        self._intake.end_turn()

    @property
    def num_unfinished(self) -> int:
        return len(self._requests)

    def drain(self) -> None:
        """Accept nothing new from here on; clients learn that nobody starts this again."""
        self._intake.draining = True
        self._welcome = structs.replace(self._welcome, restart_within_s=0.0)
        for client in self._requests.clients():
            self._front_door.send(client, self._welcome)

    def end_all(self, reason: FinishReason, message: str) -> None:
        """End every request, as the last thing that is done for clients."""
        for live in self._requests.all():
            self._finish(live, reason, message)
        self._send_replies()

    def announce_restart(self, within_s: float, reason: str) -> None:
        """Leave every request unfinished, for its client to submit again to the next epoch."""
        computing = set[RequestId]().union(*(replica.computing for replica in self._replicas))
        for client in self._requests.clients():
            own = {live.request_id for live in self._requests.of_client(client)}
            suspects = tuple(sorted(own & computing))
            self._front_door.send(client, Restarting(within_s, reason, suspects))

    def _unwanted(self, now: float) -> Iterator[tuple[LiveRequest, FinishReason, str]]:
        """Requests that must end, and why: of lost clients, and who waits or takes too long."""
        for client, reason in list(self._lost.items()):
            for live in self._requests.of_client(client):
                yield live, FinishReason.ABORT, reason
            del self._lost[client]
        for live in [late for each in self._replicas for late in each.waiting.late(now)]:
            yield live, FinishReason.REJECTED, PASSED_TOO_LONG
        for live in self._requests.take_overdue(now):
            reason = f"unfinished after its timeout of {live.submit.timeout_s:g} s"
            yield live, FinishReason.TIMEOUT, reason

    def _next_deadline(self) -> float | None:
        """When a turn has something to do though nothing arrives."""
        deadlines = [self._requests.next_deadline(), self._clock() if self._lost else None]
        deadlines += [replica.deadline for replica in self._replicas]
        return min((deadline for deadline in deadlines if deadline is not None), default=None)

    def _reply(self, client: Identity, message: Message | bytes) -> None:
        self._replies.append((client, message))

    def _send_replies(self) -> None:
        for client, message in self._replies:
            self._front_door.send(client, message)
        self._replies.clear()

    # --- what the ranks computed ---------------------------------------------------------------

    def _take_results(self, replica: Replica, now: float) -> None:
        for result in replica.workers.results():
            if isinstance(result, CopyResult):
                replica.take_copy(result)
            else:
                replica.tell(self._step_done(replica, result, now))

    def _step_done(self, replica: Replica, result: StepResult, now: float) -> StepDone:
        """Hand out the tokens of a step, and end the requests whose last ones they are."""
        step = replica.take_step(result, self._welcome.vocab_size)
        sampled = step.sampling
        finished: list[RequestId] = []
        filled: list[tuple[RequestId, BlockHash]] = []
        logprobs = result.logprobs or (None,) * len(sampled)
        for scored in result.scored:
            if (live := step.requests[scored.index]) in self._requests:
                self._reply(live.client, live.score(scored.start, scored.logprobs))
        for live, embedding in zip(step.embedding, result.embeddings, strict=True):
            live.embedding = embedding
        failures = {failure.index: failure for failure in result.failures}
        for index, (live, token) in enumerate(zip(sampled, result.token_ids, strict=True)):
            if live not in self._requests:
                continue  # ended while the step ran
            if failure := failures.get(index):
                finished.append(live.request_id)
                self._finish(
                    live, FinishReason.ERROR, failure.message, is_invalid=failure.is_invalid
                )
                continue
            self._intake.gate.clear(live)
            self._metrics.requests.observe_token(live, now)
            live.append(token, logprobs[index], now)
            if (block_hash := live.hash_of_filled_block()) is not None:
                filled.append((live.request_id, block_hash))
            self._reply(live.client, live.tokens_from(len(live.output) - 1))
            if reason := self._end_reason(live):
                finished.append(live.request_id)
                self._placement.observe_finish(len(live.output))
                self._finish(live, reason)
        elapsed_s = result.compute_s or now - step.dispatched_at
        self._metrics.observe_step(step.plan, elapsed_s, result.copy_wait_s)
        return StepDone(step.plan.step_id, elapsed_s, tuple(finished), tuple(filled))

    # --- what clients ask ----------------------------------------------------------------------

    def _answer(self, client: Identity, message: ClientMessage, now: float) -> None:
        match message:
            case Submit():
                self._intake.submit(client, message, now)
            case Cancel():
                if live := self._intake.find(client, message):
                    self._abort(live, FinishReason.ABORT)
            case Hello():
                self._reply(client, self._welcome)
            case Ping():
                self._reply(client, Pong(self._welcome.epoch))
            case GetMetrics():
                self._reply(client, self._reports.metrics(now))
            case GetSnapshot():
                self._reply(client, self._reports.snapshot(message.max_requests, now))

    def _place(self, live: LiveRequest, now: float) -> Replica:
        arrived = live.arrived()
        live.replica = self._placement.choose(arrived)
        replica = self._replicas[live.replica]
        replica.place(live, arrived, now)
        return replica

    def _let_in(self, live: LiveRequest, replica: Replica, now: float) -> None:
        """Take a request that was placed, or reject it: its policy says how long it would wait."""
        if (excess_s := replica.excess_wait_s(live, self._max_wait_s, now)) is None:
            self._metrics.requests.observe_arrival(len(live.prompt))
            return
        told = f"it would wait about {excess_s:.0f} s longer than scheduler.max_wait_s allows"
        self._abort(live, FinishReason.REJECTED, told, retry_after_s=excess_s)

    # --- ends ----------------------------------------------------------------------------------

    def _end_reason(self, live: LiveRequest) -> FinishReason | None:
        """Why a request ends with its newest token; None when it goes on."""
        params, length, newest = live.params, len(live.output), live.output[-1]
        if length >= params.min_tokens and (
            newest in live.stop_token_ids
            or (newest in self._eos_token_ids and not params.ignore_eos)
        ):
            return FinishReason.STOP
        return FinishReason.LENGTH if length >= params.max_tokens else None

    def _abort(
        self,
        live: LiveRequest,
        reason: FinishReason,
        message: str = "",
        *,
        retry_after_s: float | None = None,
    ) -> None:
        """End a request that its replica would go on with."""
        if live.replica is not None:
            self._replicas[live.replica].abort(live, self._clock())
        self._finish(live, reason, message, retry_after_s=retry_after_s)

    def _finish(
        self,
        live: LiveRequest,
        reason: FinishReason,
        message: str = "",
        *,
        is_invalid: bool = False,
        retry_after_s: float | None = None,
    ) -> None:
        now = self._clock()
        self._intake.forget(live, reason, now)
        self._metrics.requests.observe_finish(reason, live, now)
        usage, timings = live.usage, live.timings(now)
        told = Finished(live.request_id, reason, usage, message, is_invalid, timings, retry_after_s)
        self._reply(live.client, told)
