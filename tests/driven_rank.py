"""The real coordinator and the loop of one rank, in turns in one thread."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import zmq

from fastserve_mega.coordinator.admission import Admission
from fastserve_mega.coordinator.coordinator import Coordinator
from fastserve_mega.coordinator.event_log import SchedulerSetup
from fastserve_mega.coordinator.replica import Replica
from fastserve_mega.messaging.frames import decode, encode
from fastserve_mega.messaging.messages import Cancel, Finished, Submit, Tokens, Welcome
from fastserve_mega.messaging.rank_messages import (
    CopyResult,
    KeepAlive,
    Shutdown,
    StepResult,
)
from fastserve_mega.metrics import ServingMetrics
from fastserve_mega.scheduling.cost_model import DecodePoint, PrefillPoint, Profile
from fastserve_mega.scheduling.kv.pool import PoolSizes
from fastserve_mega.system.config import MlfqConfig, SchedulerConfig, SwapConfig
from fastserve_mega.types import SamplingParams, StructuredOutput
from fastserve_mega.worker.fake_runner import FakeModelRunner, fake_token
from fastserve_mega.worker.loop import WorkerLoop

BLOCK_SIZE, BLOCKS, VOCAB = 4, 16, 50
PROFILE = Profile((PrefillPoint(1, 0.1),), (DecodePoint(1, 16, 0.1),))
STOPS = (3, 7, 11, 13)
PLAIN, STOPPED = {}, {"stop_token_ids": STOPS}
PENALIZED = {"frequency_penalty": 0.5}  # sampled by the rank's own history
STRUCTURED = {"structured": StructuredOutput(regex="a*"), "stop_token_ids": STOPS}
PARAMS = (PLAIN, STOPPED, PENALIZED, STRUCTURED)
STEP_S = 0.03
"""What a step takes by the clock of a device."""


class HistoryRunner(FakeModelRunner):
    """Its tokens depend on the history as well, where there is one; its device has a clock."""

    def launch(self, batch):
        output = super().launch(batch)()
        return lambda: replace(output, compute_s=STEP_S)

    def execute(self, batch):
        output = super().execute(batch)
        sampled = [sequence for sequence in batch if sequence.samples]
        for row, sequence in enumerate(sampled):
            if sequence.history is not None:
                known = [*self._read(sequence), *sequence.history.output]
                output.token_ids[row] = fake_token(known, VOCAB)
        return output


def expected_tokens(submit):
    """What a request yields when nothing disturbs it."""
    output = []
    while len(output) < submit.params.max_tokens and not set(output) & {
        *submit.params.stop_token_ids
    }:
        history = output if submit.params.needs_history else []
        output.append(fake_token([*submit.prompt, *output, *history], VOCAB))
    return output


class DrivenLoop(WorkerLoop):
    """Lets the coordinator have turns whenever it looks around, or nothing has come."""

    world: World
    ahead = 0
    """Steps that were begun before their commands came."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        for guess in filter(None, (self._look_ahead, self._launch_ahead)):
            guess.take = self._counted(guess.take)

    def _counted(self, take):
        def counted(command):
            taken = take(command)
            self.ahead += taken is not None
            return taken

        return counted

    def _receive(self):
        while not (self._came or self._socket.poll(0)):
            self._report_copies()
            self.world.turn()
        return super()._receive()

    def _look_around(self, look_ahead):
        if self.world.random.random() < self.world.hurry:
            self.world.turn()
        return super()._look_around(look_ahead)


class World:
    """Clients, sockets and the clock of one coordinator; `rank` is the other end of its ranks."""

    ranks = range(1)

    def __init__(self, rank, rng, requests, *, strategy="recompute", hurry=0.5, **options):
        self.random, self.hurry, self._rank = rng, hurry, rank
        self.now = 0.0
        self.requests, self.cancels = list(requests), 0.0
        self.tokens = {each.request_id: [] for each in requests}
        self.ended = {}
        self.calls = []
        options.setdefault("max_batch_size", 3)
        self.setup = SchedulerSetup(
            scheduler=SchedulerConfig(
                mlfq=MlfqConfig(starvation_limit_s=2.0), max_batch_tokens=12, **options
            ),
            swap=SwapConfig(strategy=strategy, write_through_blocks=2, write_through_occupancy=0.3),
            pools=PoolSizes(
                BLOCKS, 12 if strategy in ("proactive", "reactive") else 0, BLOCK_SIZE, True
            ),
            profile=PROFILE,
            window=1,
            first_step_id=0,
        )
        self._scheduler = self.setup.make_scheduler()
        metrics = ServingMetrics(block_bytes=1)
        welcome = Welcome("e", "m", "/m", max_context=60, vocab_size=VOCAB, eos_token_ids=(0,))
        self.coordinator = Coordinator(
            welcome=welcome,
            replicas=[Replica(self._scheduler, self._step, self, 1e9, metrics)],
            front_door=self,
            metrics=metrics,
            admission=Admission(VOCAB, (0,), 60, 100, 10_000),
            prefix_block_size=BLOCK_SIZE if rng.random() < 0.5 else None,
            clock=lambda: self.now,
            poll=lambda _: None,
        )

    def _step(self, now, events):
        plan = self._scheduler.step(now, events)
        self.calls.append((now, tuple(events), plan))
        return plan

    def turn(self):
        self.now += self.random.choice((0.01, 0.1, 1.0))
        self.coordinator.turn()
        self._scheduler.check_integrity()
        if self.random.random() < 0.1:
            self._rank.send(encode(KeepAlive()))
        if not self.requests and not self.coordinator.num_unfinished:
            self._rank.send(encode(Shutdown()))

    # The ranks.
    def results(self):
        while self._rank.poll(0):
            message = decode(self._rank.recv())
            if isinstance(message, StepResult | CopyResult):
                yield message

    def dispatch(self, command):
        self._rank.send(encode(command))

    # The clients.
    def receive(self, now):
        if self.requests and self.random.random() < 0.4:
            yield b"c", self.requests.pop()
        running = [name for name, got in self.tokens.items() if got and name not in self.ended]
        if running and self.random.random() < self.cancels:
            yield b"c", Cancel(self.random.choice(running))

    def take_lost(self, now):
        return ()

    def send(self, client, message):
        match message:
            case Tokens():
                assert message.offset == len(self.tokens[message.request_id])
                self.tokens[message.request_id] += message.token_ids
            case Finished():
                self.ended[message.request_id] = message.reason


@contextlib.contextmanager
def opened(rng, requests, *, looks_ahead=True, launches_ahead=False, **options):
    """A world and its rank's loop."""
    runner = HistoryRunner(
        device_blocks=BLOCKS,
        host_blocks=12,
        block_size=BLOCK_SIZE,
        vocab_size=VOCAB,
        looks_ahead=looks_ahead,
        launches_ahead=launches_ahead,
    )
    with zmq.Context() as context, context.socket(zmq.PAIR) as here:
        here.bind("inproc://ranks")
        there = context.socket(zmq.PAIR)
        there.connect("inproc://ranks")
        loop = DrivenLoop(there, 0, runner, lambda: True)
        loop.world = World(here, rng, requests, **options)
        with contextlib.closing(runner):
            yield loop.world, loop, runner


def submits(rng, count, most_tokens=20, rules=PARAMS):
    return [
        Submit(
            f"r{index}",
            tuple(rng.choice((1, 2)) for _ in range(rng.randint(1, 20))),
            SamplingParams(max_tokens=rng.randint(1, most_tokens), **rng.choice(rules)),
        )
        for index in range(count)
    ]
