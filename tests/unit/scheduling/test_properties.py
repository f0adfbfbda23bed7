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
        window=st.integers(1, 3), host_blocks=st.sampled_from([0, 6, 60]), caches=st.booleans()
    )
    def start(self, window, host_blocks, caches):
        self.caches = caches
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
            "starvation_limit_s": 3.0,
            "max_passed_over": 3,
            "backfill_lookahead": 2,
        }
        self.scheduler = make_scheduler(**self.options)
        self.twin = make_scheduler(**self.options)  # gets the same events: same plans
        self.window = window
        self.now = 0.0
        self.count = 0
        self.left: dict[str, int] = {}
        self.content: dict[str, list[str]] = {}
        """The tokens of each request; a token's name tells all tokens before it as well."""
        self.past: list[list[str]] = []
        self.tables: dict[str, list[int]] = {}
        self.in_flight: list = []
        self.copying: list = []
        # What each slot of each pool holds: the name of a token.
        self.memory = {"device": {}, "host": {}}
        self.host_blocks = host_blocks
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
        """What the workers do, and check."""
        assert plan.batch or plan.copies
        for copy in plan.copies:
            if copy.precedes_step is None:
                self.copying.append(copy)
            else:
                assert copy.precedes_step == plan.step_id
                self.run_copy(copy)
                self.copying.append(copy)
        if not plan.batch:
            return
        self.dispatching = plan
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
        # Those whose last block is full write to the next one.
        written = [self.written(name) for name in busy & set(self.left) | seen]
        for index, blocks in enumerate(written):
            others = {block for i, table in enumerate(running) if i != index for block in table}
            assert not blocks & others, "a block that is written belongs to another request"
        self.in_flight.append(plan)

    def written(self, name):
        """The blocks that the slice of a running request writes to."""
        pieces = [piece for plan in self.in_flight for piece in plan.batch]
        pieces += self.dispatching.batch
        piece = next(piece for piece in reversed(pieces) if piece.request_id == name)
        end = piece.start + piece.num_tokens
        table = self.tables[name]
        return set(table[piece.start // BLOCK_SIZE : -(-end // BLOCK_SIZE)])

    def block_hashes(self, tokens):
        if not self.caches:
            return ()
        return tuple(tokens[BLOCK_SIZE - 1 :: BLOCK_SIZE])

    def run_slice(self, piece):
        name, device = piece.request_id, self.memory["device"]
        table = self.tables.setdefault(name, [])
        if piece.block_ids:
            table[piece.block_start :] = piece.block_ids
        end = piece.start + piece.num_tokens
        assert piece.num_tokens >= 1
        content = self.content[name]
        assert end <= len(content)
        assert piece.samples == (end == len(content))
        assert len(table) * BLOCK_SIZE >= end
        assert 0 not in table

        def slot(position):
            return table[position // BLOCK_SIZE], position % BLOCK_SIZE

        for position in range(piece.start):
            assert device.get(slot(position)) == content[position], "the KV of a token is lost"
        for position in range(piece.start, end):
            device[slot(position)] = content[position]

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
        priority=st.sampled_from([0, 0, -1, 2]),
        data=st.data(),
    )
    def arrive(self, prompt, output, priority, data):
        if self.scheduler.refusal(prompt, output):
            return
        name = RequestId(f"r{self.count}")
        self.count += 1
        tokens = [f"{name}:{position}" for position in range(prompt)]
        if self.past:  # begins like an earlier one, perhaps with some of its answer
            earlier = data.draw(st.sampled_from(self.past[-6:]))
            common = data.draw(st.integers(0, min(prompt, len(earlier))))
            tokens[:common] = earlier[:common]
        self.left[name], self.content[name] = output, tokens
        self.past.append(tokens)
        oracle = output if self.policy == "srpt" else None
        hashes = self.block_hashes(tokens)
        self.tell(
            Arrived(
                name,
                prompt,
                output,
                priority=priority,
                block_hashes=hashes,
                oracle_output_tokens=oracle,
            )
        )

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
        finished, filled = [], []
        for piece in plan.batch:
            name = piece.request_id
            if name in self.left and piece.samples:
                tokens = self.content[name]
                tokens.append(f"{name}:{len(tokens)}")
                if self.caches and not len(tokens) % BLOCK_SIZE:
                    filled.append((name, tokens[-1]))
                self.left[name] -= 1
                if not self.left[name]:
                    finished.append(name)
                    self.end(name)
        self.tell(StepDone(plan.step_id, elapsed, tuple(finished), tuple(filled)))

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


CASES = [
    *(("skip_join_mlfq", strategy) for strategy in ("proactive", "reactive", "recompute", "none")),
    *((policy, "proactive") for policy in ("mlfq", "fcfs", "fixed_priority", "srpt")),
    ("fcfs", "recompute"),
]


@pytest.mark.parametrize(("policy", "strategy"), CASES)
def test_properties(policy, strategy):
    machine = type("Machine", (SchedulerMachine,), {"policy": policy, "strategy": strategy})
    machine.TestCase.settings = settings(
        max_examples=100,
        stateful_step_count=60,
        deadline=None,
        phases=[Phase.explicit, Phase.reuse, Phase.generate],  # shrinking takes minutes
        suppress_health_check=list(HealthCheck),
    )
    machine.TestCase().runTest()
