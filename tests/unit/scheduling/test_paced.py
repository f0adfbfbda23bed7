"""The policy `paced`: who is urgent, who is started, and that nobody waits for ever."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import msgspec
import pytest
from fixed_costs import FixedCosts, arrived, names
from hypothesis import given, settings
from hypothesis import strategies as st

from fastserve_mega.plan import Plan
from fastserve_mega.scheduling.events import CopyDone, Event, StepDone, WorkersLost
from fastserve_mega.scheduling.kv.pool import PoolSizes
from fastserve_mega.scheduling.policies.readers import Standing
from fastserve_mega.scheduling.scheduler import Scheduler
from fastserve_mega.system.config import PacedConfig, SchedulerConfig, SwapConfig

STEP_S = 0.02


class QuickCosts(FixedCosts):
    """A decode step takes 20 ms whatever the batch; a prefill 1 ms a token."""

    def __init__(self, step_s: float = STEP_S) -> None:
        self._step_s = step_s

    def prefill_s(self, tokens: int) -> float:
        return tokens / 1000

    def decode_s(self, batch: int, context: int) -> float:
        return self._step_s


class Readers:
    """Drives a scheduler step by step, and notes when each request got its tokens."""

    def __init__(
        self, *, step_s: float = STEP_S, batch: int = 2, device_blocks: int = 10_000, **paced: float
    ) -> None:
        self.now = 0.0
        self.scheduler = Scheduler(
            SchedulerConfig(
                policy="paced",
                max_batch_size=batch,
                max_batch_tokens=200,
                paced=PacedConfig(**paced),
            ),
            QuickCosts(step_s),
            PoolSizes(device_blocks, 10_000, 4),
            swap=SwapConfig(strategy="proactive"),
        )
        self.plans: list[Plan] = []
        self.begun: list[str] = []
        self.token_times: dict[str, list[float]] = {}
        self._step_s = step_s
        self._left: dict[str, int] = {}
        self._done: list[Event] = []

    def step(self, *requests: tuple[str, int, int], **rest: Any) -> list[str]:
        """Let requests arrive (name, prompt, answer) and run a step; return who takes part."""
        events: list[Event] = [arrived(name, prompt, 5000, **rest) for name, prompt, _ in requests]
        self._left |= {name: answer for name, _, answer in requests}
        plan = self.scheduler.step(self.now, [*self._done, *events])
        self.scheduler.check_integrity()
        self._done = []
        if plan is None:
            self.now += self._step_s
            return []
        self.plans.append(plan)
        prefill_s = sum(each.num_tokens for each in plan.batch if each.num_tokens > 1) / 1000
        elapsed_s = self._step_s + prefill_s
        self.now += elapsed_s
        yielded = [each.request_id for each in plan.batch if each.samples]
        for name in yielded:
            self._left[name] -= 1
            if name not in self.token_times:
                self.begun.append(name)
            self.token_times.setdefault(name, []).append(self.now)
        finished = tuple(name for name in yielded if not self._left[name])
        self._done = [StepDone(plan.step_id, elapsed_s, finished)] if plan.batch else []
        self._done += [CopyDone(copy.copy_id) for copy in plan.copies]
        return names(plan)

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.step()

    def lose_workers(self) -> None:
        """Let all KV be gone, and the step that is under way."""
        self._done = [WorkersLost()]

    def run_until_idle(self) -> None:
        for _ in range(20_000):
            if not self.step() and not self.scheduler.unfinished:
                return
        raise AssertionError(f"{self.scheduler.unfinished} requests are never finished")

    def longest_gaps(self) -> list[float]:
        """Return the longest time between two tokens of each answer."""
        return [max(b - a for a, b in pairwise(times)) for times in self.token_times.values()]

    def level(self, name: str) -> int:
        return self.scheduler.find(name).queue.level


def test_an_answer_ahead_of_its_reader_pauses_for_a_new_one():
    readers = Readers(batch=1)
    readers.step(("old", 100, 500))
    readers.run(20)
    assert readers.level("old") == Standing.AHEAD
    assert readers.step(("new", 100, 500)) == ["new"]


def test_more_readers_than_places_in_a_batch_are_all_served_at_reading_speed():
    readers = Readers(batch=2)  # 100 tokens/s, and a reader takes 10 to 12
    readers.step(*[(f"r{index}", 20, 60) for index in range(7)])
    readers.run_until_idle()
    for times in readers.token_times.values():
        assert times[0] <= 1.0
        assert (times[-1] - times[0]) / 59 <= 0.1
    assert max(readers.longest_gaps()) <= 0.4


def test_who_cannot_be_in_time_comes_after_those_who_can():
    readers = Readers(batch=4)
    readers.step(("long", 3000, 5), ("short", 300, 5), ("other", 300, 5))
    readers.run_until_idle()
    assert readers.begun == ["short", "other", "long"]
    assert readers.token_times["other"][0] <= 1.0
    assert readers.token_times["long"][0] > 3.0


def test_no_more_are_started_than_can_be_served_in_time():
    readers = Readers(batch=1)  # 50 tokens/s: four readers at 10 tokens/s, and some spare
    readers.step(*[(f"r{index:02}", 10, 100) for index in range(12)])
    readers.run(100)
    assert len(readers.begun) == 4
    readers.run_until_idle()
    in_time = [times for times in readers.token_times.values() if times[0] <= 1.0]
    assert len(in_time) == 4
    assert all((times[-1] - times[0]) / 99 <= 0.1 for times in in_time)


def test_no_more_are_started_than_can_be_served_in_turns_by_what_the_device_holds():
    readers = Readers(batch=16, device_blocks=120)  # two or three answers of 55 blocks in the end
    readers.step(*[(f"r{index:02}", 40, 180) for index in range(30)])
    readers.run(150)
    assert 4 <= len(readers.begun) <= 16
    readers.run_until_idle()
    assert len(readers.begun) == 30


def test_nobody_is_started_while_a_reader_waits_for_longer_than_was_promised():
    readers = Readers(batch=8)
    readers.step(*[(f"r{index}", 600, 200) for index in range(3)])
    readers.run(12)
    assert len(readers.begun) == 3
    readers.lose_workers()  # the prompts are read again, in nine steps of 0.22 s
    readers.run(7)
    readers.step(("new", 10, 5))
    assert readers.level("new") == Standing.LATE
    readers.run(4)
    assert readers.begun[3:] == ["new"]


def test_a_long_answer_is_given_up_for_short_ones_and_goes_on_after_them():
    readers = Readers(batch=1)
    readers.step(("long", 300, 1500))
    for number in range(600):
        readers.step(*([(f"s{number:03}", 4, 8)] if number % 5 == 0 else []))  # too many
    short = [times for name, times in readers.token_times.items() if name != "long"]
    assert sum((times[-1] - times[0]) / 7 <= 0.1 for times in short) > 0.9 * len(short)
    assert len(readers.token_times["long"]) < 200
    readers.run_until_idle()
    times = readers.token_times["long"]
    assert len(times) == 1500
    assert max(after - before for before, after in pairwise(times)) <= 5.5


def test_answers_take_turns_when_the_device_holds_fewer_than_a_step_takes():
    readers = Readers(batch=4, device_blocks=60)
    readers.step(*[(f"r{index}", 40, 180) for index in range(4)])  # 55 blocks each in the end
    readers.run_until_idle()
    first_end = min(times[-1] for times in readers.token_times.values())
    assert all(times[0] < first_end for times in readers.token_times.values())
    # 2.4 to 3.5 s, by which of them happens to be estimated at a little less work.
    assert max(readers.longest_gaps()) <= 3.5


@pytest.mark.parametrize(
    ("requests", "blocks", "least_s", "most_s"), [(11, 500, 0.3, 0.5), (4, 60, 1.0, 2.5)]
)
def test_the_fewer_are_on_the_host_the_sooner_they_come_back(requests, blocks, least_s, most_s):
    # Readers so slow that they never wait: all pauses are planned ones.
    readers = Readers(batch=16, device_blocks=blocks, tokens_per_s=1.0, tpot_s=1.0)
    readers.step(*[(f"r{index:02}", 40, 180) for index in range(requests)])
    readers.run_until_idle()
    assert len({copy.copy_id for plan in readers.plans for copy in plan.copies}) > 4
    assert least_s < max(readers.longest_gaps()) <= most_s


@pytest.mark.parametrize("step_s", [STEP_S, 0.5])
def test_nobody_waits_for_ever_behind_those_with_less_work(step_s):
    """Whoever has starved comes after those who starved before: they have a tenth of the time."""
    readers = Readers(batch=1, step_s=step_s, patience=0.1)
    readers.step(("first", 4, 2), ("huge", 1500, 20))
    starves_s = 1.0 + 0.1 * (1.5 + 128 * step_s)
    first_s = 128 * step_s  # as long as an answer is taken to be before any has ended
    before = number = 0
    while "huge" not in readers.begun:
        number += 1
        before += readers.now < starves_s
        readers.step((f"s{number:04}", 4, 2))  # a new one each step, and each needs two of them
        assert readers.now <= starves_s + 10 * (first_s + before * (0.004 + 4 * step_s)) + 15
    assert readers.now >= starves_s


@settings(max_examples=5)
@given(st.lists(st.integers(400, 800), min_size=1, max_size=2), st.integers(1, 2))
def test_the_starved_have_a_tenth_of_the_time_chunk_by_chunk(prompts, every):
    readers = Readers(batch=2, patience=0.1)
    huge = {f"huge{index}": prompt / 1000 for index, prompt in enumerate(sorted(prompts))}
    readers.step(*[(name, round(1000 * work_s), 2) for name, work_s in huge.items()])
    sent: dict[str, float] = {}
    for number in range(1000):
        if huge.keys() <= readers.token_times.keys():
            break
        short = f"s{number:04}"
        sent[short] = readers.now
        readers.step((short, 180, 1))  # of 200 tokens that a step has
        readers.run(every - 1)
    latest_s = 1.0 + 0.1 * (max(huge.values()) + 128 * STEP_S) + 1.0
    for name, work_s in huge.items():  # in the order of starving
        latest_s += 10 * work_s
        assert readers.token_times[name][0] <= latest_s
        latest_s += 10 * 128 * STEP_S / 2  # of its answer, as far as is known
    if every > 1:  # and not too many even without the starved
        assert all(readers.token_times[each][0] <= at + 1 for each, at in sent.items() if at > 1)


asks = st.tuples(
    st.integers(1, 400),
    st.integers(1, 60),
    st.integers(0, 6),
    st.sampled_from([None, 1, 30, 10**9]),
    st.sampled_from(["", "a", "b"]),
)


@settings(max_examples=15)
@given(st.lists(asks, max_size=15), st.sampled_from([STEP_S, 0.3]))
def test_every_request_is_finished_and_no_begun_answer_pauses_for_long(requests, step_s):
    readers = Readers(batch=2, step_s=step_s)
    for index, (prompt, answer, wait, hint, session) in enumerate(requests):
        rest = {"expected_output_tokens": hint, "session": session}
        readers.step((f"r{index}", prompt, answer), **rest)
        readers.run(wait)
    readers.run_until_idle()
    assert len(readers.token_times) == len(requests)
    slowest_s = step_s + 0.8  # of a step with two prompts
    for times in readers.token_times.values():
        gaps = [after - before for before, after in pairwise(times)]
        assert max(gaps, default=0.0) <= 5.0 + len(requests) * slowest_s


def test_the_same_requests_at_the_same_times_give_the_same_plans():
    runs = []
    for _ in range(2):
        readers = Readers(batch=3, device_blocks=60)
        for index in range(30):
            readers.step((f"r{index}", 10 + 7 * index % 50, 5 + 13 * index % 40))
        readers.run_until_idle()
        runs.append(msgspec.json.encode(readers.plans))
    assert runs[0] == runs[1]


def test_a_session_that_was_served_much_comes_after_others_where_places_are_few():
    readers = Readers(batch=1)  # four readers at 10 tokens/s
    for index in range(3):
        readers.step((f"agent{index}", 100, 60), session="agent", client="one")
        readers.run_until_idle()
    readers.step(*[(f"other{index}", 20, 400) for index in range(3)])
    readers.step(("agent3", 100, 60), session="agent", client="one")
    readers.step(("theirs", 100, 60), session="agent", client="another")
    readers.run_until_idle()
    assert readers.begun.index("theirs") < readers.begun.index("agent3")


def test_who_reads_slowly_still_gets_its_tokens_in_the_time_that_is_promised():
    readers = Readers(batch=1, tokens_per_s=4.0, tpot_s=0.1)
    readers.step(("first", 10, 400), ("second", 10, 40))
    while len(readers.token_times.get("second", ())) < 40:
        assert readers.now < 20
        readers.step()
    times = readers.token_times["second"]
    assert (times[-1] - times[0]) / 39 <= 0.1
