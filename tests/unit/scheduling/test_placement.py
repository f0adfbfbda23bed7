"""Which replica a request goes to, on schedulers with known costs."""

from types import SimpleNamespace

import pytest
from fixed_costs import FixedCosts, make_scheduler
from hypothesis import given
from hypothesis import strategies as st

from fastserve_mega.scheduling.events import Arrived, StepDone
from fastserve_mega.scheduling.kv.pool import BlockPool, PrefixCache
from fastserve_mega.scheduling.placement import ExpectedWork, Placement
from fastserve_mega.types import BlockHash


def make_schedulers(count):
    return [make_scheduler() for _ in range(count)]


def arrival(number, prompt_tokens=8, hashes=()):
    return Arrived(f"r{number}", prompt_tokens, max_tokens=16, block_hashes=hashes)


def place(placement, schedulers, arrived):
    replica = placement.choose(arrived)
    schedulers[replica].step(0.0, [arrived])
    placement.settle()
    return replica


def test_equal_requests_go_round():
    schedulers = make_schedulers(3)
    placement = Placement(schedulers)
    chosen = [place(placement, schedulers, arrival(i)) for i in range(6)]
    assert chosen == [0, 1, 2, 0, 1, 2]


def test_a_burst_is_spread_before_any_scheduler_has_heard_of_it():
    placement = Placement(make_schedulers(3))
    assert [placement.choose(arrival(i)) for i in range(6)] == [0, 1, 2, 0, 1, 2]


def test_prefills_that_wait_count_by_their_length():
    schedulers = make_schedulers(2)
    placement = Placement(schedulers)
    assert place(placement, schedulers, arrival(0, prompt_tokens=3_000)) == 0
    # All of these together are less work than the long prompt.
    chosen = [place(placement, schedulers, arrival(1 + i)) for i in range(4)]
    assert chosen == [1, 1, 1, 1]


def test_a_prefill_that_has_run_counts_no_more():
    schedulers = make_schedulers(2)
    busy = schedulers[0]
    work = ExpectedWork(busy)
    before = work.queued_prefill_s()
    plan = busy.step(0.0, [arrival(0, prompt_tokens=100)])
    waiting = work.queued_prefill_s()
    busy.step(1.0, [StepDone(plan.step_id, 1.0)])
    assert before == 0.0
    assert waiting - work.queued_prefill_s() == pytest.approx(FixedCosts().prefill_s(100))
    busy.check_integrity()


def test_a_conversation_stays_where_its_prefix_is_cached():
    schedulers = make_schedulers(2)
    placement = Placement(schedulers)
    hashes = tuple(f"{i:032x}" for i in range(20))
    first = arrival(0, prompt_tokens=81, hashes=hashes)
    plan = schedulers[1].step(0.0, [first])
    while plan:
        schedulers[1].step(1.0, [StepDone(plan.step_id, 1.0, finished=("r0",))])
        plan = schedulers[1].step(1.0)
    assert placement.choose(arrival(1, prompt_tokens=85, hashes=hashes)) == 1
    assert Placement(schedulers).choose(arrival(2, prompt_tokens=85)) == 0


def test_unless_the_other_replica_is_much_less_busy():
    schedulers = make_schedulers(2)
    hashes = tuple(f"{i:032x}" for i in range(20))
    plan = schedulers[1].step(0.0, [arrival(0, prompt_tokens=81, hashes=hashes)])
    assert plan
    schedulers[1].step(1.0, [StepDone(plan.step_id, 1.0, finished=("r0",))])
    schedulers[1].step(1.0, [arrival(10 + i, prompt_tokens=400) for i in range(8)])
    assert Placement(schedulers).choose(arrival(1, prompt_tokens=85, hashes=hashes)) == 0


