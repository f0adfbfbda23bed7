"""The requests of an event log under other policies, on a virtual clock.

The log tells when each request came, how long it was and how many tokens it got; the profile that
the scheduler was made with tells what its steps take. A request that was aborted is taken for one
that ended by itself with the tokens it had. The prefix cache is not simulated, stages are taken to
be equal, and a copy takes the shortest time for a block that the log shows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from msgspec.structs import replace

from fastserve_mega.bench.statistics import distribution
from fastserve_mega.coordinator.event_log import SchedulerSetup, StepCall
from fastserve_mega.plan import BlockCopy, Plan
from fastserve_mega.scheduling.events import Aborted, Arrived, CopyDone, StepDone
from fastserve_mega.simulator.engine_model import EngineModel
from fastserve_mega.simulator.profiled_engine import ProfiledEngine
from fastserve_mega.simulator.records import RequestRecord
from fastserve_mega.simulator.replica import SimulatedReplica
from fastserve_mega.simulator.simulation import Simulation
from fastserve_mega.simulator.workload import RequestSpec
from fastserve_mega.slo import Slo, largest_gap, lateness
from fastserve_mega.types import RequestId

ORACLE_POLICY = "srpt"
"""The policy that is told how long each answer will be."""
Latencies = dict[str, dict[str, float]]
"""Mean and percentiles by measure, seconds."""


@dataclass(frozen=True)
class Recording:
    """What a log says about its requests, seconds since the first of them came."""

    records: tuple[RequestRecord, ...]
    """One of each request that got a token, in order of arrival."""
    left_out: int
    """Requests that ended without a token, or not at all."""
    copy_block_s: float
    """Shortest time in which a KV block was copied; 0 when none was."""

    @property
    def specs(self) -> list[RequestSpec]:
        """Return the requests, to be simulated."""
        return [
            RequestSpec(record.arrival_s, record.prompt_tokens, record.output_tokens)
            for record in self.records
        ]


def read_recording(calls: Iterable[StepCall]) -> Recording:
    """Follow the requests of a log from their arrival to their end.

    Raises:
        ValueError: no request got a token.
    """
    reader = _Reader()
    for call in calls:
        reader.read(call)
    return reader.recording()


def simulate(
    setup: SchedulerSetup,
    engine: EngineModel,
    specs: Sequence[RequestSpec],
    delivery_s: float = 0.0,
) -> list[RequestRecord]:
    """Run the same scheduler on a virtual clock; the records are what clients see.

    Args:
        setup: what the live scheduler was made of.
        engine: fresh.
        specs: arrivals as clients send them.
        delivery_s: from a client to the coordinator and back.

    Raises:
        ValueError: some requests do not fit into the pools or the queue.
    """
    way_s = delivery_s / 2
    replica = SimulatedReplica(
        setup.make_scheduler(), engine, stages=setup.window, block_size=setup.pools.block_size
    )
    result = Simulation(
        [replica],
        [spec._replace(arrival_s=spec.arrival_s + way_s) for spec in specs],
        max_queued_requests=setup.scheduler.max_queued_requests,
        oracle=setup.scheduler.policy == ORACLE_POLICY,
    ).run()
    if result.rejected:
        raise ValueError(
            f"{result.rejected} of {len(specs)} requests do not fit into the queue of "
            f"{setup.scheduler.max_queued_requests} or the KV pools when they are simulated"
        )
    return [
        dataclasses.replace(
            record,
            arrival_s=record.arrival_s - way_s,
            first_token_s=record.first_token_s + way_s,
            finish_s=record.finish_s + way_s,
            lateness_s=record.lateness_s + 2 * way_s,
        )
        for record in result.records
    ]


def simulate_policy(
    setup: SchedulerSetup, recording: Recording, policy: str
) -> list[RequestRecord]:
    """Simulate the requests of a log under a policy.

    Raises:
        ValueError: some do not fit.
    """
    engine = ProfiledEngine(setup.profile, (1,) * setup.window, recording.copy_block_s)
    scheduler = replace(setup.scheduler, policy=policy)
    return simulate(replace(setup, scheduler=scheduler), engine, recording.specs)


def latencies(records: Sequence[RequestRecord]) -> Latencies:
    """Return mean and percentiles of what the clients of these requests saw."""
    return {
        "TTFT": distribution([record.ttft_s for record in records]),
        "JCT": distribution([record.jct_s for record in records]),
        "JCT per token": distribution([record.normalized_latency_s for record in records]),
    }


@dataclass
class _Request:
    """One request of the log so far."""

    arrival_s: float
    prompt_tokens: int
    token_times_s: list[float] = field(default_factory=list)
    end_s: float | None = None

    def record(self, begin_s: float) -> RequestRecord:
        """Return what its client saw, on a clock that began at `begin_s`."""
        times_s, end_s = self.token_times_s, self.end_s
        tokens = len(times_s)
        return RequestRecord(
            self.prompt_tokens,
            tokens,
            self.arrival_s - begin_s,
            times_s[0] - begin_s,
            (times_s[-1] if end_s is None else end_s) - begin_s,
            largest_gap(times_s),
            lateness(times_s, self.arrival_s, tokens, Slo().tpot_s),
        )


class _Reader:
    """Follows requests and copies through the calls of a log."""

    def __init__(self) -> None:
        self._all: list[_Request] = []
        self._unfinished: dict[RequestId, _Request] = {}
        self._plans: dict[int, Plan] = {}
        self._copies: dict[int, tuple[BlockCopy, float]] = {}
        self._block_times_s: list[float] = []

    def read(self, call: StepCall) -> None:
        """Take in one call: what the scheduler was told, then what it answered."""
        for event in call.events:
            if isinstance(event, Arrived):
                # What had been answered before is prefilled with the prompt.
                request = _Request(call.now, event.num_prompt_tokens + event.num_received_tokens)
                self._all.append(request)
                self._unfinished[event.request_id] = request
            elif isinstance(event, Aborted):
                self._end(event.request_id, call.now)
            elif isinstance(event, StepDone):
                self._step_done(event, call.now)
            elif isinstance(event, CopyDone) and event.copy_id in self._copies:
                copy, begin_s = self._copies.pop(event.copy_id)
                if copy.source_ids:  # there may be nothing left to move
                    self._block_times_s.append((call.now - begin_s) / len(copy.source_ids))
        if call.plan is not None:
            self._plans[call.plan.step_id] = call.plan
            for copy in call.plan.copies:
                self._copies[copy.copy_id] = (copy, call.now)

    def recording(self) -> Recording:
        """Return what was read."""
        ended = [each for each in self._all if each.token_times_s and each.end_s is not None]
        if not ended:
            raise ValueError("no request of the log got a token")
        begin_s = ended[0].arrival_s
        return Recording(
            tuple(request.record(begin_s) for request in ended),
            len(self._all) - len(ended),
            min(self._block_times_s, default=0.0),
        )

    def _step_done(self, event: StepDone, now: float) -> None:
        plan = self._plans.pop(event.step_id, None)
        for piece in plan.batch if plan else ():
            # An aborted request may still be in a step that was under way.
            request = self._unfinished.get(piece.request_id)
            if request is None or not piece.samples:
                continue
            request.token_times_s.append(now)
        for request_id in event.finished:
            self._end(request_id, now)

    def _end(self, request_id: RequestId, now: float) -> None:
        if (request := self._unfinished.pop(request_id, None)) is not None:
            request.end_s = now
