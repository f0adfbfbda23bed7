"""What one coordinator can drive: its own loop, with ranks and clients that answer at once.

    python tools/bench_coordinator.py

Every replica has a full batch all the time: whoever has its answer asks again. A step takes
`--step-ms` of a virtual clock, and the coordinator's process time is measured: with messages
encoded and decoded as on the wire, but without the sockets themselves and the HTTP servers.
"""

from __future__ import annotations

import argparse
import heapq
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from rich.console import Console

from fastserve_mega.coordinator.admission import Admission
from fastserve_mega.coordinator.coordinator import Coordinator
from fastserve_mega.coordinator.replica import Replica
from fastserve_mega.messaging.frames import decode, encode
from fastserve_mega.messaging.messages import Finished, Submit, Welcome
from fastserve_mega.messaging.rank_messages import StepCommand, StepResult
from fastserve_mega.metrics import ServingMetrics
from fastserve_mega.printing import FittedTable
from fastserve_mega.scheduling.cost_model import (
    DecodePoint,
    PrefillPoint,
    Profile,
    ProfiledCostModel,
)
from fastserve_mega.scheduling.kv.pool import PoolSizes
from fastserve_mega.scheduling.scheduler import Scheduler
from fastserve_mega.system.config import SchedulerConfig
from fastserve_mega.types import SamplingParams

BLOCK_SIZE = 16
VOCABULARY = 32_000
CONTEXT = 8_192
WARM_UP_STEPS = 120
"""Of each replica."""


class Ranks:
    """The ranks of one replica; each of its results is ready a step's time after its command."""

    def __init__(self, world: World, number: int) -> None:
        self.ranks = range(number, number + 1)
        self._world = world
        self._number = number
        self._ready: list[bytes] = []

    def dispatch(self, command: StepCommand) -> None:
        encode(command)
        plan = command.plan
        if plan.batch:
            tokens = tuple(100 + index for index, piece in enumerate(plan.batch) if piece.samples)
            self._world.begin_step(self._number, encode(StepResult(plan.step_id, tokens)))

    def take(self, frame: bytes) -> None:
        self._ready.append(frame)

    def results(self) -> Iterator[StepResult]:
        while self._ready:
            message = decode(self._ready.pop())
            assert isinstance(message, StepResult)
            yield message

    def wait(self, timeout_s: float) -> bool:
        return bool(self._ready)