def test_longer_answers_make_unfinished_requests_weigh_more():
    schedulers = make_schedulers(2)
    for i in range(6):
        schedulers[0].step(0.0, [arrival(i, prompt_tokens=1)])
    schedulers[1].step(0.0, [arrival(9, prompt_tokens=300)])
    short, long = Placement(schedulers), Placement(schedulers)
    for _ in range(50):
        short.observe_finish(1)
        long.observe_finish(2_000)
    assert short.choose(arrival(20)) == 0
    assert long.choose(arrival(20)) == 1


class Busy:
    """A scheduler by the three numbers that count."""

    def __init__(self, work_s, prefill_s, decode_s):
        self.work_s, self.prefill_s, self.decode_s = work_s, prefill_s, decode_s
        self.cost_model = SimpleNamespace(
            # A chunk is one token, and takes a second; an arrival is a longer prompt.
            prefill_s=lambda tokens: 1 if tokens == 1 else prefill_s,
            decode_s=lambda batch, output_tokens: decode_s * batch / output_tokens,
        )

    config = SimpleNamespace(max_batch_size=128, max_batch_tokens=1)
    memory = SimpleNamespace(prefix_cache=SimpleNamespace(tokens_of=len))
    unfinished = 0

    @property
    def num_unread_tokens(self):
        return self.work_s


TIMES = st.sampled_from([0, 1, 2, 5, 10, 30, 200])
# Whole numbers, and a weight that halves them: sums are the same in any order.
REPLICAS = st.lists(st.builds(Busy, TIMES, TIMES, TIMES), min_size=2, max_size=9)


def cost_s(replica):
    return replica.work_s + Placement.PREFILL_WEIGHT * replica.prefill_s


@given(REPLICAS)
def test_nowhere_does_a_request_cost_less(replicas):
    chosen = replicas[Placement(replicas).choose(arrival(0))]
    assert cost_s(chosen) == min(map(cost_s, replicas))


@given(REPLICAS)
def test_the_imbalance_is_bounded_by_the_prefill_that_is_saved(replicas):
    chosen = replicas[Placement(replicas).choose(arrival(0))]
    idlest = min(replicas, key=lambda each: each.work_s)
    saved_s = idlest.prefill_s - chosen.prefill_s
    assert chosen.work_s - idlest.work_s <= Placement.PREFILL_WEIGHT * max(saved_s, 0.0) + 1e-9


@given(REPLICAS, st.integers(1, 30))
def test_what_was_promised_in_a_turn_counts_as_if_it_had_arrived(replicas, count):
    at_once = Placement(replicas)
    burst = [at_once.choose(arrival(number)) for number in range(count)]
    one_by_one = Placement(replicas)
    for number in range(count):
        index = one_by_one.choose(arrival(number))
        one_by_one.settle()
        chosen = replicas[index]
        chosen.work_s += chosen.prefill_s + Placement.DECODE_WEIGHT * chosen.decode_s
        assert index == burst[number]


@given(REPLICAS, st.data())
def test_a_lost_replica_is_not_chosen_until_it_is_back(replicas, data):
    placement = Placement(replicas)
    lost = data.draw(st.sets(st.integers(0, len(replicas) - 1), max_size=len(replicas) - 1))
    for replica in lost:
        placement.lose(replica)
    assert placement.choose(arrival(0)) not in lost
    for replica in lost:
        placement.restore(replica)
    placement.settle()
    assert placement.choose(arrival(1)) == Placement(replicas).choose(arrival(1))


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 40))
def test_the_leading_blocks_in_either_pool_are_counted(device_blocks, host_blocks, others):
    hashes = [BlockHash(str(number)) for number in range(device_blocks + host_blocks + others)]
    device, host = BlockPool(64), BlockPool(64)
    for pool, known in (
        (device, hashes[:device_blocks]),
        (host, hashes[device_blocks : device_blocks + host_blocks]),
    ):
        for block, block_hash in zip(pool.allocate(len(known)), known, strict=True):
            pool.publish(block, block_hash)
    cache = PrefixCache(device, host, block_size=4)
    assert cache.tokens_of(hashes) == 4 * (device_blocks + host_blocks)
