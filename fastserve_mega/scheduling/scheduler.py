"""The scheduler: typed events in, plans out. `docs/scheduling.md` explains it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from fastserve_mega.plan import Plan
from fastserve_mega.scheduling.batch import BatchBuilder, count_decodes
from fastserve_mega.scheduling.clients.fair_share import FairShare
from fastserve_mega.scheduling.cost_model import CostModel
from fastserve_mega.scheduling.events import (
    Aborted,
    Arrived,
    CopyDone,
    Event,
    StepDone,
    WorkersLost,
)
from fastserve_mega.scheduling.kv.manager import KvManager
from fastserve_mega.scheduling.kv.pool import PoolSizes
from fastserve_mega.scheduling.kv.swap_planner import SwapPlanner
from fastserve_mega.scheduling.policies import make_policy
from fastserve_mega.scheduling.request import Place, Request, RequestStatus, Turn
from fastserve_mega.scheduling.validate import validate_all, validate_blocks
from fastserve_mega.scheduling.view import view_replica
from fastserve_mega.snapshot import ReplicaView
from fastserve_mega.system.config import SchedulerConfig, SwapConfig
from fastserve_mega.types import RequestId


class Scheduler:
    """A pure state machine: the same events at the same times give the same plans.

    The live coordinator and the simulator drive this very object. It reads no clock; `now` is in
    seconds of any clock that does not go back.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        cost_model: CostModel,
        pools: PoolSizes,
        *,
        swap: SwapConfig | None = None,
        window: int = 1,
        first_step_id: int = 0,
    ) -> None:
        """Start empty.

        Args:
            config: policy and limits of a step.
            cost_model: predicts step times, and learns from those that ran.
            pools: of every rank.
            swap: what happens to the KV of preempted requests.
            window: steps in flight at once, the number of pipeline stages.
            first_step_id: of the first plan.
        """
        self.config = config
        self.cost_model = cost_model
        self._policy = make_policy(config, cost_model)
        self._queues = self._policy.queues
        self.level_names = self._policy.level_names
        """The policy's own; empty where levels are Q1, Q2, …"""
        self.fair_share = FairShare(config, self._policy)
        swap = swap or SwapConfig()
        self.memory = KvManager(pools, swap.strategy, self._policy, cost_model, config)
        self._planner = SwapPlanner(swap, self.memory, self._policy)
        self._is_proactive = swap.strategy == "proactive"
        self._window = window
        self._requests: dict[RequestId, Request] = {}
        self._in_flight: dict[int, list[Request]] = {}
        self._released: list[RequestId] = []
        self.num_unread_tokens = 0
        """Tokens that the unfinished requests came with and no step has read."""
        self._arrivals = 0
        self._next_step_id = first_step_id
        self._promoted_at = -math.inf

    def step(self, now: float, events: Sequence[Event] = ()) -> Plan | None:
        """Take in what happened and decide the next step.

        Returns:
            A plan to dispatch, then call again without events; or None when there is nothing to
            run or `window` steps are in flight.
        """
        for event in events:
            self._apply(event, now)
        if not self.may_plan:
            return None
        self._promoted_at = now
        self.fair_share.lines.refill(now)
        self._policy.promote(now)
        return self._plan_step(now)

    def next_deadline(self, now: float) -> float | None:
        """When `step` should be called though nothing happens before; None for never.

        That is when a request will have waited too long, if a step could be planned then.
        """
        if not self.may_plan:
            return None
        deadline = self._policy.next_deadline(now)
        if deadline is None or deadline <= self._promoted_at:  # `promote` has seen it
            return None
        return deadline

    @property
    def may_plan(self) -> bool:
        """Whether a call of `step` without events could give a plan, now or later."""
        return bool(self._requests) and len(self._in_flight) < self._window

    def find(self, request_id: RequestId) -> Request | None:
        """Return an unfinished request, to be looked at only."""
        return self._requests.get(request_id)

    @property
    def preempted(self) -> Iterable[Request]:
        """Requests that lost their device blocks, or their KV on the host, for the last plan."""
        return self.memory.swapper.preempted

    @property
    def unfinished(self) -> int:
        return len(self._requests)

    def level_lengths(self) -> tuple[int, ...]:
        """Unfinished requests of each level, the highest first."""
        return self._queues.level_lengths()

    def place_lengths(self) -> tuple[int, int, int]:
        """Unfinished requests by where their KV is: waiting, resident, swapped."""
        count = self._queues.count
        waiting = count(Place.WAITING) + self.fair_share.lines.num_held
        return waiting, count(Place.RESIDENT), count(Place.SWAPPED)

    def view(self, now: float, max_requests: int) -> ReplicaView:
        """What is going on, with at most so many requests."""
        return view_replica(self._policy, self.memory, self._in_flight.values(), now, max_requests)

    def check_integrity(self) -> None:
        """Raise RuntimeError when the state contradicts itself."""
        validate_blocks(self.memory, self._queues)
        if self.num_unread_tokens != sum(r.num_unread_tokens for r in self._requests.values()):
            raise RuntimeError("the tokens not yet read are miscounted")
        queued = [request for place in Place for request in self._queues.walk(place)]
        queued += self.fair_share.lines.held()
        in_steps = [request for batch in self._in_flight.values() for request in batch]
        validate_all(self._requests.values(), queued, in_steps, self.memory.block_size)

    # --- events --------------------------------------------------------------------------------

    def _apply(self, event: Event, now: float) -> None:
        match event:
            case StepDone():
                self._step_done(event, now)
            case Arrived():
                self._arrive(event, now)
            case Aborted():
                if request := self._requests.get(event.request_id):
                    self._end(request)
            case CopyDone():
                self.memory.copy_done(event.copy_id, now)
            case WorkersLost():
                self._lose_workers(now)

    def _arrive(self, event: Arrived, now: float) -> None:
        if event.request_id in self._requests:
            raise ValueError(f"request {event.request_id} is unfinished and arrived again")
        self._arrivals += 1
        request = Request(
            request_id=event.request_id,
            num_prompt_tokens=event.num_prompt_tokens,
            max_tokens=event.max_tokens,
            priority=event.priority,
            arrival_number=self._arrivals,
            num_tokens=event.num_prompt_tokens + event.num_received_tokens,
            oracle_output_tokens=event.oracle_output_tokens,
            expected_output_tokens=event.expected_output_tokens,
            session=event.session,
            share=self.fair_share.join(event.client, event.weight, event.priority),
            offered_at=now,
            waiting_since=now,
        )
        self.memory.look_up(request, event.block_hashes)
        request.num_unread_tokens = request.num_tokens - request.kv.num_cached_tokens
        self.num_unread_tokens += request.num_unread_tokens
        self._requests[request.request_id] = request
        self.fair_share.lines.add(request, now)
        if self._is_proactive:
            self._planner.observe_arrival(self.memory.blocks_for(request.num_tokens), now)

    def _step_done(self, event: StepDone, now: float) -> None:
        for request_id, block_hash in event.filled:
            self.memory.filled(self._requests[request_id], block_hash)
        for request_id in event.finished:
            if request := self._requests.get(request_id):
                request.steady_until = 0
        batch, elapsed_s = self._in_flight.pop(event.step_id), event.elapsed_s
        others, context_tokens = count_decodes(batch, elapsed_s, now)
        prefill_tokens = prefills = 0
        sampled = len(batch) - len(others)
        finished, gone = frozenset(event.finished), set()
        for request in others:
            tokens = request.num_scheduled_tokens
            self._compute(request, elapsed_s, now)
            if tokens > 1:
                prefill_tokens += tokens
                prefills += 1
            else:
                context_tokens += request.num_computed_tokens
            if request.status is RequestStatus.FINISHED:  # aborted while the step ran
                self.memory.release(request)
                gone.add(request)
            elif request.request_id in finished:
                self._end(request)
                gone.add(request)
            elif request.num_computed_tokens == request.num_tokens:
                request.num_tokens += 1
                request.has_progressed = True
                self._read(request, request.num_unread_tokens)  # some of it may have been cached
                sampled += 1
        self.memory.started.projection.observe(sampled + len(finished), len(finished))
        decodes = len(batch) - prefills
        context = context_tokens // max(decodes, 1)
        self.cost_model.observe(prefill_tokens, decodes, context, elapsed_s)
        going_on = [each for each in batch if each not in gone] if gone else batch
        self._policy.charge(going_on, elapsed_s)

    def _compute(self, request: Request, elapsed_s: float, now: float) -> None:
        """Take in that a step has computed the tokens that it was given for."""
        tokens, request.num_scheduled_tokens = request.num_scheduled_tokens, 0
        request.num_computed_tokens += tokens
        if request.num_unread_tokens:
            self._read(request, tokens)
        request.waiting_since = now
        request.preemption_credit_s -= elapsed_s
        if request.status is RequestStatus.RUNNING:
            request.status = RequestStatus.READY
            if self.memory.shares_prefixes:
                self.memory.prefix_cache.publish(request)

    def _read(self, request: Request, tokens: int) -> None:
        """Take in that so many tokens of a request, or what it has, need not be read any more."""
        if request.turn is Turn.OFFERED:
            self.fair_share.lines.started(request)
        read = min(tokens, request.num_unread_tokens)
        request.num_unread_tokens -= read
        self.num_unread_tokens -= read

    def _end(self, request: Request) -> None:
        if request.turn is not Turn.HELD:
            self._policy.remove(request)
        request.status = RequestStatus.FINISHED
        request.steady_until = 0
        self.fair_share.end(request)
        self._read(request, request.num_unread_tokens)
        del self._requests[request.request_id]
        self._released.append(request.request_id)
        self.memory.release(request)

    def _lose_workers(self, now: float) -> None:
        for batch in self._in_flight.values():
            for request in batch:
                request.num_scheduled_tokens = 0
                request.waiting_since = now
        self._in_flight.clear()
        self.memory.lose_everything()
        self._released.clear()

    def _plan_step(self, now: float) -> Plan | None:
        step_id = self._next_step_id
        self.memory.begin_step(step_id, now)
        # An even share for each step of the window, so that no pipeline stage idles.
        share = -(-len(self._requests) // self._window)
        places = min(self.config.max_batch_size, share)
        if self._is_proactive:
            self._planner.make_way(now, places)
        self.fair_share.begin_step(places)
        batch = BatchBuilder(
            self.config,
            self.memory,
            self._policy,
            self.fair_share,
            max_requests=places,
            in_flight=sum(map(len, self._in_flight.values())),
        )
        batch.fill()
        self.fair_share.charge(batch.requests)
        if self._is_proactive:
            self._planner.plan(now)
        copies = self.memory.copies.take_planned(now)
        if not batch.requests and not copies:
            return None
        self._next_step_id += 1
        if batch.requests:
            self._in_flight[step_id] = batch.requests
        released, self._released = tuple(self._released), []
        return Plan(step_id, tuple(batch.slices), copies, released)