@dataclass
class World:
    """Everything around the coordinator, on a virtual clock."""

    replicas: int
    batch: int
    prompt: int
    output: int
    step_s: float
    now: float = 0.0
    tokens: int = 0
    requests: int = 0
    steps: int = 0
    _submitted: int = 0
    _heap: list[tuple[float, int, bytes]] = field(default_factory=list)
    _inbox: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        profile = Profile(
            (PrefillPoint(1, self.step_s), PrefillPoint(2_048, 4 * self.step_s)),
            (DecodePoint(1, 1, self.step_s), DecodePoint(256, 1, 1.5 * self.step_s)),
        )
        config = SchedulerConfig(
            policy="skip_join_mlfq",
            max_batch_size=self.batch,
            max_batch_tokens=2_048,
            max_queued_requests=1_000_000,
        )
        blocks = 2 * self.batch * (self.prompt + self.output) // BLOCK_SIZE
        metrics = ServingMetrics(block_bytes=1)
        self.ranks = [Ranks(self, number) for number in range(self.replicas)]
        made = []
        for ranks in self.ranks:
            pools = PoolSizes(blocks, 0, BLOCK_SIZE)
            scheduler = Scheduler(config, ProfiledCostModel(profile), pools)
            made.append(Replica(scheduler, scheduler.step, ranks, 10.0, metrics))
        self.coordinator = Coordinator(
            welcome=Welcome("e", "m", "/m", CONTEXT, VOCABULARY, eos_token_ids=()),
            replicas=made,
            front_door=self,  # type: ignore[arg-type]
            metrics=metrics,
            admission=Admission(VOCABULARY, (), CONTEXT, 1_000_000, 10**9),
            prefix_block_size=BLOCK_SIZE,
            clock=lambda: self.now,
            poll=self.poll,
        )
        for _ in range(self.replicas * self.batch):
            self._ask()

    def begin_step(self, replica: int, frame: bytes) -> None:
        # No two replicas are in step with each other: a turn has the result of one, or of few.
        self.steps += 1
        jitter = 1.0 + 0.1 * ((replica * 37 + self.steps * 11) % 100) / 100
        heapq.heappush(self._heap, (self.now + self.step_s * jitter, replica, frame))

    def poll(self, deadline: float | None) -> None:
        if self._inbox or not self._heap:
            return
        self.now = max(self.now, self._heap[0][0])
        while self._heap and self._heap[0][0] <= self.now:
            _, replica, frame = heapq.heappop(self._heap)
            self.ranks[replica].take(frame)

    def _ask(self) -> None:
        self._submitted += 1
        first = self._submitted % VOCABULARY
        # Answers of all lengths, so that they do not end together.
        length = self.output // 2 + self._submitted * 7919 % self.output
        params = SamplingParams(max_tokens=max(length, 1), ignore_eos=True)
        prompt = (first, *range(1, self.prompt))
        self._inbox.append(encode(Submit(f"r{self._submitted}", prompt, params)))

    # The front door.
    def receive(self, now: float) -> Iterator[tuple[bytes, Submit]]:
        inbox, self._inbox = self._inbox, []
        for frame in inbox:
            message = decode(frame)
            assert isinstance(message, Submit)
            yield b"client", message

    def take_lost(self, now: float) -> Iterator[tuple[bytes, str]]:
        yield from ()

    def send(self, client: bytes, message: object) -> None:
        if not isinstance(message, bytes):
            encode(message)  # type: ignore[arg-type]
        if isinstance(message, Finished):
            self.requests += 1
            self._ask()
        else:
            self.tokens += 1


def measure(options: argparse.Namespace, replicas: int, batch: int) -> tuple[str, ...]:
    """Return a row of the table."""
    world = World(replicas, batch, options.prompt, options.output, options.step_ms / 1e3)
    turn = world.coordinator.turn
    while world.steps < WARM_UP_STEPS * replicas:
        turn()
    before = world.steps, world.tokens, world.requests, world.now
    begin_s = time.process_time()
    while world.steps < (WARM_UP_STEPS + options.steps) * replicas:
        turn()
    elapsed_s = time.process_time() - begin_s
    steps, tokens, requests = (
        after - at
        for after, at in zip((world.steps, world.tokens, world.requests), before, strict=False)
    )
    return (
        str(replicas),
        str(batch),
        f"{1e6 * elapsed_s / steps:.0f}",
        f"{1e6 * elapsed_s / tokens:.1f}",
        f"{tokens / elapsed_s:,.0f}",
        f"{requests / elapsed_s:,.0f}",
        f"{replicas * (world.now - before[3]) / elapsed_s:.0f}",
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--batch", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--prompt", type=int, default=200, help="tokens")
    parser.add_argument("--output", type=int, default=100, help="tokens, on average")
    parser.add_argument("--step-ms", type=float, default=30.0)
    parser.add_argument("--steps", type=int, default=150, help="measured, of each replica")
    options = parser.parse_args()
    view = FittedTable(
        "replicas", "batch", "µs a step", "µs a token", "tokens/s", "requests/s",
        "replicas kept busy",
        title=f"one core: {options.prompt} in, {options.output} out, {options.step_ms:g} ms a step",
        text_columns=0,
    )  # fmt: skip
    for batch in options.batch:
        for replicas in options.replicas:
            view.add_row(*measure(options, replicas, batch))
    Console().print(view)
    return 0


if __name__ == "__main__":
    sys.exit(main())
