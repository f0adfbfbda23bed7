"""What must hold for every policy after any sequence of events."""

import pytest
from fixed_costs import make_scheduler
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from fastserve_mega.config import SwapConfig
from fastserve_mega.scheduling.events import Aborted, Arrived, CopyDone, StepDone, WorkersLost
from fastserve_mega.types import RequestId

BLOCK_SIZE = 4
BLOCKS = 24
BATCH = 4
BATCH_TOKENS = 24


class SchedulerMachine(RuleBasedStateMachine):
    """Random events, and a model of what each request holds."""

    policy: str
    strategy: str

    @initialize(
        window=st.integers(1, 3),
        host_blocks=st.sampled_from([0, 1, 6, 60]),
        starvation_limit_s=st.sampled_from([3.0, 3.0, None]),
    )
    def start(self, window, host_blocks, starvation_limit_s):
        self.options = {
            "policy": self.policy,
            "swap": SwapConfig(
                strategy=self.strategy, write_through_blocks=3, write_through_occupancy=0.3
            ),
            "host_blocks": host_blocks,
            "device_blocks": BLOCKS,
            "block_size": BLOCK_SIZE,
            "window": window,
            "max_batch_size": BATCH,
            "max_batch_tokens": BATCH_TOKENS,
            "starvation_limit_s": starvation_limit_s,
            "max_passed_over": 3,
            "backfill_lookahead": 2,
        }
        self.scheduler = make_scheduler(**self.options)
        self.twin = make_scheduler(**self.options)  # gets the same events: same plans
        self.window = window
        self.now = 0.0
        self.count = 0
        self.left: dict[str, int] = {}
        self.known: dict[str, int] = {}
        self.tables: dict[str, list[int]] = {}
        self.in_flight: list = []
        self.copying: list = []
        # What each slot of each pool holds: (request, position).
        self.memory = {"device": {}, "host": {}}
        self.host_blocks = host_blocks
        self.ended: set[str] = set()
        self.released: set[str] = set()
        self.next_step_id = 0

    def tell(self, *events):
        pending = list(events)
        while True:
            plan = self.scheduler.step(self.now, pending)
            assert plan == self.twin.step(self.now, pending)
            pending = []
            if plan is None:
                break
            self.take(plan)

    def take(self, plan):
        """What the workers do, and check."""
        assert plan.batch or plan.copies
        assert plan.step_id == self.next_step_id
        self.next_step_id += 1
        for name in plan.released:
            assert name in self.ended
            assert name not in self.released, "a request is released twice"
            self.released.add(name)
        for copy in plan.copies:
            if copy.precedes_step is None:
                self.copying.append(copy)
            else:
                assert copy.precedes_step == plan.step_id
                self.run_copy(copy)
                self.copying.append(copy)
        if not plan.batch:
            return
        busy = {piece.request_id for other in self.in_flight for piece in other.batch}
        assert len(plan.batch) <= BATCH
        assert plan.num_tokens <= BATCH_TOKENS
        assert len(self.in_flight) < self.window
        seen = set()
        for piece in plan.batch:
            name = piece.request_id
            assert name in self.left, "an ended request was scheduled"
            assert name not in busy | seen
            seen.add(name)
            self.run_slice(piece)
        running = [self.tables[name] for name in busy & set(self.left) | seen]
        flat = [block for table in running for block in table]
        assert len(flat) == len(set(flat)), "a block belongs to two running requests"
        self.in_flight.append(plan)

    def run_slice(self, piece):
        name, device = piece.request_id, self.memory["device"]
        table = self.tables.setdefault(name, [])
        if piece.block_ids:
            table[piece.block_start :] = piece.block_ids
        end = piece.start + piece.num_tokens
        assert piece.num_tokens >= 1
        assert end <= self.known[name]
        assert piece.samples == (end == self.known[name])
        assert len(table) * BLOCK_SIZE >= end
        assert 0 not in table

        def slot(position):
            return table[position // BLOCK_SIZE], position % BLOCK_SIZE

        for position in range(piece.start):
            assert device.get(slot(position)) == (name, position), "the KV of a token is lost"
        for position in range(piece.start, end):
            device[slot(position)] = (name, position)

    def run_copy(self, copy):
        pools = ("device", "host") if copy.direction == "swap_out" else ("host", "device")
        source, target = (self.memory[pool] for pool in pools)
        for here, there in zip(copy.source_ids, copy.target_ids, strict=True):
            assert here
            assert there
            for offset in range(BLOCK_SIZE):
                target[there, offset] = source.get((here, offset))

    @rule(
        prompt=st.integers(1, 60),
        output=st.integers(1, 30),
        unused=st.sampled_from([0, 0, 7]),
        received=st.sampled_from([0, 0, 0, 5]),
        priority=st.sampled_from([0, 0, -1, 2]),
    )
    def arrive(self, prompt, output, unused, received, priority):
        """Some are resumed (`received`), some end before their `max_tokens` (`unused`)."""
        received = min(received, output - 1)
        max_tokens = output + unused
        if self.scheduler.refusal(prompt, max_tokens):
            return
        name = RequestId(f"r{self.count}")
        self.count += 1
        self.left[name], self.known[name] = output - received, prompt + received
        oracle = output if self.policy == "srpt" else None
        self.tell(Arrived(name, prompt, max_tokens, received, priority, oracle))

    @precondition(lambda self: self.left)
    @rule(data=st.data())
    def abort(self, data):
        name = data.draw(st.sampled_from(sorted(self.left)))
        self.end(name)
        self.tell(Aborted(name))

    @precondition(lambda self: self.in_flight)
    @rule(elapsed=st.floats(0.1, 5.0))
    def finish_step(self, elapsed):
        self.now += elapsed
        plan = self.in_flight.pop(0)
        finished = []
        for piece in plan.batch:
            name = piece.request_id
            if name in self.left and piece.samples:
                self.known[name] += 1
                self.left[name] -= 1
                if not self.left[name]:
                    finished.append(name)
                    self.end(name)
        self.tell(StepDone(plan.step_id, elapsed, tuple(finished)))

    @precondition(lambda self: self.copying)
    @rule(data=st.data())
    def finish_copy(self, data):
        """In any order, and read and written at the last moment."""
        copy = data.draw(st.sampled_from(self.copying))
        self.now += 0.1
        self.finish_this_copy(copy)

    def finish_this_copy(self, copy):
        self.copying.remove(copy)
        if copy.precedes_step is None:
            self.run_copy(copy)
        self.tell(CopyDone(copy.copy_id))

    @rule()
    def lose_workers(self):
        self.in_flight.clear()
        self.copying.clear()
        self.tables.clear()
        self.memory = {"device": {}, "host": {}}
        self.tell(WorkersLost())

    @rule(seconds=st.floats(0.1, 10.0))
    def wait(self, seconds):
        self.now += seconds
        self.tell()

    def end(self, name):
        assert name not in self.ended, "a request ended twice"
        self.ended.add(name)
        del self.left[name]

    @invariant()
    def state_is_consistent(self):
        if hasattr(self, "scheduler"):
            self.scheduler.check_integrity()
            assert self.scheduler.unfinished == len(self.left)
            assert sum(self.scheduler.level_lengths()) == len(self.left)
            assert self.scheduler.steps_in_flight == len(self.in_flight)
            assert not self.left or self.in_flight or self.copying, "work is left, nothing runs"

    def teardown(self):
        """Everything still finishes, and all memory comes back."""
        if not hasattr(self, "scheduler"):
            return
        for _ in range(5000):
            if self.copying:
                self.finish_this_copy(self.copying[0])
            elif self.in_flight:
                self.finish_step(1.0)
            else:
                break
        assert not self.left, "a request never finishes"
        assert self.scheduler.memory.device.free_count == BLOCKS - 1
        assert self.scheduler.memory.host.free_count == max(self.host_blocks - 1, 0)


POLICIES = ("skip_join_mlfq", "mlfq", "fcfs", "fixed_priority", "srpt")
STRATEGIES = ("proactive", "reactive", "recompute", "none")


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("policy", POLICIES)
def test_properties(policy, strategy):
    machine = type("Machine", (SchedulerMachine,), {"policy": policy, "strategy": strategy})
    machine.TestCase.settings = settings(
        max_examples=100 if policy == "skip_join_mlfq" else 40,
        stateful_step_count=60,
        deadline=None,
        phases=[Phase.explicit, Phase.reuse, Phase.generate],  # shrinking takes minutes
        suppress_health_check=list(HealthCheck),
    )
    machine.TestCase().runTest()
