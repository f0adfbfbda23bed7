"""What must hold for every policy after any sequence of events."""

import json
from collections import Counter
from pathlib import Path

import pytest
from fixed_costs import make_scheduler
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from plain import make_plain
from rank_memory import BLOCK_SIZE, RankMemory

from fastserve_mega.scheduling.events import Aborted, Arrived, CopyDone, StepDone, WorkersLost
from fastserve_mega.system.config import SwapConfig
from fastserve_mega.types import BACKGROUND_PRIORITY, RequestId

BLOCKS = 24
BATCH_TOKENS = 24


class SchedulerMachine(RuleBasedStateMachine):
    """Random events, and a model of what each request holds."""

    policy: str
    strategy: str

    @initialize(
        window=st.integers(1, 3),
        host_blocks=st.sampled_from([60, 60, 25, 25, 6, 1, 0]),
        starvation_limit_s=st.sampled_from([3.0, 3.0, None]),
        batch=st.sampled_from([1, 2, 4]),
        copies_each_step=st.sampled_from([0.1, 1.0, 5.0]),
        caches=st.booleans(),
        admission=st.sampled_from(["greedy", "projected"]),
        decode_s=st.sampled_from([1.0, 0.02]),
        grows_ahead=st.booleans(),
    )
    def start(  # noqa: PLR0917 - drawn by name
        self,
        window,
        host_blocks,
        starvation_limit_s,
        batch,
        copies_each_step,
        caches,
        admission,
        decode_s=1.0,
        grows_ahead=False,
    ):
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
            "grows_ahead": grows_ahead,
            "admission": admission,
            "decode_s": decode_s,
            "max_batch_size": batch,
            "max_batch_tokens": BATCH_TOKENS,
            "starvation_limit_s": starvation_limit_s and starvation_limit_s * decode_s,
            "max_passed_over": 3,
            "backfill_lookahead": 2,
        }
        self.scheduler = make_scheduler(**self.options)
        self.plain = make_plain(make_scheduler(**self.options))  # the same events: same plans
        self.window = window
        self.now, self.count = 0.0, 0
        # By key, "name#use": a name may be used again as soon as its request has ended.
        self.left: dict[str, int] = {}
        self.content: dict[str, list[str]] = {}
        """The tokens of each request; a token's name tells all tokens before it as well."""
        self.past: list[list[str]] = []
        self.uses: Counter[str] = Counter()
        self.ended: Counter[str] = Counter()
        self.released: Counter[str] = Counter()
        self.in_flight: list = []  # (plan, keys of its batch)
        self.copying: list = []  # (copy, what its source held at its start)
        self.memory = RankMemory()
        self.host_blocks = host_blocks
        self.batch = batch
        self.copies_each_step, self.decode_s = copies_each_step, decode_s
        self.next_step_id = 0

    def key(self, name):
        """Of the latest request of this name."""
        return f"{name}#{self.uses[name]}"

    def tell(self, *events):
        pending = list(events)
        while True:
            plan = self.scheduler.step(self.now, pending)
            assert plan == self.plain.step(self.now, pending)
            pending = []
            if plan is None:
                break
            self.take(plan)

    def take(self, plan):
        """What the workers do, and check."""
        assert plan.batch or plan.copies
        assert plan.step_id == self.next_step_id
        self.next_step_id += 1
        self.released.update(plan.released)
        assert self.released <= self.ended, "released before its end, or twice"
        for copy in plan.copies:
            assert copy.precedes_step in (None, plan.step_id)
            self.memory.run_copy(copy)
            self.copying.append((copy, self.memory.held_by_source(copy)))
        if not plan.batch:
            return
        busy = {key for _, keys in self.in_flight for key in keys}
        assert len(plan.batch) <= self.batch
        assert plan.num_tokens <= BATCH_TOKENS
        assert len(self.in_flight) < self.window
        seen = [self.key(piece.request_id) for piece in plan.batch]
        assert len(set(seen)) == len(seen)
        for key, piece in zip(seen, plan.batch, strict=True):
            assert key in self.left, "an ended request was scheduled"
            assert key not in busy
            self.memory.run_slice(key, piece, self.content[key])
        self.in_flight.append((plan, seen))
        self.memory.check_written_blocks(self.in_flight)

    def block_hashes(self, tokens):
        return tuple(tokens[BLOCK_SIZE - 1 :: BLOCK_SIZE]) if self.caches else ()

    @rule(
        prompt=st.one_of(st.integers(1, 12), st.integers(1, 60)),
        outputs=st.tuples(
            st.integers(1, 30), st.sampled_from([0, 0, 7]), st.sampled_from([0, 0, 0, 5])
        ),
        priority=st.sampled_from([0, 0, 0, -1, 2, BACKGROUND_PRIORITY]),
        again=st.sampled_from([None, None, None, "again0", "again1"]),
        begins_like=st.tuples(st.integers(1, 6), st.integers(0, 60)),
        client=st.sampled_from([("", 1.0), ("", 1.0), ("a", 1.0), ("a", 3.0), ("b", 0.1)]),
        says=st.sampled_from([(None, ""), (None, ""), (30, ""), (1, "s"), (None, "s")]),
    )
    def arrive(  # noqa: PLR0917 - drawn by name
        self, prompt, outputs, priority, again, begins_like, client, says=(None, "")
    ):
        """Some end before their `max_tokens` (`unused`), some are resumed (`received`).

        Args:
            says: the length that the client expects, and the session.
        """
        output, unused, received = outputs
        received = min(received, output - 1)
        max_tokens = output + unused
        if prompt + max_tokens > (BLOCKS - 1) * BLOCK_SIZE:
            return
        name = again
        if name is None or self.key(name) in self.left:
            self.count += 1
            name = f"r{self.count}"
        self.uses[name] += 1
        key = self.key(name)
        tokens = [f"{key}:{position}" for position in range(prompt + received)]
        earlier, common = begins_like  # an earlier prompt, perhaps with some of its answer
        if len(self.past) >= earlier:
            common = min(common, prompt)
            shared = self.past[-earlier][:common]
            tokens[: len(shared)] = shared
        self.past.append(tokens)
        self.left[key], self.content[key] = output - received, tokens
        oracle = output if self.policy == "srpt" else None
        hashes = self.block_hashes(tokens)
        sender = (*client, *says)
        self.tell(
            Arrived(
                RequestId(name), prompt, max_tokens, received, priority, hashes, oracle, *sender
            )
        )

    @precondition(lambda self: self.left)
    @rule(data=st.data(), happens=st.sampled_from([True, False, False]))
    def abort(self, data, happens):
        if happens:
            key = data.draw(st.sampled_from(sorted(self.left)))
            self.tell(Aborted(self.end(key)))

    @precondition(lambda self: self.in_flight or self.copying)
    @rule(choices=st.binary(min_size=1, max_size=40))
    def run(self, choices):
        """Steps in their order and copies in any; each byte says which is next and how long."""
        for choice in choices:
            if self.copying and (choice % 2 or not self.in_flight):
                self.now += 0.1 * self.decode_s
                self.finish_copy(choice % len(self.copying))
            elif self.in_flight:
                self.finish_step(0.1 + choice / 64)
            self.state_is_consistent()

    def finish_step(self, decodes):
        """The first of those in flight ends; it took as long as so many decode steps."""
        elapsed = decodes * self.decode_s
        self.now += elapsed
        plan, keys = self.in_flight.pop(0)
        finished, filled = [], []
        for key, piece in zip(keys, plan.batch, strict=True):
            if key in self.left and piece.samples:
                tokens = self.content[key]
                tokens.append(f"{key}:{len(tokens)}")
                if self.caches and not len(tokens) % BLOCK_SIZE:
                    filled.append((piece.request_id, tokens[-1]))
                self.left[key] -= 1
                if not self.left[key]:
                    finished.append(self.end(key))
        self.tell(StepDone(plan.step_id, elapsed, tuple(finished), tuple(filled)))

    def finish_copy(self, index):
        copy, held = self.copying.pop(index)
        if copy.precedes_step is None:
            assert self.memory.held_by_source(copy) == held, (
                "a block was written while it was copied"
            )
            self.memory.run_copy(copy)
        self.tell(CopyDone(copy.copy_id))

    @rule(happens=st.sampled_from([True, *[False] * 19]))
    def lose_workers(self, happens):
        """Rarely: after it, there is no memory to run short of for a while."""
        if not happens:
            return
        self.in_flight.clear()
        self.copying.clear()
        self.memory.clear()
        self.tell(WorkersLost())

    @rule(decodes=st.floats(0.1, 10.0))
    def wait(self, decodes):
        self.now += decodes * self.decode_s
        self.tell()

    def end(self, key):
        """It has ended, and only now: returns its name."""
        del self.left[key]
        name = RequestId(key.split("#")[0])
        self.ended[name] += 1
        return name

    @invariant()
    def state_is_consistent(self):
        if hasattr(self, "scheduler"):
            self.scheduler.check_integrity()
            assert self.scheduler.unfinished == len(self.left)
            assert sum(self.scheduler.place_lengths()) == len(self.left)
            assert self.scheduler.view(0.0, 0).steps_in_flight == len(self.in_flight)
            assert not self.left or self.in_flight or self.copying, "work is left, nothing runs"

    def teardown(self):
        """Everything still finishes, and all memory comes back."""
        if not hasattr(self, "scheduler"):
            return
        copies_due = 0.0
        for _ in range(10_000):
            if self.copying and (copies_due >= 1 or not self.in_flight):
                copies_due = max(copies_due - 1, 0)
                self.finish_copy(0)
            elif self.in_flight:
                copies_due += self.copies_each_step
                self.finish_step(1.0)
            else:
                break
        assert not self.left, "a request never finishes"
        assert self.scheduler.memory.device.free_count == BLOCKS - 1
        assert self.scheduler.memory.host.free_count == max(self.host_blocks - 1, 0)


POLICIES = ("skip_join_mlfq", "paced", "mlfq", "fcfs", "fixed_priority", "srpt")
STRATEGIES = ("proactive", "reactive", "recompute", "none")


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("policy", POLICIES)
def test_properties(policy, strategy):
    machine = type("Machine", (SchedulerMachine,), {"policy": policy, "strategy": strategy})
    machine.TestCase.settings = settings(
        # Each example is a run of many events.
        max_examples=settings().max_examples // (4 if policy == "skip_join_mlfq" else 10),
        stateful_step_count=60,
        phases=[Phase.explicit, Phase.reuse, Phase.generate],  # shrinking takes minutes
    )
    machine.TestCase().runTest()


def test_those_on_the_host_come_back_though_their_clients_are_over_their_shares():
    """A run that an earlier version did not finish: it left room on the host to those behind."""
    machine = type("Machine", (SchedulerMachine,), {"policy": "mlfq", "strategy": "reactive"})()
    path = Path(__file__).with_name("two_clients_on_the_host.jsonl")
    for name, arguments in map(json.loads, path.read_text().splitlines()):
        getattr(machine, name)(**arguments)
        machine.state_is_consistent()
    machine.teardown()
