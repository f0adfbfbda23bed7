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

from fastserve_mega.scheduling.events import Aborted, Arrived, StepDone, WorkersLost
from fastserve_mega.types import RequestId

BLOCK_SIZE = 4
BLOCKS = 24
BATCH = 4
BATCH_TOKENS = 24


class SchedulerMachine(RuleBasedStateMachine):
    """Random events, and a model of what each request holds."""

    policy: str

    @initialize(window=st.integers(1, 3))
    def start(self, window):
        self.options = {
            "policy": self.policy, "device_blocks": BLOCKS, "block_size": BLOCK_SIZE,
            "window": window, "max_batch_size": BATCH, "max_batch_tokens": BATCH_TOKENS,
            "starvation_limit_s": 3.0, "max_passed_over": 3, "backfill_lookahead": 2,
        }  # fmt: skip
        self.scheduler = make_scheduler(**self.options)
        self.twin = make_scheduler(**self.options)  # gets the same events: same plans
        self.window = window
        self.now = 0.0
        self.count = 0
        self.left: dict[str, int] = {}
        self.computed: dict[str, int] = {}
        self.known: dict[str, int] = {}
        self.tables: dict[str, list[int]] = {}
        self.in_flight: list = []
        self.ended: set[str] = set()

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
        """What a worker would check."""
        busy = {piece.request_id for other in self.in_flight for piece in other.batch}
        assert 1 <= len(plan.batch) <= BATCH
        assert 1 <= plan.num_tokens <= BATCH_TOKENS
        assert len(self.in_flight) < self.window
        seen = set()
        for piece in plan.batch:
            name = piece.request_id
            assert name in self.left, "an ended request was scheduled"
            assert name not in busy | seen
            seen.add(name)
            table = self.tables.setdefault(name, [])
            if piece.block_ids:
                table[piece.block_start :] = piece.block_ids
            if piece.start == 0:
                self.computed[name] = 0
            assert piece.start == self.computed[name]
            end = piece.start + piece.num_tokens
            assert end <= self.known[name]
            assert piece.samples == (end == self.known[name])
            assert len(table) * BLOCK_SIZE >= end
            assert 0 not in table
            self.computed[name] = end
        running = [self.tables[name] for name in busy & set(self.left) | seen]
        flat = [block for table in running for block in table]
        assert len(flat) == len(set(flat)), "a block belongs to two running requests"
        self.in_flight.append(plan)

    @rule(
        prompt=st.integers(1, 60),
        output=st.integers(1, 30),
        priority=st.sampled_from([0, 0, -1, 2]),
    )
    def arrive(self, prompt, output, priority):
        if self.scheduler.refusal(prompt, output):
            return
        name = RequestId(f"r{self.count}")
        self.count += 1
        self.left[name], self.known[name] = output, prompt
        oracle = output if self.policy == "srpt" else None
        self.tell(Arrived(name, prompt, output, priority=priority, oracle_output_tokens=oracle))

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

    @rule()
    def lose_workers(self):
        self.in_flight.clear()
        self.tables.clear()
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
            assert not self.left or self.in_flight, "work is left and nothing runs"

    def teardown(self):
        """Everything still finishes, and all memory comes back."""
        if not hasattr(self, "scheduler"):
            return
        for _ in range(5000):
            if not self.in_flight:
                break
            self.finish_step(1.0)
        assert not self.left, "a request never finishes"
        assert self.scheduler.memory.pool.free_count == BLOCKS - 1


@pytest.mark.parametrize("policy", ["skip_join_mlfq", "mlfq", "fcfs", "fixed_priority", "srpt"])
def test_properties(policy):
    machine = type(f"Machine_{policy}", (SchedulerMachine,), {"policy": policy})
    machine.TestCase.settings = settings(
        max_examples=100,
        stateful_step_count=60,
        deadline=None,
        phases=[Phase.explicit, Phase.reuse, Phase.generate],  # shrinking takes minutes
        suppress_health_check=list(HealthCheck),
    )
    machine.TestCase().runTest()
