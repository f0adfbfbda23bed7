"""Who leaves the device first and who comes back first, told from the plans alone."""

from __future__ import annotations

import pytest
from fixed_costs import Driver, arrived, make_scheduler, names

from fastserve_mega.plan import BlockCopy, CopyDirection, Plan
from fastserve_mega.scheduling.events import CopyDone, Event, StepDone
from fastserve_mega.system.config import SwapConfig

STEP_S = 0.01


class Ranks:
    """Executes plans at once, and notes whose blocks each copy moves."""

    def __init__(self, scheduler, now: float) -> None:
        self.scheduler = scheduler
        self.now = now
        self.left: list[str] = []
        self.returned: list[str] = []
        self._tables: dict[str, list[int]] = {}
        self._hosted: dict[int, str] = {}
        """Host block to the request whose KV it holds."""
        self._done: list[Event] = []

    def step(self, *events: Event, elapsed_s: float = STEP_S, ends: tuple[str, ...] = ()) -> None:
        """Plan a step; with the next one it is told to have taken `elapsed_s`."""
        plan = self.scheduler.step(self.now, [*self._done, *events])
        self.scheduler.check_integrity()
        self._done = []
        if plan is not None:
            self._execute(plan, elapsed_s, ends)

    def _execute(self, plan: Plan, elapsed_s: float, ends: tuple[str, ...]) -> None:
        for name in plan.released:
            del self._tables[name]
        for copy in plan.copies:
            self._move(copy)
            self._done.append(CopyDone(copy.copy_id))
        for piece in plan.batch:
            table = self._tables.setdefault(piece.request_id, [])
            if piece.block_ids:
                table[piece.block_start :] = piece.block_ids
        if plan.batch:
            self.now += elapsed_s
            finished = tuple(p.request_id for p in plan.batch if p.request_id in ends)
            self._done.append(StepDone(plan.step_id, elapsed_s, finished))

    def _move(self, copy: BlockCopy) -> None:
        if copy.direction is CopyDirection.SWAP_OUT:
            (owner,) = (n for n, table in self._tables.items() if copy.source_ids[0] in table)
            self.left.append(owner)
            self._hosted.update(dict.fromkeys(copy.target_ids, owner))
            del self._tables[owner]
        else:
            self.returned.append(self._hosted[copy.source_ids[0]])


@pytest.fixture
def ranks():
    """Two requests on the device whose ENST and whose priority disagree, seen at 22 s.

    "starving" joined level 5 (170 tokens, 17 s) and waits since 17 s; with a limit of 10 s it is
    promoted in 5 s. "idle" joined level 3 (50 tokens, 5 s) and has just run: it is of higher
    priority, but each newcomer in Q1 takes 1 + 2 + 4 s to come down to its level, so it is
    expected to run in 7 s.
    """

    def make(strategy: str) -> Ranks:
        swap = SwapConfig(strategy=strategy, write_through_blocks=0)
        scheduler = make_scheduler(
            device_blocks=62, host_blocks=100, max_batch_size=1, starvation_limit_s=10.0, swap=swap
        )
        ranks = Ranks(scheduler, 0.0)
        ranks.step(arrived("starving", 170), elapsed_s=17.0)
        ranks.step(arrived("idle", 50), elapsed_s=5.0)
        assert (ranks.now, scheduler.memory.device.free_count) == (22.0, 61 - 43 - 13)
        return ranks

    return make


@pytest.mark.parametrize("strategy", ["proactive", "reactive"])
def test_enst_and_not_queue_order_chooses_what_is_swapped_out(ranks, strategy):
    ranks = ranks(strategy)
    ranks.step(arrived("new", 24, priority=-9))  # 6 blocks of 5 free: level 0
    assert ranks.left == ["idle"]


def test_enst_and_not_queue_order_chooses_what_is_swapped_in_first(ranks):
    ranks = ranks("proactive")
    # Level 0 as well: needs all the memory, and then gives it back.
    large, small = arrived("large", 220, priority=-9), arrived("small", 10)
    ranks.step(large, small, ends=("large",))
    while len(ranks.returned) < 2:
        assert ranks.now < 30
        ranks.step(ends=("large",))
    assert ranks.left[:2] == ["idle", "starving"]
    assert ranks.returned[:2] == ["starving", "idle"]


def test_all_who_need_a_block_share_what_one_preemption_frees():
    swap = SwapConfig(strategy="proactive", write_through_blocks=0)
    scheduler = make_scheduler(policy="fcfs", device_blocks=14, host_blocks=14, swap=swap)
    driver = Driver(scheduler, dict.fromkeys("abcd", 20))
    driver.step([arrived("a", 8), arrived("b", 8), arrived("c", 8), arrived("d", 15)])
    while names(driver.step()):
        assert driver.now < 20
    assert scheduler.memory.swapper.preemptions == 1  # d leaves with four blocks
    assert names(driver.step()) == ["a", "b", "c"]


def test_the_host_has_no_room_where_kv_still_comes_back_from(ranks):
    ranks = ranks("proactive")
    memory = ranks.scheduler.memory
    large = arrived("large", 220, priority=-9)
    ranks.step(large, ends=("large",))
    while not ranks.returned:
        ranks.step(ends=("large",))
    assert memory.host.free_count < memory.host.capacity - memory.swapper.num_swapped_blocks
    assert memory.swapper.host_room == memory.host.free_count
